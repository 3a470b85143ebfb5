"""A path of the user's -> rows, each file's with the store that its images are in.

What a file is, its first bytes decide, not its name. It parses no row and opens no image.
"""

from __future__ import annotations

import posixpath
from errno import ENOENT
from pathlib import Path

from model_core.errors import ConfigError, DataFormatError
from model_core.training.data.archive import Archive
from model_core.training.data.columns import rows_of_table
from model_core.training.data.rows import MAX_ARRAY_BYTES, Rows, rows_of_bytes, rows_of_file
from model_core.training.data.stores import FolderStore, Store, ZipStore

#: Of one JSON or JSON-lines file inside a zip, which is unpacked into memory.
MAX_MEMBER_BYTES = MAX_ARRAY_BYTES
_SUFFIXES = (".json", ".jsonl", ".ndjson")
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_TABLES = (b"PAR1", b"ARROW1")
_REFUSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}


def open_data(path: Path, image_root: Path | None) -> list[tuple[Rows, Store]]:
    """Raises DataFormatError; ConfigError where image_root means nothing or is no folder."""
    if image_root is not None and not image_root.is_dir():
        raise ConfigError(
            "image_root is no folder",
            value=str(image_root),
            allowed="a folder that holds the images",
            fix="Name the folder that the images' paths begin in, or leave it out for the data file's own",
            param="image_root",
        )
    head = b"" if path.is_dir() else _head(path)
    kind = next((name for magic, name in _REFUSED.items() if head.startswith(magic)), None)
    if kind is not None or path.suffix == ".tar":
        raise DataFormatError(
            "archives of this kind are not read", value=f"{path.name}, {kind or 'tar'}",
            allowed="zip, JSON, JSON lines, Parquet or a datasets folder", fix="Unpack it, or pack it as a zip",
        )  # fmt: skip
    if head.startswith(_ZIP):
        return _open_zip(path, image_root)
    folder = FolderStore(image_root or (path if path.is_dir() else path.parent))
    if path.is_dir() or head.startswith(_TABLES) or path.suffix in (".arrow", ".parquet"):
        return [(rows_of_table(path), folder)]
    return [(rows_of_file(path), folder)]


def _head(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise FileNotFoundError(ENOENT, "not there, or no ordinary file")
        with path.open("rb") as file:
            return file.read(8)
    except OSError as error:
        raise DataFormatError(
            f"the data file can't be read ({error.strerror or error})", value=str(path), allowed="a file or folder",
            fix="Check train_data_path, val_data_path or data_path",
        ) from error  # fmt: skip


def _open_zip(path: Path, image_root: Path | None) -> list[tuple[Rows, Store]]:
    if image_root is not None:
        raise ConfigError(
            "image_root and a zip, which holds its own images", value=str(image_root), allowed="one of the two",
            fix="Leave image_root out, or name the unpacked JSON file", param="image_root",
        )  # fmt: skip
    archive = Archive(path)
    found: list[tuple[Rows, Store]] = []
    for name in sorted(one for one in archive if one.lower().endswith(_SUFFIXES)):
        data = archive.read(name, MAX_MEMBER_BYTES)
        if data is None:
            raise DataFormatError(
                "a data file in the zip is too large", value=name, allowed=f"{MAX_MEMBER_BYTES} bytes",
                fix="Unpack the zip, and name its data file as JSON lines",
            )  # fmt: skip
        found.append((rows_of_bytes(name, data), ZipStore(archive, posixpath.dirname(name))))
    if not found:
        raise DataFormatError(
            "the zip holds no data file", value=path.name, allowed="at least one .json or .jsonl in it",
            fix="Pack the data file with the images, or name the data file itself",
        )  # fmt: skip
    return found
