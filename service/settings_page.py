"""The settings as a page of Markdown, a table for each role: name, value, what is allowed, what it means.

In: one loaded object of each role. Out: `SETTINGS.md`. It knows no setting by name: whatever a class has is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_settings import BaseSettings

_HEAD = """# Settings

Written by `dve serve --print-config --format table`. Each is an environment variable (`DVE_PORT=8123`) and a flag,
which wins over it (`--port 8123`, `--set port=8123`): the server's and the jobs' of `dve serve`, the worker's and the
first four of the jobs' of `dve worker`. What stands in two tables is one variable, read by both.
"""

_ROW = "| setting | value | allowed | meaning |\n|---|---|---|---|\n"


def settings_page(roles: Mapping[str, BaseSettings]) -> str:
    """Every field of every role. `roles`: by the heading of its table."""
    return _HEAD + "".join(f"\n## {title}\n\n{_ROW}{_rows(settings)}\n" for title, settings in roles.items())


def _rows(settings: BaseSettings) -> str:
    values = settings.model_dump(mode="json")
    return "\n".join(
        f"| `{name}` | {_plain(values[name])} | {', '.join(_allowed(schema))} | {schema['description']} |"
        for name, schema in type(settings).model_json_schema()["properties"].items()
    )


_KINDS = {"boolean": "true, false", "null": "none", "string": "text"}


def _plain(value: object) -> str:
    if value is None or value == "":
        return "none"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _allowed(schema: Mapping[str, Any]) -> Iterator[str]:
    for choice in schema.get("anyOf", [schema]):
        if "enum" in choice:
            yield from choice["enum"]
        elif choice["type"] in ("integer", "number"):
            yield _range(choice)
        else:
            yield _KINDS.get(choice["type"], choice["type"])


def _range(schema: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in schema:
        return f"over {schema['exclusiveMinimum']}"
    if "maximum" in schema:
        return f"{schema.get('minimum', '')} to {schema['maximum']}".strip()
    return f"{schema['minimum']} or more" if "minimum" in schema else "any number"
