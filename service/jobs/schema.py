"""The store's tables, as SQLAlchemy Core knows them; migrations/ makes them. Knows no rule about jobs.

Every list that is paged has `seq`, which grows, beside the id that clients see. The database's own clock is `db_now`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

metadata = MetaData()


class db_now(FunctionElement[float]):  # noqa: N801  SQL's spelling
    """Seconds since 1970 by the clock of the database, so that all hosts agree about leases."""

    type = Double()
    inherit_cache = True
    name = "db_now"


@compiles(db_now, "sqlite")
def _sqlite_now(_element: Any, _compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(db_now, "postgresql")
def _postgresql_now(_element: Any, _compiler: Any, **_: Any) -> str:
    # Not now(), which is when the transaction began.
    return "extract(epoch from clock_timestamp())::double precision"


def _seq() -> Column[int]:
    return Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)


jobs = Table(
    "jobs",
    metadata,
    _seq(),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("status", String(32), nullable=False),
    Column("model", Text, nullable=False),
    Column("training_file", String(64), nullable=False),
    Column("validation_file", String(64)),
    Column("suffix", String(64)),
    Column("seed", BigInteger, nullable=False),
    Column("hyperparameters", JSON, nullable=False),
    Column("metadata", JSON(none_as_null=True)),
    Column("fusion", JSON, nullable=False),
    Column("config", JSON, nullable=False),
    Column("files", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("num_gpus", Integer, nullable=False),
    Column("is_dry_run", Boolean, nullable=False),
    Column("is_validated", Boolean, nullable=False, server_default=false()),
    Column("resume_from", String(64)),
    Column("body_hash", String(64), nullable=False),
    Column("requested_action", String(16)),
    Column("num_switches", Integer, nullable=False, server_default="0"),
    Column("version", Integer, nullable=False, server_default="0"),
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("attempts_left", Integer, nullable=False),
    Column("lease_owner", String(200)),
    Column("lease_expires_at", Double),
    Column("not_before", Double, nullable=False, server_default="0"),
    Column("started_at", Double),
    Column("attempt_at", Double),
    Column("progress_at", Double),
    Column("finished_at", Double),
    Column("stage", Integer),
    Column("global_step", BigInteger, nullable=False, server_default="0"),
    Column("start_step", BigInteger, nullable=False, server_default="0"),
    Column("num_steps", BigInteger),
    Column("trained_tokens", BigInteger),
    Column("freeze_table", JSON(none_as_null=True)),
    Column("fine_tuned_model", Text),
    Column("result_files", JSON, nullable=False),
    Column("error", JSON(none_as_null=True)),
    Column("request_id", String(128), nullable=False, server_default=""),
    Column("traceparent", String(64), nullable=False, server_default=""),
    Index("jobs_runnable", "status", "priority", "seq"),
    Index("jobs_of_owner", "owner", "body_hash", "created_at"),
    sqlite_autoincrement=True,
)

job_metadata = Table(
    "job_metadata",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(512), nullable=False),
    Index("job_metadata_value", "key", "value"),
)

#: Which files a job reads, so that none is deleted under it.
job_files = Table(
    "job_files",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("file_id", String(64), primary_key=True),
    Index("job_files_file", "file_id"),
)

idempotency = Table(
    "idempotency_keys",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("body_hash", String(64), nullable=False),
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", Double, nullable=False),
)

events = Table(
    "job_events",
    metadata,
    _seq(),
    Column("id", String(64), nullable=False, unique=True),
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("stage", Integer, nullable=False),
    Column("global_step", BigInteger, nullable=False),
    Column("kind", String(128), nullable=False),
    Column("level", String(8), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
    UniqueConstraint("job_id", "stage", "global_step", "kind", name="job_events_once"),
    Index("job_events_page", "job_id", "seq"),
    sqlite_autoincrement=True,
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _seq(),
    Column("id", String(64), nullable=False, unique=True),
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("stage", Integer, nullable=False),
    Column("path", Text, nullable=False),
    Column("reason", String(32), nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("model_id", Text, nullable=False),
    UniqueConstraint("job_id", "step", name="checkpoints_once"),
    sqlite_autoincrement=True,
)

switches = Table(
    "job_switches",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("created_at", Double, nullable=False),
    Column("freeze", JSON, nullable=False),
    Column("applied_step", BigInteger),
)

files = Table(
    "files",
    metadata,
    _seq(),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(64), nullable=False, index=True),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, index=True),
    Column("name", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("status_details", Text),
    Column("path", Text, nullable=False),
    sqlite_autoincrement=True,
)

models = Table(
    "models",
    metadata,
    _seq(),
    Column("id", Text, nullable=False, unique=True),
    Column("job_id", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("base", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("step", BigInteger),
    Column("status", String(16), nullable=False),
    Column("details", JSON, nullable=False),
    sqlite_autoincrement=True,
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("devices", JSON, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
    Column("job_id", String(64)),
)
