"""The loop: a run that is stopped goes on to the bit; events and checkpoints tell the truth."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model_core.checkpoint import load_checkpoint
from model_core.errors import (
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    ConfigError,
    NonFiniteLossError,
    StorageFullError,
)
from model_core.manifest import verify_folder
from model_core.model import DualVisionModel
from model_core.training import step
from model_core.training.config import TrainConfig
from model_core.training.events import Event, read_events
from model_core.training.forward import PackForward
from model_core.training.hooks import RunHooks
from model_core.training.runs import RunFolder
from model_core.training.trainer import DualVisionTrainer
from tests.model_core import tiny
from tests.model_core.training.toy import ToySource, pack_of, recipe

CURRICULUM = {
    "enabled": True,
    "stages": [
        {"mode": "fusion_only", "epochs": 2, "description": "fusion first"},
        {"mode": "llm_only", "epochs": 1},
        {"mode": "full", "epochs": 1},
    ],
}
TIMING = ("seconds", "data_wait_seconds", "tokens_per_second", "path", "final", "best")


def trainer(config: TrainConfig, model: DualVisionModel | None = None, **kwargs: Any) -> DualVisionTrainer:
    num = kwargs.pop("num_samples", 8)
    val = ToySource(config, 4) if kwargs.pop("evaluates", False) else None
    return DualVisionTrainer(
        model or tiny.dual_model(), ToySource(config, num), val, config, processor=tiny.processor(), **kwargs
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def told(folder: Path) -> list[tuple[Any, ...]]:
    """Every event but `resumed`, without what a clock or a folder's name decides."""
    return [
        (*event.key, json.dumps({k: v for k, v in event.data.items() if k not in TIMING}, sort_keys=True))
        for event in read_events(folder)
        if event.kind != "resumed"
    ]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of three stages."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    config = recipe(curriculum_training=CURRICULUM, output_dir=str(folder), dropout=None)
    outcome = trainer(config, evaluates=True).train()
    assert outcome.reason == "done" and outcome.final == folder / "final"
    return folder


def test_a_run_leaves_a_model_that_loads(whole: Path) -> None:
    loaded = load_checkpoint(whole / "final")
    assert same(dict(loaded.model.state_dict()), dict(load_checkpoint(whole / "checkpoint_latest").model.state_dict()))
    assert loaded.model.fusion.is_trained


@pytest.mark.parametrize("stop_after", [1, 8, 11])
def test_a_stopped_run_goes_on_to_the_bit(whole: Path, tmp_path: Path, stop_after: int) -> None:
    """Stopped in an epoch, at a stage's end, in a later stage: weights, moments and events are the same."""
    config = recipe(curriculum_training=CURRICULUM, output_dir=str(tmp_path / "run"))

    def stop(event: Event) -> None:
        if event.kind == "step" and event.global_step == stop_after:
            first.request_stop()

    first = trainer(config, evaluates=True, hooks=RunHooks(listeners=(stop,)))
    assert first.train().reason == "requested"
    second = trainer(config, tiny.dual_model(seed=5), evaluates=True)
    second.resume(tmp_path / "run")
    assert second.position.global_step == stop_after
    assert second.train().reason == "done"
    assert same(weights(whole / "final"), weights(tmp_path / "run" / "final"))
    last = RunFolder(whole).steps()[0].path
    mine = RunFolder(tmp_path / "run").steps()[0].path
    assert last.name == mine.name
    assert same(load_file(last / "optimizer.safetensors"), load_file(mine / "optimizer.safetensors"))
    requested = [t for t in told(tmp_path / "run") if t[2] == "checkpoint" and '"requested"' in t[3]]
    rest = [t for t in told(tmp_path / "run") if t not in requested]
    assert rest == [t for t in told(whole) if not (requested and t[:3] == requested[0][:3])]


def test_events_are_whole_lines_told_once(whole: Path) -> None:
    events = read_events(whole)
    keys = [event.key for event in events]
    assert len(keys) == len(set(keys))
    assert [e.global_step for e in events if e.kind == "step"] == list(range(1, 17))
    assert [e.message for e in events if e.kind == "stage"] == ["fusion first", "llm_only", "full"]
    assert [e.global_step for e in events if e.kind == "evaluation"] == [0, 4, 8, 12, 16]


def test_the_first_stage_is_applied_too(whole: Path) -> None:
    """An earlier trainer began a curriculum with what the model happened to be, and applied its second stage first."""
    events = read_events(whole)
    modes = [event.data["freeze"]["mode"] for event in events if event.kind == "freeze"]
    assert modes == ["fusion_only", "llm_only", "full"]
    rows = next(event for event in events if event.kind == "verified" and event.global_step == 3).data["rows"]
    changed = {row["component"] for row in rows if row["is_changed"]}
    assert changed and changed <= {"projections", "gate", "output_projector"}


def test_a_torn_checkpoint_falls_back_and_says_so(whole: Path, tmp_path: Path) -> None:
    config = recipe(curriculum_training=CURRICULUM, output_dir=str(tmp_path / "run"))
    seen: list[Event] = []

    def stop(event: Event) -> None:
        if event.kind == "step" and event.global_step == 9:
            first.request_stop()

    first = trainer(config, evaluates=True, hooks=RunHooks(listeners=(stop,)))
    first.train()
    newest = tmp_path / "run" / "step-9" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(bytes(content))
    second = trainer(config, evaluates=True, hooks=RunHooks(listeners=(seen.append,)))
    second.resume(tmp_path / "run")
    assert second.position.global_step == 8
    assert seen[0].kind == "warning:torn_checkpoint" and "step-9" in seen[0].message
    second.train()
    assert same(weights(whole / "final"), weights(tmp_path / "run" / "final"))


def test_a_half_written_event_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(Event(0, 1, "step").to_json() + "\n" + Event(0, 2, "step").to_json()[:20])
    assert [e.global_step for e in read_events(tmp_path, repair=True)] == [1]
    assert (tmp_path / "events.jsonl").read_text().endswith("\n")


def test_accumulation_equals_one_big_batch() -> None:
    """Losses are divided by the labels of the whole step: the samples' lengths differ, and the gradients do not."""
    found = []
    for batch, times in ((4, 1), (1, 4), (2, 2)):
        no_gate = {"diversity_loss": "none"}
        config = recipe(batch_size=batch, gradient_accumulation_steps=times, losses=no_gate, max_grad_norm=None)
        run = trainer(config, tiny.trained_model(), write=False, num_samples=4)
        gradients: dict[str, torch.Tensor] = {}

        def step(run: DualVisionTrainer = run, gradients: dict[str, torch.Tensor] = gradients) -> float:
            gradients |= {name: g.clone() for name, g in run.optimizer.gradients().items()}
            return 0.0

        run.optimizer.step = step  # type: ignore[method-assign]
        run.train()
        found.append(gradients)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_mode_switch_holds_until_the_stage_ends_and_survives_a_stop(tmp_path: Path) -> None:
    runs = []
    for name, stop_after in (("a", None), ("b", 2)):
        config = recipe(output_dir=str(tmp_path / name), num_epochs=2)
        current: list[DualVisionTrainer] = []

        def listen(
            event: Event, current: list[DualVisionTrainer] = current, stop_after: int | None = stop_after
        ) -> None:
            if event.kind == "step" and event.global_step == 1:
                assert "llm" not in current[0].switch_training_mode("encoders_only").trainable_components
            if event.kind == "step" and event.global_step == stop_after:
                current[0].request_stop()

        current.append(trainer(config, hooks=RunHooks(listeners=(listen,)), num_samples=6))
        if current[0].train().reason == "requested":
            second = trainer(config, num_samples=6)
            second.resume(tmp_path / name)
            assert second.table.freeze.mode == "encoders_only"
            second.train()
        runs.append(weights(tmp_path / name / "final"))
    assert same(*runs)
    assert [e.kind for e in read_events(tmp_path / "a") if e.kind == "switched"] == ["switched"]


def test_change_freeze_settings_changes_flags_of_what_trains_now() -> None:
    run = trainer(recipe(), write=False)
    table = run.change_freeze_settings({"freeze_qwen_vision": True, "freeze_llm": True, "freeze_fusion_layers": False})
    assert table.trainable_components == {"dinov2", "projections", "gate", "output_projector"}
    with pytest.raises(ConfigError, match="freeze_qwen_vison"):
        run.change_freeze_settings({"freeze_qwen_vison": True})
    assert run.table is table


def test_nan_ends_the_run_or_is_left_out(tmp_path: Path) -> None:
    def poison(model: DualVisionModel, at: int) -> Any:
        original, calls = model.model.fuse, []

        def fuse(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            calls.append(1)
            return replace(found, tokens=found.tokens * float("nan")) if len(calls) == at else found

        model.model.fuse = fuse

    model = tiny.trained_model()
    poison(model, 2)
    run = trainer(recipe(output_dir=str(tmp_path / "fail")), model)
    with pytest.raises(NonFiniteLossError, match="step 2 is not finite"):
        run.train()
    model = tiny.trained_model()
    poison(model, 2)
    run = trainer(recipe(failures={"nan": "skip"}, output_dir=str(tmp_path / "skip")), model)
    outcome = run.train()
    assert outcome.reason == "done" and run.optimizer.num_steps == 3
    assert [e.global_step for e in read_events(tmp_path / "skip") if e.kind == "warning:skipped_step"] == [2]
    assert all(bool(torch.isfinite(t).all()) for t in weights(tmp_path / "skip" / "final").values())


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    """A rate that destroys: the first evaluation after the start is the best, and what the run leaves is that step."""
    config = recipe(
        learning_rate=0.5, num_epochs=9, early_stopping={"patience": 2}, output_dir=str(tmp_path), schedule_span="run",
        lr_schedule="constant",
    )  # fmt: skip
    outcome = trainer(config, evaluates=True, num_samples=4).train()
    assert outcome.reason == "early_stopping" and outcome.position.epoch < 9
    assert same(weights(tmp_path / "final"), weights(tmp_path / "best"))
    assert outcome.best is not None and outcome.summary["scores"]["best_step"] == int(outcome.best.name[5:])


def test_retention_keeps_the_last_the_best_and_the_ends_of_stages(tmp_path: Path) -> None:
    curriculum = {"enabled": True, "stages": [{"mode": "full", "epochs": 2}, {"mode": "llm_only", "epochs": 2}]}
    config = recipe(curriculum_training=curriculum, output_dir=str(tmp_path), checkpoints={"keep_last": 1})
    trainer(config, num_samples=4).train()
    assert [(one.step, one.reason) for one in RunFolder(tmp_path).steps()] == [(8, "stage"), (4, "stage")]


def test_what_a_resume_refuses(whole: Path, tmp_path: Path) -> None:
    config = recipe(curriculum_training=CURRICULUM, output_dir=str(whole))
    with pytest.raises(CheckpointError, match="pickle"):
        trainer(config).resume("outputs/checkpoint_latest.pth")
    with pytest.raises(CheckpointIncompleteError, match="no complete checkpoint"):
        trainer(config).resume(tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"learning_rate=0\.002, was 0\.001"):
        other = recipe(curriculum_training=CURRICULUM, output_dir=str(whole), learning_rate=2e-3)
        trainer(other).resume(whole)
    with pytest.raises(CheckpointMismatchError, match="data is not what"):
        trainer(config, num_samples=9).resume(whole)
    with pytest.raises(ConfigError, match="holds another run"):
        trainer(config).train()


def test_a_fresh_gated_model_wakes_its_second_encoder(tmp_path: Path) -> None:
    """DINOv2 follows from the second step on: the check looks after the first and the third."""
    config = recipe(output_dir=str(tmp_path), max_steps=4)
    trainer(config).train()
    reports = [e.data for e in read_events(tmp_path) if e.kind == "verified"]
    changed = [{row["component"] for row in report["rows"] if row["is_changed"]} for report in reports]
    assert "dinov2" not in changed[0] and "dinov2" in changed[1] and not reports[1]["unmoved"]


def test_text_alone_trains_and_says_what_stood_still(tmp_path: Path) -> None:
    config = recipe(output_dir=str(tmp_path), max_steps=4)
    source = ToySource(config, 8, with_images=False)
    DualVisionTrainer(tiny.trained_model(), source, None, config, processor=tiny.processor()).train()
    warned = [e.message for e in read_events(tmp_path) if e.kind == "warning:unmoved"]
    assert len(warned) == 1 and "qwen_vision" in warned[0] and "llm" not in warned[0]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """On a real, small file system: the error says so, nothing half-written stays, and the run goes on with room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=True)
    try:
        config = recipe(output_dir=str(disk / "run"), num_epochs=3)
        with pytest.raises(StorageFullError, match="disk is full"):
            trainer(config, num_samples=4).train()
        steps = RunFolder(disk / "run").steps()
        assert steps and all(verify_folder(one.path, deep=True) for one in steps)
        assert not [path for path in (disk / "run").iterdir() if path.name.startswith(".step")]
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        second = trainer(config, num_samples=4)
        second.resume(disk / "run")
        assert second.train().reason == "done"
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.heavy)])
def test_adapters_resume_to_the_bit_and_are_folded_into_the_result(tmp_path: Path, dtype: torch.dtype) -> None:
    """A step's folder loads as the model without adapters; `final` answers as the adapted model does.

    In bfloat16, which processors without units for it take a hundred times longer over, `test_optim.py` has the resume.
    """
    results = []
    for name, stop_after in (("whole", None), ("stopped", 3)):
        config = recipe(output_dir=str(tmp_path / name), num_epochs=2, lora={"llm": {"rank": 4}})
        current: list[DualVisionTrainer] = []

        def stop(event: Event, runs: list[DualVisionTrainer] = current, at: int | None = stop_after) -> None:
            if event.kind == "step" and event.global_step == at:
                runs[0].request_stop()

        current.append(
            trainer(config, tiny.trained_model().to(dtype), hooks=RunHooks(listeners=(stop,)), num_samples=4)
        )
        run = current[0]
        if run.train().reason == "requested":
            run = trainer(config, tiny.trained_model(seed=4).to(dtype), num_samples=4)
            run.resume(tmp_path / name)
            run.train()
        results.append(weights(tmp_path / name / "final"))
    assert same(*results)
    assert not any("lora" in name for name in results[0])
    step = load_checkpoint(tmp_path / "whole" / "step-4").model
    final = load_checkpoint(tmp_path / "whole" / "final").model
    q_proj = "model.language_model.layers.0.self_attn.q_proj.weight"
    start = tiny.trained_model().to(dtype).state_dict()[q_proj]
    assert torch.equal(step.state_dict()[q_proj], start) and not torch.equal(final.state_dict()[q_proj], start)
    expected = run.forward(pack_of([0, 1])).losses.detach()
    run.model.eval()
    merged = PackForward(final, tiny.processor().patch_spec, precision="float32" if dtype == torch.float32 else "auto")
    torch.testing.assert_close(merged(pack_of([0, 1])).losses.detach(), expected, rtol=3e-2, atol=1e-4)


def test_what_never_trained_has_neither_gradient_nor_state(tmp_path: Path) -> None:
    run = trainer(recipe(training_mode="fusion_only", output_dir=str(tmp_path)))
    run.train()
    trained = {key.rpartition("/")[0] for key in run.optimizer.state_tensors()}
    assert trained and all(".fusion." in name for name in trained)
    assert all(p.grad is None for name, p in run.model.named_parameters() if ".fusion." not in name)


def test_freed_memory_goes_back_to_the_system_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(step, "_STEPS_BETWEEN_TRIMS", 2)
    run = trainer(recipe(num_epochs=2, max_steps=5), write=False)
    monkeypatch.setattr(step, "give_back_memory", lambda: given.append(run.position.global_step))
    run.train()
    assert given == [1, 3], "within the second and the fourth step"
