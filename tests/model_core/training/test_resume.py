"""What a run's folder may be gone on with, what is refused before anything is written, and what outlives a kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from model_core import DualVisionDataset
from model_core.errors import BadSampleBudgetError, CheckpointIncompleteError, CheckpointMismatchError, ConfigError
from model_core.model import DualVisionModel
from model_core.training.config import TrainConfig
from model_core.training.events import Event
from model_core.training.hooks import RunHooks
from model_core.training.runs import RunFolder, find_resume_point
from model_core.training.trainer import DualVisionTrainer
from tests.model_core import tiny
from tests.model_core.training.data.corpus import write_corpus
from tests.model_core.training.test_run_ends import KilledError, killed_after
from tests.model_core.training.test_trainer import same, told, trainer, weights
from tests.model_core.training.toy import recipe

Listeners = tuple[Callable[[Event], None], ...]


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def dies_at(kind: str, step: int) -> Listeners:
    def listen(event: Event) -> None:
        if (event.kind, event.global_step) == (kind, step):
            raise KilledError

    return (listen,)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, each saved, that died as it told of the second."""
    folder = tmp_path_factory.mktemp("resume") / "begun"
    killed_after(saving_each(folder), "checkpoint", 2)
    return folder


def saving_each(folder: Path, **settings: Any) -> TrainConfig:
    return recipe(output_dir=str(folder), checkpoints={"every_steps": 1}, **settings)


# A resume that is refused


OTHERS: dict[str, tuple[dict[str, Any], Callable[[], DualVisionModel], int, str]] = {
    "recipe": ({"learning_rate": 2e-3}, tiny.dual_model, 8, "learning_rate=0.002, was 0.001"),
    "data": ({}, tiny.dual_model, 10, "data is not what"),
    "shapes": ({}, lambda: tiny.dual_model(common_dim=96), 8, r"does not fit this model.*\(64, .*, not \(96, "),
    "architecture": ({}, lambda: tiny.dual_model("token_gated"), 8, "Got: fusion gated.*Allowed: fusion token_gated"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_refused_resume_leaves_nothing_behind(begun: Path, tmp_path: Path, other: str) -> None:
    """Neither where it would have gone on nor where it would have begun: the corrected command finds room."""
    settings, model_of, num_samples, says = OTHERS[other]
    new, before = tmp_path / "new", names_in(begun)
    for folder in (new, begun):
        run = trainer(saving_each(folder, **settings), model_of(), num_samples=num_samples)
        with pytest.raises(CheckpointMismatchError, match=says) as caught:
            run.resume(begun)
        assert caught.value.fix
    assert not new.exists() and names_in(begun) == before
    right = trainer(saving_each(new))
    right.resume(begun)
    assert right.train().reason == "done" and names_in(begun) == before


def test_a_resume_into_a_third_runs_folder_is_refused_before_weights_are_read(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after(saving_each(tmp_path, seed=9), "checkpoint", 1)
    monkeypatch.setattr("model_core.training.trainer.load_step", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="holds another run than the one to go on with") as caught:
        trainer(saving_each(tmp_path)).resume(begun)
    assert f"Give --set output_dir={begun} to go on where that lies" in str(caught.value)
    assert f"--resume {tmp_path}" not in str(caught.value), "that is the other run"


# Steps that are not whole


def copy_of(begun: Path, folder: Path) -> Path:
    return Path(shutil.copytree(begun, folder, symlinks=True))


def test_a_step_without_its_manifest_is_no_complete_step(begun: Path, tmp_path: Path) -> None:
    run = copy_of(begun, tmp_path / "run")
    (run / "step-2" / "manifest.json").unlink()
    with pytest.raises(CheckpointIncompleteError, match=r"manifest\.json is missing") as caught:
        find_resume_point(run / "step-2")
    assert caught.value.value and caught.value.allowed and caught.value.fix
    found = find_resume_point(run)
    assert found.path.name == "step-1" and "step-2: manifest.json is missing" in found.torn


def test_the_newest_steps_link_means_its_run(begun: Path, tmp_path: Path) -> None:
    """Where it is torn, the one before it is taken, with a word; so it is where the link leads nowhere."""
    run = copy_of(begun, tmp_path / "run")
    link = run / "checkpoint_latest"
    assert link.is_symlink() and find_resume_point(link).path == run / "step-2"
    data = bytearray((run / "step-2" / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "step-2" / "optimizer.safetensors").write_bytes(data)
    seen: list[Event] = []
    resumed = trainer(saving_each(run), hooks=RunHooks(listeners=(seen.append,)))
    resumed.resume(link)
    assert resumed.position.global_step == 1 and link.resolve().name == "step-1"
    assert seen[0].kind == "warning:torn_checkpoint" and "step-2" in seen[0].message
    link.unlink()
    link.symlink_to("step-7")
    assert find_resume_point(link).path.name == "step-1"
    link.unlink()
    assert find_resume_point(link).path.name == "step-1"
    with pytest.raises(CheckpointIncompleteError, match="other content"):
        find_resume_point(run / "step-2")


# A run that died before its first step


def test_a_run_that_died_before_its_first_step_is_begun_anew_in_its_folder(tmp_path: Path) -> None:
    """As the error of a resume says; another recipe's folder is left alone, and its error says what helps."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trainer(recipe(output_dir=str(whole)), evaluates=True).train()
    killed_after(recipe(output_dir=str(killed)), "step", 2, evaluates=True)
    left = names_in(killed)
    assert left == ["events.jsonl", "recipe.json"]
    with pytest.raises(CheckpointIncompleteError, match="Start the run anew without --resume"):
        trainer(recipe(output_dir=str(killed)), evaluates=True).resume(killed)
    with pytest.raises(ConfigError, match=r"holds another run.*no step to go on from: move the folder away"):
        trainer(recipe(output_dir=str(killed), seed=9), evaluates=True).train()
    assert names_in(killed) == left
    assert trainer(recipe(output_dir=str(killed)), evaluates=True).train().reason == "done"
    assert told(killed) == told(whole) and same(weights(killed / "final"), weights(whole / "final"))
    with pytest.raises(ConfigError, match="Go on with it by --resume"):
        trainer(recipe(output_dir=str(killed)), evaluates=True).train()


def test_a_folder_whose_steps_are_all_torn_is_not_begun_anew(tmp_path: Path, begun: Path) -> None:
    run = copy_of(begun, tmp_path / "run")
    for step in ("step-1", "step-2"):
        (run / step / "manifest.json").unlink()
    with pytest.raises(CheckpointIncompleteError, match=r"step-2: .*moved away or another --set output_dir"):
        find_resume_point(run)
    with pytest.raises(ConfigError, match="move the folder away"):
        trainer(saving_each(run)).train()


def test_a_run_that_is_alive_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    config, (read, write) = recipe(output_dir=str(tmp_path / "run")), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            alive = RunFolder(config.output_dir)
            alive.begin(config)
            os.write(write, b".")
            signal.pause()
        finally:
            os._exit(3)  # never back into pytest
    try:
        os.read(read, 1)
        with pytest.raises(ConfigError, match="a run that a process is working at") as caught:
            RunFolder(config.output_dir).begin(config)
        assert caught.value.fix
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
    RunFolder(config.output_dir).begin(config)


def test_a_run_that_died_right_after_it_went_on_elsewhere_goes_on_again(begun: Path, tmp_path: Path) -> None:
    """It has saved no step of its own: its link tells where it came from, and its folder is no obstacle."""
    new = tmp_path / "new"
    run = trainer(saving_each(new), hooks=RunHooks(listeners=dies_at("resumed", 2)))
    with pytest.raises(KilledError):
        run.resume(begun)
    assert not RunFolder(new).steps() and (new / "checkpoint_latest").resolve() == begun / "step-2"
    for named in (begun, new, new / "checkpoint_latest"):
        again = trainer(saving_each(new))
        again.resume(named)
        assert again.position.global_step == 2
    assert again.train().reason == "done"
    whole = tmp_path / "whole"
    trainer(saving_each(whole)).train()
    assert same(weights(new / "final"), weights(whole / "final")) and told(new) == told(whole)


# What a stage forgets


def test_a_stage_that_resets_the_optimizer_begins_fresh_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """Moments of what it trains on and of what is frozen by now are gone, and a resume does not lose them once more."""
    models, optimizers = {}, {}
    for name, stop_after, resets in (("whole", None, True), ("stopped", 6, True), ("kept", None, False)):
        second = {"mode": "llm_only", "freeze_config": {"freeze_fusion_layers": False}, "reset_optimizer": resets}
        stages = [{"mode": "fusion_only", "epochs": 1}, {"epochs": 1} | second]
        config = recipe(output_dir=str(tmp_path / name), curriculum_training={"enabled": True, "stages": stages})
        runs: list[DualVisionTrainer] = []
        moments: list[int] = []

        def listen(
            event: Event, runs: list[Any] = runs, moments: list[int] = moments, stop_after: int | None = stop_after
        ) -> None:
            if event.kind == "stage":
                moments.append(len(runs[0].optimizer.state_tensors()))
            if event.kind == "step" and event.global_step == stop_after:
                runs[0].request_stop()

        runs.append(trainer(config, hooks=RunHooks(listeners=(listen,))))
        if runs[0].train().reason == "requested":
            again = trainer(config, tiny.dual_model(seed=5))
            again.resume(tmp_path / name)
            assert again.position.global_step == 6 and again.train().reason == "done"
        assert moments[0] == 0 and (moments[1] == 0) == resets
        models[name] = weights(tmp_path / name / "final")
        optimizers[name] = load_file(tmp_path / name / "step-8" / "optimizer.safetensors")
    gate, projector = "model.fusion.gate.0.weight/step", "model.fusion.projectors.qwen.weight/step"
    assert [float(optimizers[name][gate]) for name in ("whole", "stopped", "kept")] == [4, 4, 8]
    assert projector in optimizers["kept"] and projector not in optimizers["whole"]
    assert same(models["whole"], models["stopped"]) and same(optimizers["whole"], optimizers["stopped"])
    assert not same(models["whole"], models["kept"])


# Samples that were set aside


def on_pictures(folder: Path, data: Path, held: Path | None, listeners: Listeners = (), seed: int = 0) -> Any:
    """Steps of four rows, each step saved. Of 8 rows or 6 one may be bad."""
    bad = {"policy": "quarantine", "max_ratio": 0.2}
    config = saving_each(folder, batch_size=4, num_epochs=3, bad_samples=bad)
    val = None if held is None else DualVisionDataset(held)
    return DualVisionTrainer(
        tiny.dual_model(seed=seed), DualVisionDataset(data), val, config, processor=tiny.processor(),
        hooks=RunHooks(listeners=listeners),
    )  # fmt: skip


def test_samples_set_aside_in_a_run_outlive_a_kill(tmp_path: Path) -> None:
    """Pictures vanish after the scan. The run that was killed and found them gone is the one that never stopped: its
    packs, its words, its summary, of the held-out data too."""
    for name in ("whole", "killed"):
        data, held = write_corpus(tmp_path / "data", 8), write_corpus(tmp_path / "held", 6)
        out = tmp_path / name
        run = on_pictures(out, data, held, dies_at("checkpoint", 3) if name == "killed" else ())
        (data.parent / "4.jpg").unlink()
        (held.parent / "1.jpg").unlink()
        if name == "killed":
            with pytest.raises(KilledError):
                run.train()
            run = on_pictures(out, data, held, seed=5)
            run.resume(out)
            assert run.position.global_step == 3
        assert run.train().reason == "done"
        summary = json.loads((out / "summary.json").read_text())
        assert [(one["split"], one["row"]) for one in summary["quarantined"]] == [("train", 5), ("val", 2)]
    assert told(tmp_path / "killed") == told(tmp_path / "whole")
    assert same(weights(tmp_path / "killed" / "final"), weights(tmp_path / "whole" / "final"))


def test_what_was_set_aside_before_a_kill_counts_after_it(tmp_path: Path) -> None:
    """One of eight may be bad: one was, its picture is back, and now another one goes."""
    data, out = write_corpus(tmp_path / "data", 8), tmp_path / "run"
    run = on_pictures(out, data, None, dies_at("checkpoint", 3))
    (data.parent / "4.jpg").unlink()
    with pytest.raises(KilledError):
        run.train()
    write_corpus(tmp_path / "data", 8)
    again = on_pictures(out, data, None)
    again.resume(out)
    (data.parent / "6.jpg").unlink()
    with pytest.raises(BadSampleBudgetError, match="2 of 8"):
        again.train()


def test_a_step_from_before_the_count_was_kept_can_be_gone_on_with(begun: Path, tmp_path: Path) -> None:
    step = copy_of(begun, tmp_path / "run") / "step-2"
    content = json.loads((step / "trainer.json").read_text())
    assert content.pop("set_aside") == [[], []]
    (step / "trainer.json").write_text(json.dumps(content))
    manifest, raw = json.loads((step / "manifest.json").read_text()), (step / "trainer.json").read_bytes()
    manifest["files"]["trainer.json"] = {"sha256": hashlib.sha256(raw).hexdigest(), "size_bytes": len(raw)}
    (step / "manifest.json").write_text(json.dumps(manifest))
    run = trainer(saving_each(tmp_path / "run"))
    run.resume(tmp_path / "run")
    assert run.position.global_step == 2 and run.train().reason == "done"
