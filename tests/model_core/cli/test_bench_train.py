"""`dve bench train` on a small real model: what is counted, not how fast it is. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model_core.analysis.peaks import peak_flops_per_second
from model_core.analysis.training_load import TrainingLoad
from model_core.cli.bench_train import main
from model_core.training.freeze import MODES
from tests.model_core import tiny

LOAD = ["--batch-size", "2", "--image-size", "56,84", "--words", "1,12", "--rounds", "1"]
TWO_STEPS, ONE_STEP = ["-n", "4", *LOAD], ["-n", "2", *LOAD]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("model") / "tiny"
    tiny.encoder().save_pretrained(target)
    return str(target)


def test_everybody_trains_the_same_samples(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, *TWO_STEPS, "--modes", "full,fusion_only", "--peak-tflops", "0.1"]
    assert main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    runs: dict[tuple[str, str], Any] = {(run["mode"], run["kind"]): run for run in found["runs"]}
    assert list(runs) == [(m, k) for m in ("full", "fusion_only") for k in ("packed", "unpacked", "Trainer")]
    for name in ("num_samples", "num_tokens", "num_label_tokens"):
        assert len({run["rounds"][0][name] for run in runs.values()}) == 1, name
    assert runs["full", "packed"]["medians"]["padding_ratio"] == 0 < runs["full", "Trainer"]["medians"]["padding_ratio"]
    assert all(0 <= run["medians"]["data_wait_ratio"] < 1 for run in runs.values())
    assert runs["full", "packed"]["over_full"] == 1 and runs["fusion_only", "packed"]["over_trainer"] > 0
    # The same clock, the same peak: what fusion_only owes is less than a full step.
    owed = [runs[mode, "packed"]["rounds"][0]["flops"] for mode in ("full", "fusion_only")]
    assert 0 < owed[1] < owed[0] and runs["full", "packed"]["mfu"] > 0 and runs["full", "Trainer"]["mfu"] is None


def test_what_a_mode_freezes_holds_no_gradient_and_no_state(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On one model that all modes share, one after the other: nothing of an earlier mode is left over."""
    assert main(["--model", folder, *ONE_STEP, "--no-trainer", "--no-unpacked", "--json"]) == 0
    for run in json.loads(capsys.readouterr().out)["runs"]:
        for component, held in run["memory"].items():
            assert held["weights"] > 0
            if component in MODES[run["mode"]]:
                # A component whole: two moments, and a gradient, as large as the weights (a mask token has none).
                assert held["gradients"] >= 0.9 * held["weights"], (run["mode"], component)
                assert held["optimizer"] >= 1.8 * held["weights"], (run["mode"], component)
            else:
                assert held["gradients"] == held["optimizer"] == 0, (run["mode"], component)


def test_the_table(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", folder, *ONE_STEP, "--modes", "fusion_only", "--no-unpacked"]) == 0
    shown = capsys.readouterr().out
    for words in ("fusion_only, packed", "fusion_only, Trainer", "x Trainer", "data wait, %", "output_projector"):
        assert words in shown
    assert "unpacked" not in shown


def test_data_is_a_function_of_its_numbers(tmp_path: Path) -> None:
    a, b = (TrainingLoad(num_samples=3).write(tmp_path / name) for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert [p.read_bytes() for p in sorted((tmp_path / "a" / "images").iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "b" / "images").iterdir())
    ]


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A10G", None),
        ("Some Accelerator 9000", None),
        ("", None),
    ],
)
def test_peaks_by_name_and_none_for_strangers(name: str, tera: float | None) -> None:
    assert peak_flops_per_second(name) == (None if tera is None else tera * 1e12)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["-n", "5", "--batch-size", "2"], "whole steps"),
        (["--peak-tflops", "0"], "above 0"),
        (["--model", "/no/such/folder"], "no such folder"),
        (["--recompute", "gate"], "gradient_checkpointing"),
    ],
)
def test_errors_are_one_line(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and says in captured.err


@pytest.mark.parametrize(
    "flags", [["--modes", "half"], ["--image-size", "224,56"], ["--words", "3"], ["--rounds", "0"]]
)
def test_flags_that_mean_nothing_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == 2
    assert flags[0] in capsys.readouterr().err
