"""A recipe is the original's JSON, read strictly: what it means, and what it refuses."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from model_core import training
from model_core.cli.configs import SCENARIOS
from model_core.errors import ConfigError
from model_core.training.config import DEFAULT_LEARNING_RATES, FreezeConfig, TrainConfig, load_config, parse_config
from model_core.training.sections import DiversityLoss
from model_core.training.strict import MAX_FILE_BYTES

ORIGINAL = {
    "qwen_model_name": "q",
    "dinov2_model_name": "d",
    "common_dim": 64,
    "dropout": 0.1,
    "use_flash_attention": False,
    "learning_rate": 1e-4,
    "num_epochs": 10,
    "batch_size": 4,
    "diversity_loss_weight": 0.01,
    "train_data_path": "train.json",
    "val_data_path": "val.json",
    "image_root": "images",
    "freeze_config": {"freeze_dinov2": True, "freeze_llm": False},
    "curriculum_training": {
        "enabled": True,
        "stages": [
            {"mode": "fusion_only", "epochs": 3, "description": "First train only fusion layers"},
            {"mode": "full", "epochs": 2, "learning_rate": 1e-5},
        ],
    },
}


IDLE_RATE = {"pattern": "*.bias", "train": False, "learning_rate": 1e-4}


def test_the_originals_keys_mean_what_they_meant() -> None:
    config = parse_config(ORIGINAL)
    first, second = config.stages()
    assert (first.training_mode, first.epochs, first.description) == (
        "fusion_only",
        3,
        "First train only fusion layers",
    )
    assert set(first.learning_rates.values()) == {1e-4}
    assert set(second.learning_rates.values()) == {1e-5}
    assert second.freeze == FreezeConfig(mode="full"), "a stage with a mode of its own leaves the run's flags behind"
    assert config.train_sources()[0].image_root == "images"


def test_a_disabled_curriculum_is_one_stage_of_the_runs_own_settings() -> None:
    (only,) = parse_config(ORIGINAL, ["curriculum_training.enabled=false"]).stages()
    assert (only.epochs, only.training_mode) == (10, None)
    assert only.freeze.flags == {"freeze_dinov2": True, "freeze_llm": False}


@pytest.mark.parametrize(
    ("data", "path", "said"),
    [
        ({"learning_rte": 1}, "learning_rte", "Write 'learning_rate'"),
        ({"freeze_config": {"freeze_lm": True}}, "freeze_config.freeze_lm", "Write 'freeze_llm'"),
        ({"datasets": [{"data_pth": "x"}]}, "datasets.0.data_pth", "Write 'data_path'"),
        ({"lora": {"llm": {"rnk": 2}}}, "lora.llm.rnk", "Write 'rank'"),
        ({"num_epochs": 0}, "num_epochs", "greater than or equal to 1"),
        ({"learning_rate": float("nan")}, "learning_rate", "finite"),
        ({"losses": {"prior": [0.5, 0.6]}}, "losses", "sums to 1"),
        ({"curriculum_training": {"enabled": True}}, "curriculum_training", "at least one stage"),
        ({"model": "m", "qwen_model_name": "q", "dinov2_model_name": "d"}, "model", "Got: m, q, d."),
        ({"qwen_model_name": "q"}, "dinov2_model_name", "Name the other one"),
        ({"train_data_path": "a", "datasets": [{"data_path": "b"}]}, "datasets", "a, and as datasets b"),
        ({"datasets": [{"data_path": "x/a.json"}, {"data_path": "y/a.json"}]}, "datasets", "different names"),
        ({"datasets": [{"data_path": "a.json", "weight": 0}]}, "datasets", "a weight above 0"),
        ({**ORIGINAL, "training_mode": "full"}, "training_mode", "not both"),
        ({"new_model": {"name": "a:b"}, "start_from": "step-3"}, "new_model", "Got: step-3."),
        ({"batch_source": {"name": "a:b"}, "train_data_path": "a.json"}, "batch_source", "Got: a.json."),
        ({"seed": None}, "seed", "Got: None."),
        ({"losses": {"diversity_loss": "load_balance", "prior": [0.5, 0.5]}}, "losses.prior", "draws to no prior"),
        ({"losses": {"diversity_loss": "none", "anneal_ratio": 0.5}}, "losses.anneal_ratio", "none is not annealed"),
        ({"freeze_config": {"rules": [IDLE_RATE]}}, "freeze_config.rules.0", "what is frozen has none"),
        ([], "recipe", "Got: list."),
    ],
)
def test_what_is_wrong_is_told_with_its_path_and_a_way_out(data: Any, path: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    assert_is_whole(caught.value)
    assert caught.value.param == path
    assert said in str(caught.value)


def assert_is_whole(error: ConfigError) -> None:
    """What was seen, what is allowed, what to do, and where."""
    missing = [name for name in ("value", "allowed", "fix", "param") if getattr(error, name) in (None, "")]
    assert not missing, f"{error} has no {', '.join(missing)}"


REFUSALS: dict[str, Callable[[Path], object]] = {
    "no file": lambda folder: load_config(folder / "none.json"),
    "no json": lambda folder: load_config(written(folder, "{")),
    "a key twice": lambda folder: load_config(written(folder, '{"seed": 1, "seed": 2}')),
    "a file that is no recipe": lambda folder: load_config(written(folder, " " * (MAX_FILE_BYTES + 1))),
    "an override without a value": lambda _: parse_config(ORIGINAL, ["seed"]),
    "an override beyond a list": lambda _: parse_config(ORIGINAL, ["curriculum_training.stages.9.epochs=1"]),
    "an override into a number": lambda _: parse_config(ORIGINAL, ["seed.x=1"]),
    "weights of nothing": lambda _: parse_config(ORIGINAL, ['curriculum_training.stages.0.dataset_weights={"x": 1}']),
    "no data": lambda _: parse_config({}).train_sources(),
    "a saved model's fusion": lambda _: parse_config({"model": "folder", "common_dim": 64}).model_source(),
    "a mode beside a curriculum": lambda _: parse_config(ORIGINAL).with_freeze("full", {}),
    "a mode beside rules": lambda _: parse_config({"freeze_config": RULES}).with_freeze("full", {}),
    "evaluations of nothing": lambda _: parse_config({"evaluation": {"num_answers": 4}}).require_no_evaluation(),
    "stopping by nothing": lambda _: parse_config({"early_stopping": {}}).require_no_evaluation(),
    "an unknown setting": lambda _: FreezeConfig().changed({"freeze_lm": True}),
    "a rate of what is frozen": lambda _: FreezeConfig().changed({"rules": [IDLE_RATE]}),
}
RULES = {"rules": [{"pattern": "*.layers.0.*", "train": True}]}


def written(folder: Path, text: str) -> Path:
    (folder / "recipe.json").write_text(text)
    return folder / "recipe.json"


@pytest.mark.parametrize("case", REFUSALS)
def test_every_refusal_says_what_was_seen_what_is_allowed_and_what_to_do(case: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        REFUSALS[case](tmp_path)
    assert_is_whole(caught.value)


def test_no_error_of_training_leaves_a_part_out() -> None:
    """Read from the source: most of them need a model, data or an extra that is missing to be raised."""
    room, lacking = Path(training.__file__).parent, []
    for path in sorted(room.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ConfigError":
                missing = {"value", "allowed", "fix", "param"} - {keyword.arg for keyword in node.keywords}
                lacking += [f"{path.relative_to(room)}:{node.lineno}: {', '.join(sorted(missing))}"] if missing else []
    assert not lacking


def test_the_last_stage_weights_must_name_datasets() -> None:
    stage = {"mode": "full", "epochs": 1, "dataset_weights": {"vqq": 1.0}}
    with pytest.raises(ConfigError, match="vqq"):
        parse_config(
            {
                "datasets": [{"data_path": "vqa.json"}],
                "curriculum_training": {"enabled": True, "stages": [stage]},
            }
        )


def test_overrides_reach_into_sections_and_lists() -> None:
    config = parse_config(
        ORIGINAL, ["curriculum_training.stages.1.epochs=7", "losses.diversity_loss=none", "seed=3", "model=null"]
    )
    assert (config.stages()[1].epochs, config.losses.diversity_loss, config.seed) == (7, "none", 3)
    for wrong in ("seed", "=3", "curriculum_training.stages.9.epochs=1", "seed.x=1", "a..b=1"):
        with pytest.raises(ConfigError):
            parse_config(ORIGINAL, [wrong])


def test_a_mode_on_the_command_line_leaves_none_of_the_files_flags() -> None:
    """The template freezes DINOv2; `--training_mode dinov2_only` must train it all the same."""
    config = parse_config({"freeze_config": {"freeze_dinov2": True}})
    assert config.with_freeze("dinov2_only", {}).freeze == FreezeConfig(mode="dinov2_only")
    assert config.with_freeze(None, {"freeze_llm": True}).freeze.flags == {"freeze_dinov2": True, "freeze_llm": True}
    assert config.with_freeze("full", {"freeze_llm": True}).freeze == FreezeConfig(mode="full", freeze_llm=True)
    assert config.with_freeze(None, {}) is config
    with pytest.raises(ConfigError, match="curriculum"):
        parse_config(ORIGINAL).with_freeze("full", {})


def test_a_mode_on_the_command_line_never_drops_rules_unsaid() -> None:
    config = parse_config({"freeze_config": RULES})
    with pytest.raises(ConfigError, match=r"training_mode=full instead .* freeze_config\.rules=\[\]"):
        config.with_freeze("full", {})
    assert len(config.with_freeze(None, {"freeze_llm": True}).freeze.rules) == 1
    kept = parse_config({"freeze_config": RULES}, ["training_mode=full"]).freeze
    assert (kept.mode, len(kept.rules)) == ("full", 1)
    dropped = parse_config({"freeze_config": RULES}, ["freeze_config.rules=[]"])
    assert dropped.with_freeze("full", {}).freeze == FreezeConfig(mode="full")


def test_without_held_out_data_only_what_was_asked_for_is_refused() -> None:
    parse_config({}).require_no_evaluation()
    parse_config(json.loads(parse_config({}).model_dump_json())).require_no_evaluation()
    with pytest.raises(ConfigError, match="every_steps"):
        parse_config({"evaluation": {"every_steps": 5}}).require_no_evaluation()


def test_rates_from_the_general_to_the_particular() -> None:
    assert dict(TrainConfig().stages()[0].learning_rates) == dict(DEFAULT_LEARNING_RATES)
    (stage,) = parse_config({"learning_rate": 1e-3, "learning_rates": {"gate": 1e-6}}).stages()
    assert stage.learning_rates["gate"] == 1e-6
    assert stage.learning_rates["llm"] == 1e-3


def test_where_the_model_comes_from() -> None:
    pair = parse_config(ORIGINAL).model_source()
    assert pair.pair == ("q", "d")
    assert dict(pair.settings) == {"common_dim": 64, "dropout": 0.1}
    assert parse_config({"model": "folder"}).model_source().model == "folder"
    assert parse_config({}).model_source() == parse_config({"seed": 1}).model_source()
    with pytest.raises(ConfigError, match="its own fusion"):
        parse_config({"model": "folder", "common_dim": 64}).model_source()


def test_encoder_dropout_is_on_where_fusion_alone_learns() -> None:
    assert parse_config({"training_mode": "fusion_only"}).stages()[0].encoder_dropout == 0.2
    assert parse_config({"training_mode": "full"}).stages()[0].encoder_dropout == 0.0
    assert parse_config({"losses": {"encoder_dropout": 0.4}}).stages()[0].encoder_dropout == 0.4


@pytest.mark.parametrize("name", get_args(DiversityLoss))
def test_what_one_loss_alone_looks_at_is_no_fault_of_the_others_defaults(name: str) -> None:
    """A checkpoint's recipe is written out in full, and is read again."""
    for losses in ({"diversity_loss": name}, {"diversity_loss": name, "anneal_ratio": None}):
        config = parse_config({"losses": losses})
        assert parse_config(json.loads(config.model_dump_json())) == config
    for losses in ({"prior": [0.3, 0.7], "anneal_ratio": 0.5}, {"diversity_loss": "marginal_kl", "prior": [0.3, 0.7]}):
        assert parse_config({"losses": losses}).losses.prior == (0.3, 0.7)


def test_a_file_with_a_key_twice_or_no_json_is_refused(tmp_path: Path) -> None:
    for text in ('{"seed": 1, "seed": 2}', "{", "[1]", "NaN" * 3):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ConfigError):
            load_config(tmp_path / "c.json")
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path / "none.json")


def test_a_recipe_survives_json_and_its_fingerprint_tells_what_trains() -> None:
    config = parse_config(ORIGINAL)
    assert parse_config(json.loads(config.model_dump_json())) == config
    assert parse_config(ORIGINAL, ["output_dir=elsewhere"]).fingerprint() == config.fingerprint()
    assert parse_config(ORIGINAL, ["seed=1"]).fingerprint() != config.fingerprint()


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_and_says_what_it_is_for(path: Path) -> None:
    config = load_config(path)
    assert config.note is not None
    assert config.stages()
    assert config.train_sources()


def test_a_recipe_can_be_checked_without_torch() -> None:
    program = "import sys, model_core.training.config, model_core.training.curriculum; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
