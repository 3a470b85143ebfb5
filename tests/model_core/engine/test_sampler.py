"""Logits to tokens as the parameters say, the same for a row alone and in any batch."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from model_core.engine.logit_changes import apply_changes, change_of
from model_core.engine.row_arrays import HostArrays
from model_core.engine.sampler import Sampled, SamplerState, build_generator, check_params, sample_batch
from model_core.errors import InvalidRequestError, RequestFailedError
from model_core.types import SamplingParams

EOS = frozenset({3})


def state(prompt: tuple[int, ...] = (), **options: object) -> SamplerState:
    return SamplerState(SamplingParams(**options), prompt, EOS)


def choose(logits: Tensor, one: SamplerState) -> int:
    (found,) = sample_batch(logits[None], [one])
    assert isinstance(found, Sampled), found
    return found.token_id


def naive(logits: list[float], params: SamplingParams) -> list[float]:
    """Temperature, top-k, min-p, top-p over plain lists."""
    scaled = [x / params.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if params.top_k:
        order = order[: params.top_k]
    weights = {i: 2.718281828459045 ** (scaled[i] - scaled[order[0]]) for i in order}
    weights = {i: w for i, w in weights.items() if w >= params.min_p}
    total, kept, mass = sum(weights.values()), {}, 0.0
    for i, w in weights.items():  # in falling order
        if mass >= params.top_p * total:
            break
        kept[i], mass = w, mass + w
    return [kept.get(i, 0.0) / mass for i in range(len(logits))]


LOGITS = torch.tensor([1.0, 3.0, 0.2, 2.5, -1.0, 2.0, -4.0])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0}, {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_k": 99}, {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 0.01}, {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.8, "min_p": 0.1},
    ],
)  # fmt: skip
def test_draws_follow_the_naive_distribution(options: dict[str, float]) -> None:
    params = SamplingParams(seed=0, **options)
    state, n = SamplerState(params, (), frozenset()), 4000
    counts = Counter(choose(LOGITS, state) for _ in range(n))
    for token, expected in enumerate(naive(LOGITS.tolist(), params)):
        seen = counts[token] / n
        assert expected > 0.0 or seen == 0.0
        assert abs(seen - expected) <= 4 * (expected * (1 - expected) / n) ** 0.5


def test_greedy_is_the_best_token_and_needs_no_generator() -> None:
    params = SamplingParams(temperature=0.0, top_k=2, top_p=0.1, seed=5)
    assert build_generator(params) is None
    assert choose(LOGITS, SamplerState(params, (), frozenset())) == 1


def draws(seed: int | None, logits: Tensor = LOGITS, n: int = 24) -> list[int]:
    state = SamplerState(SamplingParams(temperature=1.0, seed=seed), (), frozenset())
    return [choose(logits, state) for _ in range(n)]


def test_a_seed_repeats_and_others_differ() -> None:
    torch.manual_seed(0)
    first = draws(7)
    torch.manual_seed(1)
    assert draws(7) == first, "the global generator plays no part"
    assert draws(8) != first
    assert draws(-3) == draws(-3), "negative seeds are allowed"
    assert draws(None) != draws(None)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([0.0, float("-inf"), 0.0, float("-inf")])
    assert set(draws(0, logits, 200)) == {0, 2}


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-6])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    """Dividing by it gave infinities, and the sampler's error took the engine down with every request."""
    params = SamplingParams(temperature=temperature, seed=1)
    assert choose(torch.tensor([0.1, 3.0, 2.9]), SamplerState(params, (), frozenset())) == 1


def plain_change(logits: list[float], one: SamplerState) -> list[float]:
    """Bias, minimum length and penalties, one token after the other."""
    p, out = one.params, list(logits)
    for token in range(len(out)):
        out[token] += p.logit_bias.get(token, 0.0)
        if one.num_generated < p.min_tokens and (token in EOS or token in p.stop_token_ids):
            out[token] = -math.inf
        if token in one._prompt_ids or one.counts[token]:
            out[token] = out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
        out[token] -= one.counts[token] * p.frequency_penalty
        out[token] -= p.presence_penalty if one.counts[token] else 0.0
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {0: 5.0, 6: -2.5}}, {"min_tokens": 5}, {"min_tokens": 5, "stop_token_ids": (1, 5)},
        {"repetition_penalty": 1.7}, {"repetition_penalty": 0.4}, {"frequency_penalty": 0.7},
        {"frequency_penalty": -1.5}, {"presence_penalty": 1.1},
        {"presence_penalty": -0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "logit_bias": {1: 1.0}},
    ],
)  # fmt: skip
def test_changes_equal_the_plain_ones(options: dict) -> None:
    one = state((0, 4), **options)
    for token in (1, 1, 5, 2):
        one.push(token)
    found = apply_changes(HostArrays(), LOGITS[None].numpy(), [change_of(one)])[0]
    assert found.tolist() == pytest.approx(plain_change(LOGITS.tolist(), one), abs=1e-6)


def test_a_bias_forces_and_forbids() -> None:
    assert choose(LOGITS, state(logit_bias={6: 100.0})) == 6
    assert choose(LOGITS, state(logit_bias={1: -100.0})) == 3


def test_no_end_before_the_least_number_of_tokens() -> None:
    one, logits = state(min_tokens=2), torch.tensor([0.0, 1.0, 0.0, 9.0])
    chosen = []
    for _ in range(3):
        chosen.append(choose(logits, one))
        one.push(chosen[-1])
    assert chosen == [1, 1, 3]
    assert choose(logits, state(min_tokens=2, ignore_eos=True)) == 3, "an ignored end is a token like any other"


def test_logprobs_are_of_the_raw_distribution_best_first() -> None:
    (found,) = sample_batch(LOGITS[None], [state(logprobs=3, logit_bias={6: 100.0})])
    expected = LOGITS.log_softmax(-1)
    assert found.token_id == found.logprob.token_id == 6
    assert found.logprob.logprob == pytest.approx(float(expected[6]))
    assert [token for token, _ in found.logprob.top] == [1, 3, 5]
    assert [value for _, value in found.logprob.top] == pytest.approx(expected[[1, 3, 5]].tolist())
    (bare,) = sample_batch(LOGITS[None], [state(logprobs=0)])
    assert bare.logprob.top == ()
    (tied,) = sample_batch(torch.tensor([[2.0, 5.0, 5.0, 5.0]]), [state(logprobs=3)])
    assert [token for token, _ in tied.logprob.top] == [1, 2, 3]


def test_a_row_is_the_same_alone_and_among_others() -> None:
    torch.manual_seed(3)
    rows = torch.randn(8, 50)
    options = [
        {}, {"temperature": 1.0, "seed": 1}, {"temperature": 0.7, "seed": 2, "top_p": 0.8}, {"logprobs": 2},
        {"temperature": 1.3, "seed": 3, "top_k": 9, "frequency_penalty": 0.5}, {"min_tokens": 3},
        {"logit_bias": {4: 9}},
        {"temperature": 1.0, "seed": 4, "min_p": 0.1, "logprobs": 5},
    ]  # fmt: skip
    alone = [[sample_batch(row[None], [one])[0] for _ in range(5)]
             for row, one in ((rows[i], state(**o)) for i, o in enumerate(options))]  # fmt: skip
    together = [state(**o) for o in options]
    for turn in range(5):
        assert sample_batch(rows, together) == [found[turn] for found in alone]


def test_a_row_that_is_not_finite_fails_alone() -> None:
    rows = LOGITS.repeat(4, 1)
    rows[1, 2], rows[2, 0] = math.nan, math.inf
    found = sample_batch(rows, [state(), state(), state(temperature=1.0, seed=1), state()])
    assert [type(one) for one in found] == [Sampled, RequestFailedError, RequestFailedError, Sampled]


class Allowing:
    """A grammar that never moves."""

    def __init__(self, *ids: int) -> None:
        self._mask = torch.zeros(7, dtype=torch.bool)
        self._mask[list(ids)] = True

    def mask(self) -> torch.Tensor:
        return self._mask


def test_a_mask_leaves_what_it_allows_and_an_empty_one_is_that_rows_error() -> None:
    one, none, short = state(), state(temperature=1.0), state(min_tokens=3)
    one.grammar = Allowing(0, 2)
    none.grammar = Allowing()
    short.end_ids, short.grammar = [2], Allowing(2)
    found = sample_batch(LOGITS.repeat(4, 1), [one, none, state(), short])
    assert found.pop() == Sampled(2), "min_tokens does not hold an answer that can only end"
    assert found[0] == Sampled(0)
    assert isinstance(found[1], RequestFailedError)
    assert found[2] == Sampled(1)


def test_tokens_that_the_model_does_not_have_are_refused() -> None:
    check_params(SamplingParams(logit_bias={0: 1.0, 99: 1.0}, stop_token_ids=(5,)), 100)
    with pytest.raises(InvalidRequestError, match=r"logit_bias.*100.*0 to 99"):
        check_params(SamplingParams(logit_bias={100: 1.0}), 100)
    with pytest.raises(InvalidRequestError, match=r"stop_token_ids.*-1.*0 to 99"):
        check_params(SamplingParams(stop_token_ids=(-1,)), 100)
