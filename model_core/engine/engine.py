"""The engine's first form: a dynamic micro-batcher behind the `Engine` interface.

Each step admits what waits (one encode for all their images), prefills it, then decodes one token for
every running row. Synchronous, deterministic, no thread, no sleep, no wall clock of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from model_core.engine.detokenizer import Detokenizer
from model_core.engine.model_runner import ModelRunner
from model_core.engine.sampler import build_generator, sample
from model_core.engine.sequence import Sequence
from model_core.errors import DualVisionError, InvalidRequestError, RequestFailedError
from model_core.processing.batch import InputFormat, prepare_inputs
from model_core.types import EngineStats, FinishReason, GenerationRequest, ModelInfo, TokenEvent


class MicroBatchEngine:
    """See `model_core.types.Engine`. `max_num_seqs` rows run at once, the rest wait in order."""

    def __init__(self, runner: ModelRunner, info: ModelInfo, eos_ids: frozenset[int], max_num_seqs: int = 16) -> None:
        self.runner, self.info = runner, info
        self._eos_ids, self._max_num_seqs = eos_ids, max_num_seqs
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._running: list[Sequence] = []  # in cache row order
        self._num_steps = self._num_prompt_tokens = self._num_generation_tokens = 0

    def prepare(self, request: GenerationRequest, fmt: InputFormat | None = None) -> Sequence:
        """Pure and thread-safe: decodes images, encodes text, checks the context.

        `fmt`: instead of the engine's own (the Python facade's opens local paths).
        """
        clock: Callable[[], float] = self.runner.clock
        start = clock()
        suffix = request.score_token_ids or ()
        room = self.info.max_context_tokens - (0 if suffix or request.encode_only else 1)
        inputs = prepare_inputs(request.messages, fmt or self.runner.fmt, room, suffix)
        sampling = request.sampling
        return Sequence(
            request=request,
            inputs=inputs,
            max_tokens=min(sampling.max_tokens, self.info.max_context_tokens - len(inputs.input_ids)),
            detokenizer=Detokenizer(self.runner.fmt.tokenizer, sampling.stop),
            generator=build_generator(sampling),
            preprocess_seconds=clock() - start,
        )

    def add_request(self, prepared: Sequence) -> None:
        known = prepared.request_id in self._waiting or any(s.request_id == prepared.request_id for s in self._running)
        if known:
            raise InvalidRequestError("this request id is already in the engine", value=prepared.request_id)
        prepared.added_at = self.runner.clock()
        self._waiting[prepared.request_id] = prepared

    @torch.inference_mode()
    def abort(self, request_id: str) -> None:
        if self._waiting.pop(request_id, None) is None:
            for sequence in self._running:
                if sequence.request_id == request_id:
                    self._free(sequence)
                    break

    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self._num_generation_tokens,
            num_images_encoded=self.runner.num_images_encoded,
            encoder_seconds=dict(self.runner.encoder_seconds),
        )

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        self._num_steps += 1
        events: list[TokenEvent] = []
        self._admit(events)
        if self._running:
            self._decode(events)
        return events

    def _admit(self, events: list[TokenEvent]) -> None:
        room = self._max_num_seqs - len(self._running)
        admitted = [self._waiting.popitem(last=False)[1] for _ in range(min(room, len(self._waiting)))]
        if not admitted:
            return
        now = self.runner.clock()
        for sequence in admitted:
            sequence.admitted_at = now
        for sequence in self._encode(admitted, events):
            self._start(sequence, events)

    def _encode(self, sequences: list[Sequence], events: list[TokenEvent]) -> list[Sequence]:
        """One encode for all; if it fails, one at a time, so that only the culprit ends."""
        try:
            self.runner.encode(sequences)
            return sequences
        except (RuntimeError, ValueError, MemoryError, DualVisionError) as error:
            if len(sequences) == 1:
                events.append(self._failed(sequences[0], error))
                return []
            return [s for one in sequences for s in self._encode([one], events)]

    def _start(self, sequence: Sequence, events: list[TokenEvent]) -> None:
        """First event of a sequence: its fusion, and its first token or its scores."""
        request = sequence.request
        opening = TokenEvent(sequence.request_id, fusion=sequence.fusion, usage=sequence.usage())
        if request.encode_only:
            events.append(self._closed(sequence, opening, "stop"))
            return
        try:
            hidden = self.runner.prefill(sequence)
            self._running.append(sequence)
            self._num_prompt_tokens += len(sequence.inputs.input_ids)
            if request.score_token_ids is not None:
                scores = self.runner.score(hidden, request.score_token_ids)
                self._free(sequence)
                events.append(self._closed(sequence, replace(opening, score_logprobs=tuple(scores)), "stop"))
                return
            logits = self.runner.first_logits(hidden)
        except (RuntimeError, DualVisionError) as error:
            if sequence.row is not None:
                self._free(sequence)
            events.append(self._failed(sequence, error))
            return
        events.append(self._advance(sequence, logits, opening))

    def _decode(self, events: list[TokenEvent]) -> None:
        rows = list(self._running)  # freeing a row reorders the list
        try:
            batch = self.runner.decode(rows)
        except RuntimeError as error:
            # Out of memory, most likely, and the longest row holds the most. A step that is done again
            # writes the same cache places, so the others go on with the next one as if nothing had been.
            longest = max(rows, key=lambda s: len(s.inputs.input_ids) + len(s.token_ids))
            self._free(longest)
            events.append(self._failed(longest, error))
            return
        for sequence, logits in zip(rows, batch, strict=True):
            events.append(self._advance(sequence, logits, TokenEvent(sequence.request_id)))

    def _advance(self, sequence: Sequence, logits: Tensor, event: TokenEvent) -> TokenEvent:
        """Choose a token, turn it to text, and see whether the sequence ends."""
        if not bool(torch.isfinite(logits).all()):
            self._free(sequence)
            return self._failed(sequence, RequestFailedError("the model gave logits that are not finite"))
        sampling = sequence.request.sampling
        try:
            token = sample(logits, sampling, sequence.generator)
            is_eos = token in self._eos_ids and not sampling.ignore_eos
            text = "" if is_eos else sequence.detokenizer.push(token)
        except (RuntimeError, ValueError) as error:  # this row's own: the others must not feel it
            self._free(sequence)
            return self._failed(sequence, error)
        sequence.token_ids.append(token)
        self._num_generation_tokens += 1
        event = replace(event, text=text, token_ids=(token,))
        if is_eos or sequence.detokenizer.is_stopped:
            return self._finish(sequence, event, "stop")
        if len(sequence.token_ids) >= sequence.max_tokens:
            return self._finish(sequence, event, "length")
        return event

    def _finish(self, sequence: Sequence, event: TokenEvent, reason: FinishReason) -> TokenEvent:
        self._free(sequence)
        return self._closed(sequence, replace(event, text=event.text + sequence.detokenizer.finish()), reason)

    def _closed(self, sequence: Sequence, event: TokenEvent, reason: FinishReason) -> TokenEvent:
        timings = sequence.timings(self.runner.clock())
        return replace(event, finish_reason=reason, usage=sequence.usage(), timings=timings)

    def _failed(self, sequence: Sequence, error: Exception) -> TokenEvent:
        shown = error if isinstance(error, DualVisionError) else RequestFailedError(
            "the model failed on this request", value=type(error).__name__
        )  # fmt: skip
        shown.__cause__ = None if shown is error else error
        timings = sequence.timings(self.runner.clock())
        return TokenEvent(sequence.request_id, error=shown, usage=sequence.usage(), timings=timings)

    def _free(self, sequence: Sequence) -> None:
        """Give the cache row back; the last row moves into the gap, in the cache and in our list."""
        row = sequence.row
        self.runner.cache.remove_row(row)
        sequence.row = None
        if row < len(self._running) and self._running[row] is sequence:
            last = self._running.pop()
            if last is not sequence:
                last.row, self._running[row] = row, last
