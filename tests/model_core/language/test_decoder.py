"""The lean decoder gives transformers' logits, and its cache holds what a plain dictionary would."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from model_core.errors import ConfigError
from model_core.language.decoder import Decoder
from model_core.language.kv_cache import LENGTH_STEP, BatchCache
from model_core.language.rope import MropeLayout, mrope_positions
from tests.model_core import tiny

LAYOUT = MropeLayout(merge_size=2, tokens_per_second=2)


def decoder(model: torch.nn.Module) -> Decoder:
    return Decoder(model.model.language_model, model.lm_head)


def random_sequence(rng: random.Random, length: int) -> tuple[list[int], Tensor, int]:
    """Ids, positions (3, T) with an image's rectangle in the middle, delta."""
    h, w = 2 * rng.randint(1, 3), 2 * rng.randint(1, 3)
    types = [0] * length + [1] * (h * w // 4) + [0] * rng.randint(1, 4)
    positions, delta = mrope_positions(types, [(1, h, w)], [], [], LAYOUT)
    return [rng.randrange(10, 200) for _ in types], positions, delta


def reference_logits(model: torch.nn.Module, ids: list[int], positions: Tensor, delta: int) -> Tensor:
    """transformers' own forward over the whole sequence, (T, V)."""
    extra = torch.arange(positions.shape[1], len(ids)).expand(3, -1) + delta
    full = torch.cat([positions, extra], dim=1)[:, None]
    embeds = model.model.language_model.embed_tokens(torch.tensor([ids]))
    hidden = model.model.language_model(inputs_embeds=embeds, position_ids=full, use_cache=False).last_hidden_state
    return model.lm_head(hidden)[0].float()


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 30, 7, 300]])
@torch.inference_mode()
def test_prefill_and_decode_equal_transformers_with_mixed_lengths(lengths: list[int]) -> None:
    model, rng = tiny.qwen_model(), random.Random(len(lengths))
    lean, sequences = decoder(model), [random_sequence(rng, n) for n in lengths]
    cache = lean.new_cache()
    for ids, positions, delta in sequences:
        row = cache.add_row(len(ids))
        hidden = lean.prefill(model.model.language_model.embed_tokens(torch.tensor(ids)), positions, cache, row)
        expected = reference_logits(model, ids, positions, delta)
        assert torch.allclose(lean.logits(hidden), expected, atol=1e-5)
    grown = [list(ids) for ids, _, _ in sequences]
    for _ in range(5):
        fed = [rng.randrange(10, 200) for _ in grown]
        at = [len(ids) + delta for ids, (_, _, delta) in zip(grown, sequences, strict=True)]
        logits = lean.decode(torch.tensor(fed), torch.tensor(at), cache)
        for row, (ids, (_, positions, delta)) in enumerate(zip(grown, sequences, strict=True)):
            ids.append(fed[row])
            assert torch.allclose(logits[row], reference_logits(model, ids, positions, delta)[-1], atol=1e-5)
    assert cache.lengths == [len(ids) for ids in grown]


@torch.inference_mode()
def test_a_row_decodes_on_after_another_left_and_a_longer_one_came() -> None:
    model, rng = tiny.qwen_model(), random.Random(1)
    lean, sequences = decoder(model), [random_sequence(rng, n) for n in (3, 9, 20)]
    cache = lean.new_cache()
    embed = model.model.language_model.embed_tokens
    for ids, positions, _ in sequences[:2]:
        lean.prefill(embed(torch.tensor(ids)), positions, cache, cache.add_row(len(ids)))
    assert cache.remove_row(0) == 1, "the last row moves into the gap"
    lean.prefill(embed(torch.tensor(sequences[2][0])), sequences[2][1], cache, cache.add_row(len(sequences[2][0])))
    rows = [sequences[1], sequences[2]]
    at = torch.tensor([len(ids) + delta for ids, _, delta in rows])
    logits = lean.decode(torch.tensor([77, 88]), at, cache)
    for row, (ids, positions, delta) in enumerate(rows):
        expected = reference_logits(model, [*ids, (77, 88)[row]], positions, delta)[-1]
        assert torch.allclose(logits[row], expected, atol=1e-5)


@torch.inference_mode()
def test_lora_and_hooks_stay_in_effect() -> None:
    model = tiny.qwen_model()
    lean, (ids, positions, _) = decoder(model), random_sequence(random.Random(2), 4)
    embeds, cache = model.model.language_model.embed_tokens(torch.tensor(ids)), lean.new_cache()
    before = lean.prefill(embeds, positions, cache, cache.add_row(len(ids)))
    model.model.language_model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: args[2] * 2)
    assert not torch.allclose(lean.prefill(embeds, positions, cache, cache.add_row(len(ids))), before, atol=1e-3)


def test_sliding_windows_are_refused() -> None:
    model = tiny.qwen_model()
    model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ConfigError, match=r"sliding-window.*use_sliding_window=true"):
        decoder(model)


class PlainCache:
    """What BatchCache must equal: for each row a list of (K, dh) a layer and a side."""

    def __init__(self) -> None:
        self.rows: list[list[Tensor]] = []  # (L, 2, K, dh) a token

    def remove(self, row: int) -> None:
        self.rows[row] = self.rows[-1]
        self.rows.pop()


def fill(cache: BatchCache, plain: PlainCache, row: int, tokens: Tensor, at: int) -> None:
    """Write tokens (n, L, 2, K, dh) into one row of both."""
    for layer in range(2):
        keys, values = (tokens[:, layer, side].transpose(0, 1) for side in (0, 1))
        whole = cache.write(layer, row, at, keys, values)
        assert whole[0].shape[1] == at + len(tokens)
    cache.lengths[row] = at + len(tokens)
    plain.rows[row] += list(tokens)


def append(cache: BatchCache, plain: PlainCache, generator: torch.Generator) -> None:
    """One token for every row of both, as a decode step does."""
    cache.reserve_next()
    new = torch.randn(len(plain.rows), 2, 2, 2, 4, generator=generator)
    slots, length = torch.tensor(cache.lengths), max(cache.lengths) + 1
    for layer in range(2):
        keys, values = cache.append(layer, slots, new[:, layer, 0], new[:, layer, 1], length)
        assert keys.shape == values.shape == (len(plain.rows), 2, length, 4)
    cache.lengths = [n + 1 for n in cache.lengths]
    for row, token in zip(plain.rows, new, strict=True):
        row.append(token)


def check(cache: BatchCache, plain: PlainCache) -> None:
    assert cache.lengths == [len(row) for row in plain.rows]
    assert len(cache) == len(plain.rows)
    assert (cache.num_bytes == 0) == (not plain.rows)
    for number, row in enumerate(plain.rows):
        held = cache._store[:, :, number, :, : len(row)].permute(3, 0, 1, 2, 4)
        assert torch.equal(held, torch.stack(row))


@pytest.mark.parametrize("seed", range(8))
def test_cache_equals_a_plain_model_under_random_operations(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cache = BatchCache(2, 2, 4, device=torch.device("cpu"), dtype=torch.float32)
    plain = PlainCache()
    for _ in range(60):
        action = rng.choice(["add", "add", "append", "append", "remove"])
        if action == "add":
            n = rng.choice([1, 2, rng.randint(3, 40), LENGTH_STEP - 1, LENGTH_STEP, LENGTH_STEP + 1])
            row = cache.add_row(n)
            assert row == len(plain.rows)
            plain.rows.append([])
            fill(cache, plain, row, torch.randn(n, 2, 2, 2, 4, generator=generator), 0)
        elif action == "append" and plain.rows:
            append(cache, plain, generator)
        elif action == "remove" and plain.rows:
            row = rng.randrange(len(plain.rows))
            assert cache.remove_row(row) == len(plain.rows) - 1
            plain.remove(row)
        check(cache, plain)


def test_a_row_may_be_written_in_chunks_and_reads_up_to_its_own_end() -> None:
    cache, plain = BatchCache(2, 2, 4, device=torch.device("cpu"), dtype=torch.float32), PlainCache()
    row = cache.add_row(10)
    plain.rows.append([])
    fill(cache, plain, row, torch.randn(6, 2, 2, 2, 4), 0)
    fill(cache, plain, row, torch.randn(4, 2, 2, 2, 4), 6)
    check(cache, plain)


def test_capacity_grows_in_steps_and_falls_back_when_empty() -> None:
    cache = BatchCache(2, 2, 4, device=torch.device("cpu"), dtype=torch.float32)
    sizes = []
    for _ in range(9):
        cache.add_row(1)
        sizes.append(cache.num_bytes)
    assert len(set(sizes)) == 5, "1, 2, 4, 8, 16 rows"
    for _ in range(9):
        cache.remove_row(0)
    assert cache.num_bytes == 0
    cache.add_row(1)
    assert cache.num_bytes == sizes[0]
