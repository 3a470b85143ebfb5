"""`dve train` as its users run it: a recipe's file, flags, a resume, a supervisor's two open files."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from model_core.checkpoint import load_checkpoint, save_checkpoint
from model_core.cli import checkpoints, train
from model_core.manifest import recover
from model_core.training import curves
from model_core.training.config import TrainConfig, parse_config
from model_core.training.data.prefetch import worker_ended
from model_core.training.events import read_events
from model_core.training.saving import whole_model
from model_core.variant import publish_variant
from tests.model_core import tiny, variants

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, eight coloured pictures with questions, and a recipe in the original's words."""
    folder = tmp_path_factory.mktemp("corpus")
    model = tiny.dual_model()
    model.generation_config.eos_token_id = tiny.token_id("<|im_end|>")
    save_checkpoint(model, tiny.processor(), folder / "model")
    (folder / "images").mkdir()
    rows = []
    for number in range(8):
        name, colour = list(COLOURS.items())[number % 4]
        Image.new("RGB", (64, 64 + 28 * (number % 2)), colour).save(folder / "images" / f"{number}.png")
        turns = [{"role": "user", "content": "colour?"}, {"role": "assistant", "content": name}]
        rows.append({"image_path": f"images/{number}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "val.json").write_text(json.dumps(rows[:4]))
    recipe = {
        "model": str(folder / "model"), "learning_rate": 1e-3, "num_epochs": 2, "batch_size": 4,
        "diversity_loss_weight": 0.5, "train_data_path": str(folder / "train.json"),
        "val_data_path": str(folder / "val.json"), "image_root": str(folder), "seed": 1,
        "evaluation": {"num_answers": 2, "max_tokens": 3}, "loggers": ["jsonl", "tensorboard", "curves"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(recipe))
    return folder


def run(corpus: Path, out: Path, *flags: str) -> int:
    return train.main(["--config", str(corpus / "config.json"), "--set", f"output_dir={out}", *flags])


def test_a_recipe_becomes_a_model(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(corpus, out, "--training-mode", "fusion_only", "--verdict") == 0
    said = capsys.readouterr().out
    for text in (
        "PARAMETER FREEZE STATUS",
        "Gating Network",
        "step 4/4: loss",
        "val_accuracy",
        "verdict: ",
        "an answer",
    ):
        assert text in said
    assert said.count("PARAMETER FREEZE STATUS") == said.count("step 4/4: loss") == 1, "shown once"
    scores = json.loads((out / "summary.json").read_text())["scores"]
    assert f"val_loss: {scores['latest']['val_loss']:.4f} (start {scores['start']['val_loss']:.4f})\n" in said
    assert f"trained: fusion_only, 4 steps\nval_loss: {scores['latest']['val_loss']:.4f}" in said
    assert f"best checkpoint: step-{scores['best_step']}, {scores['best_value']:.4f}\nmodel: {out / 'final'}\n" in said
    assert said.index("verdict: ") < said.index("curves: ")
    assert load_checkpoint(out / "final").model.fusion.is_trained
    with Image.open(out / "curves.png") as drawn:
        assert drawn.size[0] > 400
    assert list((out / "tensorboard").glob("events.out*"))
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["num_samples"] == 4 and verdict["num_answers"] == 2
    assert verdict["seconds_per_answer"] > 0 and verdict["unfused_seconds_per_answer"] > 0
    assert verdict["loss"]["low"] <= verdict["loss"]["value"] <= verdict["loss"]["high"]
    start = next(e for e in read_events(out) if e.kind == "evaluation")
    assert start.global_step == 0 and start.data["val_loss"] == pytest.approx(start.data["unfused_loss"], rel=1e-6)
    checkpoints.main(["list", str(out)])
    assert "step-4" in capsys.readouterr().out
    assert checkpoints.main(["inspect", str(out)]) == 0 and "FROZEN" in capsys.readouterr().out
    assert checkpoints.main(["prune", str(out), "--keep-last", "1", "--drop-best", "--dry-run"]) == 0
    assert (out / "step-2").is_dir() and "would remove" in capsys.readouterr().out


def test_flags_go_over_the_recipe(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(corpus, tmp_path / "run", "--freeze_llm", "--freeze-fusion", "--dry-run") == 0
    rows = {line.split(" :")[0].strip(): line for line in capsys.readouterr().out.splitlines() if " total, " in line}
    assert "FROZEN" in rows["Language Model"] and "FROZEN" in rows["Gating Network"] and "FROZEN" in rows["DINOv2"]
    assert "TRAINABLE" in rows["Projections"] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--set", "learning_rat=1"], "learning_rate"),
        (["--set", "train_data_path=nowhere.json"], "nowhere.json"),
        (["--set", "model=./nowhere"], "nowhere"),
        (["--resume", "outputs/checkpoint_latest.pth"], "pickle"),
        (["--training-mode", "llm_only", "--freeze-llm"], "nothing is left to train"),
        (["--verdict", "--set", "val_data_path=null"], "a verdict compares"),
        (["--set", "batch_size=9"], "a batch is larger than the data"),
        (["--set", "early_stopping.metric=val_accuracy", "--set", "evaluation.num_answers=0"], "num_answers"),
        (["--set", 'loggers=["curves"]'], "'jsonl' beside 'curves'"),
        (["--set", "val_data_path=null"], "evaluations need held-out data"),
        (["--dry_run", "--resume", "nowhere"], "no complete checkpoint"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line_and_78(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    assert run(corpus, tmp_path / "run", *flags) == train.REFUSED
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_a_folder_of_another_run_is_left_alone(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(corpus, tmp_path / "run", "--set", "max_steps=1") == 0
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    for flags in ([], ["--dry_run"]):
        assert run(corpus, tmp_path / "run", *flags) == train.REFUSED
        assert "holds another run" in capsys.readouterr().err
    again = ("--set", "max_steps=1", "--dry_run", "--resume", str(tmp_path / "run"))
    assert run(corpus, tmp_path / "run", *again) == 0
    assert run(corpus, tmp_path / "run", *again[2:]) == train.REFUSED, "another recipe"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_missing_matplotlib_is_told_before_the_run(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(corpus, tmp_path / "run") == train.REFUSED
    assert "curves need matplotlib" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_verdict_has_answers_of_its_own_and_no_picture_undoes_a_run(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original's recipes know no `evaluation`."""
    monkeypatch.setattr(curves, "read_events", lambda _folder: [])
    out = tmp_path / "run"
    assert run(corpus, out, "--verdict", "--set", "evaluation={}", "--set", "max_steps=1") == 0
    said = capsys.readouterr()
    assert "verdict: " in said.out and "step 1: warning: no curves: there are no steps to draw" in said.out
    found = json.loads((out / "verdict.json").read_text())
    assert found["num_answers"] == 4 and found["accuracy"] is not None and found["seconds_per_answer"] > 0
    assert all(e.data["num_answers"] == 0 for e in read_events(out) if e.kind == "evaluation")


def test_after_early_stopping_the_scores_are_those_of_the_result(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate that destroys: what is handed over is the best step, and its scores with it."""
    settings = ("early_stopping.patience=1", "num_epochs=9", "learning_rate=0.5", 'loggers=["jsonl"]', "evaluation={}")
    assert run(corpus, tmp_path / "run", *(word for one in settings for word in ("--set", one))) == 0
    said = capsys.readouterr().out
    scores = json.loads((tmp_path / "run" / "summary.json").read_text())["scores"]
    assert scores["best"]["val_loss"] == scores["best_value"] < scores["latest"]["val_loss"]
    assert f"\nval_loss: {scores['best_value']:.4f} (start " in said


def test_rows_of_both_files_are_named_before_anything_trains(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 9, 9)).save(tmp_path / f"{number}.png")
    turns = [{"role": "user", "content": "colour?"}, {"role": "assistant", "content": "red"}]
    rows = [{"image_path": f"{one}.png", "conversations": turns} for one in (0, 1, 0, "gone", 2, 3)]
    (tmp_path / "some.json").write_text(json.dumps(rows))
    (tmp_path / "held.json").write_text(json.dumps(rows[3:]))
    settings = (
        f"train_data_path={tmp_path / 'some.json'}", f"val_data_path={tmp_path / 'held.json'}",
        "bad_samples.policy=quarantine", "bad_samples.max_ratio=0.7", 'loggers=["jsonl"]', "evaluation={}",
        "batch_size=2", f"image_root={tmp_path}",
    )  # fmt: skip
    flags = [word for one in settings for word in ("--set", one)]
    lines = [
        "set aside: some.json row 4: image_not_found: ",
        "set aside: validation data, held.json row 1: image_not_found: ",
        "warning: some.json row 3: duplicate: ",
    ]
    assert run(corpus, tmp_path / "run", *flags, "--dry_run") == 0
    said = capsys.readouterr().out
    assert all(f"\n{line}" in f"\n{said}" for line in lines)
    assert run(corpus, tmp_path / "run", *flags, "--set", "max_steps=1") == 0
    said = capsys.readouterr().out
    assert all(said.index(line) < said.index("step 1/1") for line in lines)
    assert "samples set aside: 2\n" in said
    told = next(e.data for e in read_events(tmp_path / "run") if e.kind == "validated")
    assert told["num_problems"] == 3
    assert [(one["split"], one["row"], one["severity"]) for one in told["problems"]] == [
        ("train", 4, "error"), ("val", 1, "error"), ("train", 3, "warning")
    ]  # fmt: skip
    (tmp_path / "2.png").unlink()
    resumed = ("--set", "max_steps=1", "--resume", str(tmp_path / "run"))
    assert run(corpus, tmp_path / "run", *flags, *resumed) == train.REFUSED
    said = capsys.readouterr()
    assert "set aside: some.json row 5: image_not_found" in said.out and "data is not what" in said.err


SUPERVISED = ("--set", "evaluation.num_answers=0", "--set", 'loggers=["jsonl"]', "--set", "num_epochs=500")


def start(corpus: Path, out: Path, *flags: str) -> tuple[subprocess.Popen[bytes], int, int]:
    """A trainer in a process of its own; the events' reading end and the commands' writing end."""
    events_read, events_write = os.pipe()
    control_read, control_write = os.pipe()
    command = [
        sys.executable, "-m", "model_core.cli.train", "--config", str(corpus / "config.json"),
        "--set", f"output_dir={out}", "--events-fd", str(events_write), "--control-fd", str(control_read),
        *SUPERVISED, *flags,
    ]  # fmt: skip
    child = subprocess.Popen(command, pass_fds=(events_write, control_read), stdout=subprocess.DEVNULL)
    os.close(events_write)
    os.close(control_read)
    return child, events_read, control_write


def fork(corpus: Path, out: Path, *flags: str) -> tuple[int, int, int]:
    """As `start`, without seconds of imports: a fork of this process. Its number instead of a handle."""
    events_read, events_write = os.pipe()
    control_read, control_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(control_write)  # or the child would hold its own supervisor alive
            os.close(events_read)
            torch.set_num_threads(1)  # a pool of more does not survive a fork
            ends = ("--events-fd", str(events_write), "--control-fd", str(control_read))
            os._exit(run(corpus, out, *ends, *SUPERVISED, *flags))
        finally:
            os._exit(3)  # never back into pytest
    os.close(events_write)
    os.close(control_read)
    return child, events_read, control_write


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_until(descriptor: int, kind: str) -> list[dict[str, Any]]:
    found = []
    with os.fdopen(os.dup(descriptor), "rb", buffering=0) as file:
        for line in iter(file.readline, b""):
            found.append(json.loads(line))
            if found[-1]["kind"] == kind:
                break
    return found


def test_a_supervisor_stops_resumes_and_hears_every_event(corpus: Path, tmp_path: Path) -> None:
    """SIGTERM saves and ends with 75; the next attempt writes to its own folder and goes on."""
    child, events, control = start(corpus, tmp_path / "attempt-1")
    for order in ({"command": "deadline", "seconds": 1000}, {"command": "freeze", "freeze": {"freeze_llm": True}}):
        os.write(control, json.dumps(order).encode() + b"\n")
    first = read_until(events, "switched")
    assert {"validated", "freeze", "stage", "switched"} <= {event["kind"] for event in first}
    child.send_signal(signal.SIGTERM)
    rest = read_until(events, "never")
    assert child.wait(110) == train.CHECKPOINTED
    saved = rest[-1]
    assert saved["kind"] == "checkpoint" and saved["data"]["reason"] == "requested"
    os.close(control)
    os.close(events)
    number, events, control = fork(corpus, tmp_path / "attempt-2", "--resume", str(tmp_path / "attempt-1"))
    second = read_until(events, "step")
    assert "resumed" in {event["kind"] for event in second}
    assert second[-1]["global_step"] == saved["global_step"] + 1
    os.write(control, b'{"command": "deadline", "seconds": 0.05}\n')
    late = read_until(events, "never")
    assert exit_code(number) == 79
    reasons = {event["data"]["reason"] for event in late if event["kind"] == "checkpoint"}
    assert reasons <= {"epoch", "stage"}, "an end that came before the deadline is saved; the deadline saves nothing"
    assert not (tmp_path / "attempt-2" / "final").exists()
    os.close(control)
    os.close(events)


def test_a_supervisor_that_dies_takes_its_trainer_along(corpus: Path, tmp_path: Path) -> None:
    number, events, control = fork(corpus, tmp_path / "run")
    read_until(events, "step")
    os.close(control)
    assert exit_code(number) == 79
    os.close(events)


def test_an_error_is_the_last_event(corpus: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    flags = ("--set", "train_data_path=nowhere.json", "--events-fd", str(write))
    assert run(corpus, tmp_path / "run", *flags) == train.REFUSED
    os.close(write)
    told = read_until(read, "never")
    os.close(read)
    assert told[-1]["kind"] == "error" and told[-1]["data"]["retry"] is False


def test_after_a_killed_data_process_a_supervisor_may_try_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: Any, **__: Any) -> int:
        raise worker_ended("process 7 with exit code -9")

    monkeypatch.setattr(train, "train_recipe", ended)
    read, write = os.pipe()
    assert run(corpus, tmp_path / "run", "--events-fd", str(write)) == train.FAILED
    os.close(write)
    told = read_until(read, "never")
    os.close(read)
    assert told[-1]["data"] == {"code": "training_failed", "retry": True} and "num_workers" in told[-1]["message"]


def test_a_run_begins_from_another_ones_step_with_its_adapters_folded_in(corpus: Path, tmp_path: Path) -> None:
    """A step's folder holds the model without its adapters, which lie beside it: as a model it had learnt nothing."""
    out = tmp_path / "run"
    assert run(corpus, out, "--set", 'lora={"llm": {"rank": 2}}', "--set", "training_mode=llm_only") == 0
    last = load_checkpoint(out / "final").model.state_dict()
    settings = {"model": str(corpus / "model"), "start_from": str(out / "step-4"), "device": "cpu"}
    recipe = parse_config(settings | {"output_dir": str(tmp_path / "next")})
    begun = train.load_for_training(recipe).model.state_dict()
    fresh = load_checkpoint(corpus / "model").model.state_dict()
    assert all(torch.equal(begun[name], last[name]) for name in last)
    assert not all(torch.equal(begun[name], fresh[name]) for name in fresh)


def test_a_run_begins_from_a_published_version(corpus: Path, tmp_path: Path) -> None:
    """What is published is what differs from its base; a key that nobody gave leaves older runs' fingerprints alone."""
    base = load_checkpoint(corpus / "model")
    trained = variants.train(base, tmp_path / "trained")
    record, version = publish_variant(base, trained, tmp_path / "out", base_name="tiny", created_unix=0)
    assert record.components == ("fusion",)
    recipe = parse_config({"model": str(corpus / "model"), "start_from": str(version), "device": "cpu"})
    begun, wanted = train.load_for_training(recipe).model.state_dict(), load_checkpoint(trained).model.state_dict()
    assert all(torch.equal(begun[name], wanted[name]) for name in wanted)
    without = TrainConfig(model="m")
    assert without.fingerprint() != without.model_copy(update={"start_from": "x"}).fingerprint()
    older = without.model_dump_json(exclude={*TrainConfig.HARMLESS, "start_from"})
    assert without.fingerprint() == hashlib.sha256(older.encode()).hexdigest()[:16]


def test_a_step_is_folded_beside_its_result_and_not_in_the_systems_own_folder(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container /tmp is memory, and a whole model has no room there. What a killed process left is cleared."""
    out, scratch = tmp_path / "lora", tmp_path / "models"
    assert run(corpus, out, "--set", 'lora={"llm": {"rank": 2}}', "--set", "training_mode=llm_only") == 0
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/nowhere")
    left, busy = scratch / ".folded.00000000.tmp", scratch / ".folded.11111111.tmp"
    for one in (left, busy):
        one.mkdir(parents=True)
    lock = os.open(busy, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with whole_model(out / "step-4", scratch) as whole:
        assert whole.parent.parent == scratch and not left.exists() and busy.is_dir()
        assert load_checkpoint(whole).model.config.model_type
    os.close(lock)
    assert [one.name for one in scratch.iterdir()] == [busy.name]
    recover(scratch)
    assert list(scratch.iterdir()) == [], "by name too, in a run's own folder"
    with whole_model(out / "final", scratch / "unused") as whole:
        assert whole == out / "final" and not (scratch / "unused").exists(), "there is nothing to fold"


def test_a_full_disk_is_an_exit_code_where_not_even_a_word_finds_room(corpus: Path, tmp_path: Path) -> None:
    """Events, messages and errors all go to a disk that is full."""
    with open("/dev/full", "wb", buffering=0) as full:
        command = [sys.executable, "-m", "model_core.cli.train", "--config", str(corpus / "config.json"),
                   "--set", f"output_dir={tmp_path / 'run'}", "--events-fd", str(full.fileno())]  # fmt: skip
        child = subprocess.run(command, stdout=full, stderr=full, pass_fds=[full.fileno()], check=False, timeout=110)
    assert child.returncode == train.STORAGE_FULL
