"""`dve up`: two processes that begin, drain and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = "import sys; from service.together import run_together; sys.exit(run_together({0}, {1}))"
DRAINS = (
    "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({code})); "
    # Not open(...).write(...): the file is there before it is written, and an exit that a signal raises while
    # a forgotten file is being closed is swallowed with the file.
    "pathlib.Path({path!r}).write_text('up'); time.sleep(600)"
)


def start(folder: Path, first: str, second: str) -> subprocess.Popen[bytes]:
    code = RUN.format([sys.executable, "-c", first], [sys.executable, "-c", second])
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})


def drains(path: Path, code: int = 0) -> str:
    return DRAINS.format(path=str(path), code=code)


def wait_for(*paths: Path) -> None:
    while not all(path.exists() for path in paths):
        os.sched_yield()


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((0, 3), 3)])
def test_a_signal_drains_both(tmp_path: Path, codes: tuple[int, int], expected: int) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    process = start(tmp_path, drains(a, codes[0]), drains(b, codes[1]))
    wait_for(a, b)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == expected


def test_one_that_fails_takes_the_other_along(tmp_path: Path) -> None:
    a = tmp_path / "a"
    failing = f"import os, sys, time\nwhile not os.path.exists({str(a)!r}): time.sleep(0.01)\nsys.exit(2)"
    assert start(tmp_path, drains(a), failing).wait(20) == 2
