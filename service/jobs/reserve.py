"""Room that the SQLite store keeps to itself: on a full disk a lease can still be renewed and a job be told as failed.

In: a connection outside any transaction. Out: pages of the file that hold nothing and are really on the disk, and a
write-ahead log that may begin anew. PostgreSQL keeps its own house.
"""

from __future__ import annotations

from typing import Any

#: Of 4 KiB: some thousand events.
_PAGES = 512
_TABLE = "dve_reserve"


def keep_reserve(connection: Any) -> bool:
    """Whether anything was to be done. Raises the driver's error: the disk is full, another write does not end."""
    free, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_size"))
    if free >= _PAGES // 2:
        return False
    # Two transactions: pages that are given back in the one that took them would never be written. The log becomes as
    # large too, and keeps its size while anybody has the store open.
    connection.execute(f"CREATE TABLE IF NOT EXISTS {_TABLE} (room BLOB)")
    connection.execute(f"INSERT INTO {_TABLE} VALUES (zeroblob(?))", (_PAGES * size,))
    begin_log_anew(connection)
    connection.execute(f"DROP TABLE {_TABLE}")
    return True


def begin_log_anew(connection: Any) -> None:
    """What is in the log goes into the file, over pages that are there; the next writer begins at the log's start."""
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
