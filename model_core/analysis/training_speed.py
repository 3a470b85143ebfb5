"""Times training: the same samples through this project's trainer, packed and not, and through anyone beside it.

In: contenders that train one epoch when asked; out: their rounds, alternating, and medians. Each contender's own
warm-up comes first and is long enough for the freeze checks, which look at a run's first three steps and never again.
It draws no data and prints nothing.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from model_core.analysis.flops import tower_flops
from model_core.analysis.training_memory import component_bytes, peak_bytes, reset_peak
from model_core.errors import TrainingMemoryError
from model_core.training.config import TrainConfig
from model_core.training.events import Event
from model_core.training.hooks import RunHooks
from model_core.training.trainer import DualVisionTrainer
from model_core.training.verify import STEPS_LOOKED_AT

Clock = Callable[[], float]


@dataclass(slots=True)
class TrainingRound:
    """One epoch. seconds: all of it by the clock. num_padded: tokens as the model was given them, padding included.

    data_wait_seconds: in which nothing trained because a batch was not there. flops: owed by model and mode, 0 where
    nobody counted. peak_bytes: held at most, less what only others held; None where it can't be known.
    """

    seconds: float = 0.0
    num_samples: int = 0
    num_tokens: int = 0
    num_padded: int = 0
    num_label_tokens: int = 0
    data_wait_seconds: float = 0.0
    flops: float = 0.0
    peak_bytes: int | None = None

    @property
    def figures(self) -> dict[str, float]:
        return {
            "samples_per_second": self.num_samples / self.seconds,
            "tokens_per_second": self.num_tokens / self.seconds,
            "label_tokens_per_second": self.num_label_tokens / self.seconds,
            "data_wait_ratio": self.data_wait_seconds / self.seconds,
            "padding_ratio": 1 - self.num_tokens / self.num_padded,
        }


class Contender(Protocol):
    """Something that trains. mode, kind: `full` and `packed`, for instance."""

    mode: str
    kind: str

    @property
    def held_bytes(self) -> int:
        """What it keeps between its rounds: the optimizer's state."""

    def warm_up(self) -> None:
        """A few steps that don't count."""

    def run(self) -> TrainingRound:
        """One epoch."""


class OurTrainer:
    """This project's trainer on one recipe; it stops after each epoch and goes on with the next."""

    def __init__(
        self, kind: str, model: Any, processor: Any, source: Any, config: TrainConfig, clock: Clock,
        *, peak_flops_per_second: float | None = None,
    ) -> None:  # fmt: skip
        self.kind, self.mode = kind, str(config.training_mode)
        self._clock, self._peak = clock, peak_flops_per_second
        hooks = RunHooks(
            listeners=(self._hear,), clock=clock, tower_flops=tower_flops, peak_flops_per_second=peak_flops_per_second
        )
        self._trainer = DualVisionTrainer(model, source, None, config, processor=processor, hooks=hooks, write=False)
        self._epoch_steps = source.num_steps(config.stages()[0], 0)
        self._left, self._round = 0, TrainingRound()

    @property
    def held_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._trainer.optimizer.state_tensors().values())

    def warm_up(self) -> None:
        epochs = -(-STEPS_LOOKED_AT[-1] // self._epoch_steps)
        self._train(epochs * self._epoch_steps)

    def run(self) -> TrainingRound:
        return self._train(self._epoch_steps)

    def component_bytes(self) -> dict[str, dict[str, int]]:
        """After its rounds: bytes by component."""
        return {name: found.to_json() for name, found in component_bytes(self._trainer).items()}

    def _train(self, num_steps: int) -> TrainingRound:
        trainer = self._trainer
        # The model is shared: whoever trained before may have left other parts of it trainable.
        trainer.table.apply(trainer.model)
        trainer.forward.set_freeze(trainer.table)
        self._left, self._round = num_steps, TrainingRound()
        device = trainer.forward.device
        reset_peak(device)
        begin = self._clock()
        trainer.train()
        _wait(device)
        self._round.seconds = self._clock() - begin
        self._round.peak_bytes = peak_bytes(device)
        return self._round

    def _hear(self, event: Event) -> None:
        if event.kind != "step":
            return
        data, found = event.data, self._round
        found.num_samples += data["num_samples"]
        found.num_tokens += data["num_tokens"]
        found.num_padded += data["num_tokens"]
        found.num_label_tokens += data["num_label_tokens"]
        found.data_wait_seconds += data["data_wait_seconds"]
        if data.get("mfu") is not None:
            found.flops += data["mfu"] * data["seconds"] * (self._peak or 0.0)
        self._left -= 1
        if not self._left:
            self._trainer.request_stop()


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender's rounds. memory: by component, where it is told. failure: why there are no rounds."""

    mode: str
    kind: str
    rounds: Sequence[TrainingRound]
    memory: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    failure: str | None = None

    def median(self, name: str) -> float:
        """Of a figure over the rounds, of which there must be one."""
        return statistics.median(one.figures[name] for one in self.rounds)

    def peak_bytes(self) -> int | None:
        known = [one.peak_bytes for one in self.rounds if one.peak_bytes is not None]
        return max(known) if known else None

    def utilisation(self, peak_flops_per_second: float | None) -> float | None:
        """MFU by the clock, data included; None where operations or the peak are not known."""
        if not peak_flops_per_second or not self.rounds or not all(one.flops for one in self.rounds):
            return None
        return statistics.median(one.flops / one.seconds / peak_flops_per_second for one in self.rounds)

    def ratio(self, other: Measured, name: str = "tokens_per_second") -> float | None:
        """This over the other, round by round; the median of those. None where one of them has no rounds."""
        if not self.rounds or not other.rounds:
            return None
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(mine.figures[name] / theirs.figures[name] for mine, theirs in pairs)

    def to_json(self) -> dict[str, Any]:
        names = self.rounds[0].figures if self.rounds else ()
        return {
            "mode": self.mode, "kind": self.kind, "rounds": [asdict(one) for one in self.rounds],
            "medians": {name: self.median(name) for name in names}, "peak_bytes": self.peak_bytes(),
            "memory": {name: dict(part) for name, part in self.memory.items()}, "failure": self.failure,
        }  # fmt: skip


def measure(makers: Sequence[Callable[[], Contender]], num_rounds: int) -> Iterator[Measured]:
    """Warm each up, then A B C A B C ...: whatever drifts on the machine falls on all alike."""
    contenders: list[Contender] = []
    for make in makers:
        contenders.append(make())
        contenders[-1].warm_up()
    rounds: dict[int, list[TrainingRound]] = {number: [] for number in range(len(contenders))}
    for turn in range(num_rounds * len(contenders)):
        number = turn % len(contenders)
        one = contenders[number].run()
        if one.peak_bytes is not None:
            one.peak_bytes -= sum(other.held_bytes for other in contenders if other is not contenders[number])
        rounds[number].append(one)
        if len(rounds[number]) == num_rounds:
            yield _measured(contenders[number], rounds[number])


def measure_apart(makers: Mapping[tuple[str, str], Callable[[], Contender]], num_rounds: int) -> Iterator[Measured]:
    """One after the other, each alone in memory, for models whose optimizers don't fit side by side.

    A contender that does not fit at all has no rounds, and says so.
    """
    for (mode, kind), make in makers.items():
        try:
            contender = make()
            contender.warm_up()
            yield _measured(contender, [contender.run() for _ in range(num_rounds)])
        except (TrainingMemoryError, torch.OutOfMemoryError):
            yield Measured(mode, kind, (), failure="out of memory")
        contender = None
        gc.collect()


def _measured(contender: Contender, rounds: Sequence[TrainingRound]) -> Measured:
    memory = contender.component_bytes() if isinstance(contender, OurTrainer) else {}
    return Measured(contender.mode, contender.kind, rounds, memory)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
