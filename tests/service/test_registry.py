"""Published models as the server finds them: by id, fresh from the disk at every look, whoever changed it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from model_core import published
from model_core.errors import CheckpointError, ModelNotFoundError
from model_core.published import folder_name
from service.registry import FolderRegistry
from tests.model_core.versions import add_version

RED = "ft:Qwen/Qwen2.5:v:acme:red:ab12cd34"
STEP_20 = f"{RED}:ckpt-step-20"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def registry(root: Path) -> FolderRegistry:
    return FolderRegistry(root, lambda: 1234.5)


def publish(root: Path, model_id: str, version: str, **record) -> None:
    add_version(root / folder_name(model_id), version, **record)
    published.promote(root / folder_name(model_id), version)


def test_nothing_published_is_nothing_found(registry: FolderRegistry) -> None:
    assert registry.find(RED) is None
    assert registry.models() == []
    assert registry.purge_deleted() == []
    for change in (registry.delete, registry.roll_back, lambda i: registry.promote(i, "one")):
        for model_id in (RED, "..", ""):
            with pytest.raises((ModelNotFoundError, CheckpointError)):
                change(model_id)


def test_the_newest_first_and_the_owner_from_the_id(registry: FolderRegistry, root: Path) -> None:
    publish(root, RED, "one", created_unix=100)
    publish(root, STEP_20, "one", created_unix=300)
    publish(root, "plain", "one", created_unix=200)
    add_version(root / "held", "one")
    found = registry.models()
    assert [model.id for model in found] == [STEP_20, "plain", RED]
    assert [model.owner for model in found] == ["acme", "", "acme"]
    assert found[2].folder == root / folder_name(RED) / "one"


def test_a_change_by_anybody_is_seen_at_the_next_look(registry: FolderRegistry, root: Path) -> None:
    publish(root, RED, "one")
    assert registry.find(RED).version == "one"
    publish(root, RED, "two")
    assert (registry.find(RED).version, registry.find(RED).previous) == ("two", ("one",))
    other = FolderRegistry(root, lambda: 5.0)
    assert other.roll_back(RED).version == "one"
    assert registry.find(RED).version == "one"
    other.delete(RED)
    assert registry.find(RED) is None
    assert registry.purge_deleted() == [RED]
    assert list(root.iterdir()) == []


def test_a_look_reads_no_file_that_did_not_change(registry: FolderRegistry, root: Path, monkeypatch) -> None:
    publish(root, RED, "one")
    first = registry.find(RED)

    def refuse(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(published, "read_state", refuse)
    monkeypatch.setattr(published.VariantRecord, "read", refuse)
    assert registry.find(RED) == first
    os.utime(root / folder_name(RED) / published.STATE_NAME, (1, 1))
    with pytest.raises(AssertionError, match="read again"):
        registry.find(RED)


def test_what_can_not_be_read_is_left_out_of_the_list_and_told_once(registry, root: Path, caplog) -> None:
    publish(root, RED, "one")
    publish(root, "broken", "one")
    (root / "broken" / published.STATE_NAME).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert [[model.id for model in registry.models()] for _ in range(3)] == [[RED]] * 3
    assert len(caplog.records) == 1
    with pytest.raises(CheckpointError):
        registry.find("broken")
    publish(root, "half", "one")
    (root / "half" / "one" / published.RECORD_NAME).unlink()
    with pytest.raises(CheckpointError):
        registry.find("half")
    assert registry.purge_deleted() == []


def test_purging_takes_nothing_but_what_was_deleted(registry: FolderRegistry, root: Path) -> None:
    publish(root, RED, "one")
    registry.purge(RED)
    assert registry.find(RED) is not None
    registry.delete(RED)
    registry.purge(RED)
    registry.purge(RED)
    (root / ".half.deleted" / "one").mkdir(parents=True)
    assert registry.purge_deleted() == []
    assert list(root.iterdir()) == []
