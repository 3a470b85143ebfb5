"""`make test-ops` is not green where a tool is missing: a skip fails, and so does a download."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPS = """
import pytest

@pytest.mark.skipif(True, reason="no such tool")
def test_of_a_tool():
    pass

@pytest.mark.xfail(reason="known", strict=True)
def test_that_is_known():
    assert False
"""


@pytest.mark.parametrize(("no_skips", "code"), [("", 0), ("1", 1)])
def test_a_skip_is_a_failure_where_the_target_says_so(tmp_path: Path, no_skips: str, code: int) -> None:
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", str(tmp_path)]
    known = {**os.environ, "NO_SKIPPED_TESTS": no_skips, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == code, done.stdout
    assert ("nothing may be (NO_SKIPPED_TESTS): Skipped: no such tool" in done.stdout) == bool(no_skips)
    assert "1 xfailed" in done.stdout


def test_the_targets_say_so() -> None:
    recipes = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "tests/deploy" in line and "pytest" in line
    ]
    assert len(recipes) == 2 and all("$(NO_SKIPS)" in line for line in recipes)


def test_a_kubectl_that_does_not_come_ends_the_target(tmp_path: Path) -> None:
    """Or its stamp would say ever after that it is there."""
    venv, path = tmp_path / "venv", tmp_path / "path"
    for program, script in (
        (venv / "bin/python", 'case "$*" in *download*) exit 1;; esac'), (path / "kubectl", "exit 1"),
    ):  # fmt: skip
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    for stamp in (".created", ".runtime", ".dev"):
        (venv / stamp).touch()
    command = ["make", f"VENV={venv}", f"{venv}/.ops"]
    known = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode != 0, done.stdout
    assert not (venv / ".ops").exists()
