"""Who may import whom: the contracts of pyproject.toml hold and can break, and the service starts without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LIGHT = (
    "service.app", "service.main", "service.cli", "service.worker", "service.translate",
    "model_core", "model_core.types", "model_core.analysis.compare",
)  # fmt: skip
HEAVY = {"torch", "transformers", "opentelemetry.sdk"}
IMPORTED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name, *sys.modules)
"""
PLANTED = [
    ("model_core/unplaced.py", "", "unplaced"),
    ("service/unplaced.py", "", "unplaced"),
    ("model_core/types.py", "import model_core.model", "model_core: layers"),
    ("model_core/types.py", "def f():\n    import fastapi", "model_core knows no server"),
    ("service/logs.py", "import torch", "service knows no torch"),
]


def heavy_after(root: Path, *modules: str) -> dict[str, set[str]]:
    """What is heavy in a fresh interpreter's memory after each of these, imported in this order."""
    command = [sys.executable, "-c", IMPORTED, *modules]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return {name: HEAVY & set(loaded) for name, *loaded in map(str.split, finished.stdout.splitlines())}


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the tree at `root`, by that tree's own contracts."""
    linter = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([str(linter), "--no-cache"], cwd=root, capture_output=True, text=True)


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """Both packages' Python files and their contracts, to be spoiled."""
    for package in ("model_core", "service"):
        shutil.copytree(
            root / package, tmp_path / package, ignore=shutil.ignore_patterns("weights", "ui", "__pycache__")
        )
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


def test_torch_and_the_tracer_stay_out_of_memory(root: Path) -> None:
    assert heavy_after(root, *LIGHT) == {name: set() for name in LIGHT}


def test_the_probe_sees_them(root: Path) -> None:
    assert heavy_after(root, "service.tracing.otel", "transformers", "torch")["torch"] == HEAVY


def test_the_contracts_hold(root: Path) -> None:
    finished = lint_imports(root)
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize(("name", "line", "contract"), PLANTED)
def test_a_planted_import_breaks_a_contract(name: str, line: str, contract: str, copy: Path) -> None:
    with (copy / name).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    finished = lint_imports(copy)
    assert finished.returncode == 1
    assert contract in finished.stdout.split("Broken contracts")[-1]
