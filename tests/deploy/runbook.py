"""The runbook's own lines, and how they are run."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def section(title: str) -> str:
    return (ROOT / "RUNBOOK.md").read_text().partition(f"### {title}\n")[2].partition("\n### ")[0]


def blocks(title: str) -> list[str]:
    """A section's commands, in their order."""
    return re.findall(r"```bash\n(.*?)```", section(title), re.DOTALL)


def run(block: str, **environment: str | Path) -> str:
    """What it printed. It must succeed."""
    known = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run(["bash", "-euc", block], env=known, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout
