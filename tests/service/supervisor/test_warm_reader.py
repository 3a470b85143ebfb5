"""The reader that is kept ready: it becomes the program that it was told to be, once."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from service.supervisor.warm_reader import WarmReader

MODULE = "tests.service.supervisor.readable"


def test_it_becomes_its_program(tmp_path: Path) -> None:
    async def run() -> int:
        reader = WarmReader([MODULE, "json"], 0)
        assert reader.take((sys.executable, "-m", MODULE), tmp_path / "out", tmp_path / "log") is None
        reader.prepare()
        assert reader.take((sys.executable, "-m", "another"), tmp_path / "out", tmp_path / "log") is None
        process = reader.take((sys.executable, "-m", MODULE, "a", "b"), tmp_path / "out", tmp_path / "log")
        assert process is not None
        code = await process.wait()
        assert reader.take((sys.executable, "-m", MODULE), tmp_path / "out", tmp_path / "log") is None
        await reader.close()
        return code

    assert asyncio.run(run()) == 78
    assert (tmp_path / "out").read_text() == "['a', 'b']"
    assert (tmp_path / "log").read_text() == "complaint"


def test_one_that_can_not_be_had_is_not_tried_again(tmp_path: Path) -> None:
    async def run() -> None:
        reader = WarmReader(["no.such.module"], 0)
        reader.prepare()
        assert reader._spare is not None
        await reader._spare[0].wait()
        reader.prepare()
        assert reader.take((sys.executable, "-m", "no.such.module"), tmp_path / "out", tmp_path / "log") is None
        await reader.close()

    asyncio.run(run())
