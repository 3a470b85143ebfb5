"""Rows of files, fine-tuned models and workers: plain reading and writing, without a job's rules.

What lies on the disk under a file's row is files.py's; what a model's folder holds, the registry's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, and_, case, delete, func, insert, or_, select, update

from service.errors import FileInUseError, InvalidBodyError, QuotaExceededError, UploadNotFoundError
from service.jobs.database import Database
from service.jobs.job import (
    TERMINAL,
    FilePurpose,
    FileRecord,
    FileStatus,
    ModelRecord,
    ModelStatus,
    WorkerRecord,
)
from service.jobs.moves import insert_into, to_record
from service.jobs.schema import db_now, files, job_files, jobs, models, workers


class FileRows:
    """max_bytes_per_owner: of all files of one owner together."""

    def __init__(self, database: Database, max_bytes_per_owner: int) -> None:
        self._database, self._max_bytes_per_owner = database, max_bytes_per_owner

    def add(
        self,
        file_id: str,
        owner: str,
        name: str,
        *,
        purpose: FilePurpose,
        num_bytes: int,
        path: str,
        expires_seconds: float | None = None,
        status: FileStatus = "uploaded",
    ) -> FileRecord:
        """A row for a file that lies at `path` already. Raises QuotaExceededError."""
        with self._database.write() as connection:
            self._database.take_turn(connection, f"files of {owner}")
            used = select(func.coalesce(func.sum(files.c.num_bytes), 0)).where(files.c.owner == owner)
            total = connection.execute(used).scalar_one() + num_bytes
            if total > self._max_bytes_per_owner:
                raise QuotaExceededError(
                    "this key's files are too large together", value=f"{total} bytes",
                    allowed=f"{self._max_bytes_per_owner} bytes", fix="Delete some files", param="file",
                )  # fmt: skip
            values = {
                "id": file_id, "owner": owner, "name": name, "purpose": purpose, "num_bytes": num_bytes, "path": path,
                "status": status, "created_at": db_now(),
                "expires_at": None if expires_seconds is None else db_now() + expires_seconds,
            }  # fmt: skip
            row = connection.execute(insert(files).values(**values).returning(*files.c)).mappings()
            return to_record(FileRecord, row.one())

    def get(self, file_id: str) -> FileRecord:
        """Raises UploadNotFoundError."""
        with self._database.read() as connection:
            row = connection.execute(select(files).where(files.c.id == file_id)).mappings().first()
        if row is None:
            raise _no_file(file_id)
        return to_record(FileRecord, row)

    def page(
        self,
        *,
        after: str | None = None,
        limit: int = 10_000,
        purpose: str | None = None,
        is_ascending: bool = False,
        vision_of: str,
        has_others: bool,
    ) -> tuple[list[FileRecord], bool]:
        """Newest first unless ascending, those behind `after`, and whether there are more.

        vision_of: whose files of purpose `vision`; has_others: with those of all other purposes.
        """
        order = files.c.seq if is_ascending else files.c.seq.desc()
        statement = select(files).order_by(order).limit(limit + 1)
        if purpose is not None:
            statement = statement.where(files.c.purpose == purpose)
        own = and_(files.c.purpose == "vision", files.c.owner == vision_of)
        statement = statement.where(or_(own, files.c.purpose != "vision") if has_others else own)
        with self._database.read() as connection:
            if after is not None:
                seq = connection.execute(select(files.c.seq).where(files.c.id == after)).scalar_one_or_none()
                if seq is None:
                    raise InvalidBodyError(
                        "'after' names nothing", value=after, allowed="an id of the page before",
                        fix="Take that page's last_id, or leave 'after' out", param="after",
                    )  # fmt: skip
                statement = statement.where(files.c.seq > seq if is_ascending else files.c.seq < seq)
            found = [to_record(FileRecord, row) for row in connection.execute(statement).mappings()]
        return found[:limit], len(found) > limit

    def set_status(self, file_id: str, status: FileStatus, details: str | None = None) -> None:
        with self._database.write() as connection:
            connection.execute(update(files).where(files.c.id == file_id).values(status=status, status_details=details))

    def delete(self, file_id: str) -> FileRecord:
        """Drop the row; the caller then drops the file. Raises UploadNotFoundError, FileInUseError."""
        with self._database.write() as connection:
            row = connection.execute(select(files).where(files.c.id == file_id).with_for_update()).mappings().first()
            if row is None:
                raise _no_file(file_id)
            if (job_id := _reader(connection, file_id)) is not None:
                raise FileInUseError(
                    "a job that has not ended reads this file", value=job_id, fix="Cancel the job, or wait for its end"
                )
            connection.execute(delete(files).where(files.c.id == file_id))
            return to_record(FileRecord, row)

    def take_expired(self, limit: int = 100) -> list[FileRecord]:
        """Drop the rows of files whose time is over and that no job reads any more; the caller drops the files."""
        statement = select(files).where(files.c.expires_at <= db_now()).limit(limit).with_for_update(skip_locked=True)
        with self._database.write() as connection:
            found = [to_record(FileRecord, row) for row in connection.execute(statement).mappings()]
            gone = [record for record in found if _reader(connection, record.id) is None]
            connection.execute(delete(files).where(files.c.id.in_([record.id for record in gone])))
            return gone


def _reader(connection: Connection, file_id: str) -> str | None:
    reading = (
        select(job_files.c.job_id)
        .join(jobs, jobs.c.id == job_files.c.job_id)
        .where(job_files.c.file_id == file_id, jobs.c.status.not_in(TERMINAL))
        .limit(1)
    )
    found = connection.execute(reading).scalar_one_or_none()
    return None if found is None else str(found)


def _no_file(file_id: str) -> UploadNotFoundError:
    return UploadNotFoundError(
        "there is no such file, or not any more", value=file_id, allowed="the id of an uploaded file",
        fix="Upload it again", param="file_id",
    )  # fmt: skip


class ModelRows:
    """Fine-tuned models. A worker adds one under its lease: `Leases.register_model`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self, model_id: str, job_id: str, path: str, *, base: str, step: int | None = None,
        status: ModelStatus = "ready", details: Mapping[str, Any] | None = None,
    ) -> ModelRecord:  # fmt: skip
        """A row, or a new path, status and details for the one of this id (a roll-back, a checkpoint on first use)."""
        values = {
            "id": model_id, "job_id": job_id, "created_at": db_now(), "base": base, "path": path, "step": step,
            "status": status, "details": dict(details or {}),
        }  # fmt: skip
        kept = {key: values[key] for key in ("path", "status", "details")}
        with self._database.write() as connection:
            row = connection.execute(
                insert_into(models, connection.dialect)
                .values(**values)
                .on_conflict_do_update(index_elements=["id"], set_=kept)
                .returning(*models.c)
            ).mappings()
            return to_record(ModelRecord, row.one())

    def get(self, model_id: str) -> ModelRecord | None:
        with self._database.read() as connection:
            row = connection.execute(select(models).where(models.c.id == model_id)).mappings().first()
            return None if row is None else to_record(ModelRecord, row)

    def list(self, *statuses: ModelStatus) -> list[ModelRecord]:
        """Oldest first; of these statuses, without any all."""
        statement = select(models).order_by(models.c.seq)
        if statuses:
            statement = statement.where(models.c.status.in_(statuses))
        with self._database.read() as connection:
            return [to_record(ModelRecord, row) for row in connection.execute(statement).mappings()]

    def set_status(self, model_id: str, status: ModelStatus, details: Mapping[str, Any] | None = None) -> bool:
        """Whether there is one. `deleted` is a mark: a worker deletes the folder, then `forget`."""
        values: dict[str, Any] = {"status": status} | ({} if details is None else {"details": dict(details)})
        with self._database.write() as connection:
            return connection.execute(update(models).where(models.c.id == model_id).values(**values)).rowcount > 0

    def forget(self, model_id: str) -> None:
        with self._database.write() as connection:
            connection.execute(delete(models).where(models.c.id == model_id))


class WorkerRows:
    """Who works; for people to see. Leases, not these rows, decide about jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def beat(self, worker_id: str, host: str, pid: int, devices: Sequence[Any] = (), job_id: str | None = None) -> None:
        """I am here, at this job or at none. The first beat makes the row."""
        seen = {"seen_at": db_now(), "devices": list(devices), "job_id": job_id}
        with self._database.write() as connection:
            connection.execute(
                insert_into(workers, connection.dialect)
                .values(id=worker_id, host=host, pid=pid, started_at=db_now(), **seen)
                .on_conflict_do_update(index_elements=["id"], set_=seen)
            )

    def remove(self, worker_id: str) -> None:
        with self._database.write() as connection:
            connection.execute(delete(workers).where(workers.c.id == worker_id))

    def list(self, *, seen_within_seconds: float | None = None) -> list[WorkerRecord]:
        """Those that beat lately; all without a limit."""
        statement = select(workers).order_by(workers.c.started_at)
        if seen_within_seconds is not None:
            statement = statement.where(workers.c.seen_at > db_now() - seen_within_seconds)
        with self._database.read() as connection:
            return [to_record(WorkerRecord, row) for row in connection.execute(statement).mappings()]

    def heartbeat(self, alive_within_seconds: float) -> tuple[int, float | None]:
        """How many beat lately, and seconds since the last beat of any; None where no worker is known."""
        is_alive = case((workers.c.seen_at > db_now() - alive_within_seconds, 1), else_=0)
        with self._database.read() as connection:
            row = connection.execute(
                select(func.coalesce(func.sum(is_alive), 0), db_now() - func.max(workers.c.seen_at))
            ).one()
            return int(row[0]), None if row[1] is None else max(float(row[1]), 0.0)

    def drop_unseen(self, seconds: float) -> int:
        """Forget workers that have not beaten for so long; how many."""
        with self._database.write() as connection:
            return connection.execute(delete(workers).where(workers.c.seen_at < db_now() - seconds)).rowcount
