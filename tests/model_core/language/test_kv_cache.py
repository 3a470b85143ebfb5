"""A store answers what plain attention over a list of tokens would, whatever mix of work a step packs."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from model_core.language.kv_cache import LENGTH_STEP, CacheShape, KVStore, RowStore, Work

SHAPE = CacheShape(num_layers=2, num_kv_heads=2, head_dim=8, device=torch.device("cpu"), dtype=torch.float32)
HEADS, BLOCK = 4, 4


def plain_attention(query: Tensor, tokens: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The last n queries (n, H, dh), each over all (key, value) pairs (K, dh) up to its own -> (n, H * dh)."""
    keys, values = (torch.stack([t[side] for t in tokens]).repeat_interleave(2, dim=1) for side in (0, 1))  # (T, H, dh)
    scores = torch.einsum("nhd,thd->hnt", query, keys) / SHAPE.head_dim**0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(tokens) - len(query) + 1)
    return torch.einsum("hnt,thd->nhd", scores.masked_fill(later, -torch.inf).softmax(-1), values).flatten(1)


class Bench:
    """A store and its plain twin: {key: {layer: [(key, value), ...]}}."""

    def __init__(self, store: KVStore, seed: int) -> None:
        self.store, self.generator = store, torch.Generator().manual_seed(seed)
        self.plain: dict[str, list[list[tuple[Tensor, Tensor]]]] = {}

    def open(self, key: str, cached: list[int] | None = None, tokens: list | None = None) -> None:
        self.store.open(key, cached or [])
        self.plain[key] = tokens or [[] for _ in range(SHAPE.num_layers)]

    def close(self, key: str) -> None:
        self.store.close(key)
        del self.plain[key]

    def length(self, key: str) -> int:
        return len(self.plain[key][0])

    def step(self, wanted: dict[str, int], blocks: dict[str, list[int]] | None = None) -> None:
        """Give each sequence so many random tokens, in one packed step, and compare every layer."""
        ordered = sorted(wanted.items(), key=lambda pair: pair[1] != 1)
        work = [Work(key, self.length(key), n, (blocks or {}).get(key, ())) for key, n in ordered]
        attend, total = self.store.begin(work), sum(wanted.values())
        for layer in range(SHAPE.num_layers):
            query = torch.randn(total, HEADS, SHAPE.head_dim, generator=self.generator)
            key, value = torch.randn(2, total, SHAPE.num_kv_heads, SHAPE.head_dim, generator=self.generator)
            found, at = attend(layer, query, key, value), 0
            for w in work:
                tokens = self.plain[str(w.key)][layer]
                here = slice(at, at + w.length)
                tokens.extend(zip(key[here], value[here], strict=True))
                assert torch.allclose(found[here], plain_attention(query[here], tokens), atol=1e-5), w
                at += w.length


@pytest.mark.parametrize("seed", range(6))
def test_any_mix_of_work_equals_plain_attention(seed: int) -> None:
    rng = random.Random(seed)
    store = RowStore(SHAPE)
    bench = Bench(store, seed)
    for number in range(40):
        if len(bench.plain) < 5 and rng.random() < 0.5:
            bench.open(f"s{number}")
        if bench.plain and rng.random() < 0.2:
            bench.close(rng.choice(list(bench.plain)))
        members = [key for key in bench.plain if rng.random() < 0.8]
        wanted = {
            key: 1 if bench.length(key) and rng.random() < 0.7 else rng.choice([1, 2, 7, LENGTH_STEP])
            for key in members
        }
        if wanted:
            bench.step(wanted)
        assert store.num_open == len(bench.plain)
        assert (store.num_bytes == 0) == (not bench.plain)


def test_a_repeated_step_writes_the_same_places() -> None:
    """A step that failed half-way is run again, in parts."""
    store = RowStore(SHAPE)
    bench = Bench(store, 0)
    bench.open("a")
    bench.step({"a": 3})
    store.begin([Work("a", 3, 1)])  # failed before its attention
    bench.step({"a": 1})
    bench.step({"a": 2})


def test_kept_blocks_come_back_in_another_row() -> None:
    store = RowStore(SHAPE, num_blocks=8, block_size=BLOCK)
    bench = Bench(store, 1)
    bench.open("first")
    bench.step({"first": 10})
    store.keep("first", 0, [5, 2])
    kept = [layer[: 2 * BLOCK] for layer in bench.plain["first"]]
    bench.close("first")
    bench.open("other")
    bench.step({"other": 3})
    bench.open("second", [5, 2], [list(layer) for layer in kept])
    bench.step({"second": 5, "other": 1})
    bench.step({"second": 1, "other": 1})
    store.keep("second", 2, [7])
    longer = [layer[: 3 * BLOCK] for layer in bench.plain["second"]]
    bench.open("third", [5, 2, 7], [list(layer) for layer in longer])
    bench.step({"third": 1, "second": 1})


def test_capacity_grows_in_steps_and_falls_back_when_empty() -> None:
    store, sizes = RowStore(SHAPE), []
    for number in range(9):
        store.open(number)
        sizes.append(store.num_bytes)
    assert len(set(sizes)) == 5, "1, 2, 4, 8, 16 rows"
    for number in range(9):
        store.close(number)
    store.close("never seen")
    assert store.num_bytes == 0
    store.open("again")
    assert store.num_bytes == sizes[0]


@pytest.mark.parametrize("first_closed", ["poisoned", "other"])
def test_what_a_closed_sequence_left_reaches_nobody(first_closed: str) -> None:
    """A NaN in a closed row came through the mask of a shorter sequence in that row: 0 * NaN is NaN."""
    store = RowStore(SHAPE)
    bench = Bench(store, 5)
    for key in ("long", "other", "poisoned"):
        bench.open(key)
    bench.step({"long": 30, "other": 3, "poisoned": 20})
    attend = store.begin([Work("poisoned", 20, 6)])
    nan = torch.full((6, SHAPE.num_kv_heads, SHAPE.head_dim), float("nan"))
    for layer in range(SHAPE.num_layers):
        attend(layer, torch.zeros(6, HEADS, SHAPE.head_dim), nan, nan)
    for key in sorted(("poisoned", "other"), key=lambda k: k != first_closed):
        bench.close(key)
        bench.step({"long": 1})
    for key in ("new", "newer"):
        bench.open(key)
    bench.step({"new": 2, "newer": 5})
    bench.step({"long": 1, "new": 1, "newer": 1})
