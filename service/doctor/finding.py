"""One line of the doctor: what was looked at, how it is, what it saw, and where it is not well, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model_core.errors import DualVisionError

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """remedy: of all but `ok`."""

    name: str
    state: State
    detail: str
    remedy: str = ""


def ok(name: str, detail: str) -> Finding:
    return Finding(name, "ok", detail)


def warn(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name, "warn", detail, remedy)


def fail(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name, "fail", detail, remedy)


def of_error(name: str, error: DualVisionError, remedy: str = "") -> Finding:
    """In the error's own words, which are those of the start; its fix is the remedy."""
    return fail(name, str(error), remedy or error.fix or "Change what it names")
