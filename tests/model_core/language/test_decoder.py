"""The lean decoder gives transformers' logits, packed and in chunks."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from model_core.errors import ConfigError
from model_core.language.decoder import Decoder
from model_core.language.kv_cache import RowStore, Work
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


def prefill(lean: Decoder, store: RowStore, key: object, ids: list[int], positions: Tensor, start: int = 0) -> Tensor:
    """Hidden states of ids[start:], one chunk."""
    embeds = lean.embed(torch.tensor(ids[start:]))
    return lean.forward(embeds, positions[:, start:], store.begin([Work(key, start, len(ids) - start)]))


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 30, 7, 300]])
@torch.no_grad()
def test_packed_prefill_and_decode_equal_transformers_with_mixed_lengths(lengths: list[int]) -> None:
    model, rng = tiny.qwen_model(), random.Random(len(lengths))
    lean, sequences = decoder(model), [random_sequence(rng, n) for n in lengths]
    store = RowStore(lean.cache_shape)
    for number in range(len(sequences)):
        store.open(number)
    work = [Work(n, 0, len(ids)) for n, (ids, _, _) in enumerate(sequences)]
    embeds = lean.embed(torch.tensor([i for ids, _, _ in sequences for i in ids]))
    hidden = lean.forward(embeds, torch.cat([p for _, p, _ in sequences], dim=1), store.begin(work))
    for part, (ids, positions, delta) in zip(hidden.split([w.length for w in work]), sequences, strict=True):
        assert torch.allclose(lean.logits(part), reference_logits(model, ids, positions, delta), atol=1e-5)
    grown = [list(ids) for ids, _, _ in sequences]
    for _ in range(5):
        fed = [rng.randrange(10, 200) for _ in grown]
        at = [len(ids) + delta for ids, (_, _, delta) in zip(grown, sequences, strict=True)]
        attend = store.begin([Work(n, len(ids), 1) for n, ids in enumerate(grown)])
        logits = lean.logits(lean.forward(lean.embed(torch.tensor(fed)), torch.tensor(at).expand(3, -1), attend))
        for row, (ids, (_, positions, delta)) in enumerate(zip(grown, sequences, strict=True)):
            ids.append(fed[row])
            assert torch.allclose(logits[row], reference_logits(model, ids, positions, delta)[-1], atol=1e-5)


@pytest.mark.parametrize("cut", [1, 5, 16])
@torch.no_grad()
def test_a_prompt_in_two_chunks_equals_one(cut: int) -> None:
    model = tiny.qwen_model()
    lean, (ids, positions, delta) = decoder(model), random_sequence(random.Random(cut), 18)
    store = RowStore(lean.cache_shape)
    store.open("a")
    first = prefill(lean, store, "a", ids[:cut], positions[:, :cut])
    second = prefill(lean, store, "a", ids, positions, cut)
    whole = lean.logits(torch.cat([first, second]))
    assert torch.allclose(whole, reference_logits(model, ids, positions, delta), atol=1e-5)


@torch.no_grad()
def test_lora_and_hooks_stay_in_effect() -> None:
    model = tiny.qwen_model()
    lean, (ids, positions, _) = decoder(model), random_sequence(random.Random(2), 4)
    store = RowStore(lean.cache_shape)
    store.open("a")
    before = prefill(lean, store, "a", ids, positions)
    model.model.language_model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: args[2] * 2)
    assert not torch.allclose(prefill(lean, store, "a", ids, positions), before, atol=1e-3)


def test_sliding_windows_are_refused() -> None:
    model = tiny.qwen_model()
    model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ConfigError, match=r"sliding-window.*use_sliding_window=true"):
        decoder(model)
