"""Work by turns: none is done while the caller computes, and a stop sent to all leaves the processes at their work.

That they end with a killed trainer is asked beside those that work ahead, in training/data/test_source.py.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from model_core.demo.turns import ByTurns
from model_core.errors import TrainingError


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


def test_a_killed_process_is_told_with_a_sentence() -> None:
    turns = ByTurns(lambda number: (os.getpid(), number), 2)
    results = turns.in_order(range(40))
    os.kill(next(results)[0], signal.SIGKILL)
    with pytest.raises(TrainingError, match=r"has ended before its trainer\. Got: A process") as caught:
        list(results)
    assert caught.value.param == "num_workers"
    turns.close()
