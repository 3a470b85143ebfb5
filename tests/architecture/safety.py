"""What the code of the two packages must not do, and what no file of the tree may say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.architecture.tree import PACKAGES, Source, dotted_name, imported_names, python_sources, text_files

UNPICKLERS = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
BANNED_CALLS = {
    "torch.load": "a pickle inside: safetensors and JSON only",
    "yaml.load": "builds any object",
    "yaml.unsafe_load": "builds any object",
    "yaml.full_load": "builds any object",
    "eval": "runs what it is given",
    "exec": "runs what it is given",
}
BANNED_FLAGS = frozenset({"trust_remote_code", "allow_pickle"})

BROAD_EXCEPT_ALLOWED = {
    "service/engine_thread.py": "the engine loop: everyone who waits gets an answer",
    "service/fleet.py": "the engine loop: a variant that breaks ends its own requests",
    "service/middleware.py": "the last resort before a response has begun",
    "service/supervisor/worker_loop.py": "the worker: one job's fault is its own",
    "service/streaming.py": "the last resort once a response has begun",
}
TERMINAL = ("model_core/cli/", "model_core/demo/", "service/cli.py")
IMPURE_MODULES = frozenset(
    {"asyncio", "concurrent", "http", "httpx", "multiprocessing", "requests", "socket", "threading"}
)
IMPURE_CALLS = frozenset({"time.time", "time.monotonic", "time.perf_counter", "time.sleep", "datetime.now"})
ENVIRONMENT = frozenset({"os.environ", "os.getenv"})
SETTINGS = "service/settings.py"

THIS_FILE = "tests/architecture/safety.py"
# Put together from pieces, so that no search for them ends here.
HOSTS = (
    ("pypi", "org"),
    ("pythonhosted", "org"),
    ("npmjs", "org"),
    ("npmjs", "com"),
    ("debian", "org"),
    ("crates", "io"),
)
WORKPLACE = "/" + "work/"
FORBIDDEN_TEXT = re.compile(
    "|".join(
        [rf"\b{name}\.{end}\b" for name, end in HOSTS]
        + [rf"(?<![\w.\-/]){WORKPLACE}", r"--find-links|--(extra-)?index-url"]
    )
)


def unsafe_loading(root: Path) -> list[str]:
    """Unpicklers, `torch.load`, `yaml.load`, `eval`, `exec`, `trust_remote_code`: anything that runs a file."""
    return [
        f"{source.name}:{line}: {what}"
        for source in python_sources(root, *PACKAGES)
        for node in source.nodes
        for line, what in _unsafe(node)
    ]


def broad_excepts(root: Path) -> list[str]:
    """`except Exception` and wider, outside the three borders. One that ends in a bare `raise` hides nothing."""
    return [
        f"{source.name}:{node.lineno}: except Exception outside the borders {sorted(BROAD_EXCEPT_ALLOWED)}"
        for source in python_sources(root, *PACKAGES)
        if source.name not in BROAD_EXCEPT_ALLOWED
        for node in source.nodes
        if isinstance(node, ast.ExceptHandler) and _is_broad(node)
    ]


def stale_allowances(root: Path) -> list[str]:
    """Borders in the allow-list above that no longer catch everything."""
    catching = {
        source.name
        for source in python_sources(root, *PACKAGES)
        for node in source.nodes
        if isinstance(node, ast.ExceptHandler) and _is_broad(node)
    }
    return [f"{name}: allowed a broad except, has none" for name in sorted(BROAD_EXCEPT_ALLOWED.keys() - catching)]


def prints(root: Path) -> list[str]:
    """`print` anywhere but in the command line and the demo."""
    return [
        f"{source.name}:{node.lineno}: print"
        for source in python_sources(root, *PACKAGES)
        if not source.name.startswith(TERMINAL)
        for node in source.nodes
        if isinstance(node, ast.Call) and dotted_name(node.func) == "print"
    ]


def impurities(root: Path) -> list[str]:
    """Threads, sockets, HTTP and the reading of a clock in model_core. A clock handed over uncalled is a parameter."""
    return [
        f"{source.name}:{line}: {what}"
        for source in python_sources(root, "model_core")
        if not source.name.startswith(TERMINAL)
        for line, what in _impure(source)
    ]


def environment_reads(root: Path) -> list[str]:
    """The process environment, read anywhere but in the service's settings (and by the demo's build)."""
    return [
        f"{source.name}:{node.lineno}: reads the environment; {SETTINGS} does that, once"
        for source in python_sources(root, *PACKAGES)
        if source.name != SETTINGS and not source.name.startswith(TERMINAL[:2])
        for node in source.nodes
        if isinstance(node, ast.Attribute) and dotted_name(node) in ENVIRONMENT
    ]


def forbidden_text(root: Path) -> list[str]:
    """Files that name a package registry's host, pip's way to another one, or a path of one workplace."""
    return [
        f"{name}: says {found.group()!r}"
        for name, text in text_files(root)
        if name != THIS_FILE and (found := FORBIDDEN_TEXT.search(text))
    ]


def _unsafe(node: ast.AST) -> Iterator[tuple[int, str]]:
    for name in imported_names(node):
        if name.split(".")[0] in UNPICKLERS:
            yield node.lineno, f"imports {name}: runs what it reads"
        elif name in BANNED_CALLS:
            yield node.lineno, f"imports {name}: {BANNED_CALLS[name]}"
    if isinstance(node, ast.Call):
        name = dotted_name(node.func)
        if name in BANNED_CALLS:
            yield node.lineno, f"{name}: {BANNED_CALLS[name]}"
        for keyword in node.keywords:
            is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in BANNED_FLAGS and not is_off:
                yield node.lineno, f"{keyword.arg}: runs code that came with the data"


def _is_broad(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    is_broad = any(kind is None or dotted_name(kind) in {"Exception", "BaseException"} for kind in kinds)
    last = handler.body[-1]
    return is_broad and not (isinstance(last, ast.Raise) and last.exc is None)


def _impure(source: Source) -> Iterator[tuple[int, str]]:
    for node in source.nodes:
        for name in imported_names(node):
            if name.split(".")[0] in IMPURE_MODULES or name.startswith("urllib.request"):
                yield node.lineno, f"imports {name}"
        if isinstance(node, ast.Call) and dotted_name(node.func).removeprefix("datetime.") in IMPURE_CALLS:
            yield node.lineno, f"calls {dotted_name(node.func)}: time is passed in"
