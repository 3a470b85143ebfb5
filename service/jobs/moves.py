"""The one place where a job's status changes: together with its event, under the job's own lock.

In: a connection in a writing transaction, a job read under `lock`. Out: the job as it is now. Both sides of the store
work through it: people's requests (ledger.py) and workers (leases.py).
"""

from __future__ import annotations

import functools
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Dialect, RowMapping, Table, exists, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from service.jobs.job import JOB_STAGE, TERMINAL, Job, Level, NewEvent, Status, check_move
from service.jobs.schema import checkpoints, db_now, events, jobs

RecordT = TypeVar("RecordT")
_JOB_COLUMNS = [jobs.c[field.name] for field in fields(Job)]
_EVENTS_AT_ONCE = 500

LEASE_FREE: Mapping[str, Any] = {"lease_owner": None, "lease_expires_at": None}


def job_columns() -> list[ColumnElement[Any]]:
    """What `to_record(Job, ...)` needs, for SELECT and RETURNING."""
    return list(_JOB_COLUMNS)


def to_record(kind: type[RecordT], row: RowMapping) -> RecordT:
    """A row as the dataclass whose fields have its columns' names."""
    return kind(*[row[name] for name in _names(kind)])  # type: ignore[arg-type]


@functools.cache
def _names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def storable(value: Any) -> Any:
    """JSON that both databases take: a trainer's NaN becomes null, and no text holds a NUL."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, Mapping):
        return {storable(str(key)): storable(inner) for key, inner in value.items()}
    return [storable(inner) for inner in value] if isinstance(value, list | tuple) else value


def insert_into(table: Table, dialect: Dialect) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that knows ON CONFLICT, which both databases spell alike and SQLAlchemy apart."""
    return sqlite.insert(table) if dialect.name == "sqlite" else postgresql.insert(table)


def lock(connection: Connection, *conditions: ColumnElement[bool]) -> Job | None:
    """The job, with its row locked until the transaction ends (SQLite: all writes are one after another anyway)."""
    row = connection.execute(select(*_JOB_COLUMNS).where(*conditions).with_for_update()).mappings().first()
    return None if row is None else to_record(Job, row)


def change(connection: Connection, job: Job, **values: Any) -> Job:
    """The locked job with other values. Its status is `move`'s alone."""
    row = connection.execute(
        update(jobs).where(jobs.c.seq == job.seq).values(**values).returning(*_JOB_COLUMNS)
    ).mappings()
    return to_record(Job, row.one())


def move(connection: Connection, job: Job, to: Status, message: str, **values: Any) -> Job:
    """The locked job in another status, with the event that says so. Raises IllegalMoveError."""
    check_move(job.status, to)
    if to in TERMINAL:
        values |= {"finished_at": db_now()}
    if to != "running":
        values |= {**LEASE_FREE, "requested_action": None}
    moved = change(connection, job, status=to, version=job.version + 1, **values)
    data = {"status": to, **({"error": moved.error} if moved.error else {})}
    note(connection, moved, f"job:{to}", message, data, level="error" if to == "failed" else "info")
    return moved


def note(
    connection: Connection,
    job: Job,
    kind: str,
    message: str,
    data: Mapping[str, Any] | None = None,
    *,
    level: Level = "info",
) -> None:
    """An event about the job itself; its version in the place of a step makes it one of its kind."""
    add_events(connection, job.id, [NewEvent(JOB_STAGE, job.version, kind, message, dict(data or {}), level)])


def is_needed() -> ColumnElement[bool]:
    """Of a checkpoint's row: a job that has not ended begins from it, or goes on from it."""
    other = jobs.alias()
    begins = or_(other.c.resume_from == checkpoints.c.id, other.c.model == checkpoints.c.model_id)
    return exists().where(other.c.status.not_in(TERMINAL), begins).correlate(checkpoints)


def add_events(connection: Connection, job_id: str, new: Sequence[NewEvent]) -> list[NewEvent]:
    """Insert what is not there yet, in order; returns that. The job's row must be locked: seq then tells the order."""
    added: list[NewEvent] = []
    # The values stand beside the statement, so that it is the same one each time and compiled once.
    statement = (
        insert_into(events, connection.dialect)
        .values(created_at=db_now())
        .on_conflict_do_nothing(index_elements=["job_id", "stage", "global_step", "kind"])
        .returning(events.c.id)
    )
    for begin in range(0, len(new), _EVENTS_AT_ONCE):
        some = new[begin : begin + _EVENTS_AT_ONCE]
        rows = [_event_row(job_id, event) for event in some]
        inserted = set(connection.execute(statement, rows).scalars())
        added += [event for event, row in zip(some, rows, strict=True) if row["id"] in inserted]
    return added


def _event_row(job_id: str, event: NewEvent) -> dict[str, Any]:
    return {
        "id": new_id("ftevent-"),
        "job_id": job_id,
        "stage": event.stage,
        "global_step": event.global_step,
        "kind": event.kind[:128],
        "level": event.level,
        "message": storable(event.message),
        "data": storable(event.data),
    }
