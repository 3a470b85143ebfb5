"""Files on the disk: written as they come in, whole or not there, under names of ours.

In: chunks of bytes, or a finished file of a worker's. Out: paths below `<data folder>/files`, relative to the data
folder as the store keeps them. It refuses to look into a file (dataset_file.py) and to let a client name a path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from model_core.training.config import TrainConfig, parse_config
from service.errors import RequestTooLargeError, StorageFullError
from service.jobs.job import FilePurpose

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FILE_ID = re.compile(r"file-[0-9a-f]{32}")
_OWNER = re.compile(r"[0-9A-Za-z_-]{1,64}")
_STALE_SECONDS = 24 * 3600.0


class FileFolder:
    """`<data_dir>/files`. Methods may be called from any thread, and block."""

    def __init__(self, data_dir: str | Path) -> None:
        self.data_dir = Path(data_dir).absolute()
        self._root = self.data_dir / "files"

    def receive(self, max_bytes: int) -> IncomingFile:
        """A file that comes in piece by piece. Raises StorageFullError."""
        incoming = self._root / "incoming"
        with storage_errors():
            incoming.mkdir(parents=True, exist_ok=True)
            return IncomingFile(incoming / uuid.uuid4().hex, max_bytes)

    def keep(self, incoming: IncomingFile, purpose: FilePurpose, owner: str) -> tuple[str, str, int]:
        """Make it a file of ours: fsync, then its name. Returns (id, path, bytes). Raises StorageFullError."""
        file_id = f"file-{uuid.uuid4().hex}"
        folder = self._root / purpose
        if purpose == "vision":  # found again without the database, by its owner alone
            folder /= owner
        with storage_errors():
            incoming.sync()
            folder.mkdir(parents=True, exist_ok=True)
            os.replace(incoming.path, folder / file_id)
            _sync_folder(folder)
        return file_id, str((folder / file_id).relative_to(self.data_dir)), incoming.num_bytes

    def write(self, data: bytes, purpose: FilePurpose, owner: str) -> tuple[str, str, int]:
        """As receive and keep, of bytes that are there already: a worker's result file."""
        incoming = self.receive(len(data))
        with incoming:
            incoming.write(data)
            return self.keep(incoming, purpose, owner)

    def path(self, relative: str) -> Path:
        """Where the store's path lies. Raises ValueError for one that leads out of the data folder."""
        path = self.data_dir / relative
        if not path.resolve().is_relative_to(self._root.resolve()):
            raise ValueError(f"{relative!r} is no path of a file of ours")
        return path

    def read_picture(self, file_id: str, owner: str) -> tuple[bytes, float] | None:
        """The bytes of one of this owner's files of purpose `vision`, and when it came; None if there is none."""
        if not _FILE_ID.fullmatch(file_id) or not _OWNER.fullmatch(owner):
            return None
        path = self._root / "vision" / owner / file_id
        try:
            return path.read_bytes(), path.stat().st_mtime
        except OSError:
            return None

    def delete(self, relative: str) -> None:
        """Whether or not it is there still."""
        self.path(relative).unlink(missing_ok=True)

    def drop_stale(self, now: Callable[[], float] = time.time) -> None:
        """Pieces that a killed server left behind."""
        for path in (self._root / "incoming").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < now() - _STALE_SECONDS:
                    path.unlink()


class IncomingFile:
    """A piece-by-piece file; as a context it leaves nothing behind unless it was kept."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.num_bytes, self._max_bytes = path, 0, max_bytes
        self._file = open(path, "xb")  # noqa: SIM115  closed by __exit__

    def write(self, data: bytes) -> None:
        """Raises RequestTooLargeError, StorageFullError."""
        self.num_bytes += len(data)
        if self.num_bytes > self._max_bytes:
            raise RequestTooLargeError(
                "the file is too large", value=f"more than {self._max_bytes} bytes",
                allowed=f"at most {self._max_bytes} bytes",
                fix="Send a smaller one; rows may lie in several files of 'fusion.datasets'", param="file",
            )  # fmt: skip
        with storage_errors():
            self._file.write(data)

    def flush(self) -> None:
        """So that what was written can be read under `path`. Raises StorageFullError."""
        with storage_errors():
            self._file.flush()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> IncomingFile:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk: what is buffered is dropped with the file
            self._file.close()
        self.path.unlink(missing_ok=True)


def place_files(config: Mapping[str, Any], resolve: Callable[[str], str], **settings: Any) -> TrainConfig:
    """A job's recipe with paths in the place of file ids.

    resolve: from an id to a path (a JSONL, or the folder of an unpacked archive). settings: laid over it, output_dir
    above all. Raises ConfigError.
    """
    placed = dict(config) | settings
    placed["datasets"] = [{**one, "data_path": resolve(one["data_path"])} for one in config.get("datasets", ())]
    if config.get("val_data_path") is not None:
        placed["val_data_path"] = resolve(config["val_data_path"])
    return parse_config(placed)


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """A disk that is full, told as such. Raises StorageFullError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError("the disk is full", fix="Free some room") from error
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
