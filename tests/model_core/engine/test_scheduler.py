"""Who runs when: budget, rank, chunks, preemption; and over random lives no leak, no livelock, one end each."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model_core.engine.block_manager import BlockManager
from model_core.engine.prefix_hash import PrefixHasher, prefix_root
from model_core.engine.scheduler import Chunk, Scheduler, SchedulerConfig
from model_core.errors import ConfigError

SIZE = 4
HASHER = PrefixHasher(prefix_root("test"), SIZE)


@dataclass(eq=False)
class Plain:
    """A sequence that will generate `wanted` tokens."""

    prompt: list[int]
    wanted: int = 1
    priority: int = 0
    arrival: int = 0
    num_computed: int = 0
    num_cached: int = -1
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    made: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.made)

    def extend_hashes(self, block_size: int) -> None:
        HASHER.extend(self.block_hashes, self.prompt + self.made)


def scheduler(
    num_blocks: int = 16, seqs: int = 4, tokens: int = 32, *, caching: bool = True, has_even_rows: bool = False
) -> Scheduler:
    blocks = BlockManager(num_blocks, SIZE, enable_prefix_caching=caching)
    return Scheduler(SchedulerConfig(seqs, tokens), blocks, has_even_rows=has_even_rows)


def prompt(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


def turn(one: Scheduler) -> list[Chunk]:
    """A whole step: plan, compute, choose a token, end who has enough."""
    chunks = one.schedule()
    one.commit(chunks)
    for chunk in chunks:
        sequence = chunk.sequence
        if sequence.num_computed == sequence.num_tokens:
            sequence.made.append(len(sequence.made))
            if len(sequence.made) >= sequence.wanted:
                one.remove(sequence)
    return chunks


def lengths(chunks: list[Chunk]) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.length) for chunk in chunks]


def test_a_long_prompt_comes_in_chunks_behind_those_that_answer() -> None:
    one = scheduler(tokens=10)
    short, long = Plain(prompt(3), wanted=5), Plain(prompt(20, 100), arrival=1)
    one.add(short)
    one.add(long)
    assert lengths(turn(one)) == [(0, 3), (0, 7)]
    assert lengths(turn(one)) == [(3, 1), (7, 9)]
    last = one.schedule()
    assert lengths(last) == [(4, 1), (16, 4)]
    assert [chunk.is_last for chunk in last] == [True, True]


def test_rank_is_priority_then_arrival_and_nobody_overtakes_the_first_in_line() -> None:
    one = scheduler(num_blocks=4, seqs=2)
    late, early, urgent = Plain(prompt(4), arrival=2), Plain(prompt(4, 50), arrival=1), Plain(prompt(4, 90), 1, -1, 3)
    for sequence in (late, early, urgent):
        one.add(sequence)
    assert [chunk.sequence for chunk in one.schedule()] == [urgent, early]
    big, small = Plain(prompt(15, 200), arrival=4, priority=-5), Plain(prompt(1, 300), arrival=5, priority=-4)
    one.remove(urgent)
    one.add(big)
    one.add(small)
    assert [chunk.sequence for chunk in one.schedule()] == [early], "no room for the big one, so nobody passes it"


def test_a_prefix_hit_is_never_the_whole_prompt_and_counts_once() -> None:
    one = scheduler()
    first, second = Plain(prompt(8)), Plain(prompt(8), arrival=1)
    one.add(first)
    turn(one)
    one.add(second)
    assert lengths(turn(one)) == [(4, 4)]
    assert (second.num_cached, one.num_prefix_queries, one.num_prefix_hits) == (4, 16, 4)


def test_what_is_not_computed_yet_is_no_hit() -> None:
    one = scheduler()
    first, second = Plain(prompt(9)), Plain(prompt(9), arrival=1)
    one.add(first)
    one.add(second)
    assert lengths(one.schedule()) == [(0, 9), (0, 9)], "both in the same step: neither can use the other's blocks"


def test_the_worst_in_rank_gives_its_blocks_and_comes_back_with_most_of_them() -> None:
    one = scheduler(num_blocks=5)
    first, second = Plain(prompt(7), wanted=9), Plain(prompt(8, 50), wanted=9, arrival=1)
    one.add(first)
    one.add(second)
    turn(one)  # 2 + 2 blocks, one is left
    turn(one)  # both need room; the first takes it, the second steps back
    assert one.preempted == [second] or second.num_computed in (8, 9)
    while not one.preempted:
        turn(one)
    assert one.preempted == [second]
    assert (second.num_computed, second.blocks, one.waiting) == (0, [], [second])
    for _ in range(40):
        turn(one)
    assert len(first.made) == len(second.made) == 9
    assert second.num_cached == 0, "what came back after the preemption is no prefix hit of the request"
    assert one.blocks.num_free == 5


def test_one_of_better_rank_is_never_preempted_for_a_worse_one() -> None:
    one = scheduler(num_blocks=4)
    urgent, other = Plain(prompt(7), wanted=8, priority=-1, arrival=1), Plain(prompt(7, 50), wanted=8)
    one.add(other)
    one.add(urgent)
    seen = []
    while one.running or one.waiting:
        turn(one)
        seen += one.preempted
    assert seen
    assert urgent not in seen


def test_a_settled_step_is_planned_on_before_its_tokens_are_known() -> None:
    one = scheduler(num_blocks=5, seqs=2)
    first, second = Plain(prompt(3), wanted=9), Plain(prompt(7, 50), wanted=9, arrival=1)
    one.add(first)
    one.add(second)
    chunks = one.schedule()
    one.commit(chunks)
    assert one.is_settled(chunks)
    assert lengths(one.plan_behind(chunks)) == [(3, 1), (7, 1)]
    waiting = Plain(prompt(3, 90), arrival=2)
    one.add(waiting)
    assert one.is_settled(chunks), "no seat is free"
    for sequence in (first, second):
        sequence.made.append(0)
    chunks = one.schedule()
    one.commit(chunks)
    assert [len(sequence.blocks) for sequence in (first, second)] == [1, 2]
    assert lengths(one.plan_behind(chunks)) == [(4, 1), (8, 1)]
    assert [len(sequence.blocks) for sequence in (first, second)] == [2, 3]
    one.remove(first)
    assert not one.is_settled(chunks), "somebody left, so that another may come"


def test_nobody_makes_room_for_a_step_that_is_planned_ahead() -> None:
    one = scheduler(num_blocks=2)
    first, second = Plain(prompt(4), wanted=9), Plain(prompt(4, 50), wanted=9, arrival=1)
    one.add(first)
    one.add(second)
    chunks = one.schedule()
    one.commit(chunks)
    assert one.plan_behind(chunks) == []
    assert (one.running, one.preempted) == ([first, second], [])
    for sequence in (first, second):
        sequence.made.append(0)
    assert [chunk.sequence for chunk in one.schedule()] == [first]
    assert one.preempted == [second]


@pytest.mark.parametrize("tokens", [5, 8])
def test_a_step_with_a_prompt_under_way_is_not_settled(tokens: int) -> None:
    one = scheduler(tokens=tokens)
    one.add(Plain(prompt(3)))
    one.add(Plain(prompt(5, 50), arrival=1))
    chunks = one.schedule()
    one.commit(chunks)
    assert one.is_settled(chunks) == (tokens == 8)
    assert not one.is_settled(chunks[:1])


def test_removal_at_any_stage_frees_everything_and_may_be_repeated() -> None:
    one = scheduler(num_blocks=3)
    running, waiting = Plain(prompt(9), wanted=5), Plain(prompt(9, 50), arrival=1)
    one.add(running)
    one.add(waiting)
    turn(one)
    for sequence in (running, waiting, running, Plain([1])):
        one.remove(sequence)
    assert (one.running, one.waiting, one.blocks.num_free) == ([], [], 3)
    assert one.schedule() == []


def test_contradicting_settings_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens=3, max_num_seqs=4"):
        SchedulerConfig(4, 3)


class Lives(RuleBasedStateMachine):
    """Random arrivals, aborts and steps on a cache that is far too small."""

    NUM_BLOCKS, SEQS, TOKENS = 7, 3, 9
    HAS_EVEN_ROWS = False

    def __init__(self) -> None:
        super().__init__()
        self.one = scheduler(self.NUM_BLOCKS, self.SEQS, self.TOKENS, has_even_rows=self.HAS_EVEN_ROWS)
        self.alive: list[Plain] = []
        self.arrivals = 0

    @rule(length=st.integers(1, 20), wanted=st.integers(1, 8), priority=st.integers(-1, 1), family=st.integers(0, 2))
    def arrive(self, length: int, wanted: int, priority: int, family: int) -> None:
        """Three families of prompts share prefixes. Nothing that could never fit gets this far."""
        wanted = min(wanted, self.NUM_BLOCKS * SIZE - length)
        sequence = Plain(prompt(length, family * 1000), wanted, priority, self.arrivals)
        self.arrivals += 1
        self.alive.append(sequence)
        self.one.add(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.one.remove(self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1))))

    @rule()
    def step(self) -> None:
        before = {id(s): s.num_tokens - s.num_computed for s in self.alive}
        chunks = turn(self.one)
        assert sum(chunk.length for chunk in chunks) <= self.TOKENS
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        assert all(chunk.length >= 1 for chunk in chunks)
        assert chunks or not self.alive, "something could have been done"
        assert not any(chunk.sequence in self.one.preempted for chunk in chunks)
        assert all(before[id(chunk.sequence)] >= 1 for chunk in chunks)
        self.alive = [s for s in self.alive if len(s.made) < s.wanted]

    @precondition(lambda self: self.alive)
    @rule()
    def drain(self) -> None:
        """Everyone ends within the steps that all tokens, recomputed for every token made, could take."""
        bound = sum((s.num_tokens + s.wanted + 1) * (s.wanted + 1) for s in self.alive) + 10
        for _ in range(bound):
            if not self.alive:
                break
            self.step()
        assert not self.alive, "nobody may wait for ever"
        assert self.one.blocks.num_free == self.NUM_BLOCKS

    @invariant()
    def blocks_add_up(self) -> None:
        blocks, owners = self.one.blocks, {}
        for sequence in self.alive:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            assert len(sequence.blocks) * SIZE >= sequence.num_computed
            for block in sequence.blocks:
                owners[block] = owners.get(block, 0) + 1
        assert owners == blocks._owners
        assert blocks.num_free + len(owners) == self.NUM_BLOCKS
        assert len(self.one.running) <= self.SEQS
        if self.HAS_EVEN_ROWS:
            longest = max((len(s.blocks) for s in self.one.running), default=0)
            assert len(self.one.running) * longest <= self.NUM_BLOCKS, "all rows are as long as the longest"
        assert {id(s) for s in self.alive} == {id(s) for s in (*self.one.running, *self.one.waiting)}

    @invariant()
    def names_tell_the_truth(self) -> None:
        """A named block of a live sequence holds what that sequence computed there."""
        for sequence in self.alive:
            for number, block in enumerate(sequence.blocks):
                name = self.one.blocks._name_of.get(block)
                if name is not None:
                    assert (number + 1) * SIZE <= sequence.num_computed
                    assert name == sequence.block_hashes[number]


class EvenLives(Lives):
    """The same where a short sequence takes as much room as the longest."""

    HAS_EVEN_ROWS = True


TestLives, TestEvenLives = Lives.TestCase, EvenLives.TestCase
TestLives.settings = TestEvenLives.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.heavy
class TestManyLives(Lives.TestCase):
    settings = settings(max_examples=3000, stateful_step_count=80, deadline=None)


@pytest.mark.heavy
class TestManyEvenLives(EvenLives.TestCase):
    settings = settings(max_examples=3000, stateful_step_count=80, deadline=None)


def test_a_crowd_of_equal_rank_all_end() -> None:
    rng, one = random.Random(0), scheduler(num_blocks=9, seqs=8, tokens=12)
    crowd = [Plain(prompt(rng.randint(1, 24), 1000 * n), rng.randint(1, 10), arrival=n) for n in range(60)]
    for sequence in crowd:
        one.add(sequence)
    for _ in range(5000):
        if not (one.running or one.waiting):
            break
        turn(one)
    assert all(len(s.made) == s.wanted for s in crowd)
    assert one.num_preemptions > 10
