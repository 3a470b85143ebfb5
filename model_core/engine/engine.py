"""Continuous batching behind the `Engine` interface (model_core.types).

Each step encodes pictures that wait, asks the scheduler for work under one token budget, runs it as one
packed forward, and turns the last row of every finished prompt and decode into a token. On a GPU the next step
may begin before this one's tokens are read (lookahead.py). Deterministic; no thread, no sleep, no wall clock of
its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from model_core.engine.block_manager import BlockManager
from model_core.engine.config import BLOCK_SIZE, EngineConfig
from model_core.engine.detokenizer import Detokenizer, bytes_of, text_of
from model_core.engine.encode_stage import EncodeStage
from model_core.engine.encoder_cache import EncoderCache
from model_core.engine.grammar import GrammarCompiler, GrammarMatcher
from model_core.engine.lookahead import Lookahead
from model_core.engine.model_runner import ModelRunner
from model_core.engine.prefix_hash import PrefixHasher, prefix_root
from model_core.engine.row_errors import ROW_ERRORS, make_room, told
from model_core.engine.sampler import Sampled, SamplerState, check_params, sample_batch
from model_core.engine.scheduler import Chunk, Scheduler, SchedulerConfig, rank
from model_core.engine.sequence import Sequence
from model_core.errors import InvalidRequestError, RequestFailedError
from model_core.language.paged import num_copies
from model_core.processing.batch import InputFormat, ModelInputs, prepare_inputs
from model_core.types import EngineStats, FinishReason, GenerationRequest, ModelInfo, SamplingParams, TokenEvent

_NO_FEATURES = EncoderCache(0)


class ContinuousEngine:
    """See `model_core.types.Engine`. Everything but `prepare` belongs to one thread."""

    def __init__(
        self,
        runner: ModelRunner,
        info: ModelInfo,
        eos_ids: frozenset[int],
        blocks: BlockManager,
        config: EngineConfig | None = None,
        *,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        config = config or EngineConfig()
        self.runner, self.info, self.config, self.blocks = runner, info, config, blocks
        self.scheduler: Scheduler[Sequence] = Scheduler(
            SchedulerConfig(config.max_num_seqs, config.max_num_batched_tokens),
            blocks,
            has_even_rows=runner.store.has_even_rows,
        )
        self._ahead = Lookahead(runner, self.scheduler, is_on=config.overlaps_on(runner.device.type))
        self._eos_ids = eos_ids
        tokens, window = config.encode_tokens_on(runner.device.type), config.encode_window_seconds
        self._encoding = EncodeStage(runner, tokens, window)
        self._vocab_size = runner.decoder.config.vocab_size
        self.grammars = grammars or GrammarCompiler(runner.fmt.tokenizer, self._vocab_size, eos_ids)
        self._arrivals = itertools.count()
        self._known: dict[str, Sequence] = {}
        self._num_steps = self._num_prompt_tokens = self._num_generation_tokens = 0

    def prepare(self, request: GenerationRequest, fmt: InputFormat | None = None) -> Sequence:
        """Pure and thread-safe: decodes images, encodes text, checks that it fits the context.

        `fmt`: instead of the engine's own (the Python facade's opens local paths).
        """
        clock: Callable[[], float] = self.runner.clock
        start = clock()
        sampling, suffix = request.sampling, request.score_token_ids or ()
        grammar = self._start_grammar(sampling)  # first: a refusal is cheaper than a picture
        most = self.info.max_context_tokens
        inputs = prepare_inputs(
            request.messages,
            fmt or self.runner.fmt,
            most - (0 if suffix or request.encode_only else 1),
            suffix,
            clock=clock,
        )
        prepared = self._sequence(request, inputs, grammar)
        prepared.preprocess_seconds = clock() - start + request.fetch_seconds
        return prepared

    def fork(self, prepared: Sequence, request: GenerationRequest) -> Sequence:
        """Nothing of the images or the text is done again; what sampling needs is this request's own."""
        forked = self._sequence(request, prepared.inputs, self._start_grammar(request.sampling))
        forked.is_fork = True
        return forked

    def _start_grammar(self, sampling: SamplingParams) -> GrammarMatcher | None:
        check_params(sampling, self._vocab_size)
        wanted = sampling.response_format
        return None if wanted is None else self.grammars.matcher(wanted)

    def _sequence(self, request: GenerationRequest, inputs: ModelInputs, grammar: GrammarMatcher | None) -> Sequence:
        sampling, most = request.sampling, self.info.max_context_tokens
        return Sequence(
            request=request,
            inputs=inputs,
            max_tokens=min(sampling.max_tokens, most - len(inputs.input_ids)),
            detokenizer=Detokenizer(self.runner.fmt.tokenizer, sampling.stop),
            sampler=SamplerState(sampling, inputs.input_ids, self._eos_ids, grammar),
            hasher=self._hasher(request),
        )

    def _hasher(self, request: GenerationRequest) -> PrefixHasher | None:
        if not self.config.enable_prefix_caching:
            return None
        info = self.info
        return PrefixHasher(prefix_root(info.model_id, request.arm, info.fingerprint), BLOCK_SIZE)

    def add_request(self, prepared: Sequence) -> None:
        if prepared.request_id in self._known:
            raise InvalidRequestError(
                "this request id is already in the engine", value=prepared.request_id,
                allowed="an id that no request in the engine has", fix="Give every request an id of its own",
            )  # fmt: skip
        prepared.added_at = prepared.queued_at = self.runner.clock()
        prepared.arrival = next(self._arrivals)
        self._known[prepared.request_id] = prepared
        self._encoding.add(prepared)

    @torch.inference_mode()
    def abort(self, request_id: str) -> None:
        sequence = self._known.get(request_id)
        if sequence is not None:
            self._free(sequence)
            if not self._known:
                self._ahead.drop()

    def reset_caches(self) -> None:
        self.blocks.reset_cache()
        self.runner.features.clear()

    @property
    def cache_bytes(self) -> int:
        """Of keys and values when full, with the copies of prefixes where these lie apart, and of kept features."""
        shape, caches = self.runner.decoder.cache_shape, self.config.enable_prefix_caching
        tokens = self.blocks.num_blocks * BLOCK_SIZE * num_copies(shape, enable_prefix_caching=caches)
        features = self.config.encoder_cache_bytes if self.runner.owns_features else 0
        return tokens * shape.token_bytes + features

    def has_work(self) -> bool:
        return bool(self._known)

    def token_text(self, token_id: int) -> tuple[str, list[int]]:
        """A token as text and as its own bytes, for log-probabilities on the wire."""
        tokenizer = self.runner.fmt.tokenizer
        return text_of(tokenizer, token_id), bytes_of(tokenizer, token_id)

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        # A cache that two engines share is counted by the one that made it.
        cache = self.runner.features if self.runner.owns_features else _NO_FEATURES
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(self._encoding),
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self._num_generation_tokens,
            num_images_encoded=self.runner.encoders.num_images,
            encoder_seconds=dict(self.runner.encoders.seconds),
            num_encoding=len(self._encoding),
            num_preemptions=scheduler.num_preemptions,
            kv_cache_usage_ratio=self.blocks.usage_ratio,
            prefix_cache_queries=scheduler.num_prefix_queries,
            prefix_cache_hits=scheduler.num_prefix_hits,
            encoder_cache_hits=dict(cache.hits),
            encoder_cache_misses=dict(cache.misses),
            encoder_cache_evictions=dict(cache.evictions),
            encoder_cache_bytes=dict(cache.bytes),
            encoder_tokens=dict(self.runner.encoders.num_tokens),
            encoder_batches={name: dict(sizes) for name, sizes in self.runner.encoders.batch_sizes.items()},
        )

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        self._num_steps += 1
        events: list[TokenEvent] = []
        self._expire(events)
        if not self._ahead.is_flying:
            self._encode_waiting(events)
            chunks = self.scheduler.schedule()
            for sequence in self.scheduler.preempted:
                self.runner.store.close(sequence)
            if chunks:
                self._run(sorted(chunks, key=lambda c: c.length != 1), events)
        if self._ahead.is_flying:
            self._land(events)
        return events

    def _land(self, events: list[TokenEvent]) -> None:
        """The tokens of the step that flies, while the one behind it runs. Who left meanwhile gets no token more."""
        landed = self._ahead.advance(may_go_on=not self._encoding.has_next(self._is_wanted))
        self._take([(s, chosen) for s, chosen in landed if self._is_here(s)], events)
        chunks = [chunk for chunk in self._ahead.chunks if self._is_here(chunk.sequence)]
        try:
            self._keep(chunks)
        except ROW_ERRORS as error:  # not committed, so it comes again in order
            make_room(error)
            chunks = []
        self._commit(chunks, 0.0)
        if not chunks:
            self._ahead.drop()

    def _is_here(self, sequence: Sequence) -> bool:
        return self._known.get(sequence.request_id) is sequence

    def _expire(self, events: list[TokenEvent]) -> None:
        timed = [s for s in self._known.values() if s.deadline is not None]
        if not timed:
            return
        now = self.runner.clock()
        for sequence in timed:
            if now >= sequence.deadline:
                seconds = sequence.request.timeout_seconds
                late = RequestFailedError("the request ran out of time", value=f"{seconds:g} s", allowed="less")
                events.append(self._fail(sequence, late))

    def _encode_waiting(self, events: list[TokenEvent]) -> None:
        others_run = bool(self.scheduler.running)
        for sequence, error in self._encoding.advance(others_run=others_run, is_wanted=self._is_wanted):
            if error is not None:
                events.append(self._fail(sequence, error))
            elif sequence.request.encode_only:
                events.append(self._close(sequence, self._opening(sequence), "stop"))
            else:
                sequence.queued_at = self.runner.clock()
                self.scheduler.add(sequence)

    def _is_wanted(self, sequence: Sequence) -> bool:
        """As many wait with their pictures encoded as there are seats; one of better rank than the last may join."""
        ready = self.scheduler.waiting
        return len(ready) < self.config.max_num_seqs or rank(sequence) < rank(ready[-1])

    # Running

    def _run(self, chunks: list[Chunk[Sequence]], events: list[TokenEvent]) -> None:
        """One forward over all chunks; if it fails, half and half again. Writing a place twice does no harm."""
        start = self.runner.clock()
        try:
            for chunk in chunks:
                self._open(chunk, start)
            hidden = self.runner.run(chunks)
            ends = list(itertools.accumulate(c.length for c in chunks))
            for chunk, end in zip(chunks, ends, strict=True):
                if chunk.sequence.request.score_token_ids is not None:
                    chunk.sequence.scores += self.runner.score(hidden[end - chunk.length : end], chunk)
            answering = [(c, end - 1) for c, end in zip(chunks, ends, strict=True) if _is_answering(c)]
            logits = self.runner.logits(hidden, [row for _, row in answering]) if answering else None
            self._keep(chunks)
        except ROW_ERRORS as error:
            self._split(chunks, error, events)
            return
        self._commit(chunks, self.runner.clock() - start)
        for chunk in chunks:
            if chunk.is_last and chunk.sequence.request.score_token_ids is not None:
                scored = replace(self._opening(chunk.sequence), score_logprobs=tuple(chunk.sequence.scores))
                events.append(self._close(chunk.sequence, scored, "stop"))
        if answering and not self._ahead.take_off([c for c, _ in answering], logits):
            self._sample([c.sequence for c, _ in answering], logits, events)

    def _open(self, chunk: Chunk[Sequence], now: float) -> None:
        """A sequence that begins to run, or begins again after it was preempted, starts behind its cached prefix."""
        if chunk.sequence not in self.runner.store:
            chunk.sequence.leave_queue(now)
            self.runner.store.open(chunk.sequence, chunk.sequence.blocks[: chunk.start // BLOCK_SIZE])

    def _split(self, chunks: list[Chunk[Sequence]], error: Exception, events: list[TokenEvent]) -> None:
        if len(chunks) == 1:
            events.append(self._fail(chunks[0].sequence, error))
            return
        make_room(error)
        half = len(chunks) // 2
        for part in (chunks[:half], chunks[half:]):
            for chunk in part:
                del chunk.sequence.scores[self._num_scored(chunk) :]
            self._run(part, events)

    def _num_scored(self, chunk: Chunk[Sequence]) -> int:
        """How many scores a sequence has before this chunk: what a failed try has added goes."""
        suffix = chunk.sequence.request.score_token_ids or ()
        return max(0, chunk.start - (chunk.sequence.num_prompt - len(suffix) - 1))

    def _keep(self, chunks: list[Chunk[Sequence]]) -> None:
        """Copies of the blocks that are full now, before `commit` names them."""
        if not self.config.enable_prefix_caching:
            return
        for chunk in chunks:
            first, last = chunk.start // BLOCK_SIZE, (chunk.start + chunk.length) // BLOCK_SIZE
            if first < last:
                self.runner.store.keep(chunk.sequence, first, chunk.sequence.blocks[first:last])

    def _commit(self, chunks: list[Chunk[Sequence]], seconds: float) -> None:
        self.scheduler.commit(chunks)
        for chunk in chunks:
            if not chunk.sequence.has_opened:
                chunk.sequence.prefill_seconds += seconds
                self._num_prompt_tokens += chunk.length

    def _sample(self, sequences: list[Sequence], logits: Tensor, events: list[TokenEvent]) -> None:
        """A token for each; where there is no memory for all at once, half and half again."""
        try:
            sampled = sample_batch(logits, [s.sampler for s in sequences])
        except ROW_ERRORS as error:
            if len(sequences) == 1:
                events.append(self._fail(sequences[0], error))
                return
            make_room(error)
            half = len(sequences) // 2
            self._sample(sequences[:half], logits[:half], events)
            self._sample(sequences[half:], logits[half:], events)
            return
        self._take(zip(sequences, sampled, strict=True), events)

    def _take(self, pairs: Iterable[tuple[Sequence, Sampled | Exception]], events: list[TokenEvent]) -> None:
        for sequence, chosen in pairs:
            if isinstance(chosen, Exception):
                events.append(self._fail(sequence, chosen))
                continue
            try:
                events.append(self._advance(sequence, chosen))
            except ROW_ERRORS as error:  # this row's own: the others must not feel it
                events.append(self._fail(sequence, error))

    def _advance(self, sequence: Sequence, chosen: Sampled) -> TokenEvent:
        """Add the token, turn it to text, and see whether the sequence ends."""
        opening = None if sequence.has_opened else self._opening(sequence)
        sampling, token = sequence.request.sampling, chosen.token_id
        is_end = token in sampling.stop_token_ids or (token in self._eos_ids and not sampling.ignore_eos)
        text = "" if is_end else sequence.detokenizer.push(token)
        sequence.token_ids.append(token)
        sequence.sampler.push(token)
        self._num_generation_tokens += 1
        reason: FinishReason | None = None
        if is_end or sequence.detokenizer.is_stopped:
            reason = "stop"
        elif len(sequence.token_ids) >= sequence.max_tokens:
            reason = "length"
        if reason is not None:
            text += sequence.detokenizer.finish()
        # Made once and not changed after: this is done for every token.
        event = TokenEvent(
            sequence.request_id,
            text,
            (token,),
            None if opening is None else opening.fusion,
            usage=None if opening is None else opening.usage,
            logprobs=None if chosen.logprob is None else (chosen.logprob,),
        )
        return event if reason is None else self._close(sequence, event, reason)

    # Ends

    def _opening(self, sequence: Sequence) -> TokenEvent:
        """The first event of a request: its fusion, and the prompt's counts."""
        sequence.has_opened = True
        sequence.prefilled_at = self.runner.clock()
        return TokenEvent(sequence.request_id, fusion=sequence.fusion, usage=sequence.usage())

    def _close(self, sequence: Sequence, event: TokenEvent, reason: FinishReason) -> TokenEvent:
        self._free(sequence)
        timings = sequence.timings(self.runner.clock())
        return replace(event, finish_reason=reason, usage=sequence.usage(), timings=timings)

    def _fail(self, sequence: Sequence, error: Exception) -> TokenEvent:
        self._free(sequence)
        shown = told(error)
        timings = sequence.timings(self.runner.clock())
        return TokenEvent(sequence.request_id, error=shown, usage=sequence.usage(), timings=timings)

    def _free(self, sequence: Sequence) -> None:
        """Whatever its stage: nothing of it is left after this."""
        self._known.pop(sequence.request_id, None)
        self._encoding.drop(sequence)
        self.scheduler.remove(sequence)
        self.runner.store.close(sequence)
        sequence.embeds = None
        sequence.held_features.clear()


def _is_answering(chunk: Chunk[Sequence]) -> bool:
    return chunk.is_last and chunk.sequence.request.score_token_ids is None
