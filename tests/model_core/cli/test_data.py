"""`dve data validate` as a user calls it: what it says, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_core.cli.data import BAD_DATA
from service.cli import main as dve
from tests.model_core import tiny
from tests.model_core.training.data.corpus import row, write_corpus, write_rows
from tests.model_core.training.data.test_scan import FOUND, corrupt_corpus


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Tokenizer and preprocessing of a model; its weights are not asked for."""
    folder = tmp_path / "model"
    tiny.dual_config().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


def test_good_data_ends_with_0(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_corpus(tmp_path / "corpus", 6)
    assert dve(["data", "validate", str(path)]) == 0
    said = capsys.readouterr().out
    assert "6 rows, 6 can be used" in said
    assert "give --model" in said
    assert dve(["data", "validate", str(path), "--type", "vqa", "--model", str(model), "--max-rows", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 of 6 rows looked at, 2 can be used" in said
    assert "the longest sample" in said


def test_bad_rows_are_named_and_end_with_78(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(corrupt_corpus(tmp_path))
    asked = ["data", "validate", path, "--model", str(model), "--max-tokens", "600"]
    assert dve(asked) == BAD_DATA
    said = capsys.readouterr().out
    for number, (severity, code) in FOUND.items():
        assert (f"error: data.jsonl row {number}: {code}: " in said) == (severity == "error")
    assert "warning: 1 rows: duplicate: rows 9" in said
    assert "note: 1 rows: converted: CMYK, converted without a profile: rows 4" in said
    assert dve([*asked, "--json"]) == BAD_DATA
    report = json.loads(capsys.readouterr().out)
    assert not report["valid"]
    assert [(one["row"], one["code"]) for one in report["problems"]] == [(n, found[1]) for n, found in FOUND.items()]


def test_a_misspelt_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such a row is a question without its picture, and would be trained on as one."""
    path = write_corpus(tmp_path / "corpus", 3)
    rows = json.loads(path.read_text())
    for one in rows[1:]:
        one["image_pth"] = next(one.pop(key) for key in ("image", "image_path") if key in one)
    path.write_text(json.dumps(rows))
    assert dve(["data", "validate", str(path)]) == 0
    said = capsys.readouterr().out
    assert "warning: 2 rows: near_key: the row has a key 'image_pth', which is not read" in said
    assert "Write 'image_path' if that is meant: rows 2, 3" in said


def test_image_root_and_type_are_heeded(tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "data.json", [row("1.jpg"), row("2.jpg", None)]))
    pictures = str(write_corpus(tmp_path / "pictures", 3).parent)
    assert dve(["data", "validate", path]) == BAD_DATA
    assert dve(["data", "validate", path, "--image_root", pictures]) == 0
    assert dve(["data", "validate", path, "--image-root", pictures, "--type", "captioning"]) == 0
    assert dve(["data", "validate", path, "--image-root", pictures, "--type", "medical_vqa"]) == BAD_DATA


def test_a_file_that_is_no_data_is_one_line_and_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dve(["data", "validate", str(tmp_path / "none.json")]) == BAD_DATA
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "data.json").write_text("[{]")
    assert dve(["data", "validate", str(tmp_path / "data.json"), "--json"]) == BAD_DATA
    assert json.loads(capsys.readouterr().out)["code"] == "invalid_file_format"


@pytest.mark.parametrize("flags", [["--max-tokens", "5"], ["--max-rows", "0"], ["--type", "audio"]])
def test_a_wrong_call_ends_with_2(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        dve(["data", "validate", str(write_corpus(tmp_path, 1)), *flags])
    assert caught.value.code == 2
