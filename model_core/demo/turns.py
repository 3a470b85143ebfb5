"""Packs made by several processes between two steps of a trainer whose steps take every core.

In: a function and its items; out: results, in order. It knows nothing of scenes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, Generic, TypeVar

import torch

from model_core.errors import DualVisionError, TrainingError
from model_core.training.data.prefetch import stay_with_the_trainer, worker_ended

T = TypeVar("T")
R = TypeVar("R")


class ByTurns(Generic[T, R]):
    """Processes that work only while somebody waits for them: each makes a result, then all rest until those are used.

    Where the caller's threads take every core, as a training step on a CPU does, work done ahead stops them at each
    barrier; done by one process between two steps it leaves the other cores idle. The processes are forked once, at
    the first call, and end with their trainer. Pools of the standard library don't do: where one of their processes is
    killed, they wait for ever for the others, which don't heed the signal that is to end them.
    """

    def __init__(self, work: Callable[[T], R], num_workers: int) -> None:
        self._work, self._num_workers = work, num_workers
        self._workers: list[_Worker] = []
        Finalize(self, _end, (self._workers,), exitpriority=0)  # before Python waits for its processes at exit

    def close(self) -> None:
        """End the processes; whoever asks for more results gets new ones."""
        _end(self._workers)

    def in_order(self, items: Sequence[T]) -> Iterator[R]:
        """work(item) of each; as many results as there are processes are made at a time, none while one is in use.

        Raises:
            TrainingError: one of the processes was killed, or broke; the others are ended then. And what `work` raises
                of our own tree.
        """
        for begin in range(0, len(items), self._num_workers):
            yield from self._turn(items[begin : begin + self._num_workers])

    def _turn(self, items: Sequence[T]) -> list[R]:
        while len(self._workers) < self._num_workers:
            self._workers.append(_Worker(self._work))
        workers = self._workers[: len(items)]
        with ExitStack() as stack:
            stack.callback(self.close)  # a result that was asked for and not taken would come in place of the next
            for worker, item in zip(workers, items, strict=True):
                worker.ask(item)
            found = [worker.answer() for worker in workers]
            stack.pop_all()
        for _, error in found:
            if error is not None:
                raise error
        return [result for result, _ in found]


class _Worker:
    def __init__(self, work: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_answer_all, args=(work, theirs), daemon=True)
        self._process.start()
        theirs.close()  # else its end would not be told here

    def ask(self, item: Any) -> None:
        try:
            self._pipe.send(item)
        except OSError as error:
            raise self._ended() from error

    def answer(self) -> tuple[Any, DualVisionError | None]:
        try:
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error

    def _ended(self) -> TrainingError:
        self._process.join(1)
        return worker_ended(f"process {self._process.pid} with exit code {self._process.exitcode}")

    def end(self) -> None:
        self._process.kill()  # it holds nothing, and heeds nothing less
        self._process.join()
        self._pipe.close()


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


def _answer_all(work: Callable[[Any], Any], pipe: Connection) -> None:
    """What is no error of ours ends the process, with a traceback on stderr."""
    torch.set_num_threads(1)
    stay_with_the_trainer(0)
    while True:
        item = pipe.recv()
        result, told = None, None
        try:
            result = work(item)
        except DualVisionError as error:
            told = error
        pipe.send((result, told))
