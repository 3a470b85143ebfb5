"""Work on a list of items in its order, here or ahead of time in torch's worker processes.

In: a function and its items; out: results, one by one. It knows nothing of data sets.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from model_core.errors import TrainingError

T = TypeVar("T")
R = TypeVar("R")
_LOOKS_EVERY_SECONDS = 1.0


class _Work(Dataset, Generic[T, R]):
    def __init__(self, work: Callable[[T], R], items: Sequence[T]) -> None:
        self._work, self._items = work, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> R:
        return self._work(self._items[index])


def in_order(work: Callable[[T], R], items: Sequence[T], num_workers: int) -> Iterator[R]:
    """work(item) of each. With workers, at most two results each are waiting at any time."""
    if num_workers == 0 or len(items) < 2:
        yield from map(work, items)
        return
    # Its own generator: a loader that draws its seed from torch's global one would change what a resumed run draws.
    yield from DataLoader(
        _Work(work, items), batch_size=None, num_workers=min(num_workers, len(items)), collate_fn=_same,
        generator=torch.Generator(), worker_init_fn=stay_with_the_trainer,
    )  # fmt: skip


@contextmanager
def ends_of_workers_told() -> Iterator[None]:
    """Around all of a training: torch tells of a worker's end from a signal handler, so in the midst of anything."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise worker_ended(str(error)) from error


def worker_ended(seen: str) -> TrainingError:
    """What a run ends with whose packs are made no more."""
    return TrainingError(
        "a process that makes packs has ended before its trainer", value=seen.rstrip(". "),
        allowed="processes that live as long as it", fix="Look whether the system killed it for memory (dmesg), or a "
        "container's /dev/shm is small; lower num_workers, and go on: the last checkpoint is intact",
        param="num_workers",
    )  # fmt: skip


def stay_with_the_trainer(_: int) -> None:
    """A stop is often sent to the whole process group: the trainer saves on it, and needs its workers until then.

    But a killed trainer's workers would stay for ever, half a gigabyte each: torch lets them end of themselves, after a
    last result is taken from a pipe that nobody reads.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, partial(_end_without, os.getppid()))
    signal.setitimer(signal.ITIMER_REAL, _LOOKS_EVERY_SECONDS, _LOOKS_EVERY_SECONDS)


def _end_without(parent: int, *_: object) -> None:
    if os.getppid() != parent:
        os._exit(1)


def _same(result: R) -> R:
    return result
