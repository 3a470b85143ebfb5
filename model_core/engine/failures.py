"""What an exception inside the engine means to the request that met it."""

from __future__ import annotations

import torch

from model_core.errors import DualVisionError, OutOfDeviceMemoryError, RequestFailedError

#: What one row may do wrong without taking the others with it.
ROW_ERRORS = (RuntimeError, ValueError, MemoryError, DualVisionError)


def told(error: Exception) -> DualVisionError:
    """The error that the request's client may see: one of ours, without the library's own words."""
    if isinstance(error, DualVisionError):
        return error
    if _is_memory(error):
        return OutOfDeviceMemoryError("this request does not fit the memory", fix="Send smaller images or less text")
    return RequestFailedError("the model failed on this request", value=type(error).__name__)


def make_room(error: Exception) -> None:
    """Before a smaller try: what the larger one has left behind in torch's cache may be in its way."""
    if _is_memory(error) and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_memory(error: Exception) -> bool:
    # On CPUs torch's allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
