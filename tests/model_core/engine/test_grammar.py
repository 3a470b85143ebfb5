"""Structured output: whatever the model would like to say, a finished answer parses and fits its schema."""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jsonschema
import pytest
import torch

from model_core.encoder import DualVisionEncoder
from model_core.engine.grammar import MAX_CACHED, GrammarCompiler
from model_core.engine.json_schema import MAX_DEPTH, check_schema
from model_core.errors import InvalidRequestError, InvalidSchemaError
from model_core.types import ChatMessage, GenerationRequest, ResponseFormat, SamplingParams, TextPart, TokenEvent
from tests.model_core import tiny
from tests.model_core.engine.test_engine import random_request, run

SCHEMAS = {
    "enums": {
        "type": "object",
        "properties": {"animal": {"enum": ["dog", "cat", "bird"]}, "sure": {"type": "boolean"}, "no": {"const": None}},
        "required": ["animal", "sure", "no"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {"box": {"$ref": "#/$defs/box"}, "tag": {"anyOf": [{"type": "null"}, {"enum": ["\u4e2d"]}]}},
        "required": ["box", "tag"],
        "additionalProperties": False,
        "$defs": {
            "box": {
                "type": "object",
                "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "y": {"enum": [1, 2]}},
                "required": ["x", "y"],
                "additionalProperties": False,
            }
        },
    },
    "arrays": {
        "type": "array",
        "items": {"type": "string", "minLength": 1, "maxLength": 4},
        "minItems": 2,
        "maxItems": 3,
    },
    "numbers": {
        "type": "array",
        "prefixItems": [
            {"type": "number", "exclusiveMinimum": -1, "maximum": 1.5, "multipleOf": 0.25},
            {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
        ],
        "items": False,
        "minItems": 2,
    },
    "pattern": {
        "type": "object",
        "properties": {
            "plate": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "day": {"type": "string", "format": "date"},
        },
        "required": ["plate", "day"],
        "additionalProperties": False,
    },
}  # fmt: skip


@functools.cache
def demo() -> DualVisionEncoder:
    return DualVisionEncoder(device="cpu")


@functools.cache
def small() -> DualVisionEncoder:
    return tiny.encoder()


def asking(name: str, schema: dict | None, **sampling: object) -> GenerationRequest:
    wanted = ResponseFormat(None if schema is None else json.dumps(schema))
    params = SamplingParams(**{"max_tokens": 120, "response_format": wanted} | sampling)
    return GenerationRequest(name, (ChatMessage("user", (TextPart("what is this?"),)),), params)


def check(event: TokenEvent, schema: dict) -> None:
    assert event.error is None, event.error
    assert event.finish_reason == "stop", event.text
    jsonschema.validate(json.loads(event.text), schema)


def test_every_finished_answer_of_the_demo_fits_its_schema() -> None:
    """Greedy and far too hot, all schemas in one batch beside rows of plain text, logprobs and biases with them."""
    requests = {}
    for name, schema in SCHEMAS.items():
        requests[f"{name} 0"] = (asking(f"{name} 0", schema, logprobs=2), schema)
        for seed in range(3):
            key = f"{name} {seed} hot"
            requests[key] = (asking(key, schema, temperature=1.5, seed=seed, logit_bias={5: 3.0}), schema)
    plain = replace(asking("plain", None), sampling=SamplingParams(max_tokens=8))
    alone = run(demo(), [replace(plain, request_id="alone")])["alone"]
    found = run(demo(), [plain, *(request for request, _ in requests.values())], arrive=6)
    for name, (_, schema) in requests.items():
        check(found[name], schema)
    assert found["plain"].token_ids == alone.token_ids, "a row beside a grammar feels nothing of it"
    assert len({found[f"nested {seed} hot"].text for seed in range(3)}) > 1, "hot answers differ"


def test_any_object_and_an_answer_cut_by_its_length() -> None:
    """Random bytes as a model: strings may run on, so some answers are cut; those that ended are objects."""
    requests = [asking(f"{i}", None, temperature=2.0, seed=i, max_tokens=60) for i in range(24)]
    found = run(small(), requests).values()
    ended = [event for event in found if event.finish_reason == "stop"]
    assert all(isinstance(json.loads(event.text), dict) for event in ended)
    assert {event.finish_reason for event in found} == {"stop", "length"}
    cut = run(small(), [asking("cut", SCHEMAS["pattern"], max_tokens=5)])["cut"]
    assert (cut.finish_reason, cut.usage.completion_tokens) == ("length", 5)


def test_no_mask_has_a_control_token_and_the_end_only_where_the_json_is_whole() -> None:
    tokenizer, vocab = tiny.byte_tokenizer(), len(tiny.byte_tokenizer()) + 5
    ends = frozenset({tiny.token_id("<|im_end|>"), tiny.token_id("<|endoftext|>")})
    matcher = GrammarCompiler(tokenizer, vocab, ends).matcher(ResponseFormat('{"type": "string", "maxLength": 30}'))
    control = [tiny.token_id(token) for token in tiny.SPECIAL]
    for token in tokenizer.encode('"<|im_end|> \u4e2d"', add_special_tokens=False):
        if token in control:
            continue
        mask = matcher.mask()
        assert (mask.shape, mask.dtype) == ((vocab,), torch.bool)
        assert not mask[control].any()
        assert not mask[-5:].any(), "ids that the model has and the tokenizer has not"
        assert mask[token]
        assert not matcher.is_complete
        matcher.accept(token)
    assert matcher.is_complete
    assert matcher.is_terminated
    assert set(matcher.mask().nonzero().flatten().tolist()) == set(ends)


def test_a_stop_string_a_stop_token_and_a_minimum_length() -> None:
    schema = SCHEMAS["enums"]
    stopped = run(demo(), [asking("a", schema, stop=("sure",))])["a"]
    assert stopped.finish_reason == "stop"
    assert '"animal"' in stopped.text
    assert "sure" not in stopped.text
    check(run(demo(), [asking("b", schema, min_tokens=120)])["b"], schema)
    with pytest.raises(InvalidRequestError, match="ignore_eos"):
        asking("c", schema, ignore_eos=True)


def test_logprobs_are_of_the_distribution_before_the_mask() -> None:
    engine = demo().engine
    engine.add_request(engine.prepare(asking("a", SCHEMAS["enums"], logprobs=1)))
    told = []
    while engine.has_work():
        told += [one for event in engine.step() for one in event.logprobs or ()]
    first = told[0]
    assert first.top[0][0] != first.token_id, "the model wanted to say something else"
    assert first.top[0][1] > first.logprob


def test_a_fork_shares_inputs_and_has_its_own_place_in_the_grammar() -> None:
    engine = demo().engine
    asked = [asking(f"f{i}", SCHEMAS["arrays"], temperature=1.5, seed=i) for i in range(3)]
    first = engine.prepare(asked[0])
    forks = [engine.fork(first, request) for request in asked[1:]]
    assert all(fork.inputs is first.inputs for fork in forks)
    alone = run(demo(), [replace(request, request_id=f"{request.request_id} alone") for request in asked])
    texts = dict.fromkeys((request.request_id for request in asked), "")
    for sequence in (first, *forks):
        engine.add_request(sequence)
    while engine.has_work():
        for event in engine.step():
            texts[event.request_id] += event.text
    assert texts == {request.request_id: alone[f"{request.request_id} alone"].text for request in asked}


def test_what_preparing_took_is_told_once() -> None:
    """Each fork told the shared picture's decode again, and the metrics counted it n times."""
    engine, asked = small().engine, random_request(5)
    first = engine.prepare(asked)
    assert first.inputs.media.stage_seconds
    engine.add_request(first)
    engine.add_request(engine.fork(first, replace(asked, request_id="fork")))
    told = {}
    while engine.has_work():
        told |= {event.request_id: event.timings for event in engine.step() if event.is_terminal}
    assert dict(told[asked.request_id].preprocess_stages) == dict(first.inputs.media.stage_seconds)
    assert (told["fork"].preprocess_stages, told["fork"].preprocess_seconds) == ({}, 0.0)


DEEP: dict = {}
for _ in range(MAX_DEPTH + 1):
    DEEP = {"items": DEEP}
CYCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"uniqueItems": True}, "'uniqueItems'"),
        ({"properties": {"a": {"not": {}}}}, "'not' in 'schema.properties.a'"),
        ({"propertyNames": {}}, "'propertyNames'"),
        ({"contains": {}}, "'contains'"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"type": "object", "reqired": ["a"]}, "'reqired'"),
        ({"x-guidance": {"lenient": True}}, "'x-guidance'"),
        ({"unevaluatedProperties": False}, "'unevaluatedProperties'"),
        ({"$ref": "http://10.0.0.1/x"}, "leads outside"),
        ({"$ref": "file:///etc/passwd"}, "leads outside"),
        ({"$ref": "other.json"}, "leads outside"),
        ({"$ref": "#/$defs/missing"}, "can't be followed"),
        (CYCLE, "can't be followed"),
        ({"type": "string", "format": "iri"}, "iri"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "string", "pattern": "["}, "can't be followed"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "can't be followed"),
        ({"type": "nothing"}, "can't be followed"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"type": "string", "maxLength": 10**6}, "out of range"),
        ({"enum": list(range(1025))}, "too many values"),
        ({"properties": {f"p{i}": {} for i in range(2100)}}, "too many parts"),
        ({"description": "x" * 70_000}, "too large"),
        ({"properties": [1]}, "wrong type"),
        ({"items": 7}, "no JSON schema"),
        (DEEP, "too deeply"),
    ],
)
def test_a_schema_that_would_not_be_kept_to_is_refused(schema: dict, words: str) -> None:
    with pytest.raises(InvalidSchemaError, match="(?s)" + words.replace("(", "[(]")) as caught:
        demo().engine.prepare(asking("x", schema))
    assert caught.value.param == "response_format"


def test_what_pydantic_writes_is_understood() -> None:
    import enum
    from typing import Literal

    from pydantic import BaseModel, Field

    class Colour(enum.Enum):
        RED = "red"

    class Node(BaseModel):
        """A tree."""

        kind: Literal["node"] = "node"
        colour: Colour | None = None
        size: float = Field(ge=0, le=9)
        children: list[Node] = Field(default_factory=list, max_length=2)

    check_schema(json.dumps(Node.model_json_schema()))
    demo().engine.prepare(asking("x", Node.model_json_schema()))


GREEDY_PATTERNS = [
    "^(.*a.{200,900}b){30}$",
    "^(a|aa|aaa){900}(b?){900}$",
    "^((a{1,90}b{1,90}){1,90}c){1,90}$",
    "^(.*x.{11}|.*y.{12}|.*z.{13})*$",
    "^" + "(.*[ab].{9}){20}" + "$",
    "^[a-z]*" + "|".join(f".*{c}.{{16}}" for c in "abcdefghij") + "$",
]


@pytest.mark.parametrize("pattern", GREEDY_PATTERNS)
def test_a_pattern_can_not_hang_a_step(pattern: str) -> None:
    """Refused, or followed to the end, or ended by its own error: never a step without an end beside others."""
    other = replace(asking("other", None), sampling=SamplingParams(max_tokens=3))
    slow = asking("slow", {"type": "string", "pattern": pattern}, temperature=2.0, seed=1, max_tokens=40)
    try:
        found = run(small(), [slow, other])
    except InvalidSchemaError:
        return
    assert found["other"].finish_reason is not None
    assert found["slow"].finish_reason is not None or isinstance(found["slow"].error, InvalidSchemaError)


def test_grammars_are_kept_by_their_schema_and_made_in_any_thread() -> None:
    compiler = GrammarCompiler(tiny.byte_tokenizer(), len(tiny.byte_tokenizer()), frozenset({2}))
    wanted = [ResponseFormat(json.dumps({"enum": [i % 4]})) for i in range(64)]
    with ThreadPoolExecutor(4) as pool:
        matchers = list(pool.map(compiler.matcher, wanted))
    assert all(matcher.mask()[tiny.token_id(str(i % 4))] for i, matcher in enumerate(matchers))
    assert compiler.cache_info.currsize == 4
    for i in range(MAX_CACHED + 5):
        compiler.matcher(ResponseFormat(json.dumps({"const": i})))
    assert compiler.cache_info.currsize == MAX_CACHED
