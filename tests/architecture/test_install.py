"""From a bare clone to a working command, by the Makefile alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "*cache*", "*.egg-info", "build", "dist", "weights")


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Under `make test VENV=...` the outer make would hand its own VENV down.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "VENV"}
    return subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_the_runtime_alone_carries_the_command(root: Path, tmp_path: Path) -> None:
    clone = shutil.copytree(root, tmp_path / "a clone", ignore=LEFT_OUT)
    installed = make(clone, "install", f"PYTHON={sys.executable}")
    assert installed.returncode == 0, installed.stderr
    shown = subprocess.run([clone / ".venv/bin/dve", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_a_python_that_is_not_there_is_named(root: Path, tmp_path: Path) -> None:
    finished = make(root, "install", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}")
    assert finished.returncode != 0
    assert "Python 3.11 or newer is needed" in finished.stderr


def test_flags_are_passed_on_only_if_given(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that exports HOST (its own name) must not become an address to bind."""
    monkeypatch.setenv("HOST", "my-laptop")
    line = make(root, "--dry-run", "serve", "PORT=8123").stdout.splitlines()[-1]
    assert line.split() == ["exec", ".venv/bin/dve", "serve", "--port", "'8123'"]
