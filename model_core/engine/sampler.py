"""From logits to tokens. One generator a request, so that a seed means the same alone and in a batch.

Rows that ask for nothing special are answered by one argmax over the batch. All others are computed row by
row, so that no row's numbers depend on who stands beside it. The order is vLLM's: log-probabilities from the
raw logits; then mask, bias, minimum length, penalties; then temperature, min-p, top-k, top-p.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_core.engine.grammar import GrammarMatcher
from model_core.errors import DualVisionError, InvalidRequestError, RequestFailedError
from model_core.types import SamplingParams, TokenLogprob

#: Colder is greedy: dividing float32 logits by less overflows.
LEAST_TEMPERATURE = 1e-5
_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    logprob: TokenLogprob | None = None


class SamplerState:
    """What choosing one request's tokens needs to remember. `push` tells it what was chosen.

    grammar: says which tokens are allowed next and is told what came; None allows all.
    """

    __slots__ = ("_prompt_ids", "counts", "end_ids", "generator", "grammar", "num_generated", "params")

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        eos_ids: frozenset[int],
        grammar: GrammarMatcher | None = None,
    ) -> None:
        self.params, self.generator = params, build_generator(params)
        self._prompt_ids = prompt_ids
        self.end_ids = sorted((set() if params.ignore_eos else eos_ids) | set(params.stop_token_ids))
        self.counts: Counter[int] = Counter()
        self.num_generated = 0
        self.grammar = grammar

    def push(self, token_id: int) -> None:
        self.counts[token_id] += 1
        self.num_generated += 1
        if self.grammar is not None:
            self.grammar.accept(token_id)

    @property
    def is_plain(self) -> bool:
        """Greedy over the raw logits, and nothing to report."""
        p = self.params
        return (
            self.generator is None and p.logprobs is None and self.grammar is None and not self._is_too_short
            and not p.logit_bias and not p.presence_penalty and not p.frequency_penalty and p.repetition_penalty == 1.0
        )  # fmt: skip

    @property
    def _is_too_short(self) -> bool:
        return self.num_generated < self.params.min_tokens

    def change(self, logits: Tensor) -> Tensor:
        """(V,) float32 on the CPU with everything but temperature and filters applied; may be the same tensor."""
        p = self.params
        is_too_short = self._is_too_short
        if self.grammar is not None:
            logits = logits.masked_fill(~self.grammar.mask(), _NEVER)
            # A minimum length can't make an answer longer that has no way on.
            is_too_short = is_too_short and not _is_only(logits, self.end_ids)
        is_changing = p.logit_bias or is_too_short or p.repetition_penalty != 1.0
        if not (is_changing or p.frequency_penalty or p.presence_penalty):
            return logits
        logits = logits.clone()
        if p.logit_bias:
            logits[torch.tensor(list(p.logit_bias))] += torch.tensor(list(p.logit_bias.values()), dtype=logits.dtype)
        if is_too_short and self.end_ids:
            logits[torch.tensor(self.end_ids)] = _NEVER
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*self._prompt_ids, *self.counts}))
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if self.counts and (p.frequency_penalty or p.presence_penalty):
            ids, counts = torch.tensor(list(self.counts)), torch.tensor(list(self.counts.values()), dtype=logits.dtype)
            logits[ids] -= p.frequency_penalty * counts + p.presence_penalty
        return logits


def _is_only(logits: Tensor, ids: Sequence[int]) -> bool:
    """Whether nothing but these is left to choose from."""
    left = logits != _NEVER
    return int(left.sum()) == int(left[list(ids)].sum())


def build_generator(params: SamplingParams) -> torch.Generator | None:
    """None for greedy. Without a seed the draw is the operating system's."""
    if params.temperature < LEAST_TEMPERATURE:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed % 2**63)
    return generator


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequestError: a token id that the model does not have."""
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(
                    f"'{name}' names a token that the model does not have",
                    value=token_id,
                    allowed=f"0 to {vocab_size - 1}",
                    param=name,
                )


def sample_batch(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled | Exception]:
    """One token a row, or that row's error.

    Args:
        logits: (B, V) float32, on any device; states: B of them.
    """
    greedy, sound = _highest(logits)
    out: list[Sampled | Exception] = []
    for row, state in enumerate(states):
        if not sound[row]:
            out.append(RequestFailedError("the model gave logits that are not finite"))
        elif state.is_plain:
            out.append(Sampled(greedy[row]))
        else:
            out.append(_sample_row(logits[row].float().cpu(), state))
    return out


def _highest(logits: Tensor) -> tuple[list[int], list[bool]]:
    """Where each row is highest, and whether by a number: NaN anywhere in a row is its highest."""
    if logits.device.type == "cpu":  # a tenth of torch's time over rows as few and as long as these
        array = logits.numpy()
        places = array.argmax(axis=1)
        return places.tolist(), np.isfinite(array[np.arange(len(array)), places]).tolist()
    highest = logits.max(dim=-1)
    greedy, sound = torch.stack([highest.indices, torch.isfinite(highest.values).long()]).tolist()  # one transfer
    return greedy, sound


def _sample_row(raw: Tensor, state: SamplerState) -> Sampled | Exception:
    try:
        logits = state.change(raw)
        if bool((logits == _NEVER).all()):
            return RequestFailedError(
                "no token is left to choose from",
                value="all are forbidden",
                allowed="a logit_bias, min_tokens or response_format that leaves one",
            )
        generator = state.generator
        token = int(logits.argmax()) if generator is None else _draw(logits, state.params, generator)
        return Sampled(token, _logprob(raw, token, state.params.logprobs))
    except (RuntimeError, ValueError, DualVisionError) as error:  # this row's own: the others must not feel it
        return error


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Temperature, then min-p, top-k, top-p; only what survives is drawn from."""
    logits = logits / params.temperature
    if 0 < params.top_k < logits.numel():
        values, index = logits.topk(params.top_k)  # best first; a tie at the border goes to topk's choice
    elif params.top_p < 1.0:
        values, index = logits.sort(descending=True, stable=True)
    else:
        values, index = logits, None
    probs = values.softmax(-1)
    if params.min_p > 0.0:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0.0)
    if params.top_p < 1.0:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= params.top_p * probs.sum(), 0.0)  # the first is kept
    drawn = int(torch.multinomial(probs, 1, generator=generator))
    return drawn if index is None else int(index[drawn])


def _logprob(raw: Tensor, token_id: int, num_top: int | None) -> TokenLogprob | None:
    """Under the raw distribution. Ties among the top go to the lower id."""
    if num_top is None:
        return None
    logprobs = raw.log_softmax(-1)
    top: list[tuple[int, float]] = []
    if num_top:
        values, index = logprobs.topk(min(num_top, logprobs.numel()))
        top = sorted(zip(index.tolist(), values.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple(top))
