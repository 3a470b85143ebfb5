"""What makes engines of published versions; the composition root has the one with torch, tests have theirs.

In: a version's folder and its share of the memory. Out: an engine beside the base's, and what it takes. It refuses to
know which models there are and who uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model_core.types import Engine
from service.errors import ModelTooLargeError

#: A variant's keys and values get so much of the budget, so that several fit beside each other.
KV_SHARE = 8


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """num_bytes: what it takes beside the base: own weights, copies of them, keys and values."""

    engine: Engine
    num_bytes: int


class VariantLoader(Protocol):
    """Makes engines of versions. Called in one thread, while the base's engine is at work in another."""

    def budget_bytes(self) -> int:
        """For all variants together; the base is loaded."""

    def load(self, folder: Path, model_id: str, kv_cache_bytes: int) -> LoadedEngine:
        """Raises CheckpointError, ModelTooLargeError."""


class NoVariants:
    """A `VariantLoader` for servers that serve their base alone."""

    def budget_bytes(self) -> int:
        return 0

    def load(self, folder: Path, model_id: str, kv_cache_bytes: int) -> LoadedEngine:  # noqa: ARG002
        raise ModelTooLargeError("this server loads no variants", value=model_id)
