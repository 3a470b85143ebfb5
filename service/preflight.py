"""What a recipe costs in memory, asked of a process of its own: the answer needs torch, and the server has none.

In: a recipe. Out: the report of `python -m model_core.cli.fit`, which builds the model without its weights. One at a
time, bounded in time; whatever else it says is told as why there is no report.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from model_core.training.config import TrainConfig

FIT_COMMAND = (sys.executable, "-m", "model_core.cli.fit")
_SECONDS = 120.0
_MAX_OUTPUT_BYTES = 1 << 20


class Preflight:
    """`command` stands in for the real one in tests. device: what the server computes on."""

    def __init__(self, device: str, command: Sequence[str] = FIT_COMMAND, seconds: float = _SECONDS) -> None:
        self._device, self._command, self._seconds = device, tuple(command), seconds
        self._turn = asyncio.Semaphore(1)

    async def cost(self, recipe: TrainConfig) -> tuple[dict[str, Any] | None, str | None]:
        """The report, or None and why there is none."""
        async with self._turn:
            with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
                file.write(recipe.model_dump_json())
                file.flush()
                return await self._run("--config", file.name, "--device", self._device, "--json")

    async def _run(self, *arguments: str) -> tuple[dict[str, Any] | None, str | None]:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self._command, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe,
            limit=_MAX_OUTPUT_BYTES,
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._seconds):
                out, err = await process.communicate()
        except TimeoutError:
            return None, f"the memory preflight took longer than {self._seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        with contextlib.suppress(ValueError):
            report = json.loads(out[:_MAX_OUTPUT_BYTES])
            if isinstance(report, dict):
                return report, None
        last = err.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        return None, f"the memory preflight has no answer: {last[0][:500]}"
