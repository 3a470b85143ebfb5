"""README.md and ARCHITECTURE.md against the tree: every path, make target, module and command that they name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

PAPERS = ("README.md", "ARCHITECTURE.md")
SHORT_FOR = ("", "model_core", "service", "tests")
SOURCE_SUFFIXES = (".py", ".md", ".toml", ".sh", ".yml", ".yaml")
# The original project's files, which the README translates into ours.
ORIGINALS = frozenset(
    {
        "train.py",
        "inference.py",
        "training_examples.py",
        "model.py",
        "dataset.py",
        "utils.py",
        "config.json",
        "requirements.txt",
    }
)

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w.\-/*{},]+(:[\w.]+)?")
MAKE = re.compile(r"(?:^|[\s`;&(])make((?: +[A-Z]\w*=\S+)*(?: +[a-z][a-z-]*)+)", re.MULTILINE)
TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)
MODULE = re.compile(r"python3? -m ((?:model_core|service|benchmarks)[\w.]*)")
COMMAND = re.compile(r"(?:^|[\s`;&(/])dve((?: +[a-z][a-z_-]*)*)((?: +\S+)*)", re.MULTILINE)
FLAG = re.compile(r"--[a-z][\w-]*")

ShowHelp = Callable[[list[str]], str | None]


def missing_papers(root: Path) -> list[str]:
    """The two papers themselves."""
    return [f"{name}: not there" for name in PAPERS if not (root / name).exists()]


def dead_paths(root: Path) -> list[str]:
    """Backticked paths that lead nowhere; `file.py:name` must also hold a function or class of that name."""
    return [
        f"{paper}: `{token}` does not exist"
        for paper, text in _papers(root)
        for token in INLINE.findall(FENCE.sub("", text))
        if _is_path(root, token) and not all(_exists(root, path) for path in _expand(token))
    ]


def dead_targets(root: Path) -> list[str]:
    """`make X` where the Makefile has no X."""
    targets = set(TARGET.findall((root / "Makefile").read_text(encoding="utf-8")))
    return [
        f"{paper}: `make {target}` is no target"
        for paper, text in _papers(root)
        for code in _code(text)
        for words in MAKE.findall(code)
        for target in words.split()
        if "=" not in target and target not in targets
    ]


def dead_modules(root: Path) -> list[str]:
    """`python -m X` of ours where X is no module."""
    return [
        f"{paper}: `python -m {module}` is no module"
        for paper, text in _papers(root)
        for code in _code(text)
        for module in MODULE.findall(code)
        if not (root / module.replace(".", "/")).with_suffix(".py").exists()
        and not (root / module.replace(".", "/") / "__main__.py").exists()
    ]


def dead_commands(root: Path, show_help: ShowHelp) -> list[str]:
    """`dve X --flag` where X has no parser or its help does not know the flag.

    show_help gives the help of a command by its words, None where there is none.
    """
    dead = []
    for paper, text in _papers(root):
        for words, flags in _commands(text):
            shown = show_help(words)
            if shown is None:
                dead.append(f"{paper}: `dve {' '.join(words)}` is no command")
            else:
                dead += [f"{paper}: `dve {' '.join(words)}` has no {flag}" for flag in flags if flag not in shown]
    return dead


def _papers(root: Path) -> Iterator[tuple[str, str]]:
    for name in PAPERS:
        if (root / name).exists():
            yield name, (root / name).read_text(encoding="utf-8")


def _code(text: str) -> list[str]:
    fenced = FENCE.findall(text)
    return [block.replace("\\\n", " ") for block in fenced] + INLINE.findall(FENCE.sub("", text))


def _commands(text: str) -> Iterator[tuple[list[str], list[str]]]:
    for code in _code(text):
        for words, rest in COMMAND.findall(code):
            if words:
                yield words.split(), FLAG.findall(rest)


def _is_path(root: Path, token: str) -> bool:
    if not PATH.fullmatch(token) or token.startswith(("/", "-", ".venv", "..")) or token in ORIGINALS:
        return False
    path = token.split(":")[0]
    is_ours = "/" in path and (root / path.split("/")[0]).exists()
    return is_ours or path.endswith(SOURCE_SUFFIXES)


def _expand(token: str) -> list[str]:
    parts = re.split(r"\{([^}]*)\}", token)
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def _exists(root: Path, token: str) -> bool:
    path, _, symbol = token.partition(":")
    found = [file for start in SHORT_FOR for file in (root / start).glob(path.rstrip("/"))]
    if not found and "/" not in path:
        found = [file for package in SHORT_FOR[1:] for file in (root / package).rglob(path)]
    if not symbol:
        return bool(found)
    name = re.escape(symbol.split(".")[-1])
    return any(
        re.search(rf"^\s*((async )?def|class) {name}\b|^{name}\b", file.read_text(), re.MULTILINE) for file in found
    )
