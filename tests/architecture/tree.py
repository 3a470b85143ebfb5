"""The files of a tree, as text and as syntax: what every policy reads. Takes a root folder; knows no policy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

PACKAGES = ("model_core", "service")
GENERATED = frozenset({"__pycache__", "build", "dist", "node_modules"})
HIDDEN_BUT_OURS = frozenset({".ci", ".gitignore", ".dockerignore"})
TEXT_LIMIT_BYTES = 2_000_000


@dataclass(frozen=True)
class Source:
    """One Python file: `name` is its path from the root, with forward slashes."""

    name: str
    text: str
    tree: ast.Module

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        return tuple(ast.walk(self.tree))


@cache
def parse(name: str, text: str) -> Source:
    """A dozen policies read the same few hundred files."""
    return Source(name, text, ast.parse(text, name))


def python_sources(root: Path, *folders: str) -> Iterator[Source]:
    """Every Python file below the named folders of `root`, in the order of their names."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            if GENERATED.isdisjoint(path.relative_to(root).parts):
                text = path.read_text(encoding="utf-8")
                yield parse(path.relative_to(root).as_posix(), text)


def text_files(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every text file that belongs to the tree: no caches, no environment, no weights."""
    for path in sorted(_own_files(root)):
        data = path.read_bytes() if path.stat().st_size <= TEXT_LIMIT_BYTES else b"\0"
        if b"\0" not in data:
            yield path.relative_to(root).as_posix(), data.decode("utf-8", errors="replace")


def _own_files(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        hidden = entry.name.startswith(".") and entry.name not in HIDDEN_BUT_OURS
        if hidden or entry.name in GENERATED or entry.name.endswith(".egg-info") or entry.is_symlink():
            continue
        if entry.is_dir():
            yield from _own_files(entry)
        else:
            yield entry


def dotted_name(node: ast.AST) -> str:
    """`torch.load` of the expression torch.load; empty for anything but names and attributes."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted_name(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def imported_names(node: ast.AST) -> Iterator[str]:
    """What an import statement brings in: modules, and `module.name` for each name taken from one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
