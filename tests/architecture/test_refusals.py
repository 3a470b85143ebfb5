"""Whoever is refused something is told what to do: every error that is raised has a `fix`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import model_core.errors
import service.errors
from model_core.errors import DualVisionError

ROOT = Path(__file__).parents[2]
OWN = {
    name
    for module in (model_core.errors, service.errors)
    for name, found in inspect.getmembers(module, inspect.isclass)
    if issubclass(found, DualVisionError)
}
#: What no user can cause (a fault of this program), or nobody is left to read; by file and how the text begins.
INTERNAL = {
    ("model_core/analysis/compare.py", "the engine's events ended"),
    ("model_core/analysis/compare.py", "an arm is missing"),
    ("model_core/analysis/compare.py", "arm '"),
    ("model_core/engine/block_manager.py", "a KV cache needs blocks"),
    ("model_core/engine/model_runner.py", "image tokens and placeholders differ"),
    ("model_core/engine/scheduler.py", "a step can't hold"),
    ("model_core/language/paged.py", "unknown decode backend"),
    ("service/engine_client.py", "this request id is already running"),
    ("service/main.py", "the model is not loaded"),
    ("service/streaming.py", "the client closed the connection"),
    ("service/translate.py", "the engine gave the request up"),
    ("service/variant_loader.py", "this server loads no variants"),
}


def raised_without_fix(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each `raise` of an error of ours, by name, that says no fix."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        call = node.exc
        if isinstance(call.func, ast.Name) and call.func.id in OWN:
            names = {keyword.arg for keyword in call.keywords}
            if not names & {"fix", None}:
                yield node.lineno, ast.unparse(call.args[0]).lstrip("f").strip("\"'") if call.args else ""


def test_every_refusal_says_what_to_do() -> None:
    lacking, used = [], set()
    for room in ("model_core", "service"):
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for line, text in raised_without_fix(path.read_text()):
                known = next(
                    ((file, begin) for file, begin in INTERNAL if file == name and text.startswith(begin)), None
                )
                used.add(known)
                lacking += [f"{name}:{line}: {text}"] if known is None else []
    assert not lacking
    assert used - {None} == INTERNAL, "nothing stands in the list that is not there any more"


def test_a_raise_without_one_is_seen() -> None:
    found = list(
        raised_without_fix("raise ConfigError('a', value=1)\nraise ConfigError('b', fix='c')\nraise OSError('d')")
    )
    assert found == [(1, "a")]
