"""What a server does for jobs that no worker looks after, and what it clears away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg

from model_core.published import folder_name, promote
from service.housekeeping import purge, purge_jobs
from service.jobs.files import FileFolder
from service.jobs.job import NewCheckpoint
from service.jobs.store import Store, open_store
from tests.model_core.versions import add_version
from tests.service.conftest import LiveServer
from tests.service.jobs.player import Player, add_file, new_job
from tests.service.jobs.postgres import Cluster
from tests.service.jobs.rows import jsonl

JOBS = "/v1/fine_tuning/jobs"


def test_a_server_cancels_the_job_of_a_worker_that_never_comes_back(start: Callable[..., LiveServer]) -> None:
    live = start(job_lease_seconds=0.5)
    file_id = live.openai.files.create(file=("t.jsonl", jsonl()), purpose="fine-tune").id
    job = live.openai.fine_tuning.jobs.create(model="fake/model:1", training_file=file_id)
    store = open_store(None, live.data_dir, lease_seconds=1.0)
    Player(store).start()
    assert live.openai.fine_tuning.jobs.cancel(job.id).fusion["requested_action"] == "cancel"
    # The stream ends when the job does.
    told = live.http.get(f"{JOBS}/{job.id}/events", params={"stream": "true"}).text
    assert "The job was cancelled" in told and told.endswith("data: [DONE]\n\n")
    store.close()


def test_what_has_expired_is_cleared_away(store: Store, tmp_path: Path) -> None:
    folder = FileFolder(tmp_path)
    kept, expired, read = (folder.write(b"x", "fine-tune", "me") for _ in range(3))
    for (file_id, path, _), seconds in ((kept, 3600.0), (expired, -1.0), (read, -1.0)):
        add_file(store, file_id, path=path, expires_seconds=seconds)
    job = store.jobs.create(new_job(read[0]))[0]
    purge(store, folder, event_retention_seconds=-1.0)
    assert [folder.path(one[1]).exists() for one in (kept, expired, read)] == [True, False, True]
    store.jobs.request(job.id, "cancel")
    purge(store, folder, event_retention_seconds=-1.0)
    assert not folder.path(read[1]).exists() and store.jobs.events(job.id)[0] == []


def ended_job(store: Store, root: Path, end: str = "succeed") -> str:
    """With a folder that holds a step, and its row."""
    player = Player(store)
    store.jobs.create(new_job())
    job = player.start()
    player.steps(2)
    step = root / job.id / "attempt-1" / "step-2"
    step.mkdir(parents=True)
    store.leases.add_checkpoint(player.held.lease, NewCheckpoint(2, 0, str(step), "epoch"))
    player.succeed() if end == "succeed" else store.leases.fail(player.held.lease, {"code": "nan_loss"})
    return job.id


def test_folders_of_jobs_go_when_nobody_needs_them(store: Store, tmp_path: Path) -> None:
    root = tmp_path / "jobs"
    add_file(store)
    begun_from, gone_on_from, old = (ended_job(store, root) for _ in range(3))
    ids = [store.jobs.checkpoints(job_id)[0][0] for job_id in (begun_from, gone_on_from)]
    users = [store.jobs.create(new_job(model=ids[0].model_id))[0], store.jobs.create(new_job(resume_from=ids[1].id))[0]]
    (root / "another store's").mkdir()
    purge_jobs(store, root, retention_seconds=3600.0)
    assert len(list(root.iterdir())) == 4, "they have only just ended"
    purge_jobs(store, root, retention_seconds=-1.0)
    assert {path.name for path in root.iterdir()} == {begun_from, gone_on_from, "another store's"}
    assert store.jobs.checkpoints(old)[0] == [] and store.jobs.get(old).status == "succeeded"
    assert len(store.jobs.checkpoints(begun_from)[0]) == 1
    for user in users:
        store.jobs.request(user.id, "cancel")
    purge_jobs(store, root, retention_seconds=-1.0)
    assert {path.name for path in root.iterdir()} == {"another store's"}


def test_the_folder_of_a_deleted_models_job_goes_at_once(start: Callable[..., LiveServer]) -> None:
    live = start()
    store = open_store(None, live.data_dir)
    add_file(store)
    deleted, kept = (ended_job(store, live.data_dir / "jobs") for _ in range(2))
    name = store.jobs.get(deleted).fine_tuned_model or ""
    place = live.data_dir / "models" / folder_name(name)
    add_version(place, "v1", base_fingerprint="fake")
    promote(place, "v1")
    assert live.openai.models.delete(name).deleted
    purge_jobs(store, live.data_dir / "jobs", retention_seconds=3600.0)
    assert [path.name for path in (live.data_dir / "jobs").iterdir()] == [kept]
    store.close()


def test_lost_connections_to_postgresql_are_made_again(cluster: Cluster, tmp_path: Path) -> None:
    url = cluster.new_database()
    store = open_store(url, tmp_path)
    add_file(store)
    store.jobs.create(new_job())
    with psycopg.connect(url, autocommit=True) as connection:
        others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ended = connection.execute(f"SELECT pg_terminate_backend(pid, 5000) {others}").fetchall()
    assert ended and all(done for (done,) in ended)
    assert Player(store).start().status == "running"
    store.close()
