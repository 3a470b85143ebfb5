"""A worker with one or a few jobs: what it does of itself, when it is asked, and when the trainer misbehaves."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.service.supervisor.conftest import Bench, final_state


def state_of(bench: Bench, job_id: str) -> str:
    record = bench.store.models.get(bench.job(job_id).fine_tuned_model or "")
    assert record is not None
    return (Path(record.path) / "state").read_text()


def test_a_job_goes_from_its_files_to_a_model(bench: Bench) -> None:
    job_id = bench.submit(steps=7, checkpoint_every=3)
    worker = bench.worker(once=True)
    assert worker.wait() == 0, bench.logs()
    job = bench.job(job_id)
    assert (job.status, job.error, job.attempt, job.trained_tokens) == ("succeeded", None, 1, 70), bench.logs()
    assert bench.steps(job_id) == [1, 2, 3, 4, 5, 6, 7]
    assert job.freeze_table["rows"][0]["component"] == "gate"
    assert state_of(bench, job_id) == final_state(7)
    assert sorted(row.step for row in bench.store.jobs.checkpoints(job_id)[0]) == [3, 6, 7]
    results = bench.store.files.get(job.result_files[0])
    lines = (bench.data_dir / results.path).read_text().splitlines()
    assert lines[0].startswith("step,train_loss,train_accuracy,valid_loss")
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4", "5", "6", "7"]
    assert bench.trainer_pids() == []
    assert bench.store.workers.list() == []


def test_files_that_are_bad_fail_the_job_before_it_trains(served: Bench) -> None:
    bad = served.submit(check_code=78, report={"problems": [{"row": 3, "code": "image_not_found", "message": "a.png"}]})
    dry = served.submit(is_dry_run=True)
    job = served.until_status(bad, "failed")
    served.until_status(dry, "succeeded")
    assert (job.status, job.attempt, job.error["code"]) == ("failed", 0, "image_unreadable"), served.logs()
    assert "row 3" in job.error["message"]
    assert (served.job(dry).status, served.job(dry).attempt) == ("succeeded", 0)


def test_pause_resume_and_cancel(served: Bench) -> None:
    job_id = served.submit(steps=100_000, checkpoint_every=1000)
    served.until_step(job_id, 3)
    served.store.jobs.request(job_id, "pause")
    job = served.until_status(job_id, "paused")
    assert served.trainer_pids(job_id) == []
    saved = served.store.jobs.checkpoints(job_id)[0][0]
    assert saved.reason == "requested"
    assert job.global_step == saved.step
    served.store.jobs.resume(job_id)
    served.until_step(job_id, saved.step + 2)
    assert served.job(job_id).attempt == 2
    served.cancel(job_id)
    assert served.trainer_pids(job_id) == []
    assert served.steps(job_id) == list(range(1, served.job(job_id).global_step + 1))


def test_a_drained_worker_gives_its_job_to_the_next_one(bench: Bench) -> None:
    job_id = bench.submit(steps=60, step_seconds=0.02, checkpoint_every=1000)
    first = bench.worker()
    bench.until_step(job_id, 2)
    first.signal(signal.SIGTERM)
    assert first.wait() == 0, bench.logs()
    assert bench.job(job_id).status == "queued"
    assert bench.trainer_pids() == []
    assert bench.worker(once=True).wait() == 0
    job = bench.job(job_id)
    assert (job.status, job.attempt) == ("succeeded", 2), bench.logs()
    assert state_of(bench, job_id) == final_state(60)


def test_one_that_does_not_stop_is_killed_after_the_grace(served: Bench) -> None:
    job_id = served.submit(steps=100_000, deaf=True, checkpoint_every=2)
    served.until_step(job_id, 5)
    served.store.jobs.request(job_id, "pause")
    served.until_status(job_id, "paused")
    assert served.trainer_pids(job_id) == []
    assert served.store.jobs.checkpoints(job_id)[0][0].reason == "every"


@pytest.mark.parametrize(
    ("plan", "code", "attempts"),
    [
        ({"crash_code": 78, "complaint": {"code": "image_unreadable", "retry": False}}, "image_unreadable", 1),
        ({"crash_code": 78}, "invalid_training_file", 1),
        ({"crash_code": 1, "complaint": {"code": "nan_loss", "retry": False}}, "nan_loss", 1),
        ({"crash_code": 1, "complaint": {"code": "storage_full", "retry": False}}, "storage_full", 1),
        ({"crash_code": -9, "crash_at": 0}, "attempts_exhausted", 2),
    ],
)
def test_how_a_broken_trainer_ends_its_job(served: Bench, plan: dict[str, object], code: str, attempts: int) -> None:
    job_id = served.submit(**{"crash_at": 3, "steps": 9, **plan})
    job = served.until_status(job_id, "failed")
    assert (job.error["code"], job.attempt) == (code, attempts), served.logs()


def test_a_crash_is_tried_again_from_the_last_checkpoint(served: Bench) -> None:
    job_id = served.submit(steps=9, checkpoint_every=2, crash_at=5, crash_once=True, crash_code=-11)
    job = served.until_status(job_id, "succeeded")
    assert job.attempt == 2
    assert served.steps(job_id) == list(range(1, 10))
    assert state_of(served, job_id) == final_state(9)
    resumed = [event for event in served.events(job_id) if event.kind == "resumed"]
    assert [event.global_step for event in resumed] == [4]


def test_a_checkpoint_whose_word_a_kill_cut_off_is_told_of_by_the_next_attempt(served: Bench) -> None:
    job_id = served.submit(steps=6, checkpoint_every=2, untold_at=4)
    served.until_status(job_id, "succeeded")
    told = [event.global_step for event in served.events(job_id) if event.kind == "checkpoint"]
    assert told == [2, 4, 6]
    assert [event.global_step for event in served.events(job_id) if event.kind == "resumed"] == [4]


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(served: Bench) -> None:
    """The sizes are right, so that only the trainer, which hashes it, can tell."""
    job_id = served.submit(steps=100_000, checkpoint_every=2)
    served.until_step(job_id, 5)
    served.store.jobs.request(job_id, "pause")
    served.until_status(job_id, "paused")
    saved = served.store.jobs.checkpoints(job_id)[0]
    text = Path(saved[0].path, "trainer.json").read_text()
    Path(saved[0].path, "trainer.json").write_text(text.replace("state", "stale"))
    served.store.jobs.resume(job_id)
    served.until(lambda: any(e.kind == "resumed" for e in served.events(job_id)))
    assert not Path(saved[0].path).exists()
    resumed = next(e for e in served.events(job_id) if e.kind == "resumed")
    assert resumed.global_step == saved[1].step
    served.cancel(job_id)


def test_a_mode_is_switched_on_the_running_job(served: Bench) -> None:
    job_id = served.submit(steps=100_000)
    served.until_step(job_id, 2)
    served.store.jobs.request_switch(job_id, {"mode": "full"}, {})
    served.until(lambda: any(e.kind == "switched" for e in served.events(job_id)))
    switched = next(e for e in served.events(job_id) if e.kind == "switched")
    served.until(lambda: served.store.jobs.switches(job_id)[0].applied_step == switched.global_step)
    assert switched.data == {"freeze": {"mode": "full"}}
    served.cancel(job_id)


def test_the_more_urgent_job_goes_first_and_devices_run_side_by_side(bench: Bench) -> None:
    usual = bench.submit(steps=3, witness=str(bench.folder / "a"))
    urgent = bench.submit(steps=3, witness=str(bench.folder / "b"), priority=5)
    for _ in (usual, urgent):  # files are read one after another; training is what is looked at
        claim = bench.store.leases.claim("test", can_train=False)
        assert claim is not None
        bench.store.leases.validated(claim.lease)
    bench.worker(once=True, worker_concurrency=1).wait()
    started = {job_id: bench.job(job_id).started_at for job_id in (usual, urgent)}
    assert started[urgent] < started[usual]
