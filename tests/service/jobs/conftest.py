"""Stores on both databases: every test that asks for `store` or `new_store` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.jobs.store import Store, open_store
from tests.service.conftest import LiveServer
from tests.service.jobs.postgres import Cluster, run_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with run_cluster() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request) -> str | None:
    """None: SQLite."""
    return None if request.param == "sqlite" else request.getfixturevalue("cluster").new_database()


@pytest.fixture
def new_store(database_url: str | None, tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Opens the same database again each time: as another process would."""
    opened: list[Store] = []

    def new(**settings: Any) -> Store:
        opened.append(open_store(database_url, tmp_path / "data", **{"lease_seconds": 30.0, **settings}))
        return opened[-1]

    yield new
    for one in opened:
        one.close()


@pytest.fixture
def store(new_store: Callable[..., Store]) -> Store:
    return new_store()


@pytest.fixture
def served(start, database_url: str | None) -> Iterator[tuple[LiveServer, Store]]:
    """A started server, and its store as a worker on the same machine opens it."""
    live = start(database_url=database_url, job_lease_seconds=30.0)
    store = open_store(database_url, live.data_dir)
    yield live, store
    store.close()
