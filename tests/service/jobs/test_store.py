"""The store on both databases: jobs, claims, fences, budgets, what people ask for, what is only done once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.errors import (
    IdempotencyConflictError,
    InvalidBodyError,
    JobFinishedError,
    JobNotFoundError,
    JobStateError,
)
from service.jobs.job import STATUSES, LeaseLostError, NewEvent
from service.jobs.store import Store
from tests.service.jobs.player import Player, add_file, new_job

NewStore = Callable[..., Store]
#: A lease that has run out as soon as it is given: by the database's clock, without a sleep.
GONE = 0.0


def kinds(store: Store, job_id: str) -> list[str]:
    return [event.kind for event in reversed(store.jobs.events(job_id, limit=1000)[0])]


def test_a_job_from_creation_to_its_model(store: Store) -> None:
    add_file(store)
    job, is_new = store.jobs.create(new_job(suffix="my-run", metadata={"team": "a"}))
    assert is_new and job.status == "validating_files" and job.id.startswith("ftjob-")
    player = Player(store)
    assert player.start().attempt == 1
    player.freeze()
    assert player.steps(4) == 4
    player.checkpoint()
    done = player.succeed()
    assert done.status == "succeeded" and done.finished_at is not None and done.lease_owner is None
    assert done.fine_tuned_model == f"ft:base/model:1:dve:my-run:{job.id[-8:]}"
    assert (done.global_step, done.num_steps, done.trained_tokens) == (4, 10, 400)
    assert kinds(store, job.id) == [
        "job:created", "job:validated", "job:queued", "job:running", "freeze", *["step"] * 4, "job:succeeded",
    ]  # fmt: skip
    found = store.models.get(done.fine_tuned_model or "")
    assert found is not None and found.status == "ready" and found.base == "base/model:1"
    assert store.jobs.counts() == {**dict.fromkeys(STATUSES, 0), "succeeded": 1}


def test_claims_go_by_priority_then_by_age(store: Store) -> None:
    add_file(store)
    made = [store.jobs.create(new_job(priority=priority))[0].id for priority in (0, 5, 0, 5)]
    order = [store.leases.claim("w") for _ in range(5)]
    assert store.leases.has_work(can_train=False) is False
    assert [claim.job.id for claim in order if claim] == [made[1], made[3], made[0], made[2]]
    assert order[4] is None


def test_many_workers_claim_each_job_once(new_store: NewStore) -> None:
    stores = [new_store() for _ in range(3)]
    add_file(stores[0])
    made = {stores[0].jobs.create(new_job())[0].id for _ in range(30)}
    claimed: list[str] = []

    def work(store: Store) -> None:
        while (claim := store.leases.claim("w")) is not None:
            claimed.append(claim.job.id)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(claimed) == sorted(made)


def test_a_worker_gets_no_job_that_needs_more_gpus_than_it_has(store: Store) -> None:
    add_file(store)
    job = store.jobs.create(new_job(num_gpus=2))[0]
    claim = store.leases.claim("cpu")
    assert claim is not None, "reading files needs none"
    store.leases.validated(claim.lease)
    assert store.leases.claim("cpu") is None and store.leases.claim("one", num_gpus=1) is None
    assert Player(store, num_gpus=2).start().id == job.id
    assert store.leases.claim("late", num_gpus=8) is None


def test_a_stale_worker_can_write_nothing(new_store: NewStore) -> None:
    stalled, store = new_store(lease_seconds=GONE), new_store()
    add_file(store)
    job = store.jobs.create(new_job())[0]
    old, new = Player(stalled, "old"), Player(store, "new")
    old.start()
    old.steps(1)
    assert new.start().attempt == 2
    lease = old.held.lease
    writes = [
        lambda: stalled.leases.renew(lease),
        lambda: old.steps(1),
        lambda: old.checkpoint(),
        lambda: stalled.leases.forget_checkpoints(lease, [1]),
        lambda: stalled.leases.mark_switched(lease, 1, 1),
        lambda: stalled.leases.stopped(lease),
        lambda: stalled.leases.retry(lease, {"message": "x"}),
        lambda: stalled.leases.fail(lease, {"code": "x"}),
        lambda: stalled.leases.succeed(lease, fine_tuned_model="ft:x"),
        lambda: stalled.leases.register_model(lease, "ft:x", "/x"),
        lambda: stalled.leases.validated(lease),
    ]
    before = kinds(store, job.id)
    for write in writes:
        with pytest.raises(LeaseLostError):
            write()
    assert kinds(store, job.id) == before and store.models.get("ft:x") is None
    assert store.leases.renew(new.held.lease).attempt == 2


def test_a_repeated_step_adds_no_event_and_no_tokens(store: Store) -> None:
    add_file(store)
    job = store.jobs.create(new_job())[0]
    player = Player(store)
    player.start()
    player.steps(3)
    player.step_now = 1
    assert player.steps(4) == 2
    found = store.jobs.get(job.id)
    assert (found.global_step, found.trained_tokens) == (5, 500)
    steps = [e.global_step for e in store.jobs.events(job.id, limit=100)[0] if e.kind == "step"]
    assert steps == [5, 4, 3, 2, 1]
    assert store.leases.append_events(player.held.lease, []) == 0


def test_progress_renews_the_budget_of_attempts_and_without_it_the_job_fails(new_store: NewStore) -> None:
    store = new_store(lease_seconds=GONE, max_attempts=2)
    add_file(store)
    job = store.jobs.create(new_job())[0]
    player = Player(store)
    for steps in (1, 2, 3):
        player.start()
        player.steps(steps)
    assert store.jobs.get(job.id).attempt == 3
    player.start()
    player.start()
    assert store.leases.claim("w") is None
    found = store.jobs.get(job.id)
    assert found.status == "failed" and found.attempt == 5
    assert found.error == {
        "code": "worker_lost",
        "message": "Its worker was lost, and no attempt is left.",
        "param": None,
    }


def test_a_crash_is_tried_again_later_and_not_for_ever(new_store: NewStore) -> None:
    store = new_store(max_attempts=2)
    add_file(store)
    job = store.jobs.create(new_job())[0]
    player = Player(store)
    player.start()
    error = {"code": "internal_error", "message": "exit code 1", "param": None}
    assert store.leases.retry(player.held.lease, error, delay_seconds=3600).status == "queued"
    assert player.claim() is None, "not before an hour"
    store.jobs.request(job.id, "pause")
    store.jobs.resume(job.id)
    for _ in range(2):
        player.start()
        ended = store.leases.retry(player.held.lease, error)
    assert ended.status == "failed" and ended.error is not None and ended.error["code"] == "attempts_exhausted"
    assert "exit code 1" in ended.error["message"]


def test_what_people_ask_of_a_running_job_waits_for_its_worker(store: Store) -> None:
    add_file(store)
    job = store.jobs.create(new_job())[0]
    player = Player(store)
    player.start()
    asked = store.jobs.request(job.id, "pause")
    assert (asked.status, asked.requested_action) == ("running", "pause")
    assert store.jobs.request(job.id, "pause").version == asked.version
    assert store.leases.renew(player.held.lease).requested_action == "pause"
    assert store.jobs.resume(job.id).requested_action is None
    store.jobs.request(job.id, "pause")
    paused = store.leases.stopped(player.held.lease)
    assert (paused.status, paused.requested_action, paused.lease_owner) == ("paused", None, None)
    assert store.leases.claim("w") is None
    assert store.jobs.resume(job.id).status == "queued"
    player.start()
    assert store.jobs.request(job.id, "cancel").requested_action == "cancel"
    for refused in (lambda: store.jobs.resume(job.id), lambda: store.jobs.request(job.id, "pause")):
        with pytest.raises(JobStateError):
            refused()
    assert store.leases.stopped(player.held.lease).status == "cancelled"


def test_what_no_worker_holds_is_done_at_once(store: Store) -> None:
    add_file(store)
    job = store.jobs.create(new_job())[0]
    assert store.jobs.request(job.id, "pause").status == "paused"
    assert store.jobs.resume(job.id).status == "validating_files", "its files were not read yet"
    assert store.jobs.request(job.id, "cancel").status == "cancelled"
    for action in (lambda: store.jobs.request(job.id, "cancel"), lambda: store.jobs.resume(job.id)):
        with pytest.raises(JobFinishedError):
            action()
    with pytest.raises(JobNotFoundError):
        store.jobs.request("ftjob-none", "cancel")


def test_a_lost_workers_job_is_cancelled_without_any_worker(new_store: NewStore) -> None:
    store = new_store(lease_seconds=GONE)
    add_file(store)
    cancelled, waiting = (store.jobs.create(new_job())[0] for _ in range(2))
    store.leases.claim("w")
    assert store.jobs.request(cancelled.id, "cancel").status == "cancelled", "its lease has run out"
    holder = new_store()
    claim = holder.leases.claim("w")
    assert claim is not None and claim.job.id == waiting.id
    holder.jobs.request(waiting.id, "pause")
    assert holder.leases.reap() == 0
    store.leases.renew(claim.lease)
    assert store.leases.reap() == 1 and store.jobs.get(waiting.id).status == "paused"


def test_twenty_cancels_at_once_are_one_transition(new_store: NewStore) -> None:
    store = new_store()
    add_file(store)
    job = store.jobs.create(new_job())[0]
    barrier = threading.Barrier(10)

    def cancel(_: int) -> str:
        barrier.wait(10)
        try:
            return store.jobs.request(job.id, "cancel").status
        except JobFinishedError as error:
            return error.code

    with ThreadPoolExecutor(10) as pool:
        results = list(pool.map(cancel, range(20)))
    assert sorted(results) == ["cancelled"] + ["job_finished"] * 19
    assert kinds(store, job.id).count("job:cancelled") == 1


def test_live_switches_are_handed_over_and_again_after_a_crash(store: Store) -> None:
    add_file(store)
    job = store.jobs.create(new_job())[0]
    player = Player(store)
    player.start()
    store.jobs.request_switch(job.id, {"mode": "fusion_only"}, {"freeze": {"mode": "fusion_only"}})
    told = store.leases.renew(player.held.lease)
    assert told.num_switches == 1 and told.fusion == {"freeze": {"mode": "fusion_only"}}
    store.leases.mark_switched(player.held.lease, 1, 5)
    store.jobs.request_switch(job.id, {"mode": "full"}, {})
    everything = store.jobs.switches(job.id)
    assert [(s.number, s.freeze, s.applied_step) for s in everything] == [
        (1, {"mode": "fusion_only"}, 5), (2, {"mode": "full"}, None),
    ]  # fmt: skip
    assert [s.number for s in store.jobs.switches(job.id, from_step=5)] == [1, 2]
    assert [s.number for s in store.jobs.switches(job.id, from_step=6)] == [2]
    store.leases.fail(player.held.lease, {"code": "nan_loss", "message": "NaN", "param": None})
    with pytest.raises(JobFinishedError):
        store.jobs.request_switch(job.id, {"mode": "full"}, {})


def test_the_same_request_makes_one_job(new_store: NewStore) -> None:
    store = new_store()
    add_file(store)
    job, _ = store.jobs.create(new_job(idempotency_key="k", body_hash="a"))
    again, is_new = store.jobs.create(new_job(idempotency_key="k", body_hash="a"))
    assert again.id == job.id and not is_new
    with pytest.raises(IdempotencyConflictError):
        store.jobs.create(new_job(idempotency_key="k", body_hash="b"))
    assert store.jobs.create(new_job(owner="you", idempotency_key="k", body_hash="b"))[1]
    assert store.jobs.create(new_job(body_hash="a", is_retry=True))[0].id == job.id
    other, is_new = store.jobs.create(new_job(body_hash="a"))
    assert is_new and other.id != job.id, "asked for anew, it is a new job"
    assert store.jobs.create(new_job(body_hash="c", is_retry=True))[1], "a retry of what never arrived"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: store.jobs.create(new_job(idempotency_key="n", body_hash="x"))[0].id, range(16)))
    assert len(set(made)) == 1


def test_pages_newest_first(store: Store) -> None:
    add_file(store)
    made = [store.jobs.create(new_job(metadata={"n": str(i % 2)} if i else None))[0].id for i in range(5)]
    first, has_more = store.jobs.page(limit=2)
    assert [job.id for job in first] == made[:2:-1] and has_more
    rest, has_more = store.jobs.page(limit=10, after=first[-1].id)
    assert [job.id for job in rest] == made[2::-1] and not has_more
    assert [job.id for job in store.jobs.page(metadata={"n": "1"})[0]] == [made[3], made[1]]
    assert [job.id for job in store.jobs.page(has_no_metadata=True)[0]] == [made[0]]
    assert store.jobs.page(metadata={"n": "1", "m'\"": "%"})[0] == []
    with pytest.raises(InvalidBodyError):
        store.jobs.page(after="ftjob-none")


def test_a_dry_run_ends_when_its_files_are_read(store: Store) -> None:
    add_file(store)
    store.jobs.create(new_job(is_dry_run=True))
    claim = store.leases.claim("w")
    assert claim is not None
    done = store.leases.validated(claim.lease, {"rows": 3})
    assert done.status == "succeeded" and done.fine_tuned_model is None


def test_many_events_at_once_keep_their_order(store: Store) -> None:
    add_file(store)
    job = store.jobs.create(new_job())[0]
    player = Player(store)
    player.start()
    new = [NewEvent(0, i, "note", f"n{i}") for i in range(1200)]
    assert store.leases.append_events(player.held.lease, new) == 1200
    seen, seq = [], 0
    while events := store.jobs.events_since(job.id, seq, limit=500)[1]:
        seen += [event.global_step for event in events if event.kind == "note"]
        seq = events[-1].seq
    assert seen == list(range(1200))


def test_a_write_gets_its_turn_among_another_threads_writes(store: Store) -> None:
    """A renewal came too late behind everything else that its own process wrote: SQLite's waiters look again now and
    then, and whoever writes one thing after another is always there first."""
    written: list[int] = []
    begun, slow_disk = threading.Event(), threading.Event()

    def write_on_and_on() -> None:
        for number in range(60):
            with store.database.write():
                begun.set()
                slow_disk.wait(0.02)
            written.append(number)

    thread = threading.Thread(target=write_on_and_on)
    thread.start()
    begun.wait(20)
    with store.database.write():
        came_in_after = len(written)
    slow_disk.set()
    thread.join(20)
    assert came_in_after < 5
