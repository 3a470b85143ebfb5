"""A recipe's `loggers` are the trainer's own affair, whoever starts it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from model_core.errors import ConfigError
from model_core.training import curves
from model_core.training.events import read_events
from tests.model_core.training.test_trainer import trainer
from tests.model_core.training.toy import recipe

ALL = ["jsonl", "tensorboard", "curves"]


def test_all_of_them_leave_their_files(tmp_path: Path) -> None:
    outcome = trainer(recipe(output_dir=str(tmp_path), max_steps=2, loggers=ALL)).train()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert outcome.summary["curves"] == str(tmp_path / "curves.png")
    (written,) = (tmp_path / "tensorboard").glob("events.out*")
    assert b"train/loss" in written.read_bytes()


def test_none_is_there_unasked_and_none_without_a_folder(tmp_path: Path) -> None:
    outcome = trainer(recipe(output_dir=str(tmp_path / "a"), max_steps=1)).train()
    assert "curves" not in outcome.summary and not (tmp_path / "a" / "tensorboard").exists()
    assert not (tmp_path / "a" / "curves.png").exists()
    trainer(recipe(output_dir=str(tmp_path / "b"), max_steps=1, loggers=ALL), write=False).train()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("missing", "loggers", "says"),
    [
        ("tensorboardX", ["tensorboard"], "TensorBoard's files need tensorboardX"),
        ("matplotlib.figure", ["jsonl", "curves"], "curves need matplotlib"),
        ("", ["curves"], "'jsonl' beside 'curves'"),
    ],
)
def test_what_one_lacks_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, loggers: list[str], says: str
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=says) as caught:
        trainer(recipe(output_dir=str(tmp_path / "run"), loggers=loggers))
    assert caught.value.param == "loggers" and caught.value.fix


def test_a_picture_that_fails_undoes_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: list[Any] = []
    monkeypatch.setattr(curves, "read_events", lambda _folder: nothing)
    outcome = trainer(recipe(output_dir=str(tmp_path), max_steps=1, loggers=ALL)).train()
    assert outcome.reason == "done" and (tmp_path / "final").is_dir() and "curves" not in outcome.summary
    (warned,) = [event for event in read_events(tmp_path) if event.kind == "warning:curves"]
    assert warned.message.startswith("no curves: there are no steps to draw")
