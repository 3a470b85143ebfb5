"""Fine-tuned models that this server may serve: found in a folder, promoted, rolled back and deleted there.

In: ids and the folders that publishing makes (`model_core/published.py`). Out: `PublishedModel`s. Every look-up asks
the disk whether something changed, which costs one `stat`, so that any process may publish, promote or delete. The
folder is the truth; a database may mirror it behind `Registry`. It refuses to load a model and to know who uses one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model_core import published
from model_core.errors import CheckpointError, InvalidRequestError, ModelNotFoundError
from model_core.published import ModelState, VariantRecord
from service.logs import logger

_PART = r"[A-Za-z0-9._-]{0,64}"
#: ft:{base}:{org}:{suffix}:{8}, and the same with :ckpt-step-N for a step of the run.
FINE_TUNED_ID = re.compile(rf"ft:(?P<base>.+):(?P<org>{_PART}):(?P<suffix>{_PART}):[a-z0-9]{{8}}(:ckpt-step-\d+)?")


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model with a promoted version. folder: of that version. previous: what a roll-back would go to, first."""

    id: str
    version: str
    folder: Path
    record: VariantRecord
    previous: tuple[str, ...] = ()

    @property
    def owner(self) -> str:
        """The organisation in the id; empty where it has none."""
        match = FINE_TUNED_ID.fullmatch(self.id)
        return "" if match is None else match["org"]


class Registry(Protocol):
    """What the server asks. None of it waits for a network."""

    def find(self, model_id: str) -> PublishedModel | None:
        """None: no such model, not promoted yet, or deleted. Raises CheckpointError: its files can't be read."""

    def models(self) -> Sequence[PublishedModel]:
        """All that `find` finds, the newest first. What can't be read is left out, and logged once."""

    def roll_back(self, model_id: str) -> PublishedModel:
        """Raises ModelNotFoundError, InvalidRequestError: there is no earlier version."""

    def delete(self, model_id: str) -> None:
        """From now on nobody finds it; the files stay until `purge`. Raises ModelNotFoundError."""

    def purge(self, model_id: str) -> None:
        """Remove a deleted model's files. Anything else is left alone."""

    def purge_deleted(self) -> Sequence[str]:
        """Remove every deleted model's files: at a start, when nobody uses one. Returns their ids."""


class FolderRegistry:
    """`root` need not exist yet. now: the wall clock."""

    def __init__(self, root: Path, now: Callable[[], float]) -> None:
        self._root, self._now = root, now
        self._states: dict[Path, tuple[tuple[int, int, int], ModelState]] = {}
        self._records: dict[Path, VariantRecord] = {}
        self._told: set[str] = set()

    def find(self, model_id: str) -> PublishedModel | None:
        try:
            folder = self._root / published.folder_name(model_id)
        except InvalidRequestError:
            return None
        return self._at(folder)

    def models(self) -> Sequence[PublishedModel]:
        found = []
        for folder in published.models_in(self._root):
            try:
                model = self._at(folder)
            except CheckpointError as error:
                if str(error) not in self._told:
                    self._told.add(str(error))
                    logger.warning("a published model is left out: %s", error)
                continue
            if model is not None:
                found.append(model)
        return sorted(found, key=lambda m: (-m.record.created_unix, m.id))

    def promote(self, model_id: str, version: str) -> PublishedModel:
        """Raises CheckpointError: no such version; ModelNotFoundError."""
        published.promote(self._folder(model_id), version)
        return self._must_find(model_id)

    def roll_back(self, model_id: str) -> PublishedModel:
        published.roll_back(self._folder(model_id))
        return self._must_find(model_id)

    def delete(self, model_id: str) -> None:
        published.mark_deleted(self._folder(model_id), int(self._now()))

    def purge(self, model_id: str) -> None:
        self._remove(self._folder(model_id))

    def purge_deleted(self) -> Sequence[str]:
        published.clear_graves(self._root)
        return [published.model_id_of(f) for f in published.models_in(self._root) if self._remove(f)]

    def _remove(self, folder: Path) -> bool:
        try:
            return published.remove(folder)
        except CheckpointError as error:
            logger.warning("a published model can't be looked at, and stays: %s", error)
            return False

    def _must_find(self, model_id: str) -> PublishedModel:
        model = self.find(model_id)
        if model is None:
            raise _unknown(model_id)
        return model

    def _folder(self, model_id: str) -> Path:
        try:
            return self._root / published.folder_name(model_id)
        except InvalidRequestError:
            raise _unknown(model_id) from None

    def _at(self, folder: Path) -> PublishedModel | None:
        state = self._state(folder)
        if state is None or state.current is None or state.deleted_unix is not None:
            return None
        version = folder / state.current
        record = self._records.get(version)
        if record is None:
            record = self._records[version] = VariantRecord.read(version)
        return PublishedModel(published.model_id_of(folder), state.current, version, record, state.previous)

    def _state(self, folder: Path) -> ModelState | None:
        try:
            found = os.stat(folder / published.STATE_NAME)
        except OSError:
            self._forget(folder)
            return None
        # Replaced whole at every change, so it is another file then.
        key = (found.st_mtime_ns, found.st_ino, found.st_size)
        known = self._states.get(folder)
        if known is not None and known[0] == key:
            return known[1]
        self._forget(folder)
        state = published.read_state(folder)
        if state is not None:
            self._states[folder] = key, state
        return state

    def _forget(self, folder: Path) -> None:
        if self._states.pop(folder, None) is None:
            return
        for version in [v for v in self._records if v.parent == folder]:
            del self._records[version]


def _unknown(model_id: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        "there is no such model", value=model_id, allowed="a fine-tuned model of this server",
        fix="GET /v1/models lists them", param="model",
    )  # fmt: skip
