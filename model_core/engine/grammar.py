"""Structured output: which tokens may come next, so that the answer is JSON and fits its schema.

In: a tokenizer, once, and a `ResponseFormat` a request. Out: a `GrammarMatcher`, whose `mask` the sampler asks before
each token and whose `accept` it tells afterwards. Compiling and every mask are bounded by work counted, not by time:
a schema that costs more is refused, or ends its own row. It knows neither batches nor text.

llguidance works on bytes, so a character split over tokens is no special case; control tokens are in no mask, ends of
text only where the JSON is whole.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from model_core.engine.json_schema import check_schema, refuse
from model_core.errors import InvalidRequestError
from model_core.types import ResponseFormat

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

#: Compiled grammars that are kept; a schema of 64 KiB takes some megabytes.
MAX_CACHED = 32

#: One line, at most one space: a model that can't end may otherwise write white space until its tokens run out.
_LAYOUT: JsonCompileOptions = {
    "whitespace_flexible": False,
    "whitespace_pattern": r"[\x20]?",
    "coerce_one_of": False,
    "lenient": False,
}

_ANY_OBJECT = '{"type": "object"}'


def _limits() -> LLParserLimits:
    # By the library's own figures 20 ms to compile and 15 ms a mask, at the very most.
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


class GrammarMatcher:
    """One sequence's place in its grammar. Not for two threads at once."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def mask(self) -> Tensor:
        """(V,) bool: the tokens allowed next. Raises InvalidSchemaError if finding them out costs too much."""
        bits = self._matcher.compute_bitmask()
        self._check()
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: self._vocab_size]
        if not allowed.any():  # a reference that leads only to itself, a value that nothing satisfies
            raise refuse(
                "no answer fits the JSON schema from here on", allowed="a schema that some JSON satisfies",
                fix="Look for a $ref to itself, or bounds that exclude all",
            )  # fmt: skip
        return torch.from_numpy(allowed).bool()

    def accept(self, token_id: int) -> None:
        """Go on past a token that the mask allowed."""
        self._matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """What has been accepted so far is a whole answer, though more may follow."""
        return bool(self._matcher.is_accepting())

    @property
    def is_terminated(self) -> bool:
        """Nothing but an end of text can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise refuse(
                "the JSON schema can't be followed: it contradicts itself or costs too much",
                value=self._matcher.stop_reason(),
                allowed="patterns and bounds with fewer states",
                fix="Make patterns and bounds smaller",
            )


class GrammarCompiler:
    """Makes matchers for one tokenizer. May be used from several threads; grammars are kept by their schema."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, eos_ids
        self._inner: LLTokenizer | None = None
        self._compiled = functools.lru_cache(MAX_CACHED)(self._compile)

    @property
    def cache_info(self) -> Any:
        """hits, misses, maxsize, currsize."""
        return self._compiled.cache_info()

    def matcher(self, wanted: ResponseFormat) -> GrammarMatcher:
        """At its beginning. Raises InvalidSchemaError; InvalidRequestError if the tokenizer can't be constrained."""
        # A copy: the kept one stays at the beginning, and no thread ever changes it.
        kept = self._compiled(_ANY_OBJECT if wanted.schema is None else wanted.schema)
        return GrammarMatcher(kept.deep_copy(), self._vocab_size)

    def _compile(self, schema: str) -> LLMatcher:
        check_schema(schema)
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_LAYOUT)
        except ValueError:
            allowed, fix = "a JSON object in UTF-8", "Send the schema itself, as an object"
            raise refuse("the JSON schema can't be read", allowed=allowed, fix=fix) from None
        matcher = LLMatcher(self._build_tokenizer(), grammar, log_level=0, limits=_limits())
        problems = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
        if problems:
            allowed, fix = "what an answer can be held to, token by token", "Leave that part out, or say it simpler"
            raise refuse("the JSON schema can't be followed", value=problems[0], allowed=allowed, fix=fix)
        GrammarMatcher(matcher, self._vocab_size).mask()  # what costs too much at once is known now, off the engine
        return matcher

    def _build_tokenizer(self) -> LLTokenizer:
        """Once, by whoever comes first: about a second for a vocabulary of 150,000. Built twice does no harm."""
        if self._inner is None:
            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise InvalidRequestError(
                    "this model's tokenizer can't be constrained", value=type(self._tokenizer).__name__,
                    allowed='{"type": "text"}', fix="Leave response_format out", param="response_format",
                )  # fmt: skip
            self._inner = LLTokenizer(backend.to_str(), n_vocab=self._vocab_size, eos_token=sorted(self._eos_ids))
        return self._inner
