"""Requests whose images are not encoded yet: which of them the next pass takes, and what becomes of a failure.

In: requests that were admitted, and whether others are being answered. Out: those that are ready or have failed. One
pass at most a turn, of `max_encode_tokens` at most, so that whoever is being answered never waits for longer. It
starts no language model and frees nothing.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator

from model_core.engine.model_runner import ModelRunner
from model_core.engine.row_errors import ROW_ERRORS, is_memory, make_room
from model_core.engine.sequence import Sequence

#: A request that leaves the stage, and what ended it, if anything did.
Left = tuple[Sequence, Exception | None]


class EncodeStage:
    """Waiting requests by id.

    Args:
        max_tokens: cells that one pass computes; an image with more goes alone.
        window_seconds: how long an image waits for company while others are being answered.
    """

    def __init__(self, runner: ModelRunner, max_tokens: int, window_seconds: float) -> None:
        self._runner, self._max_tokens, self._window_seconds = runner, max_tokens, window_seconds
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting[sequence.request_id] = sequence

    def drop(self, sequence: Sequence) -> None:
        """It has ended. One that is not here is ignored."""
        self._waiting.pop(sequence.request_id, None)

    def has_next(self, is_wanted: Callable[[Sequence], bool]) -> bool:
        """Would `advance` look at anybody now?"""
        return any(_is_next(sequence, is_wanted) for sequence in self._waiting.values())

    def advance(self, *, others_run: bool, is_wanted: Callable[[Sequence], bool]) -> Iterator[Left]:
        """Text goes on at once; images in the order of their rank, up to the budget of one pass.

        is_wanted: would it find a place next? Fused tokens take memory, and wait better as pixels.
        """
        for sequence in list(self._waiting.values()):
            if sequence.inputs.pixels is None:
                yield from self._encode([sequence])
        # After all text, which takes places: judged between two texts, an image could pass one of better rank.
        with_images = [
            sequence
            for sequence in self._waiting.values()
            if sequence.inputs.pixels is not None and _is_next(sequence, is_wanted)
        ]
        if with_images and self._is_window_over(with_images, others_run=others_run):
            yield from self._one_pass(sorted(with_images, key=lambda s: (s.priority, s.arrival)))

    def _one_pass(self, by_rank: list[Sequence]) -> Iterator[Left]:
        batch: list[Sequence] = []
        tokens = 0
        for sequence in by_rank:
            lacking = self._runner.lacking(sequence)
            if not batch and sum(lacking) > self._max_tokens and (portion := self._portion(lacking)):
                yield from self._encode_ahead(sequence, portion)
                return
            tokens += sum(lacking)
            if batch and tokens > self._max_tokens:
                break
            batch.append(sequence)
        yield from self._encode(batch)

    def _portion(self, lacking: list[int]) -> list[int]:
        """Of a request that is too large for a pass, the images that fill one; none if one image is all it lacks."""
        wanted = [i for i, cells in enumerate(lacking) if cells]
        ends = itertools.accumulate(lacking[i] for i in wanted)
        fitting = sum(end <= self._max_tokens for end in ends)
        return wanted[: max(1, fitting)] if len(wanted) > 1 else []

    def _is_window_over(self, waiting: list[Sequence], *, others_run: bool) -> bool:
        if not self._window_seconds or not others_run:
            return True
        tokens = sum(s.inputs.num_image_tokens for s in waiting)
        oldest = min(s.added_at for s in waiting)
        return tokens >= self._max_tokens or self._runner.clock() - oldest >= self._window_seconds

    def _encode(self, sequences: list[Sequence]) -> Iterator[Left]:
        """One pass for all; if it fails, half and half again, so that only the culprit ends."""
        for sequence in sequences:
            sequence.leave_encode_queue(self._runner.clock())
        try:
            self._runner.encode(sequences)
        except ROW_ERRORS as error:
            if len(sequences) == 1:
                yield from self._one_by_one(sequences[0], error)
                return
            make_room(error)
            half = len(sequences) // 2
            yield from self._encode(sequences[:half])
            yield from self._encode(sequences[half:])
            return
        for sequence in sequences:
            del self._waiting[sequence.request_id]
            yield sequence, None

    def _one_by_one(self, sequence: Sequence, error: Exception) -> Iterator[Left]:
        """Several images that do not fit the memory together may each have a pass; anything else ends the request."""
        lacking = [i for i, cells in enumerate(self._runner.lacking(sequence)) if cells] if is_memory(error) else []
        if len(lacking) > 1:
            make_room(error)
            yield from self._encode_ahead(sequence, lacking[:1])
        else:
            yield sequence, error

    def _encode_ahead(self, sequence: Sequence, images: list[int]) -> Iterator[Left]:
        """Some of a request's images; the rest has other passes."""
        sequence.leave_encode_queue(self._runner.clock())
        try:
            self._runner.encode_ahead(sequence, images)
        except ROW_ERRORS as error:
            if len(images) == 1:
                yield sequence, error
                return
            make_room(error)
            yield from self._encode_ahead(sequence, images[:1])


def _is_next(sequence: Sequence, is_wanted: Callable[[Sequence], bool]) -> bool:
    """Text and whoever wants nothing but features need no place."""
    return sequence.inputs.pixels is None or sequence.request.encode_only or is_wanted(sequence)
