"""A disk with no room left, SQLite's own file on it: what a worker has to write about its job still finds room."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.errors import StorageFullError
from service.jobs.database import SQLITE_NAME
from service.jobs.job import NewEvent
from service.jobs.reserve import keep_reserve
from service.jobs.store import Store, open_store
from tests.service.jobs.player import Player, add_file, new_job


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small one, which only root can mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "dve-full", folder], check=False)
    if mounted.returncode != 0:
        pytest.skip("a small disk can't be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def begin(store: Store) -> Player:
    add_file(store)
    store.jobs.create(new_job())
    player = Player(store)
    player.start()
    return player


def insist(work: Callable[[], object]) -> int:
    """As a worker does. How often it was refused before."""
    for refused in range(10):
        with contextlib.suppress(StorageFullError):
            work()
            return refused
    raise AssertionError("there is no room for it")


def test_a_lease_is_renewed_and_a_job_told_as_failed(disk: Path) -> None:
    store = open_store(None, disk / "data")
    store.database.keep_reserve()
    player = begin(store)
    lease = player.held.lease
    fill(disk / "filler")
    for number in range(400):
        told = [NewEvent(0, number, "step", "x" * 100, {"loss": 0.5})]
        insist(lambda: store.leases.renew(lease))
        insist(lambda told=told: store.leases.append_events(lease, told))
    full = {"code": "storage_full", "message": "The disk is full.", "param": None}
    insist(lambda: store.leases.fail(lease, full))
    assert store.jobs.get(lease.job_id).status == "failed"
    assert store.jobs.get(lease.job_id).error["code"] == "storage_full"
    store.close()


def test_without_a_reserve_nothing_can_be_written(disk: Path) -> None:
    """Which is what the reserve is for."""
    store = open_store(None, disk / "data")
    player = begin(store)
    fill(disk / "filler")
    with pytest.raises(AssertionError, match="no room"):
        insist(lambda: player.steps(5))
    store.close()


def test_the_reserve_is_made_once_and_again_when_it_is_used_up(tmp_path: Path) -> None:
    store = open_store(None, tmp_path)
    player = begin(store)
    with contextlib.closing(sqlite3.connect(tmp_path / SQLITE_NAME, isolation_level=None)) as connection:
        assert [keep_reserve(connection) for _ in range(3)] == [True, False, False]
        for number in range(100):
            told = NewEvent(0, number, "note", "x" * 20_000, {})
            store.leases.append_events(player.held.lease, [told])
        assert [keep_reserve(connection) for _ in range(2)] == [True, False]
    store.close()
