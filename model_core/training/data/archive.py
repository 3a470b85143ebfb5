"""A zip of training data, read in place: nothing is ever extracted.

In: a path; out: members by name, each read within a limit. A zip that could do harm is refused whole when it is
opened, by a DataFormatError that names the member. It knows no JSON and no pictures.
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_core.errors import DataFormatError, RecordError

MAX_ENTRIES = 200_000
#: Of the list at a zip's end, read in one piece before its entries can be counted.
MAX_DIRECTORY_BYTES = 64 << 20
#: Unpacked against packed, of the whole zip. Pictures do not shrink, JSON shrinks to a tenth.
MAX_RATIO = 100
#: Below this a zip can't hurt, whatever its ratio.
HARMLESS_BYTES = 64 << 20

_ENTRY = b"PK\x01\x02"
_LIMITS = f"up to {MAX_ENTRIES:,} files, at most {MAX_RATIO} times as large as the zip"
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".jar")
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    RuntimeError,
    NotImplementedError,
)


class Archive:
    """Members of a zip. Reads by position, so that forked processes may share it; sent to another, it opens anew."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = _PositionedFile(self.path)
            self._zip = zipfile.ZipFile(self._file)
        except _BROKEN as error:
            raise DataFormatError(
                f"the zip can't be opened ({error})", value=str(self.path), allowed="a whole zip file",
                fix="Pack or send it again",
            ) from error  # fmt: skip
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if not info.is_dir() and not _is_clutter(info.filename):
                _check_member(info, self._members)
                self._members[posixpath.normpath(info.filename)] = info
        self._check_total()

    def __reduce__(self) -> tuple[Any, ...]:
        return Archive, (self.path,)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """A member's bytes, unpacked no further than the limit; None where there are more."""
        info = self._members[name]
        if info.file_size > max_bytes:
            return None
        try:
            with self._zip.open(info) as member:
                data = member.read(max_bytes + 1)  # to its end, where the checksum is compared
        except _BROKEN as error:
            raise RecordError(
                "damaged_member", f"a file in the zip is damaged ({error})", value=name, fix="Pack or send it again"
            ) from error
        return data if len(data) <= max_bytes else None

    def _check_total(self) -> None:
        unpacked = sum(info.file_size for info in self._members.values())
        if unpacked > max(HARMLESS_BYTES, MAX_RATIO * self._file.size):
            raise DataFormatError(
                "the zip unpacks to far more than it holds", value=f"{unpacked} bytes from {self._file.size}",
                allowed=_LIMITS, fix="Pack the pictures in a compressed format",
            )  # fmt: skip


class _PositionedFile(io.RawIOBase):
    """A file with its position in this object alone. No read may bring more than a zip's directory may be."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(self._handle)
        self.size, self._at = status.st_size, 0
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not an ordinary file")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if self._at < 0:
            raise OSError("a position before the file's start")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        size = self.size - self._at if size is None or size < 0 else size
        # zipfile reads the whole directory in one call and makes an object of each entry: this is the last chance.
        if size > MAX_DIRECTORY_BYTES:
            raise OSError(f"its list of files takes {size} bytes, at most {MAX_DIRECTORY_BYTES}")
        data = os.pread(self._handle, size, self._at)
        if (count := data.count(_ENTRY)) > MAX_ENTRIES:
            raise OSError(f"{count} files, at most {MAX_ENTRIES}")
        self._at += len(data)
        return data

    def close(self) -> None:
        if not self.closed and hasattr(self, "_handle"):
            os.close(self._handle)
        super().close()


def _check_member(info: zipfile.ZipInfo, seen: dict[str, zipfile.ZipInfo]) -> None:
    name = info.filename
    if problem := _problem(info) or ("stands twice in the zip" if posixpath.normpath(name) in seen else ""):
        raise DataFormatError(
            f"a file in the zip {problem}", value=name,
            allowed="plain files with relative names, stored or deflated, without a password", fix="Pack it again",
        )  # fmt: skip


def _problem(info: zipfile.ZipInfo) -> str:
    """What is wrong with a member by its entry in the directory, or nothing."""
    name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
    parts = name.split("/")
    has_drive = len(name) > 1 and name[1] == ":"
    if name.startswith("/") or ".." in parts or "\\" in name or has_drive or not name.isprintable():
        return "has a name that leads out of it"
    if kind and not stat.S_ISREG(kind):
        return "is a link or a device"
    if info.flag_bits & 0x1:
        return "has a password"
    if info.compress_type not in _METHODS:
        return "is packed in a way that is not read"
    if name.lower().endswith(_ARCHIVES):
        return "is an archive itself"
    return ""


def _is_clutter(name: str) -> bool:
    """What desktop systems add to a zip by themselves."""
    last = name.rsplit("/", 1)[-1]
    return name.startswith("__MACOSX/") or last in (".DS_Store", "Thumbs.db", "desktop.ini")
