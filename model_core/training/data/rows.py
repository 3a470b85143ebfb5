"""Rows of a JSON array or of JSON lines, found in one pass and parsed one at a time.

In: a file, or the bytes of one; out: records by index, with the number that an editor shows. Only where each row
begins and ends is kept, so that a file of many gigabytes costs its index. It knows nothing of what a record means.
"""

from __future__ import annotations

import json
import os
import stat
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model_core.errors import DataFormatError, RecordError

#: One row, its pictures in base64 included.
MAX_ROW_BYTES = 64 << 20
#: A JSON array is parsed in memory; JSON lines are not.
MAX_ARRAY_BYTES = 2_000_000_000
_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"

Read = Callable[[int, int], bytes]


class Rows(ABC):
    """Records by index. name: of the file, for people."""

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, index: int) -> Any:
        """What the row holds. Raises RecordError where it can't be read."""

    def number(self, index: int) -> int:
        """The row's number for people: the line of a JSON-lines file, else counted from 1."""
        return index + 1


class JsonRows(Rows):
    """Rows of a text that `read(start, size)` gives the bytes of."""

    def __init__(self, name: str, read: Read, size: int) -> None:
        self.name, self._read = name, read
        self._starts, self._ends, self._numbers = array("Q"), array("Q"), array("Q")
        head = read(0, _CHUNK)
        first = head.removeprefix(_BOM).lstrip()[:1]
        if first == b"[":
            self._index_array(size)
        elif first == b"{" or (not first and size <= len(head)):
            self._index_lines(size, len(_BOM) if head.startswith(_BOM) else 0)
        else:
            raise DataFormatError(
                "the data file is neither JSON nor JSON lines", value=f"{name}, which begins with {head[:16]!r}",
                allowed="a JSON array, one JSON object a line, a zip of them with images, Parquet or a datasets folder",
                fix="Check the path, or write the rows as JSON lines",
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, index: int) -> int:
        return self._numbers[index]

    def record(self, index: int) -> Any:
        start, end = self._starts[index], self._ends[index]
        try:
            return json.loads(self._read(start, end - start))
        except (ValueError, RecursionError) as error:
            raise RecordError(
                "invalid_json", f"the row is not JSON ({error})", value=self._read(start, min(end - start, 40)),
                allowed="one JSON object", fix="Correct the row, or leave it out",
            ) from error  # fmt: skip

    def _add(self, start: int, end: int, number: int) -> None:
        if end - start > MAX_ROW_BYTES:
            raise DataFormatError(
                f"row {number} is too long", value=f"{end - start} bytes or more in {self.name}",
                allowed=f"{MAX_ROW_BYTES} bytes", fix="Put the pictures into files, or scale them down",
            )  # fmt: skip
        self._starts.append(start)
        self._ends.append(end)
        self._numbers.append(number)

    def _index_lines(self, size: int, start: int) -> None:
        at, number = start, 1
        while at < size:
            chunk = self._read(at, _CHUNK)
            if not chunk:
                break
            begin = 0
            while (newline := chunk.find(b"\n", begin)) >= 0:
                self._add_line(start, at + newline, number)
                begin, start, number = newline + 1, at + newline + 1, number + 1
            at += len(chunk)
            if at - start > MAX_ROW_BYTES:  # without an end in sight: don't read the rest to find it
                self._add(start, at, number)
        if start < at:
            self._add_line(start, at, number)

    def _add_line(self, start: int, end: int, number: int) -> None:
        is_blank = end - start <= 64 and not self._read(start, end - start).strip()
        if not is_blank:
            self._add(start, end, number)

    def _index_array(self, size: int) -> None:
        """Each element as compact bytes behind one another; the text itself is let go."""
        if size > MAX_ARRAY_BYTES:
            raise DataFormatError(
                "the JSON file is too large to be parsed whole", value=f"{size} bytes",
                allowed=f"{MAX_ARRAY_BYTES} bytes",
                fix="Write it as JSON lines: one object a line, which is read row by row",
            )  # fmt: skip
        number = 1
        try:
            text = self._read(0, size).decode("utf-8-sig")
            decoder, at, blob = json.JSONDecoder(), _skip(text, text.index("[") + 1), bytearray()
            while text[at : at + 1] != "]":
                _, end = decoder.raw_decode(text, at)
                start = len(blob)
                blob += text[at:end].encode("utf-8", "surrogatepass")
                self._add(start, len(blob), number)
                at = _skip(text, end)
                if text[at : at + 1] == ",":
                    at = _skip(text, at + 1)
                elif text[at : at + 1] != "]":
                    raise ValueError(f"a comma or ] is missing at character {at}")
                number += 1
            if _skip(text, at + 1) != len(text):
                raise ValueError(f"something stands behind the array, at character {at + 1}")
        except (ValueError, RecursionError) as error:
            raise DataFormatError(
                f"row {number} can't be read ({error})", value=self.name, allowed="a JSON array of objects",
                fix="Correct the file there, or write it anew as JSON lines",
            ) from error  # fmt: skip
        self._read = _InMemory(bytes(blob))


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


class _InMemory:
    """Bytes that are read like a file."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __call__(self, start: int, size: int) -> bytes:
        return self._data[start : start + size]


class _OnDisk:
    """A file that is read by position, so that forked processes may share it; sent to another, it opens anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(self._handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not an ordinary file")
        self.size = status.st_size

    def __reduce__(self) -> tuple[Any, ...]:
        return _OnDisk, (self._path,)

    def __call__(self, start: int, size: int) -> bytes:
        return os.pread(self._handle, size, start)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


def rows_of_file(path: Path) -> JsonRows:
    """Raises DataFormatError."""
    try:
        file = _OnDisk(path)
        return JsonRows(path.name, file, file.size)
    except OSError as error:
        raise DataFormatError(
            f"the data file can't be read ({error.strerror or error})", value=str(path), allowed="a file or folder",
            fix="Check train_data_path, val_data_path or data_path",
        ) from error  # fmt: skip


def rows_of_bytes(name: str, data: bytes) -> JsonRows:
    """Raises DataFormatError."""
    return JsonRows(name, _InMemory(data), len(data))
