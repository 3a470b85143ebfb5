"""Checked sections of a recipe: the base model, and how a refused key or value is told to the user.

In: JSON data; out: a frozen section, or a ConfigError that names the path, the value and what is allowed. It knows
no particular setting.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from model_core.errors import ConfigError

MAX_FILE_BYTES = 16 << 20
_MAX_DEPTH = 8


class Section(BaseModel):
    """Frozen, strict about keys, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


SectionT = TypeVar("SectionT", bound=Section)


def parse_section(cls: type[SectionT], data: Mapping[str, Any], what: str) -> SectionT:
    """`data` as a section.

    Settings that are right alone and contradict each other raise a ConfigError of their own in the section's
    validators: pydantic lets it pass as it is, and it knows the value and the way out.

    Raises:
        ConfigError: `param` is the dotted path of the first thing wrong; an unknown key gets the nearest known one.
    """
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        problems = sorted(error.errors(include_url=False), key=lambda p: p["type"] != "extra_forbidden")
    first = problems[0]
    path = ".".join(str(part) for part in first["loc"])
    others = [".".join(str(part) for part in p["loc"]) for p in problems[1:]]
    also = f" ({len(others)} more: {', '.join(others[:5])})" if others else ""
    if first["type"] == "extra_forbidden":
        known = keys_at(cls, first["loc"][:-1])
        raise ConfigError(
            f"{what}: unknown key '{path}'{also}",
            value=first["loc"][-1],
            allowed=", ".join(known),
            fix=nearest(str(first["loc"][-1]), known),
            param=path,
        )
    raise ConfigError(
        f"{what}: '{path}' is not valid{also}",
        value=repr(first["input"]) if first["input"] is None else first["input"],
        allowed=first["msg"].removeprefix("Value error, ").removeprefix("Input should be "),
        fix="Correct the value or leave the key out",
        param=path,
    )


def read_json(path: str | Path) -> Any:
    """A JSON file of the user's.

    Raises:
        ConfigError: it is not there, too large or not JSON; a key that stands twice.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(
                "the file is too large", value=str(path), allowed=f"up to {MAX_FILE_BYTES} bytes",
                fix="Name the recipe; data has a file of its own, which train_data_path names", param="config",
            )  # fmt: skip
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ConfigError(
            f"the file can't be read ({error.strerror})", value=str(path), allowed="a JSON file",
            fix="Check the path; `dve configs create` writes recipes to begin with", param="config",
        ) from error  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the file is not JSON ({error})", value=str(path), allowed="one JSON object",
            fix="Correct it there", param="config",
        ) from error  # fmt: skip


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`a.b=c` laid over `data`, later ones over earlier ones. c is JSON where it can be read so, else text.

    A number as a key is an index of a list that is there: `curriculum_training.stages.0.epochs=2`.
    """
    result: dict[str, Any] = json.loads(json.dumps(dict(data)))
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or len(keys) > _MAX_DEPTH:
            raise ConfigError(
                "an override can't be read", value=override, allowed="name=value or section.name=value",
                fix="Write it as --set learning_rate=1e-4", param="set",
            )  # fmt: skip
        _set(result, keys, _json_or_text(text), override)
    return result


def _set(target: Any, keys: Sequence[str], value: Any, override: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(target, list):
            if not key.isdecimal() or int(key) >= len(target):
                allowed = f"0 to {len(target) - 1}" if target else "nothing: the list is empty"
                raise ConfigError(
                    "an override names no entry of the list", value=override, allowed=allowed,
                    fix="Name an entry that is there, or give the whole list as JSON", param=".".join(keys),
                )  # fmt: skip
            if last:
                target[int(key)] = value
            target = target[int(key)]
        elif isinstance(target, dict):
            if last:
                target[key] = value
            elif target.get(key) is None:
                target[key] = {}
            target = target[key]
        else:
            raise ConfigError(
                "an override goes into a value that is no section", value=override, allowed="a section's key",
                fix=f"Write {'.'.join(keys[:depth])}=VALUE", param=".".join(keys),
            )  # fmt: skip


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return found


def nearest(key: str, known: Sequence[str], *, otherwise: str = "Leave it out") -> str:
    """What to do about a name that is not known, as an error's `fix`."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"Write '{close[0]}'" if close else otherwise


def keys_at(cls: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The keys that the section at this path knows."""
    current: Any = cls
    for part in path:
        fields = getattr(current, "model_fields", {})
        if part in fields:
            current = _section_in(fields[part].annotation)
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _section_in(annotation: Any) -> Any:
    """The section inside `X | None`, `tuple[X, ...]`, `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_section_in(argument) for argument in get_args(annotation))
    return next((found for found in inner if found is not None), None)
