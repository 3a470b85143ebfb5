"""Rows sampled together are to the bit what each is alone, by numpy or by torch, and what the full definition says."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from model_core.engine import sampler
from model_core.engine.draws import best, column_masses, mass_bits, pad, pick, to_mass, weigh
from model_core.engine.row_arrays import Arrays, DeviceArrays, HostArrays
from model_core.engine.sampler import Sampled, SamplerState, sample_batch
from model_core.engine.sampler_slab import Row, Slab
from model_core.engine.sampler_state import SeenTokens
from model_core.errors import RequestFailedError
from model_core.types import SamplingParams

EOS = frozenset({3})
DEVICE = DeviceArrays(torch.device("cpu"))
BOTH = pytest.mark.parametrize("xp", [HostArrays(), DEVICE], ids=["numpy", "torch"])


def some_options(rng: random.Random, vocab_size: int) -> dict:
    found: dict = {"seed": rng.randrange(99), "temperature": rng.choice([0.0, 0.3, 1.0, 1.7])}
    pick_one = {
        "top_k": [1, 7, 50, 300, vocab_size], "top_p": [0.05, 0.5, 0.9, 0.9999], "min_p": [0.001, 0.1],
        "logprobs": [0, 1, 5], "frequency_penalty": [0.7, -1.0], "presence_penalty": [0.4],
        "repetition_penalty": [1.3, 0.7], "min_tokens": [2], "logit_bias": [{0: 3.0, vocab_size - 1: -5.0}],
    }  # fmt: skip
    return found | {name: rng.choice(values) for name, values in pick_one.items() if rng.random() < 0.3}


def some_logits(rows: int, vocab_size: int, seed: int) -> Tensor:
    """Sharp, flat, and with many equal values, in turn; every third row has tokens that can't come."""
    torch.manual_seed(seed)
    logits = torch.randn(rows, vocab_size) * torch.tensor([6.0, 0.5, 2.0]).repeat(rows)[:rows, None]
    logits[2::3] = (logits[2::3] * 2).round() / 2
    logits[2::3, ::5] = -math.inf
    return logits


def run(xp: Arrays, logits: list[Tensor], states: list[SamplerState]) -> list[list[object]]:
    turns = []
    for rows in logits:
        found = sample_batch(rows, states, xp)
        for state, one in zip(states, found, strict=True):
            assert isinstance(one, Sampled), one
            state.push(one.token_id)
        turns.append(found)
    return turns


@pytest.mark.parametrize("vocab_size", [5, 50, 1003, 40_000])
def test_a_row_is_its_own_in_any_company_and_on_either_side(vocab_size: int) -> None:
    rng, count = random.Random(vocab_size), 12
    options = [some_options(rng, vocab_size) for _ in range(count)]
    logits = [some_logits(count, vocab_size, turn) for turn in range(3)]

    def states(rows: list[int]) -> list[SamplerState]:
        return [SamplerState(SamplingParams(**options[row]), (1, 2, 2), EOS) for row in rows]

    together = run(HostArrays(), logits, states(list(range(count))))
    for rows in [[row] for row in range(count)] + [rng.sample(range(count), 5), list(range(count))[::-1]]:
        for xp in (HostArrays(), DEVICE):
            found = run(xp, [turn[rows] for turn in logits], states(rows))
            assert found == [[turn[row] for row in rows] for turn in together]


def test_exp_gives_a_number_the_same_result_wherever_it_stands() -> None:
    torch.manual_seed(0)
    numbers = -torch.rand(200_000) * 40
    expected = numbers.exp()
    for start, count in ((1, 199_999), (2, 7), (3, 64), (5, 1), (8, 50_000), (13, 4097), (100_001, 33)):
        part = numbers[start : start + count].clone()
        assert torch.equal(part.exp_(), expected[start : start + count])
    assert torch.equal(numbers.view(8, -1)[3:5].clone().exp_(), expected.view(8, -1)[3:5])


def defined(logits: Tensor, params: SamplingParams, uniform: float) -> int:
    """Top-k, min-p and top-p by sorting everything; whole numbers for weights, as the sampler has them."""
    padded = pad(HostArrays(), logits[None].numpy())
    highest = padded.max(1)
    temperature, least = np.float32([params.temperature]), np.float32([params.min_p])
    weights = weigh(HostArrays(), padded, highest, temperature, least)
    total = int(column_masses(HostArrays(), weights).sum())
    masses = to_mass(HostArrays(), weights[0], padded.shape[1]).tolist()
    order = sorted(range(len(logits)), key=lambda token: (-logits[token].item(), token))
    if 0 < params.top_k < len(logits):
        order = order[: params.top_k]
        total = sum(masses[token] for token in order)
    kept, before = [], 0
    for token in order:
        if before >= params.top_p * total:
            break
        kept.append(token)
        before += masses[token]
    target = min(int(uniform * before), before - 1)
    for token in kept:
        target -= masses[token]
        if target < 0:
            return token
    raise AssertionError("a number in [0, 1) always falls on a token")


@BOTH
@pytest.mark.parametrize("vocab_size", [40, 700, 33_000])
def test_cuts_equal_the_full_definition(xp: Arrays, vocab_size: int) -> None:
    """Sharp rows, which a few candidates settle, and flat ones, which take all; ties at every border."""
    rng = random.Random(vocab_size)
    for turn in range(4):
        logits = some_logits(3, vocab_size, turn)
        options = [
            {"top_p": rng.choice([0.02, 0.7, 0.95, 0.999])},
            {"top_k": rng.choice([k for k in (1, 2, 30, 200, 600) if k < vocab_size])},
            {"top_p": rng.choice([0.3, 0.9]), "top_k": rng.choice([5, 60, 400]), "min_p": rng.choice([0.0, 0.02])},
        ]
        for shift in range(3):
            params = [SamplingParams(temperature=0.8, seed=turn, **options[(n + shift) % 3]) for n in range(3)]
            states = [SamplerState(one, (), EOS) for one in params]
            numbers = [SamplerState(one, (), EOS).draw() for one in params]
            expected = [defined(*row) for row in zip(logits, params, numbers, strict=True)]
            assert [one.token_id for one in sample_batch(logits, states, xp)] == expected


@BOTH
def test_a_draw_from_all_follows_the_distribution(xp: Arrays) -> None:
    torch.manual_seed(1)
    logits, count = torch.randn(1, 200) * 2, 20_000
    rows = xp.of(torch.from_numpy(pad(HostArrays(), logits.numpy()).repeat(count, 0)))
    weights = weigh(xp, rows, xp.highest(rows)[0])
    numbers = xp.upload((np.arange(count) + 0.5) / count)
    found = np.bincount(np.asarray(pick(xp, weights, column_masses(xp, weights), numbers)), minlength=200)
    expected = logits[0].double().softmax(-1).numpy() * count
    assert np.abs(found - expected).max() < 4, "even numbers give even shares, but for each column's two ends"
    assert len(found) == 200


@BOTH
def test_the_mass_of_a_row_and_its_best(xp: Arrays) -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, 64 * 700) * 3
    rows = xp.of(logits)
    total = column_masses(xp, weigh(xp, rows, xp.highest(rows)[0])).sum(-1)
    logsum = np.log(np.asarray(total) / 2 ** mass_bits(64 * 700)) + logits.amax(1).numpy()
    assert logsum == pytest.approx(logits.double().logsumexp(-1).numpy(), abs=1e-6)
    values, tokens = best(xp, rows, 100)
    expected = logits.topk(100)
    assert np.array_equal(np.asarray(values), expected.values.numpy())
    assert np.array_equal(np.asarray(tokens), expected.indices.numpy())


class Counting(DeviceArrays):
    fetched = 0

    def fetch(self, arrays: dict) -> dict:
        self.fetched += 1
        return super().fetch(arrays)


def test_a_step_comes_to_the_host_once() -> None:
    xp = Counting(torch.device("cpu"))
    options = [{}, {"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.9}, {"presence_penalty": 0.5}, {"top_k": 3}]
    logits = some_logits(1, 5000, 0).repeat(5, 1)
    sample_batch(logits, [SamplerState(SamplingParams(**one), (), EOS) for one in options], xp)
    assert xp.fetched == 1


@BOTH
def test_rows_that_break_end_alone(xp: Arrays) -> None:
    """NaN, no token left, and a penalty so small that a logit divided by it is no number any more."""
    logits = some_logits(1, 300, 0).repeat(6, 1)
    logits[1, 7] = math.nan
    logits[4] = -math.inf
    drawn = {"temperature": 0.9, "seed": 3, "top_p": 0.9, "logprobs": 2}
    options = [drawn, drawn, drawn | {"repetition_penalty": 1e-45}, drawn, drawn, {"temperature": 1.0, "seed": 3}]
    states = [SamplerState(SamplingParams(**one), (1, 2, int(logits[0].argmax())), EOS) for one in options]
    found = sample_batch(logits, states, xp)
    kinds = [type(one) for one in found]
    broken = RequestFailedError
    assert kinds == [Sampled, broken, broken, Sampled, broken, Sampled]
    assert found[0] == found[3]


def test_an_error_of_all_rows_leaves_each_to_be_tried_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(Slab):
        def __init__(self, xp: Arrays, batch: object, peaks: dict, rows: list[Row]) -> None:
            if len(rows) > 1 or rows[0].index == 2:
                raise RuntimeError("out of memory")
            super().__init__(xp, batch, peaks, rows)

    logits = some_logits(4, 100, 0)
    options = [{"temperature": 1.0, "seed": n} for n in range(4)]
    expected = sample_batch(logits, [SamplerState(SamplingParams(**one), (), EOS) for one in options])
    monkeypatch.setattr(sampler, "Slab", Small)
    found = sample_batch(logits, [SamplerState(SamplingParams(**one), (), EOS) for one in options])
    assert isinstance(found[2], RuntimeError)
    assert [found[n] for n in (0, 1, 3)] == [expected[n] for n in (0, 1, 3)], "with the same numbers"


def test_seen_tokens_grow() -> None:
    seen = SeenTokens([5, 5, 9])
    for token in [*range(300), 9, 9]:
        seen.push(token)
    counts = dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True))
    assert counts == {token: 3.0 if token == 9 else 1.0 for token in range(300)}
    assert SeenTokens([4]).counts.tolist() == [0.0]
