"""Which process of a run this one is: what the functions that train and that deal out packs take as an argument.

It knows no launcher and reads no environment: whoever starts a run says who it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ProcessContext:
    """rank: 0 to world_size - 1."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                "this process is none of its run's",
                value=f"rank {self.rank} of {self.world_size}",
                allowed="a rank from 0 to world_size - 1",
                fix="Start every process with its own rank and the same world_size",
                param="context",
            )


def require_one_process(context: ProcessContext | None) -> None:
    """Raises ConfigError: the run is one of several processes, which the trainer does not join."""
    if context is not None and context.world_size != 1:
        raise ConfigError(
            "this trainer runs in one process", value=f"world_size {context.world_size}", allowed="world_size 1",
            fix="Start one process, without a context", param="context",
        )  # fmt: skip
