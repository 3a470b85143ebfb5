"""What has been prepared is gone with the last one who holds it, however its preparation ended."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.preparation import Preparation


class Pixels:
    """Something large."""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Without the garbage collector, which would only hide what keeps itself."""
    gc.disable()
    with ThreadPoolExecutor(1) as one:
        yield one
    gc.enable()


def test_a_result_is_not_kept_by_its_own_preparation(pool: ThreadPoolExecutor) -> None:
    seen: list[weakref.ref[Pixels]] = []
    may_begin = threading.Event()

    def work() -> Pixels:
        may_begin.wait(30)  # until its end can be told to somebody: a future that has ended keeps no callback
        return Pixels()

    preparation = Preparation(work, lambda made: seen.append(weakref.ref(made)), pytest.fail)
    preparation.start(pool)
    may_begin.set()
    pool.submit(int).result()  # the pool's only thread is behind it then
    assert len(seen) == 1
    mine = weakref.ref(preparation)
    del preparation
    assert mine() is None and seen[0]() is None


def test_an_error_is_told_and_keeps_nothing(pool: ThreadPoolExecutor) -> None:
    errors: list[str] = []
    may_begin = threading.Event()

    def fail() -> None:
        may_begin.wait(30)
        raise ValueError("no picture")

    preparation = Preparation(fail, pytest.fail, lambda error: errors.append(str(error)))
    preparation.start(pool)
    may_begin.set()
    pool.submit(int).result()
    mine = weakref.ref(preparation)
    del preparation
    assert errors == ["no picture"] and mine() is None


@pytest.mark.parametrize("has_begun", [True, False])
def test_one_that_was_called_off_keeps_nothing(pool: ThreadPoolExecutor, has_begun: bool) -> None:
    may_end, begun, seen = threading.Event(), threading.Event(), []

    def work() -> Pixels:
        made = Pixels()
        seen.append(weakref.ref(made))
        begun.set()
        may_end.wait(30)
        return made

    if not has_begun:
        pool.submit(may_end.wait, 30)
    preparation = Preparation(work, pytest.fail, pytest.fail)
    preparation.start(pool)
    assert not has_begun or begun.wait(30)
    preparation.cancel()
    may_end.set()
    pool.submit(int).result()
    mine = weakref.ref(preparation)
    del preparation
    assert mine() is None
    assert [made() for made in seen] == ([None] if has_begun else [])
