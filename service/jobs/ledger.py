"""The side of the store that people's requests reach: make jobs, read them, ask something of them.

In: validated values. Out: jobs, events, checkpoints, pages of them. What a worker must do is only written down as a
requested action; what no process holds is done at once. It never writes what a worker writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    Select,
    Table,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
)

from service.errors import (
    IdempotencyConflictError,
    InvalidBodyError,
    JobFinishedError,
    JobNotFoundError,
    JobStateError,
    QuotaExceededError,
)
from service.jobs.database import Database
from service.jobs.job import STATUSES, TERMINAL, Action, Checkpoint, Job, JobEvent, NewJob, Status, Switch
from service.jobs.moves import change, is_needed, job_columns, lock, move, new_id, note, to_record
from service.jobs.schema import (
    checkpoints,
    db_now,
    events,
    files,
    idempotency,
    job_files,
    job_metadata,
    jobs,
    models,
    switches,
)

_RETRY_SECONDS = 600.0
_KEY_SECONDS = 24 * 3600.0
_DONE: Mapping[Action, tuple[Status, str]] = {
    "pause": ("paused", "The job is paused"),
    "cancel": ("cancelled", "The job was cancelled"),
}

_NO_CONFIG = literal({}, JSON).label("config")

RecordT = TypeVar("RecordT", JobEvent, Checkpoint)


class Ledger:
    """max_active_jobs: of one owner that have not ended; one more is refused."""

    def __init__(self, database: Database, max_attempts: int, max_active_jobs: int) -> None:
        self._database, self._max_attempts, self._max_active_jobs = database, max_attempts, max_active_jobs

    def create(self, new: NewJob) -> tuple[Job, bool]:
        """The job, in `validating_files`, and whether it is new: a repeated request gets the first one's job.

        Raises IdempotencyConflictError, QuotaExceededError, InvalidBodyError (a file that has gone meanwhile).
        """
        with self._database.write() as connection:
            self._database.take_turn(connection, f"jobs of {new.owner}")
            asked = (new.owner, new.body_hash, new.idempotency_key)
            if (earlier := self._earlier(connection, *asked, is_retry=new.is_retry)) is not None:
                return earlier, False
            self._check_quota(connection, new.owner)
            _check_files(connection, new)
            job_id = new_id("ftjob-")
            connection.execute(insert(jobs).values(id=job_id, **self._row(new)))
            _insert_beside(connection, job_id, new)
            job = _get(connection, job_id)
            note(connection, job, "job:created", "The job was created", {"status": "validating_files"})
            return job, True

    def find_earlier(self, owner: str, body_hash: str, key: str | None, is_retry: bool) -> Job | None:
        """The job that an earlier request of the same made, so that a retry is answered before anything is checked.

        Raises IdempotencyConflictError.
        """
        with self._database.write() as connection:
            return self._earlier(connection, owner, body_hash, key, is_retry=is_retry)

    def _row(self, new: NewJob) -> dict[str, Any]:
        names = (
            "owner", "model", "training_file", "validation_file", "suffix", "seed", "priority", "num_gpus",
            "is_dry_run", "resume_from", "body_hash", "request_id", "traceparent",
        )  # fmt: skip
        return {name: getattr(new, name) for name in names} | {
            "created_at": db_now(),
            "status": "validating_files",
            "hyperparameters": dict(new.hyperparameters),
            "metadata": None if new.metadata is None else dict(new.metadata),
            "fusion": dict(new.fusion),
            "config": dict(new.config),
            "files": list(new.files),
            "attempts_left": self._max_attempts,
            "result_files": [],
        }

    def _earlier(
        self, connection: Connection, owner: str, body_hash: str, key: str | None, *, is_retry: bool
    ) -> Job | None:
        if key is not None:
            return _by_key(connection, owner, body_hash, key)
        if not is_retry:
            return None
        asked = (jobs.c.owner == owner, jobs.c.body_hash == body_hash)
        newest = (
            select(*job_columns())
            .where(*asked, jobs.c.created_at > db_now() - _RETRY_SECONDS)
            .order_by(jobs.c.seq.desc())
            .limit(1)
        )
        row = connection.execute(newest).mappings().first()
        return None if row is None else to_record(Job, row)

    def _check_quota(self, connection: Connection, owner: str) -> None:
        active = select(func.count()).where(jobs.c.owner == owner, jobs.c.status.not_in(TERMINAL))
        if connection.execute(active).scalar_one() >= self._max_active_jobs:
            raise QuotaExceededError(
                "this key has too many jobs that have not ended", allowed=f"{self._max_active_jobs}",
                fix="Wait for one to end, or cancel one",
            )  # fmt: skip

    def get(self, job_id: str) -> Job:
        """Raises JobNotFoundError."""
        with self._database.read() as connection:
            return _get(connection, job_id)

    def page(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
        has_no_metadata: bool = False,
    ) -> tuple[list[Job], bool]:
        """Newest first, those older than `after`, and whether there are more. metadata: all of these must be equal.

        Their `config` is left empty: a list shows none, and reading it takes half of the time.
        """
        columns = [column if column is not jobs.c.config else _NO_CONFIG for column in job_columns()]
        statement = select(*columns).order_by(jobs.c.seq.desc()).limit(limit + 1)
        for key, value in (metadata or {}).items():
            has = (job_metadata.c.job_id == jobs.c.id, job_metadata.c.key == key, job_metadata.c.value == value)
            statement = statement.where(exists().where(*has))
        if has_no_metadata:
            statement = statement.where(~exists().where(job_metadata.c.job_id == jobs.c.id))
        with self._database.read() as connection:
            statement = _after(connection, statement, jobs, after)
            found = [to_record(Job, row) for row in connection.execute(statement).mappings()]
        return found[:limit], len(found) > limit

    def events(self, job_id: str, *, after: str | None = None, limit: int = 20) -> tuple[list[JobEvent], bool]:
        """As `page`, of one job's events. Raises JobNotFoundError."""
        return self._of_job(JobEvent, events, job_id, after, limit)

    def checkpoints(self, job_id: str, *, after: str | None = None, limit: int = 10) -> tuple[list[Checkpoint], bool]:
        """As `page`, of one job's checkpoints. Raises JobNotFoundError."""
        return self._of_job(Checkpoint, checkpoints, job_id, after, limit)

    def _of_job(
        self, kind: type[RecordT], table: Table, job_id: str, after: str | None, limit: int
    ) -> tuple[list[RecordT], bool]:
        statement = select(table).where(table.c.job_id == job_id).order_by(table.c.seq.desc()).limit(limit + 1)
        with self._database.read() as connection:
            _get(connection, job_id)
            statement = _after(connection, statement, table, after)
            found = [to_record(kind, row) for row in connection.execute(statement).mappings()]
        return found[:limit], len(found) > limit

    def events_since(self, job_id: str, seq: int, limit: int = 200) -> tuple[Job, list[JobEvent]]:
        """The job, and its events after `seq` (0: all), oldest first: for streams. Raises JobNotFoundError."""
        statement = select(events).where(events.c.job_id == job_id, events.c.seq > seq).order_by(events.c.seq)
        with self._database.read() as connection:
            # The job first: whoever sees it ended also sees its last event.
            job = _get(connection, job_id)
            return job, [to_record(JobEvent, row) for row in connection.execute(statement.limit(limit)).mappings()]

    def event_seq(self, job_id: str, event_id: str | None) -> int:
        """Where `events_since` goes on behind this event; 0 without one. Raises JobNotFoundError, InvalidBodyError."""
        with self._database.read() as connection:
            _get(connection, job_id)
            return 0 if event_id is None else _seq_of(connection, events, event_id)

    def checkpoint(self, checkpoint_id: str) -> Checkpoint | None:
        """One by its id."""
        return self._checkpoint(checkpoints.c.id == checkpoint_id)

    def checkpoint_of_model(self, model_id: str) -> Checkpoint | None:
        """One by the id that it is served under, `ft:...:ckpt-step-N`."""
        return self._checkpoint(checkpoints.c.model_id == model_id)

    def _checkpoint(self, condition: ColumnElement[bool]) -> Checkpoint | None:
        with self._database.read() as connection:
            row = connection.execute(select(checkpoints).where(condition)).mappings().first()
            return None if row is None else to_record(Checkpoint, row)

    def request(self, job_id: str, action: Action) -> Job:
        """Pause or cancel: done at once where no process holds the job, else asked of its worker.

        Asking twice changes nothing. Raises JobNotFoundError, JobFinishedError, JobStateError.
        """
        with self._database.write() as connection:
            job = _locked(connection, job_id)
            to, message = _DONE[action]
            if job.requested_action == action or job.status == to == "paused":
                return job
            _refuse_if_ended(job, action)
            if job.requested_action == "cancel":
                raise _ending(action)
            if not job.is_held or _has_expired(connection, job):
                return move(connection, job, to, message)
            job = change(connection, job, requested_action=action, version=job.version + 1)
            note(connection, job, f"job:{action}_requested", f"Asked the worker to {action} the job")
            return job

    def resume(self, job_id: str) -> Job:
        """A paused job waits for a worker again; a pause that is not done yet is taken back.

        Anything else that has not ended goes on as it does. Raises JobNotFoundError, JobFinishedError, JobStateError.
        """
        with self._database.write() as connection:
            job = _locked(connection, job_id)
            _refuse_if_ended(job, "resume")
            if job.requested_action == "cancel":
                raise _ending("resume")
            if job.status == "paused":
                to: Status = "queued" if job.is_validated else "validating_files"
                values = {"attempts_left": self._max_attempts, "not_before": 0.0}
                return move(connection, job, to, "The job was resumed and waits for a worker", **values)
            if job.requested_action == "pause":
                job = change(connection, job, requested_action=None, version=job.version + 1)
                note(connection, job, "job:pause_withdrawn", "The pause was taken back")
            return job

    def request_switch(self, job_id: str, freeze: Mapping[str, Any], fusion: Mapping[str, Any]) -> Job:
        """Another freeze mode from the next step on; the worker hands it to the trainer (`switches`).

        fusion: what the job's `fusion` object says from now on. Raises JobNotFoundError, JobFinishedError,
        JobStateError.
        """
        with self._database.write() as connection:
            job = _locked(connection, job_id)
            _refuse_if_ended(job, "switch the mode of")
            if job.requested_action == "cancel":
                raise _ending("switch the mode of")
            number = job.num_switches + 1
            values = {"job_id": job.id, "number": number, "created_at": db_now(), "freeze": dict(freeze)}
            connection.execute(insert(switches).values(**values))
            job = change(connection, job, num_switches=number, version=job.version + 1, fusion=dict(fusion))
            data = {"number": number, "freeze": dict(freeze)}
            note(connection, job, "job:switch_requested", "Asked for another freeze mode", data)
            return job

    def switches(self, job_id: str, *, from_step: int | None = None) -> list[Switch]:
        """In the order in which they were asked for.

        from_step: only what a trainer that goes on from this step has not had yet: those that wait, and those that
        were applied at or after it (a checkpoint of step N does not hold what came before step N + 1).
        """
        statement = select(switches).where(switches.c.job_id == job_id).order_by(switches.c.number)
        with self._database.read() as connection:
            found = [to_record(Switch, row) for row in connection.execute(statement).mappings()]
        return [s for s in found if from_step is None or s.applied_step is None or s.applied_step >= from_step]

    def counts(self) -> dict[str, int]:
        """How many jobs there are by status, of those without any 0: a gauge would stay where it was."""
        with self._database.read() as connection:
            rows = connection.execute(select(jobs.c.status, func.count()).group_by(jobs.c.status))
            return dict.fromkeys(STATUSES, 0) | {status: count for status, count in rows}

    def take_stale(self, job_ids: Sequence[str], older_than_seconds: float) -> list[str]:
        """Of these jobs those whose folder nobody needs: ended longer ago, or their model was deleted. Their
        checkpoints are forgotten, the caller deletes the folders. One that another job begins from keeps all."""
        is_old = jobs.c.finished_at < db_now() - older_than_seconds
        is_gone = exists().where(models.c.job_id == jobs.c.id, models.c.step.is_(None), models.c.status == "deleted")
        is_read = exists().where(checkpoints.c.job_id == jobs.c.id, is_needed())
        stale = select(jobs.c.id).where(
            jobs.c.id.in_(job_ids), jobs.c.status.in_(TERMINAL), or_(is_old, is_gone), ~is_read
        )
        with self._database.write() as connection:
            found = list(connection.execute(stale).scalars())
            connection.execute(delete(checkpoints).where(checkpoints.c.job_id.in_(found)))
            return found

    def longest_silence(self) -> float:
        """Seconds since the last step of that running job which has gone longest without one; 0 if none runs."""
        since = func.coalesce(jobs.c.progress_at, jobs.c.attempt_at)
        with self._database.read() as connection:
            age = connection.execute(select(func.max(db_now() - since)).where(jobs.c.status == "running")).scalar_one()
            return max(float(age or 0.0), 0.0)

    def purge_events(self, older_than_seconds: float) -> int:
        """Drop the events of jobs that ended longer ago; how many."""
        ended = select(jobs.c.id).where(jobs.c.finished_at < db_now() - older_than_seconds)
        with self._database.write() as connection:
            connection.execute(delete(idempotency).where(idempotency.c.created_at < db_now() - _KEY_SECONDS))
            return connection.execute(delete(events).where(events.c.job_id.in_(ended))).rowcount


def _get(connection: Connection, job_id: str) -> Job:
    row = connection.execute(select(*job_columns()).where(jobs.c.id == job_id)).mappings().first()
    if row is None:
        raise _no_job(job_id)
    return to_record(Job, row)


def _locked(connection: Connection, job_id: str) -> Job:
    job = lock(connection, jobs.c.id == job_id)
    if job is None:
        raise _no_job(job_id)
    return job


def _no_job(job_id: str) -> JobNotFoundError:
    return JobNotFoundError(
        "there is no such fine-tuning job", value=job_id, allowed="the id of a job", fix="GET /v1/fine_tuning/jobs"
    )


def _refuse_if_ended(job: Job, verb: str) -> None:
    if job.is_terminal:
        raise JobFinishedError(
            f"can't {verb} a job that has ended", value=job.status, allowed="a job that has not",
            fix="To train on, create a job with 'fusion.resume_from' a checkpoint of this one",
        )  # fmt: skip


def _ending(verb: str) -> JobStateError:
    what = f"can't {verb} a job that is being cancelled"
    return JobStateError(what, allowed="a job that goes on", fix="Create another")


def _has_expired(connection: Connection, job: Job) -> bool:
    return bool(
        connection.execute(select(jobs.c.lease_expires_at <= db_now()).where(jobs.c.seq == job.seq)).scalar_one()
    )


def _by_key(connection: Connection, owner: str, body_hash: str, key: str) -> Job | None:
    is_same = (idempotency.c.owner == owner, idempotency.c.key == key)
    row = connection.execute(
        select(idempotency).where(*is_same, idempotency.c.created_at > db_now() - _KEY_SECONDS)
    ).first()
    if row is None:
        connection.execute(delete(idempotency).where(*is_same))
        return None
    if row.body_hash != body_hash:
        raise IdempotencyConflictError(
            "this Idempotency-Key was used for another request", value=key, allowed="the same body again, or a new key",
            fix="Choose a new key for this body",
        )  # fmt: skip
    return _get(connection, row.job_id)


def _check_files(connection: Connection, new: NewJob) -> None:
    """Locks the rows, so that none is deleted before the job is there. Raises InvalidBodyError."""
    for file_id in sorted(set(new.files)):
        row = connection.execute(select(files.c.id).where(files.c.id == file_id).with_for_update(read=True)).first()
        if row is None:
            allowed, fix = "the id of an uploaded file", "Upload it again"
            raise InvalidBodyError("there is no such file", value=file_id, allowed=allowed, fix=fix)


def _insert_beside(connection: Connection, job_id: str, new: NewJob) -> None:
    if new.metadata:
        rows = [{"job_id": job_id, "key": key, "value": value} for key, value in new.metadata.items()]
        connection.execute(insert(job_metadata), rows)
    if new.files:
        connection.execute(insert(job_files), [{"job_id": job_id, "file_id": one} for one in sorted(set(new.files))])
    if new.idempotency_key is not None:
        values = {"owner": new.owner, "key": new.idempotency_key, "body_hash": new.body_hash, "job_id": job_id}
        connection.execute(insert(idempotency).values(**values, created_at=db_now()))


def _after(connection: Connection, statement: Select[Any], table: Table, after: str | None) -> Select[Any]:
    return statement if after is None else statement.where(table.c.seq < _seq_of(connection, table, after))


def _seq_of(connection: Connection, table: Table, after: str) -> int:
    seq = connection.execute(select(table.c.seq).where(table.c.id == after)).scalar_one_or_none()
    if seq is None:
        allowed, fix = "an id of the page before", "Take that page's last_id, or leave 'after' out"
        raise InvalidBodyError("'after' names nothing", value=after, allowed=allowed, fix=fix, param="after")
    return int(seq)
