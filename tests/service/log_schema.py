"""The one shape of a log line, whichever process wrote it."""

from __future__ import annotations

import json

import jsonschema

_TEXT = {"type": "string", "minLength": 1}
SCHEMA = {
    "type": "object",
    "required": ["time", "level", "logger", "process", "message"],
    "properties": {
        "time": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"},
        "level": {"enum": ["debug", "info", "warning", "error", "critical"]},
        "logger": _TEXT,
        "process": {"enum": ["server", "worker", "trainer"]},
        "message": _TEXT,
        "request_id": {"type": "string", "pattern": r"^[A-Za-z0-9._:\-]{1,128}$"},
        "job_id": {"type": "string", "pattern": "^ftjob-[0-9a-f]{32}$"},
        "trace_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    },
}
_VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def read_log(text: str) -> list[dict]:
    """Every line of a process's standard error, each of them in the one shape."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        _VALIDATOR.validate(line)
    return lines
