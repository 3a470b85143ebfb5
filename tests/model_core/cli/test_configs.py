"""`dve configs create` and `dve config validate` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_core.cli.configs import BAD_CONFIG, SCENARIOS, main
from service.cli import main as dve

README_NAMES = (
    "config_vision_finetuning.json",
    "config_language_adaptation.json",
    "config_fusion_learning.json",
    "config_progressive_training.json",
    "config.json",
)


def test_create_writes_the_readmes_files_and_each_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "configs"
    assert main(["create", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in SCENARIOS.glob("*.json"))
    for name in README_NAMES:
        assert dve(["config", "validate", str(out / name)]) == 0
    assert "config_fusion_learning.json: valid" in capsys.readouterr().out


def test_an_edited_file_is_not_replaced_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create", "--out", str(tmp_path)]) == 0
    (tmp_path / "config.json").write_text("{}")
    assert main(["create", "--out", str(tmp_path)]) == BAD_CONFIG
    assert "config.json" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "{}"
    assert main(["create", "--out", str(tmp_path), "--force"]) == 0
    assert len((tmp_path / "config.json").read_text()) > 2


def test_validate_tells_stages_overrides_and_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["create", "--out", str(tmp_path)])
    capsys.readouterr()
    file = str(tmp_path / "config_progressive_training.json")
    assert main(["validate", file, "--set", "curriculum_training.stages.1.epochs=9"]) == 0
    shown = capsys.readouterr().out
    assert (
        "stage 1: encoders_only, trains qwen_vision merger dinov2 projections gate output_projector, 9 epochs" in shown
    )
    assert "data/train.json is not here" in shown
    assert main(["validate", file, "--json", "--set", "seed=5"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 5


def test_validate_tells_what_a_stages_flags_leave_to_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the mode that stands behind the flags, of which they may leave nothing."""
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"freeze_config": {"freeze_dinov2": False, "freeze_llm": True}}))
    assert main(["validate", str(file)]) == 0
    shown = capsys.readouterr().out
    trained = "qwen_vision merger dinov2 projections gate output_projector"
    assert f"stage 0: freeze_dinov2=false, freeze_llm=true, trains {trained}, 1 epoch" in shown, shown


def test_a_refused_recipe_is_one_line_and_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"lerning_rate": 1}')
    assert main(["validate", str(file)]) == BAD_CONFIG
    error = capsys.readouterr().err
    assert "Write 'learning_rate'" in error
    assert error.count("\n") == 1


def test_a_recipe_that_freezes_everything_is_refused_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.json"
    frozen = {"training_mode": "llm_only", "freeze_config": {"freeze_llm": True}}
    file.write_text(json.dumps(frozen))
    assert main(["validate", str(file)]) == BAD_CONFIG
    assert "nothing is left to train in stage 0" in capsys.readouterr().err
    frozen["freeze_config"]["rules"] = [{"pattern": "*.layers.0.*", "train": True}]
    file.write_text(json.dumps(frozen))
    assert main(["validate", str(file)]) == 0


def test_evaluations_without_held_out_data_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In Python the data is handed in; `dve train` refuses."""
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"evaluation": {"num_answers": 8}}))
    assert main(["validate", str(file)]) == 0
    assert "warning: evaluations need held-out data. Got: {'num_answers': 8}." in capsys.readouterr().out
    assert main(["validate", str(file), "--set", "val_data_path=val.json"]) == 0
    assert "evaluations need" not in capsys.readouterr().out


def test_list_says_what_each_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in README_NAMES)
    assert shown.count("cost: ") == len(list(SCENARIOS.glob("*.json"))) + 2, "the demo's own beside them"
    assert "config_demo.json" in shown and "config_demo_long.json" in shown
