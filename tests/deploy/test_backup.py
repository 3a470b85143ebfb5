"""The runbook's backup and restore, run as they stand there: the store, uploads, keys and models come back."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from model_core.errors import ConfigError
from service.jobs.files import FileFolder
from service.jobs.store import Store, open_store
from tests.service.jobs.player import Player, add_file, new_job
from tests.service.jobs.postgres import find_binaries, run_cluster

ROOT = Path(__file__).parents[2]


def blocks() -> list[str]:
    """The section's commands: SQLite's backup and restore, PostgreSQL's."""
    section = (ROOT / "RUNBOOK.md").read_text().partition("### Backup and restore")[2].partition("\n### ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)


def run(block: str, **environment: str | Path) -> None:
    known = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run(["bash", "-euc", block], env=known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
    run(blocks()[0], DATA=data, BACKUP=backup)  # while the store is open, as a server has it
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
    run(blocks()[1], DATA=data, BACKUP=backup)
    restored = open_store(None, data)
    assert look(restored, data, job_id) == before
    assert not (data / "locks").exists(), "nobody holds a device after a restore"
    restored.close()


@pytest.fixture
def database() -> Iterator[str]:
    with run_cluster() as cluster:
        yield cluster.new_database()


@pytest.mark.ops
def test_postgresql_comes_back(database: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data, backup = folders
    monkeypatch.setenv("PATH", f"{find_binaries()}:{os.environ['PATH']}")
    store = open_store(database, data)
    job_id = fill(store, data)
    before = look(store, data, job_id)
    run(blocks()[2], DATABASE_URL=database, BACKUP=backup)
    store.jobs.request(job_id, "cancel")
    store.close()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DELETE FROM job_events")
    run(blocks()[3], DATABASE_URL=database, BACKUP=backup)
    restored = open_store(database, data)
    assert look(restored, data, job_id) == before
    restored.close()
