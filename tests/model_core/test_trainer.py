"""DualVisionTrainer as Python has it: what it shows, measures and answers without being handed anything for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

from model_core import DualVisionDataset, DualVisionTrainer
from model_core.cli import configs
from model_core.errors import ConfigError
from model_core.training.config import TrainConfig
from model_core.training.events import Event, read_events
from model_core.training.hooks import RunHooks
from tests.model_core import tiny
from tests.model_core.training.data.corpus import write_corpus
from tests.model_core.training.toy import ToySource, recipe

#: What makes a shipped recipe one of seconds.
SMALL = {"num_epochs": 1, "batch_size": 2, "gradient_accumulation_steps": 2}
SHIPPED = [
    path.name for path in sorted(configs.SCENARIOS.glob("*.json")) if not json.loads(path.read_text()).get("datasets")
]


def trainer(config: TrainConfig, **kwargs: Any) -> DualVisionTrainer:
    source, val = ToySource(config, 4), ToySource(config, 2)
    return DualVisionTrainer(tiny.trained_model(), source, val, config, processor=tiny.processor(), **kwargs)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as after `dve configs create`, with a user's data where the recipes look for it."""
    monkeypatch.chdir(tmp_path)
    assert configs.main(["create", "--out", "configs"]) == 0
    for name in ("train", "val"):
        write_corpus(tmp_path / "data" / name, 4, f"{name}.json")
    return tmp_path


def small(shipped: Path, name: str) -> dict[str, Any]:
    data = json.loads((shipped / "configs" / name).read_text())
    return data | SMALL | {"evaluation": data["evaluation"] | {"num_answers": 2, "max_tokens": 3}}


def loaders(shipped: Path) -> list[DualVisionDataset]:
    return [DualVisionDataset(shipped / "data" / name / f"{name}.json") for name in ("train", "val")]


def test_it_shows_and_measures_like_dve_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(recipe(output_dir=str(tmp_path / "run")))
    run.switch_training_mode("encoders_only")
    outcome = run.train()
    said = capsys.readouterr()
    assert said.out.count("PARAMETER FREEZE STATUS") == 2, "at the switch and at the start"
    for text in ("Gating Network", "step 1/2: loss", " tok/s, data wait ", "step 2/2: loss", "val_loss: ", "(start "):
        assert text in said.out
    assert said.out.endswith(f"model: {outcome.final}\n")
    steps = [event.data for event in read_events(tmp_path / "run") if event.kind == "step"]
    assert len(steps) == 2 and all(one["seconds"] > 0 and one["tokens_per_second"] > 0 for one in steps)


def test_a_switch_before_the_first_step_is_told_as_what_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever reads the run's files later is told no other mode than the one that moved the weights."""
    run = trainer(recipe(training_mode="fusion_only", output_dir=str(tmp_path / "run")))
    run.switch_training_mode("encoders_only")
    summary = run.train().summary
    assert summary["switches"] == [{"stage": 0, "step": 0, "training_mode": "encoders_only"}]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["switches"] == summary["switches"]
    (stage,) = (event for event in read_events(tmp_path / "run") if event.kind == "stage")
    assert (stage.message, stage.data["training_mode"]) == ("encoders_only", "encoders_only")
    said = capsys.readouterr().out
    assert "step 0: stage: encoders_only" in said and "switched: to encoders_only, after 0 steps" in said


def test_a_switch_after_the_end_is_refused_instead_of_training_nothing() -> None:
    run = trainer(recipe(), write=False, verbose=False)
    assert run.train().reason == "done"
    for switch in (lambda: run.switch_training_mode("llm_only"), lambda: run.change_freeze_settings({"mode": "full"})):
        with pytest.raises(ConfigError, match=r"the run is over.*2 steps are done.*Make another trainer") as caught:
            switch()
        assert caught.value.param == "training_mode"
    assert run.train().reason == "done", "as it was"


def test_quiet_is_quiet_on_stderr_too_and_bars_come_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers draws a bar for every shard that it writes."""
    transformers_logging.enable_progress_bar()
    trainer(recipe(output_dir=str(tmp_path / "run")), verbose=False).train()
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled()


def test_it_is_quiet_where_that_is_asked_or_somebody_else_listens(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[Event] = []
    hooks = RunHooks(listeners=(heard.append,))
    trainer(recipe(), write=False, verbose=False).train()
    trainer(recipe(), write=False, hooks=hooks).train()
    assert not capsys.readouterr().out
    assert [event.kind for event in heard].count("step") == 2
    trainer(recipe(), write=False, hooks=hooks, verbose=True).train()
    assert "model: in memory alone" in capsys.readouterr().out
    assert [event.kind for event in heard].count("step") == 4


def test_another_clock_is_asked_instead() -> None:
    heard: list[Event] = []
    trainer(recipe(), write=False, hooks=RunHooks((heard.append,), clock=lambda: 5.0)).train()
    steps = [event.data for event in heard if event.kind == "step"]
    assert [(one["seconds"], one["tokens_per_second"]) for one in steps] == [(0.0, None)] * 2


def test_a_stopped_run_says_how_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(output_dir=str(tmp_path / "run"))
    run = trainer(config)
    run.request_stop()
    assert run.train().reason == "requested"
    assert f"stopped on request after 1 steps, saved in {tmp_path / 'run'}; train() goes on" in capsys.readouterr().out
    assert run.train().reason == "done"
    again = trainer(config)
    again.resume(tmp_path / "run")
    assert "step 2: resumed: from step-2" in capsys.readouterr().out


def test_the_shipped_recipe_for_fusion_trains_and_answers(shipped: Path) -> None:
    train, val = loaders(shipped)
    outcome = DualVisionTrainer(tiny.encoder(), train, val, small(shipped, "config_fusion_learning.json")).train()
    assert outcome.reason == "done" and 0 <= outcome.metrics["val_accuracy"] <= 1
    told = [event.data for event in read_events(shipped / "outputs" / "fusion_learning") if event.kind == "evaluation"]
    assert len(told) == 2 and all(one["num_answers"] == 2 and "unfused_accuracy" in one for one in told)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_taken_with_a_model_and_its_processor(shipped: Path, name: str) -> None:
    train, val = loaders(shipped)
    data = small(shipped, name)
    run = DualVisionTrainer(tiny.trained_model(), train, val, data, processor=tiny.processor(), write=False)
    assert run.evaluator is not None and run.evaluator.can_answer
    with pytest.raises(ConfigError, match=r"needs? held-out data.*give a val_loader"):
        DualVisionTrainer(tiny.trained_model(), train, None, data, processor=tiny.processor(), write=False)


def test_what_a_loader_says_and_nobody_does_is_told(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = (DataLoader(one, batch_size=3, shuffle=True) for one in loaders(shipped))
    settings = {"batch_size": 2, "max_steps": 1, "output_dir": str(shipped / "run")}
    DualVisionTrainer(tiny.encoder(), train, val, settings).train()
    lines = [
        f"{name}: batch_size=3 is not used; the recipe's batch_size is 2" for name in ("train_loader", "val_loader")
    ]
    assert f"step 0: warning: {'; '.join(lines)}\n" in capsys.readouterr().out
    told = [event.data for event in read_events(shipped / "run") if event.kind == "warning:loader"]
    assert told == [{"unused": lines}]
    again = DualVisionTrainer(tiny.encoder(), train, val, settings)
    again.resume(shipped / "run")
    assert f"warning: {lines[0]}\n" in capsys.readouterr().out


def test_a_model_without_its_processor_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs the model's processor"):
        DualVisionTrainer(tiny.trained_model(), None, None, {})
