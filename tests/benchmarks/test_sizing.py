"""What the runbook says of sizes is what the program computes now."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sizing import lines

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_the_runbooks_tables_are_the_programs() -> None:
    section = (ROOT / "RUNBOOK.md").read_text().partition("### Sizing\n")[2]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert shown == [line for line in lines(["3b", "7b"]) if line]
