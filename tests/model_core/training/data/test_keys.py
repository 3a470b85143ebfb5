"""Misspelt keys: the report names them, and rows with keys of their own go on as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model_core import DualVisionDataset, VQADataset
from model_core.errors import RecordError
from model_core.processing.images import ImageLimits
from model_core.training.config import TrainConfig
from model_core.training.data.scan import Checks, RowProblem, scan
from model_core.training.data.source import build_source, problems_of
from tests.model_core.training.data.corpus import jpeg, row, tiny_format, write_rows

TEXT = row(None)
PART = {"type": "image_url", "image_url": {"url": "data:,"}}
NEAR = {
    "image_pth": ({"image_pth": "1.jpg"} | TEXT, "image_path"),
    "imgae": ({"imgae": "1.jpg"} | TEXT, "image"),
    "img": ({"img": "1.jpg"} | TEXT, "image"),
    "Image-Path": ({"Image-Path": "1.jpg"} | TEXT, "image_path"),
    "imags": ({"imags": ["1.jpg"]} | TEXT, "images"),
    "imagepath": ({"imagepath": "1.jpg", "image": None} | TEXT, "image_path"),
    "conversatons": ({"conversatons": TEXT["conversations"], "text": "A car.", "image": "1.jpg"}, "conversations"),
    "anwser": ({"question": "What?", "anwser": "A car."}, "answer"),
}  # fmt: skip
FAR: dict[str, dict[str, Any]] = {
    "metadata": TEXT | {"id": "1", "age": "40", "page": "7", "language": "en", "context": "x", "source": ["a"]},
    "an image beside": row("1.jpg") | {"image_pat": "1.jpg", "img": "x"},
    "ids": {"question": "What?", "answer": "A car.", "conversation_id": "7", "message_id": "8", "answers": ["a"]},
    "a picture in a turn": {"img": "x", "messages": [{"role": "user", "content": [PART]}]},
    "an empty one": TEXT | {"img": "", "imgs": [], "image_pth": None, "imagee": 7},
    "other formats' keys": TEXT | {"captions": "x", "questions": "y", "mesages": ["z"]},
    "a long one": TEXT | {"image_path" * 1000: "x"},
}


def report(tmp_path: Path, rows: list[Any], cls: type[DualVisionDataset] = DualVisionDataset) -> list[RowProblem]:
    (tmp_path / "1.jpg").write_bytes(jpeg())
    return list(scan(cls(write_rows(tmp_path / "data.jsonl", rows)), Checks(ImageLimits())).problems)


@pytest.mark.parametrize("key", NEAR)
def test_a_key_near_to_one_that_the_row_lacks_is_warned_of(key: str, tmp_path: Path) -> None:
    record, known = NEAR[key]
    found = [one for one in report(tmp_path, [{}, record]) if one.code == "near_key"]
    assert [(one.row, one.severity) for one in found] == [(2, "warning")]
    assert repr(key) in found[0].message
    assert f"Write '{known}'" in found[0].message


@pytest.mark.parametrize("name", FAR)
def test_other_keys_stay_allowed(name: str, tmp_path: Path) -> None:
    assert "near_key" not in [one.code for one in report(tmp_path, [FAR[name]])]


def test_a_row_that_is_refused_is_warned_of_too(tmp_path: Path) -> None:
    found = report(tmp_path, [{"image_pth": "1.jpg"} | TEXT], VQADataset)
    assert [(one.severity, one.code) for one in found] == [("error", "no_image"), ("warning", "near_key")]


def test_training_tells_it_and_trains_the_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.json", [{"image_pth": "1.jpg"} | TEXT])
    source = build_source(TrainConfig(train_data_path=str(path), batch_size=1, max_tokens=600), tiny_format())
    assert [one["code"] for one in problems_of(source)["problems"]] == ["near_key"]


@pytest.mark.parametrize(
    ("turn", "said"),
    [({"role": "user", "contnet": "x"}, "Got: keys role, contnet. .*Write 'content' for 'contnet'"),
     ({"from": "human", "vlaue": "x"}, "Got: keys from, vlaue. .*Write 'value' for 'vlaue'"),
     ({"role": "user", "content": None}, "no content. Got: None. .*Write what is said"),
     ({"rolle": "user", "content": "x"}, "Got: keys rolle, content. .*Write 'role' for 'rolle'"),
     ({"role": "", "content": "x"}, "Got: ''. .*Give it one of these"), ({}, "Got: keys none")],
)  # fmt: skip
def test_a_misspelt_key_of_a_turn_is_named(turn: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.json", [{"messages": [turn, {"role": "assistant", "content": "y"}]}])
    with pytest.raises(RecordError, match=said):
        DualVisionDataset(path).sample(0)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_is_shown(answer: str, tmp_path: Path) -> None:
    (found,) = report(tmp_path, [row(None, answer=answer)])
    assert found.code == "empty_answer"
    assert f"Got: {answer!r}. Allowed" in found.message
