"""The store's plain rows on both databases: files with their quotas and retention, models, workers; and its schema."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_core.errors import ConfigError
from service.errors import FileInUseError, InvalidBodyError, QuotaExceededError, UploadNotFoundError
from service.jobs.database import open_database, refuse_network_file_system
from service.jobs.store import Store, open_store
from tests.service.jobs.player import add_file, new_job

NewStore = Callable[..., Store]


def test_files_of_jobs_are_kept_until_the_job_has_ended(store: Store) -> None:
    add_file(store)
    expired = add_file(store, "file-2", expires_seconds=-1.0)
    job = store.jobs.create(new_job())[0]
    with pytest.raises(FileInUseError):
        store.files.delete("file-1")
    assert [record.id for record in store.files.take_expired()] == [expired]
    store.jobs.request(job.id, "cancel")
    assert store.files.delete("file-1").id == "file-1"
    with pytest.raises(UploadNotFoundError):
        store.files.get("file-1")
    with pytest.raises(InvalidBodyError):
        store.jobs.create(new_job())


def test_quotas_of_one_owner(new_store: NewStore) -> None:
    store = new_store(max_active_jobs=1, max_bytes_per_owner=25)
    add_file(store)
    add_file(store, "file-2")
    with pytest.raises(QuotaExceededError):
        add_file(store, "file-3")
    add_file(store, "file-4", owner="you")
    job = store.jobs.create(new_job())[0]
    with pytest.raises(QuotaExceededError):
        store.jobs.create(new_job())
    store.jobs.create(new_job(owner="you"))
    store.jobs.request(job.id, "cancel")
    store.jobs.create(new_job())


def test_events_of_ended_jobs_go_and_those_of_others_stay(store: Store) -> None:
    add_file(store)
    ended, active = (store.jobs.create(new_job())[0] for _ in range(2))
    store.jobs.request(ended.id, "cancel")
    assert store.jobs.purge_events(3600) == 0
    assert store.jobs.purge_events(-1.0) == 2
    assert store.jobs.events(ended.id)[0] == [] and len(store.jobs.events(active.id)[0]) == 1


def test_workers_are_seen(store: Store) -> None:
    store.workers.beat("w1", "host", 1, ["cuda:0"])
    store.workers.beat("w1", "host", 1, ["cuda:0"], job_id="ftjob-1")
    store.workers.beat("w2", "host", 2)
    assert [(w.id, w.job_id) for w in store.workers.list(seen_within_seconds=60)] == [("w1", "ftjob-1"), ("w2", None)]
    num_alive, age = store.workers.heartbeat(60)
    assert num_alive == 2 and age is not None and 0 <= age < 60
    assert store.workers.heartbeat(-1)[0] == 0, "nobody was heard of in the future"
    store.workers.remove("w2")
    assert store.workers.drop_unseen(60) == 0 and store.workers.drop_unseen(-1) == 1 and store.workers.list() == []
    assert store.workers.heartbeat(60) == (0, None)


def test_models_are_marked_and_forgotten(store: Store) -> None:
    store.models.add("ft:a", "ftjob-1", "/a", base="base")
    store.models.add("ft:a", "ftjob-1", "/b", base="base", details={"v": 2})
    found = store.models.get("ft:a")
    assert found is not None and (found.path, found.details) == ("/b", {"v": 2})
    assert store.models.set_status("ft:a", "deleted") and not store.models.set_status("ft:b", "ready")
    assert store.models.list("ready") == [] and len(store.models.list()) == 1
    store.models.forget("ft:a")
    assert store.models.list() == []


def test_processes_that_start_together_migrate_once(database_url: str | None, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: open_store(database_url, tmp_path / "new"), range(4)))
    for store in stores:
        assert not any(store.jobs.counts().values())
        store.close()


def test_a_store_of_a_newer_program_is_refused(database_url: str | None, tmp_path: Path) -> None:
    open_store(database_url, tmp_path).close()
    database = open_database(database_url, tmp_path)
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'later'")
    with pytest.raises(ConfigError, match="newer program"):
        database.migrate()
    database.close()


@pytest.mark.parametrize("url", ["mysql://x/y", "nonsense", "sqlite:///x"])
def test_other_databases_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="DVE_DATABASE_URL"):
        open_database(url, tmp_path)


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\nproc /proc proc rw 0 0\n")
    with pytest.raises(ConfigError, match="network file system"):
        refuse_network_file_system(tmp_path / "data", str(mounts))
    mounts.write_text("server:/x /other nfs4 rw 0 0\n/dev/sda / ext4 rw 0 0\n")
    refuse_network_file_system(tmp_path / "data", str(mounts))
