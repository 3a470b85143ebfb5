"""Any order of what people and workers do: only legal transitions, one end, one holder, no step told twice."""

from __future__ import annotations

import itertools
import os
import tempfile
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import update

from service.errors import ConflictError
from service.jobs.job import (
    LEGAL,
    STATUSES,
    TERMINAL,
    IllegalMoveError,
    Job,
    JobEvent,
    Lease,
    LeaseLostError,
    check_move,
)
from service.jobs.schema import jobs as job_table
from service.jobs.store import Store, open_store
from tests.service.jobs.player import Player, add_file, new_job

MAX_ATTEMPTS = 3
#: What a worker may write, by the names of the functions below.
CALLS = ("renew", "steps", "checkpoint", "validated", "stopped", "postponed", "retry", "succeed", "fail")


class JobMachine(RuleBasedStateMachine):
    """One job, three players who may stall, and people. Time passes where `lease_runs_out` says so."""

    def __init__(self) -> None:
        super().__init__()
        # In memory: durability is another test's subject, and this one makes thousands of transactions.
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.store: Store = open_store(None, self.folder.name, lease_seconds=3600, max_attempts=MAX_ATTEMPTS)
        self.players = [Player(self.store, name) for name in "abc"]
        self.valid: Lease | None = None

    @initialize(is_dry_run=st.booleans())
    def create(self, is_dry_run: bool) -> None:
        add_file(self.store)
        self.job_id = self.store.jobs.create(new_job(is_dry_run=is_dry_run))[0].id

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def job(self) -> Job:
        return self.store.jobs.get(self.job_id)

    @rule(who=st.integers(0, 2))
    def claim(self, who: int) -> None:
        before = self.job()
        player = self.players[who]
        earlier = player.claimed
        job = player.claim()
        if job is None:
            player.claimed = earlier
            return
        assert before.status in ("validating_files", "queued", "running") and before.requested_action is None
        assert job.attempt == before.attempt + (before.status != "validating_files")
        self.valid = player.held.lease
        player.step_now = job.global_step

    @rule()
    def lease_runs_out(self) -> None:
        with self.store.database.write() as connection:
            connection.execute(
                update(job_table).where(job_table.c.lease_owner.is_not(None)).values(lease_expires_at=0.0)
            )

    @rule()
    def reap(self) -> None:
        self.store.leases.reap()

    def write(self, who: int, call: Any) -> None:
        """A worker's write goes through if, and only if, its lease is the one that holds the job."""
        player = self.players[who]
        job = self.job()
        lease = player.held.lease
        is_its_own = (job.attempt, job.lease_owner) == (lease.attempt, lease.owner)
        is_expected = is_its_own and NEEDS.get(call.__name__, job.status) == job.status
        try:
            call(player, lease)
        except LeaseLostError:
            assert not is_expected
        else:
            assert is_expected and self.valid == lease

    def has_claimed(self, who: int) -> bool:
        return self.players[who].claimed is not None

    @rule(who=st.integers(0, 2), call=st.sampled_from(CALLS))
    def worker_writes(self, who: int, call: str) -> None:
        if self.has_claimed(who):
            self.write(who, WRITES[call])

    @rule(action=st.sampled_from(["pause", "cancel", "resume"]))
    def people_ask(self, action: Any) -> None:
        before = self.job()
        try:
            ask = self.store.jobs.request
            job = self.store.jobs.resume(self.job_id) if action == "resume" else ask(self.job_id, action)
        except ConflictError:
            assert before.is_terminal or before.requested_action == "cancel"
        else:
            assert job.status == before.status or job.status in LEGAL[before.status]

    @rule()
    @precondition(lambda self: not self.job().is_terminal and self.job().requested_action != "cancel")
    def switch(self) -> None:
        self.store.jobs.request_switch(self.job_id, {"mode": "full"}, {})

    @invariant()
    def all_is_well(self) -> None:
        """One look at the store for both: most of this test's time is transactions."""
        job, events = self.store.jobs.events_since(self.job_id, 0, limit=1000)
        self.check_story(job, events)
        self.check_row(job, [event.global_step for event in events if event.kind == "step"])

    def check_story(self, job: Job, events: list[JobEvent]) -> None:
        story = [event.data["status"] for event in events if event.kind in STORY]
        assert story[0] == "validating_files" and story[-1] == job.status
        for before, after in itertools.pairwise(story):
            # A new attempt of a job whose worker was lost is no transition.
            if (before, after) != ("running", "running"):
                check_move(before, after)
        assert sum(status in TERMINAL for status in story) == int(job.is_terminal)

    def check_row(self, job: Job, steps: list[int]) -> None:
        assert job.is_terminal == (job.finished_at is not None)
        assert job.is_held == (job.lease_expires_at is not None)
        assert not job.is_held or job.status in ("validating_files", "running")
        assert job.status != "running" or job.is_held
        assert job.requested_action is None or job.is_held
        assert 0 <= job.attempts_left <= MAX_ATTEMPTS
        assert steps == sorted(set(steps)) and (job.trained_tokens or 0) == 100 * len(steps)


STORY = {f"job:{status}" for status in STATUSES} | {"job:created"}


def renew(player: Player, lease: Lease) -> None:
    player.store.leases.renew(lease)


def steps(player: Player, lease: Lease) -> None:
    player.steps(1)


def checkpoint(player: Player, lease: Lease) -> None:
    player.checkpoint()


def validated(player: Player, lease: Lease) -> None:
    player.store.leases.validated(lease)


def stopped(player: Player, lease: Lease) -> None:
    player.store.leases.stopped(lease)


def postponed(player: Player, lease: Lease) -> None:
    player.store.leases.postponed(lease, "it does not fit", 0.0)


def retry(player: Player, lease: Lease) -> None:
    player.store.leases.retry(lease, {"code": "internal_error", "message": "exit code 1"})


def succeed(player: Player, lease: Lease) -> None:
    player.store.leases.succeed(lease, fine_tuned_model="ft:x")


def fail(player: Player, lease: Lease) -> None:
    player.store.leases.fail(lease, {"code": "nan_loss", "message": "NaN"})


#: Ends of one kind of claim alone.
NEEDS = {"validated": "validating_files", "succeed": "running", "postponed": "running"}
WRITES = {one.__name__: one for one in (renew, steps, checkpoint, validated, stopped, postponed, retry, succeed, fail)}

#: Without shrinking, which would take minutes of transactions.
ROUND = settings(
    max_examples=10, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)  # fmt: skip


def test_a_short_round() -> None:
    run_state_machine_as_test(JobMachine, settings=ROUND)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_a_long_round() -> None:
    run_state_machine_as_test(JobMachine, settings=settings(ROUND, max_examples=400, stateful_step_count=50))


def test_the_table_of_transitions_is_closed() -> None:
    assert set(LEGAL) == set(STATUSES) and {s for s in STATUSES if not LEGAL[s]} == TERMINAL
    for after in STATUSES:
        for ended in TERMINAL:
            try:
                check_move(ended, after)
            except IllegalMoveError:
                continue
            raise AssertionError(f"{ended} became {after}")
