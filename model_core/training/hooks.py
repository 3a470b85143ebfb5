"""What the world gives to a run: listeners, a clock, generated answers, the machine's peak.

All of it is optional, and none of it changes a weight, but for `val_accuracy`, which early stopping may watch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model_core.training.cost import TowerFlops
from model_core.training.events import Listener
from model_core.types import Arm, ChatMessage

Clock = Callable[[], float]
#: Conversations, each ending before the assistant's turn, an arm, most tokens -> what the model says there.
Answer = Callable[[Sequence[Sequence[ChatMessage]], Arm, int], list[str]]


def no_clock() -> float:
    """For runs whose durations nobody asks for."""
    return 0.0


@dataclass(frozen=True, slots=True)
class RunHooks:
    """listeners: are told every event. clock: seconds that only grow; without one durations are 0 and rates null.

    answer: for `evaluation.num_answers`. tower_flops, peak_flops_per_second: for MFU in the step's event; without both
    there is none. `model_core.DualVisionTrainer` fills in what is left out.
    """

    listeners: tuple[Listener, ...] = ()
    clock: Clock = no_clock
    answer: Answer | None = None
    tower_flops: TowerFlops | None = None
    peak_flops_per_second: float | None = None
