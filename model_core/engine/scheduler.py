"""What the next step computes: one budget of tokens, running sequences first, prompts in chunks.

In: sequences that are ready (their pictures encoded). Out: `Chunk`s. It owns their blocks and how far they
are; it knows no tensor. Rank is (priority, arrival): lower goes first. A better rank takes no running
sequence's seat, only its blocks when there are none left; whoever loses them is computed again later.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from model_core.engine.block_manager import BlockManager
from model_core.errors import ConfigError


class Schedulable(Protocol):
    """num_computed: tokens whose keys and values exist; num_cached: those of them that came as a prefix
    hit when it was first admitted, -1 before that."""

    arrival: int
    num_computed: int
    num_cached: int
    blocks: list[int]
    block_hashes: list[bytes]

    @property
    def priority(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """Prompt and generated: what must be computed before the next token can be chosen."""

    def extend_hashes(self, block_size: int) -> None:
        """Name every full block of the tokens it has now."""


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True, slots=True)
class Chunk(Generic[S]):
    """`length` tokens of a sequence from `start` on. After the last chunk a token can be chosen."""

    sequence: S
    start: int
    length: int

    @property
    def is_last(self) -> bool:
        return self.start + self.length == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int
    max_num_batched_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise ConfigError(
                "a step can't hold one token of every sequence",
                value=f"max_num_batched_tokens={self.max_num_batched_tokens}, max_num_seqs={self.max_num_seqs}",
                allowed="max_num_seqs of at least 1, max_num_batched_tokens of at least max_num_seqs",
            )


def rank(sequence: Schedulable) -> tuple[int, int]:
    return sequence.priority, sequence.arrival


class Scheduler(Generic[S]):
    """`preempted`: those that the last `schedule` took out; `num_prefix_*` count tokens, as vLLM does.

    `has_even_rows`: a running sequence takes as much of the cache as the longest does.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, *, has_even_rows: bool = False) -> None:
        self.config, self.blocks, self._has_even_rows = config, blocks, has_even_rows
        self.running: list[S] = []
        self.waiting: list[S] = []  # by rank
        self.preempted: list[S] = []
        self.num_preemptions = self.num_prefix_queries = self.num_prefix_hits = 0

    def add(self, sequence: S) -> None:
        insort(self.waiting, sequence, key=rank)

    def remove(self, sequence: S) -> None:
        """At any stage, as often as one likes; its blocks are free after this."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self.blocks.free(sequence.blocks)

    def schedule(self) -> list[Chunk[S]]:
        """The next step's work; nothing of it is done until `commit`."""
        self.preempted = []
        planned: dict[int, Chunk[S]] = {}  # by id: sequences need not be hashable
        budget = self.config.max_num_batched_tokens
        # Decodes first, then prompts that are under way: whoever has begun to answer goes on.
        for sequence in sorted(self.running, key=lambda s: s.num_tokens - s.num_computed > 1):
            if budget == 0:
                break
            if sequence in self.preempted:
                continue
            length = min(budget, sequence.num_tokens - sequence.num_computed)
            budget += self._make_room(sequence, sequence.num_computed + length, planned)
            if sequence not in self.preempted:
                planned[id(sequence)] = Chunk(sequence, sequence.num_computed, length)
                budget -= length
        # Whoever just lost its blocks must not take them back in the same step.
        while budget and self.waiting and not self.preempted and len(self.running) < self.config.max_num_seqs:
            chunk = self._admit(self.waiting[0], budget)
            if chunk is None:
                break  # the first in line keeps its place: nobody overtakes it
            planned[id(chunk.sequence)] = chunk
            budget -= chunk.length
        return list(planned.values())

    def commit(self, chunks: Sequence[Chunk[S]]) -> None:
        """These are computed: move on, and name the blocks that are full now."""
        size = self.blocks.block_size
        for chunk in chunks:
            sequence = chunk.sequence
            first = chunk.start // size
            sequence.num_computed = chunk.start + chunk.length
            full = sequence.num_computed // size
            if full > first:
                sequence.extend_hashes(size)
                for block, name in zip(sequence.blocks[first:full], sequence.block_hashes[first:full], strict=False):
                    self.blocks.register(block, name)

    def is_settled(self, chunks: Sequence[Chunk[S]]) -> bool:
        """Whether these chunks, of a step that is under way, end in one token for everybody who runs, and nobody can
        join them: then the next step is theirs again, as long as each of them goes on."""
        if len(chunks) != len(self.running) or not all(chunk.is_last for chunk in chunks):
            return False
        return not self.waiting or len(self.running) >= self.config.max_num_seqs

    def plan_behind(self, chunks: Sequence[Chunk[S]]) -> list[Chunk[S]]:
        """The step after that of these settled chunks, before their tokens are known; nothing if somebody would have
        to make room for it. Who got a block before another found none keeps it: it needs it for that token anyway."""
        behind = [Chunk(chunk.sequence, chunk.start + chunk.length, 1) for chunk in chunks]
        fits = all(
            self._has_rows(chunk.start + 1) and self.blocks.allocate(chunk.sequence.blocks, chunk.start + 1)
            for chunk in behind
        )
        return behind if fits else []

    def _make_room(self, sequence: S, num_tokens: int, planned: dict[int, Chunk[S]]) -> int:
        """Blocks for so many tokens, taken from the worst in rank if need be, itself included.

        Returns the tokens of planned work that fell away with them.
        """
        given_back = 0
        is_longer = -(-num_tokens // self.blocks.block_size) > len(sequence.blocks)
        while is_longer and not (self._has_rows(num_tokens) and self.blocks.allocate(sequence.blocks, num_tokens)):
            victim = max(self.running, key=rank)
            dropped = planned.pop(id(victim), None)
            given_back += dropped.length if dropped else 0
            self._preempt(victim)
            if victim is sequence:
                break
        return given_back

    def _has_rows(self, num_tokens: int, *, is_new: bool = False) -> bool:
        """Is there room if one of the running, or one more, holds so many tokens?"""
        if not self._has_even_rows:
            return True
        longest = max([-(-num_tokens // self.blocks.block_size), *(len(s.blocks) for s in self.running)])
        return (len(self.running) + is_new) * longest <= self.blocks.num_blocks

    def _preempt(self, victim: S) -> None:
        """Its full blocks stay known, so that most of it comes back as a prefix hit."""
        self.running.remove(victim)
        self.blocks.free(victim.blocks)
        victim.num_computed = 0
        self.preempted.append(victim)
        self.num_preemptions += 1
        insort(self.waiting, victim, key=rank)

    def _admit(self, sequence: S, budget: int) -> Chunk[S] | None:
        """The first chunk of the first in line, behind what is known of its prefix; None if there is no room."""
        size = self.blocks.block_size
        sequence.extend_hashes(size)
        usable = (sequence.num_tokens - 1) // size  # one token at least is computed, or there is nothing to choose from
        cached = self.blocks.match(sequence.block_hashes[:usable])
        start = len(cached) * size
        length = min(budget, sequence.num_tokens - start)
        if not self._has_rows(start + length, is_new=True):
            return None
        if not self.blocks.allocate(sequence.blocks, start + length, cached):
            return None
        self.waiting.pop(0)
        self.running.append(sequence)
        sequence.num_computed = start
        if sequence.num_cached < 0:
            sequence.num_cached = start
        self.num_prefix_queries += sequence.num_tokens
        self.num_prefix_hits += start
        return Chunk(sequence, start, length)
