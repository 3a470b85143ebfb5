"""A trainer's threads spin shortly, unless someone has said otherwise; it is decided before torch comes in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_STARTS = """
import os, sys
from model_core.cli.{command} import main
assert "torch" not in sys.modules, "OpenMP reads its variables when torch brings it"
main({argv})
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(
    ("command", "argv"),
    [("train", ["--config", "no-such.json"]), ("demo", ["build", "--scale", "2"])],
)
@pytest.mark.parametrize(
    ("said", "then"),
    [({}, "3000 None"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None PASSIVE"), ({"GOMP_SPINCOUNT": "0"}, "0 None")],
)
def test_threads_spin_shortly(command: str, argv: list[str], said: dict[str, str], then: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | said
    script = _STARTS.format(command=command, argv=argv)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True, timeout=120
    )
    assert done.stdout.strip().endswith(then)
