"""Published models on disk: where each lies, which of its versions counts, and what is told of it unloaded.

`<models>/<name of the id>/` holds `model.json`, which is replaced whole at every change, and one folder a version
(variant.py), each complete or absent. `model.json` says which version is served: publishing adds a version, promoting
points there, rolling back points to the one before, deleting marks the model until nobody uses it. Several processes
may do all that at once. It refuses to know weights, requests and databases. No torch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from model_core.errors import CheckpointError, InvalidRequestError, ModelNotFoundError

STATE_NAME = "model.json"
RECORD_NAME = "variant.json"
FORMAT = "dve-variant"
FORMAT_VERSION = 1
_LOCK_NAME = ".lock"
_GRAVE = ".deleted"
_MAX_NAME_BYTES = 255
#: Versions that stay on disk beside the one that is served, for a roll-back.
KEPT_VERSIONS = 2


@dataclass(frozen=True, slots=True)
class VariantRecord:
    """What one version is. `fingerprint` is also its folder's name.

    base_fingerprint: of the checkpoint folder whose tensors it shares. num_bytes: of its own tensors.
    components: those that have a tensor of their own, such as fusion.
    """

    base: str
    base_fingerprint: str
    fingerprint: str
    created_unix: int
    num_tensors: int
    num_bytes: int
    components: tuple[str, ...]
    fusion: str
    fusion_trained: bool
    encoders: tuple[str, ...]
    num_parameters: int
    max_context_tokens: int
    dtype: str

    def to_json(self) -> str:
        content = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> VariantRecord:
        """Raises CheckpointError: it is missing, or it isn't one."""
        file = folder / RECORD_NAME
        try:
            content = json.loads(file.read_bytes())
            if (content.pop("format"), content.pop("version")) != (FORMAT, FORMAT_VERSION):
                raise ValueError("another format")
            for name in ("components", "encoders"):
                content[name] = tuple(content[name])
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"the version's {RECORD_NAME} can't be read", value=folder.name,
                allowed=f"what this program writes, format {FORMAT_VERSION}", fix="Publish the model again",
            ) from error  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelState:
    """`current` None: published and not promoted yet. `previous`: versions served before, the latest first."""

    id: str
    current: str | None = None
    previous: tuple[str, ...] = ()
    deleted_unix: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"


def is_variant(folder: Path) -> bool:
    """Whether it holds what differs from a base, and not a whole model."""
    return (folder / RECORD_NAME).is_file()


def folder_name(model_id: str) -> str:
    """An id as one folder's name: ids hold `/` and `:`. Raises InvalidRequestError."""
    try:
        name = quote(model_id, safe=":@+=,")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold
        name = ""
    if not name or name.startswith(".") or len(name) > _MAX_NAME_BYTES:
        raise InvalidRequestError(
            "this can't be a model's id", value=model_id,
            allowed=f"1 to {_MAX_NAME_BYTES} characters, the first no dot",
            fix="Use a short name of letters, digits and hyphens", param="model",
        )  # fmt: skip
    return name


def model_id_of(folder: Path) -> str:
    """The id that `folder_name` made this folder's name of."""
    return unquote(folder.name)


def read_state(folder: Path) -> ModelState | None:
    """None: there is no such model, or nothing of it is finished. Raises CheckpointError: it can't be read."""
    try:
        content: dict[str, Any] = json.loads((folder / STATE_NAME).read_bytes())
        known = {field.name for field in fields(ModelState)}
        if set(content) != known or not isinstance(content["id"], str):
            raise ValueError("other fields")
        content["previous"] = tuple(content["previous"])
        return ModelState(**content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the model's {STATE_NAME} can't be read", value=folder.name, allowed="what this program writes",
            fix="Publish the model again, or remove its folder",
        ) from error  # fmt: skip


def promote(folder: Path, version: str) -> ModelState:
    """Serve this version from now on. Doing it twice changes nothing.

    Raises:
        CheckpointError: the version is not there. ModelNotFoundError: the model was deleted.
    """
    VariantRecord.read(folder / version)
    with _changing(folder) as state:
        if state.current == version:
            return state
        before = [v for v in (state.current, *state.previous) if v is not None and v != version]
        changed = replace(state, current=version, previous=tuple(before[:KEPT_VERSIONS]))
        _write_state(folder, changed)
        for left in before[KEPT_VERSIONS:]:
            shutil.rmtree(folder / left, ignore_errors=True)
        return changed


def roll_back(folder: Path) -> ModelState:
    """Serve the version before this one; a second call goes back by one more.

    Raises:
        InvalidRequestError: there is none before it. ModelNotFoundError: the model was deleted.
    """
    with _changing(folder) as state:
        before = [v for v in state.previous if (folder / v).is_dir()]
        if not before:
            raise InvalidRequestError(
                "there is no version to go back to", value=state.id, allowed="a model that was promoted twice",
                fix="Keep this version, or publish a better one", param="model",
            )  # fmt: skip
        changed = replace(state, current=before[0], previous=tuple(before[1:]))
        _write_state(folder, changed)
        return changed


def mark_deleted(folder: Path, now_unix: int) -> ModelState:
    """Nobody finds the model from now on; its files go with `remove`. Raises ModelNotFoundError."""
    with _changing(folder) as state:
        changed = replace(state, deleted_unix=now_unix)
        _write_state(folder, changed)
        return changed


def remove(folder: Path) -> bool:
    """Take a deleted model's files away. False: it was not deleted, or is gone already."""
    state = read_state(folder)
    if state is None or state.deleted_unix is None:
        return False
    # Under another name first: whoever lists the models meanwhile sees it whole or not at all.
    grave = folder.with_name(f".{folder.name[:200]}{_GRAVE}")
    try:
        os.rename(folder, grave)
    except OSError:
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()
    shutil.rmtree(grave, ignore_errors=True)
    return True


def clear_graves(root: Path) -> None:
    """What a removal that was killed has left."""
    for grave in root.glob(f".*{_GRAVE}"):
        shutil.rmtree(grave, ignore_errors=True)


def models_in(root: Path) -> Iterator[Path]:
    """Folders of models, finished or not, by name."""
    try:
        found = sorted(entry.path for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except FileNotFoundError:
        return
    yield from map(Path, found)


@contextmanager
def _changing(folder: Path) -> Iterator[ModelState]:
    """The state, while no other process changes it. A model that nobody has promoted yet begins here."""
    if not folder.is_dir():
        raise _unknown(model_id_of(folder))
    with open(folder / _LOCK_NAME, "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = read_state(folder) or ModelState(model_id_of(folder))
        if state.deleted_unix is not None:
            raise _unknown(state.id)
        yield state


def is_disk_full(error: BaseException) -> bool:
    """Also as safetensors tells it."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


def _unknown(model_id: str) -> ModelNotFoundError:
    return ModelNotFoundError("there is no such model", value=model_id, allowed="a published model", param="model",
                              fix="Publish it first: dve publish")  # fmt: skip


def _write_state(folder: Path, state: ModelState) -> None:
    temporary = folder / f".{STATE_NAME}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(state.to_json())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / STATE_NAME)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
