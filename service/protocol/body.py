"""A request body's bytes -> a validated pydantic model, or an error that names the field.

It refuses anything but `application/json`, and it never echoes a value longer than a line.
"""

from __future__ import annotations

import re
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from model_core.training.strict import keys_at
from service.errors import InvalidBodyError, UnknownParameterError

#: Strict: `true` is no number and `"7"` is no integer. Finite: NaN and 1e999 are refused.
STRICT = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="forbid")
#: The same for OpenAI bodies, whose unknown fields are tolerated and reported (`x-dve-ignored`).
TOLERANT = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="allow")

ModelT = TypeVar("ModelT", bound=BaseModel)

_HEADER_SAFE = re.compile(r"[A-Za-z0-9_.\-\[\]]{1,64}")
_MAX_NAMES = 16

#: What pydantic, and our validators after it, write before what is allowed.
_WORDING = re.compile(r"^(?:(?:Input|String|Tuple|List|Value|Dictionary) should (?:be |have )?|must be )")
_FIXES = {"too_short": "Add to it", "too_long": "Send fewer", "string_too_long": "Shorten it"}


def parse_body(model: type[ModelT], raw: bytes, content_type: str | None) -> ModelT:
    """Raises InvalidBodyError with `param` set to the first wrong field."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise InvalidBodyError(
            "the body is not declared as JSON", value=media_type, allowed="content-type: application/json",
            fix="Send that header",
        )  # fmt: skip
    try:
        # Strict throughout: sections that are borrowed from a recipe are not so by themselves.
        return model.model_validate_json(raw, strict=True)
    except ValidationError as error:
        raise _to_body_error(model, error) from None


def _to_body_error(model: type[BaseModel], error: ValidationError) -> InvalidBodyError | UnknownParameterError:
    first = error.errors(include_url=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return InvalidBodyError(
            f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}",
            value=f"{len(first['input'])} bytes", allowed="one JSON object in UTF-8",
            fix="Check its quotes, commas and brackets, and that it was sent whole",
        )  # fmt: skip
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(keys_at(model, first["loc"][:-1])[:64])
        return UnknownParameterError(
            f"unknown key '{param}'", value=first["loc"][-1], allowed=known, fix="Leave it out", param=param
        )
    if first["type"] == "missing":  # whose input is its container
        return InvalidBodyError(
            f"'{param}' is missing", value="nothing", allowed="a value", fix=f"Add '{param}'", param=param
        )
    return InvalidBodyError(
        f"'{param}' is not valid" if param else "the body is not valid",
        value=_seen(first["input"]),
        allowed=_WORDING.sub("", message, count=1).partition(" after validation")[0],
        fix=_FIXES.get(first["type"], f"Change '{param}' to that" if param else "Send one JSON object"),
        param=param,
    )


def _seen(value: object) -> object:
    """What to show of a refused value, in JSON's words. A container may hold a whole image."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, (str, int, float)) else type(value).__name__


def _path(loc: tuple[int | str, ...]) -> str | None:
    """`("messages", 0, "content", "<text>", "text")` -> `messages[0].content.text`; union tags are in <>."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not (step.startswith("<") and step.endswith(">")):
            path += f".{step}" if path else step
    return path[:200] or None


def header_list(names: list[str]) -> str:
    """Names for a header: those that a client made unprintable or too long are only counted."""
    safe = [name for name in names if _HEADER_SAFE.fullmatch(name)][:_MAX_NAMES]
    rest = len(names) - len(safe)
    return ", ".join([*safe, f"(and {rest} more)"] if rest else safe)
