"""The worker's side of the store: claims, leases, and everything that is written under one.

In: a worker's id, or a lease. Out: the job as it is now; every write is fenced by (attempt, owner), and one that finds
no such row raises LeaseLostError. It starts and ends no process, and reads no clock but the database's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, case, delete, func, or_, select, update

from service.jobs.database import Database
from service.jobs.job import (
    Action,
    Claim,
    Job,
    Lease,
    LeaseLostError,
    NewCheckpoint,
    NewEvent,
    Status,
    checkpoint_name,
    fine_tuned_name,
)
from service.jobs.moves import (
    add_events,
    change,
    insert_into,
    is_needed,
    job_columns,
    lock,
    move,
    new_id,
    note,
    storable,
    to_record,
)
from service.jobs.schema import checkpoints, db_now, jobs, models, switches

_REAP_AT_ONCE = 50
_WORKER_LOST = {"code": "worker_lost", "param": None}


class Leases:
    """lease_seconds: how long a claim or a renewal holds. max_attempts: claims without progress before a job fails."""

    def __init__(self, database: Database, lease_seconds: float, max_attempts: int) -> None:
        self._database, self.lease_seconds, self._max_attempts = database, lease_seconds, max_attempts

    def claim(
        self, worker_id: str, *, num_gpus: int = 0, can_train: bool = True, can_validate: bool = True
    ) -> Claim | None:
        """The oldest job of the highest priority that waits, or whose lease has run out; None if there is none.

        num_gpus: how many this worker can give; jobs that need more are left. A job in `validating_files` keeps that
        status: its files are to be read, then `validated` or `fail`. Any other one is `running` from now on, as its
        next attempt. Jobs that nobody may claim any more are settled first (`reap`).
        """
        owner = f"{worker_id[:128]}/{new_id('')}"
        with self._database.write() as connection:
            self._reap(connection)
            row = connection.execute(
                self._claim_statement(owner, num_gpus, can_train=can_train, can_validate=can_validate)
            ).mappings()
            if (found := row.first()) is None:
                return None
            job = to_record(Job, found)
            if job.status == "running":
                again = f", attempt {job.attempt}" if job.attempt > 1 else ""
                data = {"status": "running", "attempt": job.attempt, "from_step": job.global_step}
                note(connection, job, "job:running", f"Training started{again}", data)
            return Claim(job, Lease(job.id, job.attempt, owner, self.lease_seconds))

    def has_work(self, *, num_gpus: int = 0, can_train: bool = True, can_validate: bool = True) -> bool:
        """Whether a claim would find or settle anything; it only reads, so that idle workers lock nobody out."""
        statement = _work_statement(num_gpus, can_train=can_train, can_validate=can_validate)
        with self._database.read() as connection:
            return connection.execute(statement).first() is not None

    def _claim_statement(self, owner: str, num_gpus: int, *, can_train: bool, can_validate: bool) -> Any:
        one = (
            select(jobs.c.seq)
            .where(*_claimable(num_gpus, can_train=can_train, can_validate=can_validate))
            .order_by(jobs.c.priority.desc(), jobs.c.seq)
            .limit(1)
            .with_for_update(skip_locked=True)
            .scalar_subquery()
        )
        is_training = jobs.c.status != "validating_files"
        return (
            update(jobs)
            .where(jobs.c.seq == one)
            .values(
                status=case((is_training, "running"), else_=jobs.c.status),
                attempt=jobs.c.attempt + case((is_training, 1), else_=0),
                attempts_left=jobs.c.attempts_left - 1,
                version=jobs.c.version + 1,
                lease_owner=owner,
                lease_expires_at=db_now() + self.lease_seconds,
                started_at=case((is_training, func.coalesce(jobs.c.started_at, db_now())), else_=jobs.c.started_at),
                attempt_at=db_now(),
                progress_at=None,
                start_step=jobs.c.global_step,
            )
            .returning(*job_columns())
        )

    def renew(self, lease: Lease) -> Job:
        """The lease runs `lease_seconds` from now; read `requested_action` and `num_switches` from the answer."""
        with self._database.write() as connection:
            return self._write(connection, lease, lease_expires_at=db_now() + self.lease_seconds)

    def wishes(self, lease: Lease) -> tuple[Action | None, int]:
        """What a person wants of the job now, and how many live switches were asked for. Cheap: asked every second."""
        columns = select(jobs.c.requested_action, jobs.c.num_switches)
        with self._database.read() as connection:
            row = connection.execute(columns.where(*_fence(lease))).first()
        if row is None:
            raise _lost(lease)
        return row.requested_action, row.num_switches

    def append_events(
        self, lease: Lease, new: Sequence[NewEvent], checkpoints: Sequence[NewCheckpoint] = ()
    ) -> int:  # fmt: skip
        """Keep a trainer's events, those that are there already left out, and the folders they tell of; how many events
        were new.

        Events of kind `step` move stage, global_step, num_steps and trained_tokens; a step further than ever before
        renews the budget of attempts. `freeze` sets the freeze table. A folder is complete; of the same step again,
        from a later attempt, the row keeps its id and has the new path.
        """
        with self._database.write() as connection:
            job = _held_progress(connection, lease)
            added = add_events(connection, lease.job_id, new)
            values = self._progress(job.global_step, job.trained_tokens, added)
            for checkpoint in checkpoints:
                _put_checkpoint(connection, job, checkpoint)
                if checkpoint.step > job.start_step:
                    values["attempts_left"] = self._max_attempts
            if values:
                connection.execute(update(jobs).where(jobs.c.seq == job.seq).values(**values))
            return len(added)

    def _progress(self, reached: int, trained_tokens: int | None, added: Iterable[NewEvent]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        step, tokens = reached, 0
        for event in added:
            if event.kind == "step":
                step = max(step, event.global_step)
                tokens += int(event.data.get("tokens") or 0)
                total = event.data.get("num_steps_total")
                values |= {"stage": event.stage, "progress_at": db_now()} | ({"num_steps": total} if total else {})
            elif event.kind == "freeze":
                values["freeze_table"] = storable(event.data)
        if tokens:
            values["trained_tokens"] = (trained_tokens or 0) + tokens
        if step > reached:
            values |= {"global_step": step, "attempts_left": self._max_attempts}
        return values

    def add_checkpoint(self, lease: Lease, new: NewCheckpoint) -> None:
        """As `append_events` does beside events."""
        self.append_events(lease, (), (new,))

    def forget_checkpoints(self, lease: Lease, steps: Sequence[int]) -> None:
        """Of folders that retention has deleted."""
        with self._database.write() as connection:
            self._held(connection, lease)
            connection.execute(
                delete(checkpoints).where(checkpoints.c.job_id == lease.job_id, checkpoints.c.step.in_(steps))
            )

    def drop_checkpoints(self, lease: Lease, paths: Sequence[str]) -> list[str]:
        """Of these folders those that may be deleted: no row has them any more, and no other job begins from one."""
        with self._database.write() as connection:
            self._held(connection, lease)
            own = (checkpoints.c.job_id == lease.job_id, checkpoints.c.path.in_(paths))
            kept = set(connection.execute(select(checkpoints.c.path).where(*own, is_needed())).scalars())
            connection.execute(delete(checkpoints).where(*own, checkpoints.c.path.not_in(kept)))
        return [path for path in paths if path not in kept]

    def mark_switched(self, lease: Lease, number: int, step: int) -> None:
        """The trainer has applied this live switch before the step after `step`."""
        with self._database.write() as connection:
            self._held(connection, lease)
            connection.execute(
                update(switches)
                .where(switches.c.job_id == lease.job_id, switches.c.number == number)
                .values(applied_step=step)
            )

    def validated(self, lease: Lease, report: Mapping[str, Any] | None = None) -> Job:
        """The files are good: `queued`, or where a person asked meanwhile, paused or cancelled. A dry run succeeds."""
        with self._database.write() as connection:
            job = self._held(connection, lease, "validating_files")
            job = change(connection, job, is_validated=True, attempts_left=self._max_attempts)
            note(connection, job, "job:validated", "The files were read and are good", report)
            if job.is_dry_run and job.requested_action is None:
                return move(connection, job, "succeeded", "The dry run found nothing wrong")
            return self._let_go(connection, job, "The job waits for a worker")

    def stopped(self, lease: Lease, *, message: str = "The worker gave the job back") -> Job:
        """The process is gone and what it had is saved (exit 75): paused, cancelled, or queued where nobody asked."""
        with self._database.write() as connection:
            job = change(connection, self._held(connection, lease), attempts_left=self._max_attempts)
            return self._let_go(connection, job, message)

    def postponed(self, lease: Lease, message: str, delay_seconds: float) -> Job:
        """It does not fit the device yet. Nothing was started: no attempt is counted, and nobody claims it before."""
        with self._database.write() as connection:
            job = self._held(connection, lease, "running")
            job = change(connection, job, attempts_left=self._max_attempts, attempt=job.attempt - 1)
            return self._let_go(connection, job, message, delay_seconds)

    def retry(self, lease: Lease, error: Mapping[str, Any], *, delay_seconds: float = 0.0) -> Job:
        """The process is gone and a further attempt may help: queued again, not before `delay_seconds` from now.

        error: {code, message, param}. Without attempts left the job fails with attempts_exhausted.
        """
        with self._database.write() as connection:
            job = self._held(connection, lease)
            if job.attempts_left <= 0 and job.requested_action is None:
                last = error.get("message") or error.get("code")
                final = {
                    "code": "attempts_exhausted",
                    "message": f"No attempt is left. The last: {last}",
                    "param": None,
                }
                return move(connection, job, "failed", final["message"] or "", error=final)
            note(
                connection,
                job,
                "job:retry",
                f"Attempt {job.attempt} broke: {error.get('message')}",
                error,
                level="warn",
            )
            return self._let_go(connection, job, "The job waits for another attempt", delay_seconds)

    def succeed(
        self,
        lease: Lease,
        *,
        fine_tuned_model: str | None,
        result_files: Sequence[str] = (),
        trained_tokens: int | None = None,
    ) -> Job:
        """The end. A pause or a cancellation that came too late is forgotten."""
        values: dict[str, Any] = {"fine_tuned_model": fine_tuned_model, "result_files": list(result_files)}
        if trained_tokens is not None:
            values["trained_tokens"] = trained_tokens
        with self._database.write() as connection:
            job = self._held(connection, lease, "running")
            return move(connection, job, "succeeded", "The job has succeeded", **values)

    def fail(self, lease: Lease, error: Mapping[str, Any]) -> Job:
        """The end that no further attempt would change (exit 78, a bad file). error: code, message, param."""
        shown = storable({name: error.get(name) for name in ("code", "message", "param")})
        with self._database.write() as connection:
            job = self._held(connection, lease)
            return move(connection, job, "failed", f"The job has failed: {shown['message']}", error=shown)

    def register_model(
        self, lease: Lease, model_id: str, path: str, *, step: int | None = None, **details: Any
    ) -> None:
        """A published folder as a row of status `ready`, in one fenced write; `Models` reads it."""
        with self._database.write() as connection:
            job = self._held(connection, lease)
            values = {
                "id": model_id, "job_id": job.id, "created_at": db_now(), "base": job.model, "path": path,
                "step": step, "status": "ready", "details": details,
            }  # fmt: skip
            kept = {key: values[key] for key in ("path", "status", "details")}
            connection.execute(
                insert_into(models, connection.dialect)
                .values(**values)
                .on_conflict_do_update(index_elements=["id"], set_=kept)
            )

    def reap(self) -> int:
        """Settle what only a lost worker held: requested actions are done, a used-up budget fails the job. How many."""
        with self._database.read() as connection:  # mostly there is none, and no write lock is needed to see that
            if connection.execute(select(jobs.c.seq).where(*_lost_for_good()).limit(1)).first() is None:
                return 0
        with self._database.write() as connection:
            return self._reap(connection)

    def _reap(self, connection: Connection) -> int:
        statement = select(*job_columns()).where(*_lost_for_good()).limit(_REAP_AT_ONCE)
        rows = connection.execute(statement.with_for_update(skip_locked=True)).mappings()
        lost = [to_record(Job, row) for row in rows]
        for job in lost:
            if job.requested_action is None:
                error = {**_WORKER_LOST, "message": "Its worker was lost, and no attempt is left."}
                move(connection, job, "failed", "The worker was lost, and no attempt is left", error=error)
            else:
                self._let_go(connection, job, "")
        return len(lost)

    def _let_go(self, connection: Connection, job: Job, message: str, delay_seconds: float = 0.0) -> Job:
        """No process holds the job any more: what a person asked for, else `queued`."""
        if job.requested_action == "cancel":
            return move(connection, job, "cancelled", "The job was cancelled")
        if job.requested_action == "pause":
            return move(connection, job, "paused", "The job is paused", attempts_left=self._max_attempts)
        if job.status == "validating_files" and not job.is_validated:
            return change(connection, job, lease_owner=None, lease_expires_at=None, not_before=db_now() + delay_seconds)
        return move(connection, job, "queued", message, not_before=db_now() + delay_seconds)

    def _held(self, connection: Connection, lease: Lease, status: Status | None = None) -> Job:
        job = lock(connection, *_fence(lease))
        if job is None or (status is not None and job.status != status):
            raise _lost(lease)
        return job

    def _write(self, connection: Connection, lease: Lease, **values: Any) -> Job:
        statement = update(jobs).where(*_fence(lease)).values(**values).returning(*job_columns())
        row = connection.execute(statement).mappings().first()
        if row is None:
            raise _lost(lease)
        return to_record(Job, row)


#: What is read of a job to take in its events: its other columns are long.
_PROGRESS = (
    jobs.c.seq, jobs.c.id, jobs.c.model, jobs.c.suffix, jobs.c.global_step, jobs.c.trained_tokens, jobs.c.start_step,
)  # fmt: skip


def _held_progress(connection: Connection, lease: Lease) -> Any:
    row = connection.execute(select(*_PROGRESS).where(*_fence(lease)).with_for_update()).first()
    if row is None:
        raise _lost(lease)
    return row


def _put_checkpoint(connection: Connection, job: Any, new: NewCheckpoint) -> None:
    name = checkpoint_name(fine_tuned_name(job.model, job.suffix, job.id), new.step)
    values = {
        "id": new_id("ftckpt_"), "job_id": job.id, "created_at": db_now(), "step": new.step, "stage": new.stage,
        "path": new.path, "reason": new.reason, "metrics": storable(new.metrics), "model_id": name,
    }  # fmt: skip
    kept = {key: values[key] for key in ("path", "reason", "metrics", "stage")}
    connection.execute(
        insert_into(checkpoints, connection.dialect)
        .values(**values)
        .on_conflict_do_update(index_elements=["job_id", "step"], set_=kept)
    )


def _claimable(num_gpus: int, *, can_train: bool, can_validate: bool) -> list[ColumnElement[bool]]:
    waiting = [status for status, can in (("queued", can_train), ("validating_files", can_validate)) if can]
    is_free = or_(jobs.c.lease_owner.is_(None), jobs.c.lease_expires_at <= db_now())
    expired = and_(jobs.c.status == "running", jobs.c.lease_expires_at <= db_now()) if can_train else jobs.c.seq < 0
    return [
        or_(and_(jobs.c.status.in_(waiting), is_free), expired),
        jobs.c.requested_action.is_(None),
        jobs.c.attempts_left > 0,
        jobs.c.not_before <= db_now(),
        or_(jobs.c.num_gpus <= num_gpus, jobs.c.status == "validating_files"),
    ]


@functools.cache
def _work_statement(num_gpus: int, *, can_train: bool, can_validate: bool) -> Select[Any]:
    # Kept: an idle worker asks it four times a second, and building it took longer than asking.
    claimable = and_(*_claimable(num_gpus, can_train=can_train, can_validate=can_validate))
    return select(jobs.c.seq).where(or_(claimable, and_(*_lost_for_good()))).limit(1)


def _lost_for_good() -> tuple[ColumnElement[bool], ...]:
    """Of jobs whose lease has run out and that nobody may claim."""
    is_over = or_(jobs.c.requested_action.is_not(None), jobs.c.attempts_left <= 0)
    return jobs.c.lease_expires_at <= db_now(), is_over


def _fence(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    return jobs.c.id == lease.job_id, jobs.c.attempt == lease.attempt, jobs.c.lease_owner == lease.owner


def _lost(lease: Lease) -> LeaseLostError:
    return LeaseLostError(
        "the job is no longer this worker's", value=f"{lease.job_id}, attempt {lease.attempt}", fix="End its process"
    )
