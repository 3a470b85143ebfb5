"""The step after the one that runs, launched before the host has read what that one chose.

Without it a GPU waits at every token while the host reads ids, makes text and events of them and packs the next step.
Where the next step is sure to be the same rows again, whatever their tokens, its token ids can stay on the device: it
is launched behind the running one, and the host does its work on the one while the other runs. A row that turns out
to have ended flies along for that one step, and its token is dropped.

Only greedy rows fly: any other choice needs the host. Nothing of a flight waits in a queue of its own: all of it is
in the device's one stream, so whatever is launched later, over blocks that a dropped row gave back, runs later too.
It knows no text, no events and no ends; who joins or leaves is decided where nothing flies.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from model_core.engine.model_runner import ModelRunner
from model_core.engine.row_errors import ROW_ERRORS, make_room
from model_core.engine.sampler import Sampled
from model_core.engine.scheduler import Chunk, Scheduler
from model_core.engine.sequence import Sequence
from model_core.errors import RequestFailedError

LOG = logging.getLogger(__name__)

#: What a landed row gave: its token, or its own error.
Landed = tuple[Sequence, Sampled | Exception]


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched: one token for each of `chunks`, chosen on the device and not read yet.

    tokens: (B,) where the model is. copy: (2, B) on the host, the tokens and whether their logits were finite, to be
    read after `landed`, which is None where nothing is asynchronous.
    """

    chunks: list[Chunk[Sequence]]
    tokens: Tensor
    copy: Tensor
    landed: torch.cuda.Event | None

    @classmethod
    def launch(cls, chunks: list[Chunk[Sequence]], logits: Tensor) -> Flight:
        """logits: (B, V). The copy to the host is queued here, in front of the step that follows."""
        highest = logits.max(dim=-1)
        both = torch.stack([highest.indices, torch.isfinite(highest.values).long()])
        is_cuda = logits.device.type == "cuda"
        copy = torch.empty(both.shape, dtype=both.dtype, pin_memory=is_cuda)
        copy.copy_(both, non_blocking=True)
        landed = None
        if is_cuda:
            landed = torch.cuda.Event()
            landed.record(torch.cuda.current_stream(logits.device))
        return cls(chunks, both[0], copy, landed)

    def read(self) -> list[Landed]:
        """Waits for this step, and not for one launched behind it."""
        if self.landed is not None:
            self.landed.synchronize()
        landed: list[Landed] = []
        for chunk, token, is_sound in zip(self.chunks, *self.copy.tolist(), strict=True):
            fault = None if is_sound else RequestFailedError("the model gave logits that are not finite")
            landed.append((chunk.sequence, fault or Sampled(token)))
        return landed


class Lookahead:
    """At most one flight between two turns of the engine, two within one.

    A flight at rest is committed by the engine: everything of it is done but for its tokens, which are not read.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler[Sequence], *, is_on: bool) -> None:
        self._runner, self._scheduler, self._is_on = runner, scheduler, is_on
        self._flight: Flight | None = None

    @property
    def is_flying(self) -> bool:
        return self._flight is not None

    @property
    def chunks(self) -> list[Chunk[Sequence]]:
        """Of the flight, if there is one; of rows that left meanwhile too."""
        return [] if self._flight is None else self._flight.chunks

    def take_off(self, chunks: list[Chunk[Sequence]], logits: Tensor) -> bool:
        """A step was launched that chooses a token in each of its chunks: may they stay on the device?

        logits: (len(chunks), V). False: choose them now.
        """
        if not self._is_on or not self._is_steady(chunks):
            return False
        try:
            self._flight = Flight.launch(chunks, logits)
        except ROW_ERRORS as error:
            make_room(error)
        return self.is_flying

    def advance(self, *, may_go_on: bool) -> list[Landed]:
        """Launch the step after the flight, if that is sure to be it, and give what the flight itself has chosen.

        may_go_on: False: somebody waits for a step of another kind.
        """
        flight = self._flight
        self._flight = self._launch_behind(flight) if may_go_on and self._is_steady(flight.chunks) else None
        return flight.read()

    def drop(self) -> None:
        """Nobody wants the flight's tokens any more."""
        self._flight = None

    def _is_steady(self, chunks: Items[Chunk[Sequence]]) -> bool:
        """Whether all that run are these rows, and each of them goes on unless its token ends it."""
        if not self._scheduler.is_settled(chunks):
            return False
        rows = [chunk.sequence for chunk in chunks]
        return all(row.sampler.is_plain and len(row.token_ids) + 1 < row.max_tokens for row in rows)

    def _launch_behind(self, flight: Flight) -> Flight | None:
        chunks = self._scheduler.plan_behind(flight.chunks)
        if not chunks:
            return None
        try:
            hidden = self._runner.run(chunks, flight.tokens)
            return Flight.launch(chunks, self._runner.logits(hidden, range(len(chunks))))
        except ROW_ERRORS as error:
            # The same step comes again in order, where it is split until the culprit ends.
            LOG.warning("a step could not be launched ahead: %s", type(error).__name__)
            make_room(error)
            return None
