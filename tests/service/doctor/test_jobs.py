"""The doctor's lines about store and workers, each in each of its states, on both databases."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.doctor.jobs import look_at_jobs
from service.jobs.database import open_database
from service.jobs.store import open_store
from service.settings import JobSettings
from tests.service.jobs.conftest import cluster, database_url  # noqa: F401
from tests.service.jobs.player import add_file, new_job


def look(folder: Path, url: str | None) -> dict[str, tuple[str, str]]:
    found, skew = look_at_jobs(JobSettings(data_dir=folder, database_url=url))
    assert all(bool(one.remedy) == (one.state != "ok") for one in found)
    assert (skew is None) is (url is None) or len(found) == 1
    assert skew is None or abs(skew) < 60
    return {one.name: (one.state, one.detail) for one in found}


def test_before_the_first_start_nothing_is_made(tmp_path: Path, database_url: str | None) -> None:  # noqa: F811
    found = look(tmp_path / "data", database_url)
    assert [state for state, _ in found.values()] == ["ok", "ok"]
    assert not (tmp_path / "data").exists()


def test_a_store_and_its_workers(tmp_path: Path, database_url: str | None) -> None:  # noqa: F811
    store = open_store(database_url, tmp_path)
    assert look(tmp_path, database_url)["store"][0] == look(tmp_path, database_url)["workers"][0] == "ok"
    add_file(store)
    store.jobs.create(new_job())
    state, detail = look(tmp_path, database_url)["workers"]
    assert state == "fail" and "1 validating_files" in detail
    store.workers.beat("w", "host", 1)
    assert look(tmp_path, database_url)["workers"][0] == "ok"
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE workers SET seen_at = seen_at - 500")
    assert look(tmp_path, database_url)["workers"][0] == "fail"
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE jobs SET status = 'cancelled'")
    assert look(tmp_path, database_url)["workers"][0] == "warn"
    store.close()


@pytest.mark.parametrize(("version", "state"), [("0001", "warn"), ("later", "fail")])
def test_schemas_of_other_versions(tmp_path: Path, version: str, state: str) -> None:
    open_store(None, tmp_path).close()
    database = open_database(None, tmp_path)
    with database.write() as connection:
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{version}'")
    database.close()
    found = look(tmp_path, None)
    assert found["store"][0] == state and "workers" not in found


def test_a_database_that_is_away_or_no_database(tmp_path: Path) -> None:
    for url in (f"postgresql://postgres@/x?host={tmp_path}", "mysql://x/y"):
        assert look(tmp_path, url)["store"][0] == "fail"
