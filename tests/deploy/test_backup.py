"""The runbook's backup and restore, run as they stand there: the store, uploads, keys and models come back.

On a host they are the real thing; in compose and on Kubernetes stand-ins run here what is run inside there.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from model_core.errors import ConfigError
from service.jobs.files import FileFolder
from service.jobs.store import Store, open_store
from tests.deploy.runbook import blocks, run
from tests.deploy.standin_tools import install
from tests.service.jobs.player import Player, add_file, new_job
from tests.service.jobs.postgres import Cluster, find_binaries, run_cluster

BACKUP_AND_RESTORE = blocks("Backup and restore")
HOST_SQLITE, HOST_POSTGRES, COMPOSE_SQLITE, COMPOSE_POSTGRES, KUBERNETES_SQLITE, KUBERNETES_POSTGRES = range(0, 12, 2)


def fill(store: Store, data: Path) -> str:
    """An upload, a running job with an event, keys, a model. The job's id."""
    file_id, path, _ = FileFolder(data).write(b"a row", "fine-tune", "me")
    add_file(store, file_id, path=path)
    store.jobs.create(new_job(file_id))
    job = Player(store).start()
    for name in ("keys/hashed", "models/one/current/model.safetensors", "locks/host.cpu-0.lock"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    (data / "keys/hashed").chmod(0o600)
    return job.id


def look(store: Store, data: Path, job_id: str) -> list[object]:
    job = store.jobs.get(job_id)
    upload = FileFolder(data).path(store.files.get(job.training_file).path)
    events = [event.message for event in store.jobs.events(job_id)[0]]
    keys = data / "keys/hashed"
    return [job, events, upload.read_bytes(), keys.read_text(), keys.stat().st_mode, (data / "models/one").is_dir()]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("data", "backup"):
        (tmp_path / name).mkdir()
    return tmp_path / "data", tmp_path / "backup"


def test_sqlite_and_the_data_folder_come_back(folders: tuple[Path, Path]) -> None:
    data, backup = folders
    store = open_store(None, data)
    job_id = fill(store, data)
    before = look(store, data, job_id)
    run(BACKUP_AND_RESTORE[HOST_SQLITE], DATA=data, BACKUP=backup)  # while the store is open, as a server has it
    store.jobs.request(job_id, "cancel")
    store.close()
    # What a newer program would leave: this one refuses it, and the backup is the way back.
    with sqlite3.connect(data / "jobs.sqlite3") as newer:
        newer.execute("UPDATE alembic_version SET version_num = 'v9999'")
    newer.close()
    with pytest.raises(ConfigError, match="restore a backup"):
        open_store(None, data)
    shutil.rmtree(data)
    data.mkdir()
    run(BACKUP_AND_RESTORE[HOST_SQLITE + 1], DATA=data, BACKUP=backup)
    restored = open_store(None, data)
    assert look(restored, data, job_id) == before
    assert not (data / "locks").exists(), "nobody holds a device after a restore"
    restored.close()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with run_cluster() as running:
        yield running


@pytest.fixture
def database(cluster: Cluster) -> str:
    return cluster.new_database()


@pytest.mark.ops
def test_postgresql_comes_back(database: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data, backup = folders
    monkeypatch.setenv("PATH", f"{find_binaries()}:{os.environ['PATH']}")
    store = open_store(database, data)
    job_id = fill(store, data)
    before = look(store, data, job_id)
    run(BACKUP_AND_RESTORE[HOST_POSTGRES], DATABASE_URL=database, BACKUP=backup)
    store.jobs.request(job_id, "cancel")
    store.close()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DELETE FROM job_events")
    run(BACKUP_AND_RESTORE[HOST_POSTGRES + 1], DATABASE_URL=database, BACKUP=backup)
    restored = open_store(database, data)
    assert look(restored, data, job_id) == before
    restored.close()


def installed(folder: Path) -> dict[str, str]:
    """The environment of somebody who has docker and kubectl."""
    path = f"{install(folder)}:{find_binaries()}:{os.environ['PATH']}"
    return {"PATH": path, "COMPOSE_FILE": "deploy/compose.yaml:deploy/compose.postgres.yaml"}


@pytest.mark.parametrize("where", [COMPOSE_SQLITE, KUBERNETES_SQLITE])
def test_sqlite_comes_back_in_containers(folders: tuple[Path, Path], tmp_path: Path, where: int) -> None:
    data, backup = folders
    known = installed(tmp_path)
    store = open_store(None, data)
    job_id = fill(store, data)
    before = look(store, data, job_id)
    run(BACKUP_AND_RESTORE[where], BACKUP=backup, **known)
    assert not (data / "jobs.copy").exists()
    store.jobs.request(job_id, "cancel")
    store.close()
    (data / "models/one/current/model.safetensors").unlink()
    run(BACKUP_AND_RESTORE[where + 1], BACKUP=backup, **known)
    restored = open_store(None, data)
    assert look(restored, data, job_id) == before
    assert (data / "models/one/current/model.safetensors").exists() and not (data / "locks").exists()
    restored.close()


@pytest.mark.ops
@pytest.mark.parametrize("where", [COMPOSE_POSTGRES, KUBERNETES_POSTGRES])
def test_postgresql_comes_back_in_containers(
    cluster: Cluster, folders: tuple[Path, Path], tmp_path: Path, where: int
) -> None:
    data, backup = folders
    with psycopg.connect(cluster.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE ROLE dve LOGIN SUPERUSER")
        connection.execute("CREATE DATABASE dve OWNER dve")
    url = cluster.url("dve").replace("postgres@", "dve@")
    known = installed(tmp_path) | {"PGHOST": cluster.url("").partition("host=")[2]}
    store = open_store(url, data)
    job_id = fill(store, data)
    before = look(store, data, job_id)
    run(BACKUP_AND_RESTORE[where], BACKUP=backup, **known)
    store.jobs.request(job_id, "cancel")
    store.close()
    (data / "keys/hashed").write_text("other")
    run(BACKUP_AND_RESTORE[where + 1], BACKUP=backup, **known)
    restored = open_store(url, data)
    assert look(restored, data, job_id) == before
    restored.close()
