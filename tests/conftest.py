"""One compute thread in every test and in every server that a test starts.

The models are small, and threads that spin while they wait for each other lose a core that a second process needs:
beside one busy process the tests of the KV cache took 170 s with two threads and 14 s with one.

With NO_SKIPPED_TESTS (`make test-ops` and `make test-image`) a test that is skipped has failed: these targets bring
the tools, and green must mean that they were used.

Where tests run in several processes, the loops of decode steps are compiled once before, while these collect their
tests: on a fresh checkout each server that a test starts would do it for itself otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator

import pytest

# Before anything imports torch: OpenMP reads it when it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_COMPILE = "from model_core.language import decode_kernel; decode_kernel.load()"
_compiling = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    hands_out = getattr(session.config.option, "numprocesses", None) and not hasattr(session.config, "workerinput")
    if hands_out:
        session.config.stash[_compiling] = subprocess.Popen([sys.executable, "-c", _COMPILE])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("NO_SKIPPED_TESTS"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped, and nothing may be (NO_SKIPPED_TESTS): {why}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    compiling = session.config.stash.get(_compiling, None)
    if compiling is not None:
        compiling.wait()
