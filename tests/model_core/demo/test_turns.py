"""Work by turns: none is done while the caller computes, and a stop sent to all leaves the processes at their work.

That they end with a killed trainer is asked beside those that work ahead, in training/data/test_source.py.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model_core.demo.turns import ByTurns
from model_core.errors import ImageParseError, TrainingError


def test_by_turns_as_many_are_made_as_there_are_processes_and_then_none_until_they_are_used(tmp_path: Path) -> None:
    """What is made while the caller computes takes its cores."""

    def work(number: int) -> tuple[int, int]:
        (tmp_path / str(number)).touch()
        return os.getpid(), number * number

    before = set(multiprocessing.active_children())
    turns = ByTurns(work, 2)
    results = turns.in_order(range(5))
    found = [next(results)]
    time.sleep(0.2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]
    found += [next(results), next(results)]
    time.sleep(0.2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "3"]
    workers = {child.pid for child in set(multiprocessing.active_children()) - before}
    assert {pid for pid, _ in found} <= workers and len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    assert [square for _, square in (*found, *results)] == [0, 1, 4, 9, 16]
    assert {pid for pid, _ in turns.in_order(range(8))} <= workers, "forked once"
    turns.close()
    assert not workers & {child.pid for child in multiprocessing.active_children()}


def test_a_killed_process_is_told_and_the_others_end() -> None:
    """They don't heed SIGTERM: the standard library's pool waited for them for ever."""
    before = set(multiprocessing.active_children())
    turns = ByTurns(lambda number: (os.getpid(), number), 3)
    results = turns.in_order(range(40))
    found = [next(results) for _ in range(3)]
    workers = set(multiprocessing.active_children()) - before
    os.kill(found[1][0], signal.SIGKILL)
    with pytest.raises(TrainingError, match=r"has ended before its trainer.*exit code -9") as caught:
        list(results)
    assert caught.value.param == "num_workers" and len(workers) == 3
    assert not workers & set(multiprocessing.active_children())
    assert [number for _, number in turns.in_order(range(4))] == [0, 1, 2, 3], "whoever asks again gets new ones"
    turns.close()


def test_what_the_work_raises_is_raised_here_and_nothing_gets_out_of_order() -> None:
    def work(number: int) -> int:
        if number == 2:
            raise ImageParseError("no picture", value=number, allowed="a picture", fix="Give another", param="row")
        return number

    turns = ByTurns(work, 2)
    with pytest.raises(ImageParseError, match="no picture") as caught:
        list(turns.in_order(range(6)))
    assert caught.value.param == "row"
    assert list(turns.in_order([4, 5, 6])) == [4, 5, 6]
    turns.close()


def test_the_processes_end_with_their_owner_and_with_python() -> None:
    before = set(multiprocessing.active_children())
    turns = ByTurns(abs, 2)
    assert list(turns.in_order([-1, -2])) == [1, 2]
    del turns
    assert set(multiprocessing.active_children()) <= before
    script = "from model_core.demo.turns import ByTurns\nturns = ByTurns(abs, 2)\nprint(list(turns.in_order([-1, -2])))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "[1, 2]\n"), done.stderr


def test_a_process_that_breaks_is_told_of_and_says_why_itself(capfd: pytest.CaptureFixture[str]) -> None:
    turns = ByTurns(lambda number: 1 // number, 2)
    with pytest.raises(TrainingError, match="exit code 1"):
        list(turns.in_order([1, 0]))
    assert "ZeroDivisionError" in capfd.readouterr().err
    turns.close()
