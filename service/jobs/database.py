"""The database behind the store: SQLite in a file, or PostgreSQL; its transactions and its migrations.

In: a URL. Out: `read()` and `write()`, transactions whose failures are errors of ours. It refuses SQLite on a network
file system, where its locks don't hold, and a schema that is newer than this program.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, event, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, OperationalError

from model_core.errors import ConfigError
from service.errors import InvalidBodyError, StorageFullError, StoreUnavailableError
from service.jobs.reserve import begin_log_anew, keep_reserve
from service.jobs.schema import db_now

SQLITE_NAME = "jobs.sqlite3"
_BUSY_SECONDS = 15.0
_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x6476655F6A6F6273  # of PostgreSQL's advisory locks; any number that nobody else takes
_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "glusterfs", "fuse.sshfs", "fuse.glusterfs",
     "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "beegfs", "gpfs", "ocfs2"}
)  # fmt: skip
_FULL = ("disk is full", "no space left", "disk full")


class Database:
    """One engine and its pool. Methods may be called from any thread; each transaction has a connection of its own."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._engine = create_engine(url, pool_pre_ping=not self.is_sqlite, **_options(self.is_sqlite))
        if self.is_sqlite:
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        self._writing = self._engine.execution_options(dve_begin="BEGIN IMMEDIATE")
        self._next, self._own_turn = threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads. Raises StoreUnavailableError."""
        with _translated(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; SQLite's write lock is taken at once. Commits unless an error passes.

        Who insists after a StorageFullError may get through: what `keep_reserve` has laid by is used then.
        """
        try:
            with self._one_at_a_time(), _translated(), self._writing.begin() as connection:
                yield connection
        except StorageFullError:
            with contextlib.suppress(StoreUnavailableError, StorageFullError):
                self._on_sqlite(begin_log_anew)
            raise

    def keep_reserve(self) -> None:
        """Lay some room by for when the disk is full. Raises StorageFullError, StoreUnavailableError."""
        with self._one_at_a_time():
            self._on_sqlite(keep_reserve)

    def _on_sqlite(self, work: Callable[[Any], object]) -> None:
        """With a connection outside any transaction."""
        if self.is_sqlite:
            with _translated(), contextlib.closing(self._engine.raw_connection()) as connection:
                try:
                    work(connection)
                except sqlite3.OperationalError as error:  # as SQLAlchemy would have told it
                    raise OperationalError(None, None, error) from error

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Of SQLite's writers in this process.

        SQLite itself lets who waits look again every tenth of a second: a worker that took over a job and wrote one
        thing after another kept its own renewals out until its lease was over. Of two locks the first is held by
        whoever comes next, so that who has just written can't come before him.
        """
        if not self.is_sqlite:
            yield
            return
        give_up_at = time.monotonic() + _BUSY_SECONDS
        has_turn = False
        if self._next.acquire(timeout=_BUSY_SECONDS):
            has_turn = self._own_turn.acquire(timeout=max(give_up_at - time.monotonic(), 0.0))
            self._next.release()
        if not has_turn:
            raise StoreUnavailableError(
                "the database does not answer (another write does not end)", value=f"{_BUSY_SECONDS:g} s of waiting",
                fix=f"Retry in a few seconds; if it stays so, look for what holds {SQLITE_NAME}, or a disk that hangs",
            )  # fmt: skip
        try:
            yield
        finally:
            self._own_turn.release()

    def take_turn(self, connection: Connection, name: str) -> None:
        """Until this transaction ends, other processes that take a turn of this name wait.

        For rules over rows that are not there yet, which no row's lock can hold. SQLite's writers wait anyway.
        """
        if not self.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})

    def migrate(self) -> None:
        """Bring the schema up to this program's; one process at a time. Raises ConfigError."""
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self._migration_lock(), self.write() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise ConfigError(
                    f"the store of jobs can't be brought to this version ({error})",
                    value=self._url.render_as_string(hide_password=True), allowed="a store of this version or older",
                    fix="Run the newer program, or restore a backup",
                ) from None  # fmt: skip

    def revision(self) -> tuple[str | None, str, bool]:
        """The schema's version, None before the first; this program's; and whether it knows the first. Only reads."""
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        scripts = ScriptDirectory.from_config(config)
        with self.read() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        known = {script.revision for script in scripts.walk_revisions()}
        return current, str(scripts.get_current_head()), current is None or current in known

    def now(self) -> float:
        """Seconds since 1970 by the database's clock."""
        with self.read() as connection:
            return float(connection.execute(select(db_now())).scalar_one())

    @contextlib.contextmanager
    def _migration_lock(self) -> Iterator[None]:
        if not self.is_sqlite:
            yield
            return
        # SQLite's own lock does not stretch over the pragmas of a new file.
        with open(f"{self._url.database}.lock", "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def close(self) -> None:
        self._engine.dispose()


def open_database(url: str | None, data_dir: str | Path) -> Database:
    """PostgreSQL by its URL, or without one the SQLite file of the data folder, which is made. Raises ConfigError."""
    if url is not None:
        return Database(_postgresql(url))
    folder = Path(data_dir).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the data folder can't be made ({error.strerror})", value=str(folder), allowed="a folder to write in",
            fix="Set DVE_DATA_DIR", param="data_dir",
        ) from error  # fmt: skip
    refuse_network_file_system(folder)
    return Database(URL.create("sqlite", database=str(folder / SQLITE_NAME)))


def _postgresql(url: str) -> URL:
    allowed = "postgresql://user@host:5432/database (psycopg 3)"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(
            "DVE_DATABASE_URL is no URL", value="(not shown)", allowed=allowed,
            fix="Percent-encode what is special in its password, or leave it out for SQLite in the data folder",
            param="database_url",
        ) from None  # fmt: skip
    if parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise ConfigError(
            "DVE_DATABASE_URL names a database that is not supported", value=parsed.drivername, allowed=allowed,
            fix="Leave it out for SQLite in the data folder", param="database_url",
        )  # fmt: skip
    try:
        import psycopg  # noqa: F401, PLC0415  an extra; nobody who stays with SQLite needs it
    except ImportError:
        raise ConfigError(
            "DVE_DATABASE_URL asks for PostgreSQL, and its driver is not installed", allowed="psycopg 3",
            fix="pip install 'dual-vision-encoder[postgres]'", param="database_url",
        ) from None  # fmt: skip
    return parsed.set(drivername="postgresql+psycopg")


def refuse_network_file_system(folder: Path, mounts: str = "/proc/self/mounts") -> None:
    """Raises ConfigError. Where the mounts can't be read (not Linux) nothing is known and nothing is refused."""
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    target = os.path.realpath(folder)
    found, kind = "", ""
    for fields in (line.split() for line in lines):
        where = fields[1].replace("\\040", " ") if len(fields) > 2 else ""
        is_above = target == where or target.startswith(where.rstrip("/") + "/")
        if where and is_above and len(where) >= len(found):
            found, kind = where, fields[2]
    if kind in _NETWORK_FILE_SYSTEMS:
        raise ConfigError(
            "SQLite's locks don't hold on a network file system, and jobs would be lost", value=f"{folder} ({kind})",
            allowed="a data folder on a disk of this machine, or PostgreSQL",
            fix="Set DVE_DATA_DIR to a local folder, or DVE_DATABASE_URL", param="data_dir",
        )  # fmt: skip


def _options(is_sqlite: bool) -> dict[str, Any]:
    if is_sqlite:
        return {"connect_args": {"timeout": _BUSY_SECONDS}}
    return {"pool_size": 5, "max_overflow": 10, "pool_timeout": _BUSY_SECONDS}


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver begins no transaction by itself: `begin` below says which kind.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("dve_begin", "BEGIN"))


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """The driver's failures as errors of ours; a constraint's are the program's own and pass."""
    try:
        yield
    except DataError as error:  # PostgreSQL's; what a client can put into a text and SQLite would take
        raise InvalidBodyError(
            "a text can't be stored", allowed="text without NUL and lone surrogates", fix="Remove these characters"
        ) from error
    except UnicodeEncodeError as error:
        raise InvalidBodyError(
            "a text can't be stored", value=ascii(error.object[error.start : error.end]),
            allowed="text without lone surrogates", fix="Remove these characters",
        ) from error  # fmt: skip
    except (OperationalError, DBAPIError) as error:
        cause = str(error.orig).lower()
        if any(words in cause for words in _FULL):
            raise StorageFullError("the disk is full", fix="Free some room") from error
        if isinstance(error, OperationalError) or error.connection_invalidated:
            raise StoreUnavailableError(
                f"the database does not answer ({type(error.orig).__name__})",
                fix="Retry in a few seconds; if it stays so, `dve doctor` tells how the database is",
            ) from error
        raise
