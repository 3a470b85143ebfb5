"""Limits on form: how long, how wide, under which name, with which words at the top."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.architecture.tree import PACKAGES, python_sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_POSITIONAL = 6
OBVIOUS_LINES = 12
NAMELESS = frozenset({"utils", "util", "common", "helpers", "misc", "constants"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


def long_files(root: Path) -> list[str]:
    """Python files of more than 400 lines, the tests' included."""
    counted = ((source.name, len(source.text.splitlines())) for source in python_sources(root, *PACKAGES, "tests"))
    return [f"{name}: {lines} lines, at most {MAX_FILE_LINES}" for name, lines in counted if lines > MAX_FILE_LINES]


def long_functions(root: Path) -> list[str]:
    """Functions of more than 60 lines, from `def` to the last line."""
    return [
        f"{where} {node.name}: {_lines(node)} lines, at most {MAX_FUNCTION_LINES}"
        for where, node in _functions(root)
        if _lines(node) > MAX_FUNCTION_LINES
    ]


def wide_functions(root: Path) -> list[str]:
    """Functions that take more than six positional parameters; `self` and `cls` are not counted."""
    return [
        f"{where} {node.name}: {len(_positional(node))} positional parameters, at most {MAX_POSITIONAL}"
        for where, node in _functions(root)
        if len(_positional(node)) > MAX_POSITIONAL
    ]


def nameless_modules(root: Path) -> list[str]:
    """Modules and folders called utils, common, helpers, misc or constants."""
    return [
        f"{source.name}: a thing without a noun; name what it holds"
        for source in python_sources(root, *PACKAGES, "tests")
        if NAMELESS.intersection(source.name.removesuffix(".py").split("/"))
    ]


def folders_without_init(root: Path) -> list[str]:
    """Folders of a package that hold Python but no __init__.py: neither shipped nor seen by the import contracts."""
    folders = {(root / source.name).parent for source in python_sources(root, *PACKAGES)}
    return [
        f"{folder.relative_to(root).as_posix()}: no __init__.py"
        for folder in sorted(folders)
        if not (folder / "__init__.py").exists() and not (folder / "manifest.json").exists()  # a checkpoint's own shim
    ]


def undocumented(root: Path) -> list[str]:
    """Modules without a docstring, and public top-level classes and functions that are not obvious and have none.

    Obvious is what fits in twelve lines; an exception class is drawn in its module's tree.
    """
    missing = []
    for source in python_sources(root, *PACKAGES):
        if source.tree.body and not ast.get_docstring(source.tree):
            missing.append(f"{source.name}: no module docstring")
        missing += [
            f"{source.name}:{node.lineno} {node.name}: no docstring"
            for node in source.tree.body
            if isinstance(node, ast.ClassDef | Function) and _owes_docstring(node)
        ]
    return missing


def non_ascii(root: Path) -> list[str]:
    """Python files with a character outside ASCII; tests write them as escapes."""
    return [
        f"{source.name}: not ASCII" for source in python_sources(root, *PACKAGES, "tests") if not source.text.isascii()
    ]


def _functions(root: Path) -> Iterator[tuple[str, Function]]:
    for source in python_sources(root, *PACKAGES):
        for node in source.nodes:
            if isinstance(node, Function):
                yield f"{source.name}:{node.lineno}", node


def _lines(node: ast.ClassDef | Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _positional(node: Function) -> list[str]:
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def _owes_docstring(node: ast.ClassDef | Function) -> bool:
    is_public = not node.name.startswith("_") and not node.name.endswith("Error")
    return is_public and _lines(node) > OBVIOUS_LINES and not ast.get_docstring(node)
