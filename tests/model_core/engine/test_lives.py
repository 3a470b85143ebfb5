"""Random lives through the whole engine: arrivals, ends of every kind, faults, and a clock that jumps.

Over the tiny model, on a cache that is too small. Whatever happens, every request has one end, nobody waits for ever,
nothing is kept of who is gone, and every token is the one that the request gets alone.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model_core.checkpoint import Loaded
from model_core.encoder import DualVisionEncoder
from model_core.engine.config import EngineConfig
from model_core.engine.engine import ContinuousEngine
from model_core.engine.scheduler import rank
from model_core.engine.sequence import Sequence
from model_core.types import ChatMessage, GenerationRequest, ImagePart, SamplingParams, TextPart, TokenEvent
from tests.model_core import tiny
from tests.model_core.engine.test_batching import cache_of
from tests.model_core.engine.test_engine import generated, picture

MOST_TOKENS = 10
KINDS = 9
LEAST = 176  # two or three prompts, but not all that they become
CONFIGS = {
    "small": EngineConfig(max_num_seqs=4, max_num_batched_tokens=40, max_encode_tokens=12, max_context_tokens=LEAST,
        kv_cache_bytes=cache_of(LEAST),
    ),
    "no caches": EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=64, max_context_tokens=LEAST, enable_prefix_caching=False,
        kv_cache_bytes=cache_of(LEAST) // 2,
        encoder_cache_bytes=0,
    ),
    "window": EngineConfig(
        max_num_seqs=2, encode_window_seconds=1.0, max_context_tokens=320, kv_cache_bytes=cache_of(320)
    ),
}  # fmt: skip


@functools.cache
def loaded() -> Loaded:
    return Loaded(tiny.trained_model(), tiny.processor())


def engine_of(config: EngineConfig) -> ContinuousEngine:
    return DualVisionEncoder.from_loaded(loaded(), "tiny", config).engine


@functools.cache
def parts_of(kind: int) -> tuple[Any, ...]:
    """Of nine kinds of prompts: three of text, of which two share a prefix, six with one to three pictures."""
    rng = random.Random(kind)
    if kind < 3:
        return (
            TextPart("the same words at first, " * (kind > 0) + "".join(rng.choices("abcdefgh ?", k=20 * kind + 3))),
        )
    return (*(ImagePart(picture(rng)) for _ in range(1 + kind % 3)), TextPart("what?"))


@functools.cache
def tokens_alone(kind: int) -> tuple[int, ...]:
    """The longest answer to this kind; a shorter one is its beginning. Without a tie, or it would prove nothing."""
    encoder = DualVisionEncoder.from_loaded(loaded(), "tiny")
    tokens, margins = generated(encoder, request("alone", kind, MOST_TOKENS))
    assert min(margins) > 1e-3
    return tuple(tokens)


def request(name: str, kind: int, num_tokens: int, **more: Any) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    return GenerationRequest(name, (ChatMessage("user", parts_of(kind)),), sampling, **more)


@dataclass(eq=False)
class Life:
    """One request: what it asked for, what it got, and which of the faults have met it."""

    sequence: Sequence
    kind: int
    made: list[int] = field(default_factory=list)
    was_hit: bool = False


class Lives(RuleBasedStateMachine):
    """`alive` by id; `gone`: ids that have had their end, of which nothing may come any more."""

    @initialize(config=st.sampled_from(sorted(CONFIGS)))
    def begin(self, config: str) -> None:
        self.engine = engine_of(CONFIGS[config])
        self.now, self.count = 0.0, 0
        self.alive: dict[str, Life] = {}
        self.ended: list[Life] = []
        self.faults: dict[str, int] = {"encode": 0, "run": 0}
        self.cursed: set[str] = set()
        runner = self.engine.runner
        runner.clock = lambda: self.now
        runner.encode = self.failing("encode", runner.encode)
        runner.run = self.failing("run", runner.run)

    def failing(self, stage: str, inner: Any) -> Any:
        """`faults`: so many next calls fail, whoever is in them; a call with a cursed request fails each time."""

        def call(work: list[Any]) -> Any:
            lives = [self.alive[getattr(one, "sequence", one).request_id] for one in work]
            is_passing = self.faults[stage] > 0
            if is_passing or any(life.sequence.request_id in self.cursed for life in lives):
                self.faults[stage] -= is_passing
                for life in lives:
                    life.was_hit = True
                raise RuntimeError("a fault")
            return inner(work)

        return call

    @rule(
        kind=st.integers(0, KINDS - 1),
        num_tokens=st.integers(1, MOST_TOKENS),
        priority=st.integers(-1, 1),
        timeout=st.sampled_from([None, None, None, 2.0, 5.0]),
    )
    def arrive(self, kind: int, num_tokens: int, priority: int, timeout: float | None) -> None:
        name = f"q{self.count}"
        self.count += 1
        one = request(name, kind, num_tokens, priority=priority, timeout_seconds=timeout)
        prepared = self.engine.prepare(one)
        self.alive[name] = Life(prepared, kind)
        self.engine.add_request(prepared)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        self.engine.abort(name)
        self.end(name)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def curse(self, data: st.DataObject) -> None:
        self.cursed.add(data.draw(st.sampled_from(sorted(self.alive))))

    @rule(stage=st.sampled_from(["encode", "run"]), times=st.integers(1, 2))
    def break_down(self, stage: str, times: int) -> None:
        self.faults[stage] = times

    @rule(seconds=st.sampled_from([0.5, 1.5, 4.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(steps=st.integers(1, 6))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        scheduler, to_encode = self.engine.scheduler, self.engine._encoding._waiting
        ran, pictured = list(scheduler.running), [s for s in to_encode.values() if s.inputs.pixels is not None]
        for event in self.engine.step():
            self.take(event)
        assert all(life.sequence.deadline is None or life.sequence.deadline > self.now for life in self.alive.values())
        # First come, first served within a priority: nobody got a seat, or an encoder, before one of better rank.
        seated = [s for s in scheduler.running if s not in ran]
        assert all(rank(s) < rank(w) for s in seated for w in scheduler.waiting)
        encoded = [s for s in pictured if s.request_id in self.alive and s.request_id not in to_encode]
        assert all(rank(s) < rank(w) for s in encoded for w in pictured if w.request_id in to_encode)

    def take(self, event: TokenEvent) -> None:
        assert event.request_id in self.alive, "an event after the last one, or of nobody"
        life = self.alive[event.request_id]
        life.made += event.token_ids
        assert tuple(life.made) == tokens_alone(life.kind)[: len(life.made)]
        if event.error is not None:
            late = life.sequence.deadline is not None and life.sequence.deadline <= self.now
            assert life.was_hit or late, event.error
            self.end(event.request_id)
        elif event.finish_reason is not None:
            assert event.finish_reason == "length"
            assert len(life.made) == life.sequence.request.sampling.max_tokens
            self.end(event.request_id)

    def end(self, name: str) -> None:
        life = self.alive.pop(name)
        self.cursed.discard(name)
        self.ended.append(life)

    @invariant()
    def nothing_is_left_of_those_who_are_gone(self) -> None:
        for life in self.ended:
            assert (life.sequence.embeds, life.sequence.blocks) == (None, [])
            assert life.sequence not in self.engine.runner.store
        engine, lives = self.engine, self.alive.values()
        assert set(engine._known) == set(self.alive)
        queues = [*engine.scheduler.running, *engine.scheduler.waiting, *engine._encoding._waiting.values()]
        assert sorted(s.request_id for s in queues) == sorted(self.alive)
        owned = {block for life in lives for block in life.sequence.blocks}
        assert engine.blocks.num_blocks - engine.blocks.num_free == len(owned)
        assert engine.runner.store.num_open <= len(engine.scheduler.running) <= engine.config.max_num_seqs
        assert engine.has_work() == bool(self.alive)

    def teardown(self) -> None:
        """Nobody waits for ever: all end within the steps that all tokens, computed again for each one, could take."""
        self.faults = dict.fromkeys(self.faults, 0)
        bound = 10 + sum((life.sequence.num_tokens + MOST_TOKENS) * (MOST_TOKENS + 1) for life in self.alive.values())
        for _ in range(bound):
            if not self.alive:
                break
            self.now += 0.25
            self.step()
        assert not self.alive
        self.nothing_is_left_of_those_who_are_gone()
        assert self.engine.blocks.num_free == self.engine.blocks.num_blocks
        assert self.engine.runner.store.num_open == 0


def test_the_kinds_are_told_apart() -> None:
    """What the comparison of tokens rests on: no kind's answer passes for another's."""
    assert len({tokens_alone(kind)[:3] for kind in range(KINDS)}) == KINDS


def test_a_picture_between_two_texts_does_not_pass_one_of_better_rank() -> None:
    """Of a life that the machine found: there was a seat when the first picture was judged, none at the second."""
    lives = Lives()
    lives.begin("window")
    for kind, priority in ((0, 0), (3, 1), (0, 0), (3, 0)):
        lives.arrive(kind, 1, priority, None)
    lives.step()
    lives.teardown()


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.heavy
class TestManyLives(Lives.TestCase):
    settings = settings(
        max_examples=400, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_nobody_starves_while_others_keep_coming(config: str) -> None:
    """More comes than goes, of one priority: whoever came first begins first, and those that are large as well."""
    engine, rng, now = engine_of(CONFIGS[config]), random.Random(0), [0.0]
    engine.runner.clock = lambda: now[0]
    begun: list[int] = []
    num_come = most_waiting = 0
    while num_come < 60 or engine.has_work():
        for _ in range(2 if num_come < 60 else 0):
            one = request(f"q{num_come}", rng.randrange(KINDS), rng.randint(1, 6))
            engine.add_request(engine.prepare(one))
            num_come += 1
        now[0] += 0.5
        begun += sorted(int(event.request_id[1:]) for event in engine.step() if event.fusion is not None)
        most_waiting = max(most_waiting, engine.stats().num_waiting)
        assert now[0] < 300, "it never ended"
    assert most_waiting > 20, "there was a crowd to be lost in"
    assert (engine.stats().num_preemptions > 3) == (config != "window")
    assert begun == list(range(60))
