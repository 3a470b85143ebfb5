"""The dual vision model, its engine, its training and its analysis. No HTTP, no threads, no environment.

`from model_core import DualVisionEncoder` and its sisters are the one lazy import (PEP 562): types and errors can be
had without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_core.encoder import DualVisionEncoder
    from model_core.trainer import DualVisionTrainer
    from model_core.training.data.datasets import (
        CaptioningDataset,
        DualVisionDataset,
        MedicalVQADataset,
        VQADataset,
    )
    from model_core.training.data.multi import MultiDataset, create_dataset

__all__ = [
    "CaptioningDataset",
    "DualVisionDataset",
    "DualVisionEncoder",
    "DualVisionTrainer",
    "MedicalVQADataset",
    "MultiDataset",
    "VQADataset",
    "create_dataset",
]


def __getattr__(name: str) -> Any:
    if name == "DualVisionEncoder":
        from model_core.encoder import DualVisionEncoder

        return DualVisionEncoder
    if name == "DualVisionTrainer":
        from model_core.trainer import DualVisionTrainer

        return DualVisionTrainer
    if name in ("MultiDataset", "create_dataset"):
        from model_core.training.data import multi

        return getattr(multi, name)
    if name in __all__:
        from model_core.training.data import datasets

        return getattr(datasets, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
