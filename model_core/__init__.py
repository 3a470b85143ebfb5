"""The dual vision model, its engine, its training and its analysis. No HTTP, no threads, no environment.

`from model_core import DualVisionEncoder` is the one lazy import (PEP 562): types and errors can be had
without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_core.encoder import DualVisionEncoder

__all__ = ["DualVisionEncoder"]


def __getattr__(name: str) -> Any:
    if name == "DualVisionEncoder":
        from model_core.encoder import DualVisionEncoder

        return DualVisionEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
