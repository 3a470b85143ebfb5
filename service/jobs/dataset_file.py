"""What can be told of a training file without a model and without a picture decoded: is it one at all?

In: a path. Out: how many rows or entries it has, or an InvalidTrainingFileError that names the row or the entry. As a
program (`python -m service.jobs.dataset_file PATH`) it prints the same as JSON, so that a large file costs the server's
own process nothing. What the rows say is model_core.training.data's to judge.
"""

from __future__ import annotations

import json
import stat
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from service.errors import InvalidTrainingFileError

MAX_LINE_BYTES = 64 << 20
MAX_ENTRIES = 65_534
MAX_UNPACKED_BYTES = 64 << 30
_MAX_RATIO = 200
_SMALL_ENTRY_BYTES = 1 << 20
_TAIL_BYTES = 22 + 65_535
_END_OF_DIRECTORY = b"PK\x05\x06"
_ARCHIVES = (".zip", ".tar", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst", ".tgz")
_ROWS = (".json", ".jsonl")
_FIX = "Correct the file, and upload it again"
_ALLOWED = 'JSONL with {"messages": [...]} on each line, or a zip of JSON or JSONL and images'


def check_dataset_file(path: Path) -> dict[str, Any]:
    """{"format": "jsonl", "rows": n} or {"format": "zip", "entries": n}. Raises InvalidTrainingFileError."""
    with path.open("rb") as file:
        head = file.read(6)
    if not head:
        raise _refused("the file is empty", 0, "a training example at least")
    if head.startswith(b"PK"):
        return _check_zip(path)
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"7z\xbc\xaf", "7z"), (b"\xfd7zXZ", "xz")):
        if head.startswith(magic):
            raise _refused("an archive of this kind is not read", name, _ALLOWED)
    return _check_jsonl(path)


def _check_jsonl(path: Path) -> dict[str, Any]:
    rows = 0
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise _refused(f"row {number} is too long", f"over {MAX_LINE_BYTES} bytes", f"{MAX_LINE_BYTES} bytes")
            if line.strip():
                _check_row(line, number)
                rows += 1
    if rows == 0:
        raise _refused("the file has no row", 0, "a training example at least")
    return {"format": "jsonl", "rows": rows}


def _check_row(line: bytes, number: int) -> None:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except (ValueError, RecursionError):
        raise _refused(f"row {number} is not JSON", _start(line), _ALLOWED) from None
    if not isinstance(row, dict):
        raise _refused(f"row {number} is not a JSON object", type(row).__name__, _ALLOWED)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        seen = "no such key" if messages is None else type(messages).__name__ if messages else "an empty list"
        raise _refused(f"row {number}: 'messages' is not a list of messages", seen, _ALLOWED)
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _refused(f"row {number}: messages[{index}] has no role", _start(repr(message).encode()), _ALLOWED)


def _check_zip(path: Path) -> dict[str, Any]:
    _check_directory_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, OverflowError) as error:
        raise _refused("the zip can't be read", str(error)[:200], _ALLOWED) from None
    total = 0
    for entry in entries:
        _check_entry(entry)
        total += entry.file_size
    if total > MAX_UNPACKED_BYTES:
        raise _refused("the zip is too large when unpacked", f"{total} bytes", f"{MAX_UNPACKED_BYTES} bytes")
    if not any(entry.filename.lower().endswith(_ROWS) for entry in entries):
        raise _refused("the zip holds no rows", "no .json or .jsonl", _ALLOWED)
    return {"format": "zip", "entries": len(entries)}


def _check_directory_size(path: Path) -> None:
    """By the trailer, before the directory is read: a million entries would be a gigabyte of objects."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        tail = file.read()
    at = tail.rfind(_END_OF_DIRECTORY)
    count = int.from_bytes(tail[at + 10 : at + 12], "little") if at >= 0 else 0
    length = int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0
    if count > MAX_ENTRIES or length > MAX_ENTRIES * 512:
        raise _refused("the zip has too many entries", f"{count} or more", f"{MAX_ENTRIES}")


def _check_entry(entry: zipfile.ZipInfo) -> None:
    # orig_filename: zipfile cuts `filename` at a NUL and turns backslashes round where the system has them.
    name = entry.orig_filename
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not name or "\0" in name or name.startswith(("/", "\\")) or ".." in parts or ":" in (parts or ("",))[0]:
        raise _refused("the zip has an entry that leads out of it", name, "relative names without '..'")
    mode = entry.external_attr >> 16
    if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _refused("the zip has a link or a device in it", name, "files and folders")
    if entry.flag_bits & 0x41:
        raise _refused("the zip is encrypted", name, "a zip without a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _refused("the zip has an entry in a method that is not read", name, "stored or deflated")
    if name.lower().endswith(_ARCHIVES):
        raise _refused("the zip has an archive in it", name, "JSON or JSONL and images")
    is_large = entry.file_size > _SMALL_ENTRY_BYTES
    if is_large and entry.file_size > _MAX_RATIO * max(entry.compress_size, 1):
        raise _refused("an entry of the zip is a bomb", f"{name}: {entry.file_size} bytes", f"{_MAX_RATIO} to 1")


def _start(line: bytes) -> str:
    return line[:80].decode("utf-8", "replace").encode("unicode_escape").decode("ascii")


def _refused(what: str, value: object, allowed: str) -> InvalidTrainingFileError:
    return InvalidTrainingFileError(what, value=value, allowed=allowed, fix=_FIX, param="file")


def main(argv: Sequence[str]) -> int:
    """Prints {"ok": ...} or {"error": {what, value, allowed, fix}}."""
    try:
        report: dict[str, Any] = {"ok": check_dataset_file(Path(argv[0]))}
    except InvalidTrainingFileError as error:
        report = {"error": {"what": error.what, "value": str(error.value), "allowed": error.allowed, "fix": error.fix}}
    sys.stdout.write(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
