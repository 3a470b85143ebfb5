"""What one request asks of the sampler, and what it has to remember from token to token. Knows no logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from model_core.engine.grammar import GrammarMatcher
from model_core.errors import InvalidRequestError
from model_core.types import SamplingParams

#: Colder is greedy: dividing float32 logits by less overflows.
LEAST_TEMPERATURE = 1e-5
#: Random numbers drawn at once: one by one each would take as long as choosing the token.
_NUM_DRAWN = 64


class SamplerState:
    """What choosing one request's tokens needs to remember. `push` tells it what was chosen.

    grammar: says which tokens are allowed next and is told what came; None allows all.
    seen: the tokens that penalties look at; None without penalties.
    """

    __slots__ = (
        "_is_plain_later", "_numbers", "_prompt_ids", "counts", "end_ids", "generator", "grammar", "num_generated",
        "params", "seen",
    )  # fmt: skip

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        eos_ids: frozenset[int],
        grammar: GrammarMatcher | None = None,
    ) -> None:
        p = params
        self.params, self.generator = params, build_generator(params)
        self._numbers: list[float] = []
        self._prompt_ids = prompt_ids
        self.end_ids = sorted((set() if p.ignore_eos else eos_ids) | set(p.stop_token_ids))
        self.counts: Counter[int] = Counter()
        self.num_generated = 0
        self.grammar = grammar
        is_repetition = p.repetition_penalty != 1.0
        is_penalised = bool(p.presence_penalty or p.frequency_penalty or is_repetition)
        self.seen = SeenTokens(prompt_ids if is_repetition else ()) if is_penalised else None
        is_greedy = self.generator is None and p.logprobs is None
        self._is_plain_later = is_greedy and not is_penalised and not p.logit_bias

    def push(self, token_id: int) -> None:
        self.counts[token_id] += 1
        self.num_generated += 1
        if self.seen is not None:
            self.seen.push(token_id)
        if self.grammar is not None:
            self.grammar.accept(token_id)

    @property
    def is_plain(self) -> bool:
        """Greedy over the raw logits, and nothing to report."""
        is_long_enough = self.num_generated >= self.params.min_tokens
        return self._is_plain_later and is_long_enough and self.grammar is None

    @property
    def is_too_short(self) -> bool:
        return self.num_generated < self.params.min_tokens

    def draw(self) -> float:
        """The next number in [0, 1) of this request's own; 0 for greedy. One a token, whatever else is asked for."""
        if self.generator is None:
            return 0.0
        if not self._numbers:
            self._numbers = torch.rand(_NUM_DRAWN, dtype=torch.float64, generator=self.generator).tolist()[::-1]
        return self._numbers.pop()


class SeenTokens:
    """Different tokens in the order in which they came, and how often each was generated.

    Arrays that grow: building them anew for every token would cost as much as the answer is long.
    """

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.array([*self._places, *[0] * 64], np.int64)
        self._counts = np.zeros(len(self._ids), np.float32)

    def push(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids, self._counts = (np.concatenate([old, np.zeros_like(old)]) for old in (self._ids, self._counts))
        self._ids[place] = token_id
        self._counts[place] += 1.0

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        """float32; 0 for a token of the prompt alone."""
        return self._counts[: len(self._places)]


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
                    fix="Take token ids from this model's own tokenizer",
                    param=name,
                )
