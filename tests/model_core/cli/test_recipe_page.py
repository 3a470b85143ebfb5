"""RECIPES.md is what the program prints, holds every key, and its examples load and run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_core import CaptioningDataset, DualVisionDataset, MultiDataset, VQADataset
from model_core.cli.configs import main
from model_core.training.config import TrainConfig, load_config
from model_core.training.losses import DEFAULT_DIVERSITY_LOSS_WEIGHT
from model_core.training.strict import keys_at
from model_core.types import TextPart
from tests.model_core.training.data.corpus import jpeg

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "RECIPES.md").read_text()
JSON = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
RECIPES = [one for one in JSON if isinstance(one, dict)]
QUESTIONS, CAPTIONS = [one for one in JSON if isinstance(one, list)]
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NESTED_TWICE = "curriculum_training.stages.freeze_config.rules"


def sections(path: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Where every section may stand, with its keys, as the classes nest."""
    keys = keys_at(TrainConfig, path)
    yield ".".join(path), keys
    for key in keys:
        if keys_at(TrainConfig, (*path, key)):
            yield from sections((*path, key))


def tables() -> dict[str, list[list[str]]]:
    """The cells of each row, by the heading above."""
    parts = (part.partition("\n") for part in PAGE.split("\n### ")[1:])
    return {
        title: [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
        for title, _, text in parts
    }


def keys_of(rows: list[list[str]]) -> list[str]:
    return [cells[0].strip("`") for cells in rows]


def test_the_page_is_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys"]) == 0
    assert capsys.readouterr().out == PAGE, "dve configs keys > RECIPES.md"


def test_every_key_of_every_section_has_its_row() -> None:
    top = [row for title, rows in tables().items() if "`" not in title for row in rows]
    assert keys_of(top) == list(TrainConfig.model_fields)
    shown = {
        place.replace("[]", ""): keys_of(rows)
        for title, rows in tables().items()
        for place in re.findall(r"`([^`]+)`", title)
    }
    known = {place: keys for place, keys in sections() if place}
    assert known.pop(NESTED_TWICE) == shown["freeze_config.rules"], "shown once, under the first of its places"
    assert shown == known
    assert "lora.dinov2" in known


def test_every_row_says_type_default_and_meaning() -> None:
    rows = [row for rows in tables().values() for row in rows]
    assert len(rows) > 90
    assert [row for row in rows if len(row) != 4 or not all(cell.strip() for cell in row)] == []
    said = {row[0]: row[1:] for row in tables()["The losses"] + tables()["The run"]}
    kind, default, meaning = said["`diversity_loss_weight`"]
    assert (kind, default) == ("number, 0 or more, or null", "`null`")
    assert f"null: {DEFAULT_DIVERSITY_LOSS_WEIGHT:g} where there is a gate" in meaning
    assert said["`loggers`"][:2] == ["list of `jsonl`, `tensorboard`, `curves`", '`["jsonl"]`']
    epochs = next(row for row in tables()["`curriculum_training.stages[]`"] if row[0] == "`epochs`")
    assert epochs[1:3] == ["integer, 1 or more, up to 100000", "needed"]


@pytest.mark.parametrize("number", range(5))
def test_a_recipe_of_the_page_loads(number: int, tmp_path: Path) -> None:
    recipe: dict[str, Any] = RECIPES[number]
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    assert load_config(file).stages()
    assert main(["validate", str(file)]) == 0


def test_the_examples_are_all_there() -> None:
    assert len(RECIPES) == 5 and len(SNIPPETS) == 2
    keys = {key for recipe in RECIPES for key in recipe}
    assert {"freeze_config", "curriculum_training", "diversity_loss_weight", "loggers", "datasets", "lora"} <= keys
    assert RECIPES[3]["freeze_config"]["rules"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's own rows, with a picture for each, where the reader stands."""
    for name, rows in (("vqa.json", QUESTIONS), ("captions.json", CAPTIONS)):
        (tmp_path / name).write_text(json.dumps(rows))
        for row in rows:
            (tmp_path / row["image_path"]).parent.mkdir(exist_ok=True)
            (tmp_path / row["image_path"]).write_bytes(jpeg())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pages_rows_are_read(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from model_core.cli.data import main as dve_data

    assert [len(VQADataset("vqa.json")[i]) for i in range(2)] == [4, 2]
    question = CaptioningDataset("captions.json")[0][0]
    assert [part.text for part in question.parts if isinstance(part, TextPart)] == ["Describe this image."]
    assert dve_data(["validate", "vqa.json"]) == 0
    assert dve_data(["validate", "captions.json"]) == 0


def test_the_pages_snippets_run(data: Path) -> None:
    names: dict[str, Any] = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "RECIPES.md", "exec"), names)
    for mixed in (names["mixture"], names["same"]):
        assert isinstance(mixed, MultiDataset)
        assert (len(mixed), mixed.weights) == (3, (0.7, 0.3))
    assert isinstance(names["train"], DualVisionDataset)
    asked, answered = names["messages"]
    assert [part.text for part in asked.parts if isinstance(part, TextPart)] == [
        "Is anybody in it? Answer in few words."
    ]
    assert len(asked.parts) == 2 and answered.parts[0].text == "No."
