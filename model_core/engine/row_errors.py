"""What may go wrong for one request without taking the others with it, and what its client is told of it."""

from __future__ import annotations

import torch

from model_core.errors import DualVisionError, OutOfDeviceMemoryError, RequestFailedError

#: What one row may do wrong without taking the others with it.
ROW_ERRORS = (RuntimeError, ValueError, MemoryError, DualVisionError)


def told(error: Exception) -> DualVisionError:
    """The error as a client sees it; what lies behind it is its cause."""
    if isinstance(error, DualVisionError):
        return error
    shown: DualVisionError = RequestFailedError("the model failed on this request", value=type(error).__name__)
    if is_memory(error):
        shown = OutOfDeviceMemoryError("this request does not fit the memory", fix="Send smaller images or less text")
    shown.__cause__ = error
    return shown


def make_room(error: Exception) -> None:
    """Before a smaller try: what the larger one has left behind in torch's cache may be in its way."""
    if is_memory(error) and torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_memory(error: Exception) -> bool:
    """Was there not enough of it?"""
    # On CPUs torch's allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
