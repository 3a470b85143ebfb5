"""`dve train --resume` as the README shows it: what the run trained goes on to be trained."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model_core.checkpoint import save_checkpoint
from model_core.cli import train
from model_core.training.events import Event, read_events
from tests.model_core import tiny
from tests.model_core.training.data.corpus import write_corpus

README = (Path(__file__).resolve().parents[3] / "README.md").read_text()
#: The arguments of the README's lines, in their order.
BEGIN, RESUME = (
    shlex.split(line, comments=True)[2:]
    for line in README.splitlines()
    if line.startswith(".venv/bin/dve train --config my_config.json")
)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a reader's own recipe, which says nothing of what trains, and his own data: four steps."""
    save_checkpoint(tiny.dual_model(), tiny.processor(), tmp_path / "model")
    data = str(write_corpus(tmp_path / "data", 8))
    recipe = {
        "model": str(tmp_path / "model"), "learning_rate": 1e-3, "num_epochs": 2, "batch_size": 4, "seed": 1,
        "train_data_path": data, "val_data_path": data,
    }  # fmt: skip
    (tmp_path / "my_config.json").write_text(json.dumps(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_until_sigterm(monkeypatch: pytest.MonkeyPatch, step: int, arguments: list[str]) -> int:
    shown = train.Display.__call__

    def call(self: train.Display, event: Event) -> None:
        shown(self, event)
        if event.kind == "step" and event.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.Display, "__call__", call)
        return train.main(arguments)


def test_the_readmes_lines_work_one_after_the_other(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The freeze configuration is restored from the checkpoint; the run ends as if it had not been stopped."""
    assert "--freeze_llm" in BEGIN and "--training_mode" in BEGIN and RESUME[-2:] == ["--resume", "outputs"]
    flags = [word for word in BEGIN if word != "--verdict"]
    assert train.main([*flags, "--set", "output_dir=whole"]) == train.DONE
    assert run_until_sigterm(monkeypatch, 3, BEGIN) == train.CHECKPOINTED
    hint = re.search(r"go on with (--resume \S+)", capsys.readouterr().out)
    assert hint is not None and hint[1].split() == RESUME[-2:], "the hint is the README's line"
    assert train.main([*RESUME, "--dry_run"]) == train.DONE
    said = capsys.readouterr().out
    assert said.count("what trains is as the run began") == 1 and '"freeze_llm": true' in said
    assert re.search(r"Language Model *: .* 0 trainable  FROZEN", said)
    assert train.main(RESUME) == train.DONE
    assert capsys.readouterr().out.count("what trains is as the run began") == 1
    ends = [load_file(room / name / "final" / "model.safetensors") for name in ("whole", "outputs")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert [event.global_step for event in read_events(room / "outputs") if event.kind == "step"] == [1, 2, 3, 4]


def test_what_else_is_said_on_the_command_line_is_not_overheard(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other flags than the run's are refused, and so is another recipe: by its name, not by that of the flags."""
    assert run_until_sigterm(monkeypatch, 1, BEGIN) == train.CHECKPOINTED
    for more, says in (
        (["--freeze_dinov2"], "Got: freeze_config.freeze_dinov2=True, was "),
        (["--training_mode", "full"], "freeze_config"),
        (["--set", "training_mode=full"], "freeze_config"),
        (["--set", "freeze_config.freeze_llm=false"], "freeze_config"),
        (["--set", "learning_rate=0.5"], "learning_rate=0.5, was 0.001. Allowed: the same recipe"),
    ):
        capsys.readouterr()
        assert train.main([*RESUME, *more]) == train.REFUSED
        said = capsys.readouterr()
        assert says in said.err and "the recipe is not the one that the run began with" in said.err
        assert "what trains is as the run began" not in said.out
    flags = [word for word in BEGIN if word != "--verdict"]
    assert train.main([*flags, "--resume", "outputs", "--dry_run"]) == train.DONE
    assert "what trains is as the run began" not in capsys.readouterr().out, "the same command says it itself"
