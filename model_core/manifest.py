"""The manifest of a checkpoint folder: what makes a folder complete, and how one comes to be at once.

`write_folder` lets a callable fill a temporary sibling, hashes and fsyncs what it wrote, writes
`manifest.json` last and swaps the folder into place, so that a reader sees the old checkpoint or the new
one. `verify_folder` says whether a folder still is what was written. `check_safetensors` reads a header,
never a tensor. It refuses to know torch, what the files mean, and pickles, which it does not open.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from model_core.errors import CheckpointError, CheckpointIncompleteError

MANIFEST_NAME = "manifest.json"
FORMAT = "dve-checkpoint"
VERSION = 1

_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".pkl", ".pickle", ".ckpt")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """`files`: POSIX path inside the folder -> entry. `extra`: whatever the writer wanted to keep with them."""

    files: Mapping[str, FileEntry]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        files = {name: {"sha256": e.sha256, "size_bytes": e.size_bytes} for name, e in sorted(self.files.items())}
        content = {"format": FORMAT, "version": VERSION, "extra": dict(self.extra), "files": files}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def write_folder(target: Path, write: Callable[[Path], None], *, extra: Mapping[str, Any]) -> Manifest:
    """Make `target` the folder that `write(empty_folder)` fills, or leave everything as it was and raise.

    An older checkpoint at `target` is replaced; anything else that is there is not ours to delete.
    `extra` must be JSON. Where the system can't exchange two folders in one step (not Linux, or some
    network disks), there is an instant in which the old one has another name: see `recover`.
    """
    target = Path(os.path.abspath(target))  # a caller may change directory; and "x/.." must not be renamed
    Manifest({}, extra).to_json()  # fails before the expensive part
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(target, "tmp")
    temporary.mkdir()
    try:
        write(temporary)
        manifest = Manifest(_hash_files(temporary), extra)
        with open(temporary / MANIFEST_NAME, "x", encoding="utf-8") as file:
            file.write(manifest.to_json())
        _fsync(temporary / MANIFEST_NAME)
        for folder, _, _ in os.walk(temporary):
            _fsync(Path(folder))
        _refuse_foreign(target)  # again: `write` may have taken an hour
        _swap(temporary, target)
        _fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a failed attempt, or the older checkpoint after a swap
    return manifest


def verify_folder(path: Path, *, deep: bool) -> Manifest | None:
    """The manifest of a complete folder, or None for a plain Hugging Face folder, which has none.

    Raises CheckpointIncompleteError for a missing or altered file (`deep` also hashes every byte), and
    CheckpointError for pickles and for anything that isn't a checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        left = sorted(p.name for p in path.parent.glob(f".{glob.escape(path.name)}.*.old"))
        fix = f"A replacement was interrupted: call recover, or rename {left[0]} back" if left else "Check the path"
        raise CheckpointIncompleteError("there is no such checkpoint folder", value=str(path), fix=fix)
    for name, file in _files(path):
        _refuse_pickle(name, file)
    manifest = _read_manifest(path)
    if manifest is not None:
        for name, entry in manifest.files.items():
            _check_entry(path, name, entry, deep=deep)
    for name, file in _files(path):
        if name.endswith(".safetensors"):
            check_safetensors(file)
        elif name.endswith(".safetensors.index.json"):
            _check_shards(file)
    return manifest


def recover(parent: Path) -> tuple[str, ...]:
    """Clear up after a kill, and say what was done. Only for the one process that writes in `parent`.

    Removes half-written folders and gives an old checkpoint its name back where its successor never came.
    """
    done = []
    for left in sorted(Path(parent).iterdir()):
        named = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.(tmp|old)", left.name)
        if named is None or not left.is_dir() or left.is_symlink():
            continue
        target = left.with_name(named[1])
        if named[2] == "old" and not target.exists():
            left.rename(target)
            done.append(f"restored {target.name}")
        else:
            shutil.rmtree(left)
            done.append(f"removed {left.name}")
    return tuple(done)


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name -> {dtype, shape, data_offsets}. No tensor is read."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or length > size - 8:
            allowed = f"a header of at most {max(0, size - 8)} bytes in a file of {size}"
            fix = "Copy it again"
            raise CheckpointIncompleteError(f"{path.name} is cut short", value=length, allowed=allowed, fix=fix)
        if length > _MAX_HEADER_BYTES:
            raise _damaged(path, f"header of {length} bytes", f"at most {_MAX_HEADER_BYTES}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, raw[:40], "a JSON header") from error
    if not isinstance(header, dict):
        raise _damaged(path, type(header).__name__, "a JSON object")
    header.pop("__metadata__", None)
    spans = sorted(_check_tensor(path, name, entry) for name, entry in header.items())
    end = 0
    for begin, stop in spans:  # safetensors allows neither holes nor overlaps
        if begin != end:
            raise _damaged(path, f"a tensor at {begin}", f"the next tensor at {end}")
        end = stop
    if end != size - 8 - length:
        what = f"{path.name} does not have the bytes that its header states"
        seen, allowed = f"{size - 8 - length} bytes of tensors", f"{end} bytes"
        raise CheckpointIncompleteError(what, value=seen, allowed=allowed, fix="Copy it again")
    return header


def _check_tensor(path: Path, name: str, entry: object) -> tuple[int, int]:
    numbers: list[Any] = []
    if isinstance(entry, dict):
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2:
            numbers = [*shape, *offsets]
    # type(), not isinstance(): JSON's true is an int in Python
    if len(numbers) < 2 or any(type(n) is not int or n < 0 for n in numbers) or not isinstance(entry, dict):
        raise _damaged(path, f"{name}: {entry}", "dtype, shape and two data_offsets")
    begin, end = numbers[-2:]
    bits = _DTYPE_BITS.get(str(entry.get("dtype")))
    if bits is None:
        raise _damaged(path, f"{name}: {entry.get('dtype')}", ", ".join(_DTYPE_BITS))
    if (end - begin) * 8 != math.prod(numbers[:-2]) * bits:
        raise _damaged(path, f"{name}: {entry}", "as many bytes as dtype and shape make")
    return begin, end


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _damaged(path: Path, seen: object, allowed: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is damaged", value=seen, allowed=allowed, fix="Copy or write it again")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below `folder`, links included, in a stable order, by its POSIX name."""
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() or not file.is_dir():
            yield file.relative_to(folder).as_posix(), file


def _hash_files(folder: Path) -> dict[str, FileEntry]:
    entries = {}
    for name, file in _files(folder):
        if name == MANIFEST_NAME or file.is_symlink() or not file.is_file():
            raise CheckpointError(
                "a checkpoint is made of plain files", value=name, allowed="no link, no manifest.json",
                fix="Write the file itself, under another name than manifest.json",
            )  # fmt: skip
        _refuse_pickle(name, file)
        entries[name] = FileEntry(_sha256(file), file.stat().st_size)
        _fsync(file)
    if not entries:
        raise CheckpointError(
            "nothing was written into the checkpoint", value=str(folder), allowed="at least one file",
            fix="Let `write` fill the folder that it is given",
        )  # fmt: skip
    return entries


def _refuse_pickle(name: str, file: Path) -> None:
    """By name, else by magic. Reads 512 bytes as bytes; a pickle is code and is never opened as one."""
    if name.lower().endswith(_PICKLE_SUFFIXES):
        raise _pickle_error(name)
    if not file.is_file():
        return
    with open(file, "rb") as opened:
        head = opened.read(512)
    # A safetensors header of 640 bytes begins 80 02, as a pickle of protocol 2 does; its "{" tells them apart.
    is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and head[8:9] != b"{"
    is_torch_zip = head[:4] == b"PK\3\4" and (b"data.pkl" in head or name.endswith(".safetensors"))
    if is_pickle or is_torch_zip:
        raise _pickle_error(name)


def _pickle_error(name: str) -> CheckpointError:
    return CheckpointError(
        "pickled weights are not read or written, because a pickle can run code",
        value=name,
        allowed=".safetensors and .json",
        fix="Where you trust the file, convert it once elsewhere: safetensors.torch.save_file(state_dict, "
        "'model.safetensors'); otherwise delete it",
    )


def _read_manifest(path: Path) -> Manifest | None:
    file = path / MANIFEST_NAME
    try:
        content = json.loads(file.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError("another format")
        if content["version"] != VERSION:
            allowed, fix = f"version {VERSION}", "Read it with the program that wrote it, or use another checkpoint"
            raise CheckpointError(
                "this checkpoint has another version", value=content["version"], allowed=allowed, fix=fix
            )
        files = {n: FileEntry(str(e["sha256"]), int(e["size_bytes"])) for n, e in content["files"].items()}
        extra = dict(content["extra"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fix = "Use another checkpoint; if this is a plain Hugging Face folder, remove the file"
        allowed = f"JSON of the format {FORMAT}, version {VERSION}"
        raise CheckpointIncompleteError(
            f"{MANIFEST_NAME} is not a readable manifest", value=str(path), allowed=allowed, fix=fix
        ) from error
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(
                "the manifest names a file outside of its folder", value=name, allowed="names within the folder",
                fix="Use another checkpoint: this program writes no such manifest",
            )  # fmt: skip
    return Manifest(files, extra)


def _check_entry(folder: Path, name: str, entry: FileEntry, *, deep: bool) -> None:
    file, fix = folder / name, "Use another checkpoint, or copy this one again"
    if not file.is_file():
        raise CheckpointIncompleteError(
            f"{name} is missing", value="no file", allowed=f"{entry.size_bytes} bytes", fix=fix
        )
    if (size := file.stat().st_size) != entry.size_bytes:
        seen, allowed = f"{size} bytes", f"{entry.size_bytes} bytes"
        raise CheckpointIncompleteError(f"{name} has another size", value=seen, allowed=allowed, fix=fix)
    if deep and (digest := _sha256(file)) != entry.sha256:
        seen, allowed = f"sha256 {digest}", f"sha256 {entry.sha256}"
        raise CheckpointIncompleteError(f"{name} has other content", value=seen, allowed=allowed, fix=fix)


def _check_shards(index: Path) -> None:
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(index, "no weight_map", "a Hugging Face index") from error
    for shard in shards:
        if not (index.parent / str(shard)).is_file():
            fix = "Download or copy it again"
            raise CheckpointIncompleteError(
                f"{shard} is missing", value="no file", allowed=f"as {index.name} says", fix=fix
            )


def _refuse_foreign(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(
            "the checkpoint's place is taken", value=str(target), allowed="a folder, or nothing",
            fix="Choose another place, or move what is there away",
        )  # fmt: skip
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / MANIFEST_NAME).is_file() or _read_manifest(target) is None:
        fix = "Choose another folder, or empty this one yourself"
        raise CheckpointError("this folder is not a checkpoint of ours", value=str(target), fix=fix)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}")


def _swap(new: Path, target: Path) -> None:
    """Put `new` at `target`. An older checkpoint ends up under `new`'s name, or removed."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(new, target)
    elif not _exchange(new, target):
        old = _sibling(target, "old")
        os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE): both names at once. False where it isn't offered."""
    function = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    at_fdcwd, rename_exchange = -100, 2
    return function is not None and function(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
