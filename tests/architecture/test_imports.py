"""Who may import whom: the contracts of pyproject.toml hold and can break, and the service starts without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LOADED = "import sys, {module}; sys.exit('torch' in sys.modules)"
PLANTED = [
    ("model_core/unplaced.py", "", "unplaced"),
    ("service/unplaced.py", "", "unplaced"),
    ("model_core/types.py", "import model_core.model", "model_core: layers"),
    ("model_core/types.py", "def f():\n    import fastapi", "model_core knows no server"),
    ("service/logs.py", "import torch", "service knows no torch"),
]


def loads_torch(module: str, root: Path) -> bool:
    """Whether a fresh interpreter has torch in memory after `import module`."""
    finished = subprocess.run(
        [sys.executable, "-c", LOADED.format(module=module)], cwd=root, capture_output=True, text=True
    )
    assert finished.returncode in (0, 1), finished.stderr
    assert "Traceback" not in finished.stderr, finished.stderr
    return finished.returncode == 1


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


@pytest.mark.parametrize(
    "module", ["service.app", "service.translate", "service.worker", "model_core", "model_core.types"]
)
def test_torch_stays_out_of_memory(module: str, root: Path) -> None:
    assert not loads_torch(module, root)


def test_the_probe_sees_torch(root: Path) -> None:
    assert loads_torch("model_core.linear", root)


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
