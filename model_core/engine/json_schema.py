"""What a client's JSON schema may hold, checked before a grammar is made of it. No torch here.

In: a schema as JSON text. Out: nothing, or InvalidSchemaError that names the place and the keyword. Size, depth and
count are bounded, references stay inside the schema, and a keyword that the grammar would pass over is refused by
name: an answer that only seems to be constrained is worse than none. It refuses to judge what a keyword's value means;
the grammar library does.
"""

from __future__ import annotations

import json
from typing import Any

from model_core.errors import InvalidSchemaError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_SUBSCHEMAS = 2048
MAX_ENUM_VALUES = 1024
#: A repeated group is unrolled state by state; OpenAI's own limits are far below.
MAX_BOUND = 10_000

_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SINGLES = frozenset({"items", "additionalItems", "additionalProperties"})
_BOUNDS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
_OTHERS = frozenset({
    "type", "enum", "const", "required", "pattern", "format", "$ref", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf",
})  # fmt: skip
#: They say something to readers and constrain nothing (`discriminator` is OpenAPI's, pydantic writes it).
_ANNOTATIONS = frozenset({
    "$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "discriminator",
})  # fmt: skip
KEYWORDS = _MAPS | _LISTS | _SINGLES | _BOUNDS | _OTHERS | _ANNOTATIONS


def refuse(what: str, *, value: object = None, allowed: str = "", fix: str = "") -> InvalidSchemaError:
    return InvalidSchemaError(what, value=value, allowed=allowed, fix=fix, param="response_format")


def check_schema(text: str) -> None:
    """Raises InvalidSchemaError. `text` is JSON that `json.dumps` made."""
    if len(text.encode()) > MAX_BYTES:
        raise refuse(
            "the JSON schema is too large", value=f"{len(text)} bytes", allowed=f"{MAX_BYTES} bytes",
            fix="Move what repeats to $defs, and leave descriptions out",
        )  # fmt: skip
    schema = json.loads(text)
    count = 0
    waiting: list[tuple[str, Any, int]] = [("schema", schema, 1)]
    while waiting:
        where, node, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise refuse(
                "the JSON schema is nested too deeply", value=f"{depth} levels", allowed=f"{MAX_DEPTH}",
                fix="Use $defs and $ref",
            )  # fmt: skip
        if count > MAX_SUBSCHEMAS:
            raise refuse(
                "the JSON schema has too many parts", value=f"over {MAX_SUBSCHEMAS}", allowed=f"{MAX_SUBSCHEMAS}",
                fix="Ask for less in one answer",
            )  # fmt: skip
        waiting.extend((at, child, depth + 1) for at, child in _children(where, node))


def _children(where: str, node: Any) -> list[tuple[str, Any]]:
    """The schemas directly inside a schema; whatever of its own it may not hold is refused here."""
    if isinstance(node, bool) and where != "schema":
        return []
    if not isinstance(node, dict):
        raise refuse(f"'{where}' is no JSON schema", value=node, allowed="an object", fix="Write a schema there")
    found: list[tuple[str, Any]] = []
    for key, value in node.items():
        at = f"{where}.{key}"
        if key not in KEYWORDS:
            raise refuse(
                f"the keyword '{key}' in '{where}' is not supported", value=key, allowed=", ".join(sorted(KEYWORDS)),
                fix="Leave it out",
            )  # fmt: skip
        _check_value(at, key, value)
        if key in _MAPS and isinstance(value, dict):
            found.extend((f"{at}.{name}", child) for name, child in value.items())
        elif key in _LISTS and isinstance(value, list):
            found.extend((f"{at}[{i}]", child) for i, child in enumerate(value))
        elif key in _SINGLES:
            found.append((at, value))
        elif key in _MAPS | _LISTS:
            allowed = "an object" if key in _MAPS else "a list"
            raise refuse(f"'{at}' has the wrong type", value=value, allowed=allowed, fix=f"Make {allowed} of it")
    return found


def _check_value(at: str, key: str, value: Any) -> None:
    if key == "$ref" and not (isinstance(value, str) and value.startswith("#")):
        allowed, fix = "a local reference, like #/$defs/NAME", "Copy what it leads to into $defs"
        raise refuse(f"'{at}' leads outside the schema", value=value, allowed=allowed, fix=fix)
    if key == "$id" and not (isinstance(value, str) and "#" not in value):
        raise refuse(f"'{at}' is no name for a schema", value=value, allowed="a string without #", fix="Leave it out")
    if key == "enum" and isinstance(value, list) and len(value) > MAX_ENUM_VALUES:
        allowed, fix = f"at most {MAX_ENUM_VALUES}", "List fewer, or describe them by a pattern"
        raise refuse(f"'{at}' has too many values", value=len(value), allowed=allowed, fix=fix)
    if key in _BOUNDS and not (type(value) is int and 0 <= value <= MAX_BOUND):
        allowed, fix = f"an integer from 0 to {MAX_BOUND}", "Leave the bound out, or choose one in that range"
        raise refuse(f"'{at}' is out of range", value=value, allowed=allowed, fix=fix)
