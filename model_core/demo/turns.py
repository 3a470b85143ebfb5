"""Packs made by several processes between two steps of a trainer whose steps take every core.

In: a function and its items; out: results, in order. It knows nothing of scenes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import Any, Generic, TypeVar

import torch

from model_core.training.data.prefetch import stay_with_the_trainer, worker_ended

T = TypeVar("T")
R = TypeVar("R")


class ByTurns(Generic[T, R]):
    """Processes that work only while somebody waits for them: each makes a result, then all rest until those are used.

    Where the caller's threads take every core, as a training step on a CPU does, work done ahead stops them at each
    barrier; done by one process between two steps it leaves the other cores idle. The processes are forked once, at
    the first call, and end with their trainer.
    """

    def __init__(self, work: Callable[[T], R], num_workers: int) -> None:
        self._num_workers = num_workers
        self._pool = ProcessPoolExecutor(
            num_workers, mp_context=multiprocessing.get_context("fork"), initializer=_take_up, initargs=(work,)
        )

    def close(self) -> None:
        """End the processes; there are no more results."""
        self._pool.shutdown()

    def in_order(self, items: Sequence[T]) -> Iterator[R]:
        """work(item) of each; as many results as there are processes are made at a time, none while one is in use.

        Raises:
            TrainingError: one of the processes was killed.
        """
        for begin in range(0, len(items), self._num_workers):
            try:
                found = list(self._pool.map(_do, items[begin : begin + self._num_workers]))
            except BrokenExecutor as error:
                raise worker_ended(str(error)) from error
            yield from found


_work_of_this_process: Callable[[Any], Any]


def _take_up(work: Callable[[Any], Any]) -> None:
    """Given once, at the fork, instead of pickled with every item."""
    global _work_of_this_process
    _work_of_this_process = work
    torch.set_num_threads(1)
    stay_with_the_trainer(0)


def _do(item: Any) -> Any:
    return _work_of_this_process(item)
