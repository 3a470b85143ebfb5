"""`dve infer` as a user calls it: an answer with its weights, a comparison, a benchmark, and one-line errors."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from model_core.cli.infer import main
from model_core.types import ARMS
from tests.model_core import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "tiny"
    tiny.encoder().save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "p.png"
    Image.linear_gradient("L").resize((80, 80)).convert("RGB").save(path)
    return path


def test_an_answer_with_its_weights(folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(folder), "--image", str(picture), "--question", "?", "--max_tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert "qwen_weight 0." in shown
    assert "routing weights, not importance" in shown


def test_json_holds_comparison_and_benchmark(folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--compare_encoders", "--benchmark", "--rounds", "1", "--json", "--max-tokens", "3"]
    assert main(["--model", str(folder), "--image", str(picture), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["comparison"]["arms"]) == set(ARMS)
    assert found["answer"] == found["comparison"]["arms"]["fused"]["answer"]
    assert found["question"] == "Describe this image"
    seconds = found["comparison"]["encoder_seconds"]
    assert set(seconds) == {"qwen", "dinov2"}
    assert min(seconds.values()) > 0, "asked before anything else had put the features into the cache"
    assert found["benchmark"]["output_tokens"] == 3


def test_tables_for_people(folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--compare-encoders", "--benchmark", "--rounds", "1", "--max_tokens", "3"]
    assert main(["--model", str(folder), "--image", str(picture), *flags]) == 0
    shown = capsys.readouterr().out
    for word in ("qwen-only", "unfused", "reliance (nats)", "shapley (nats)", "TTFT", "TPOT", "peak memory"):
        assert word in shown


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--image", "/no/such.png"], "/no/such.png"),
        (["--image", "P", "--model", "/no/such/folder"], "no such folder"),
        (["--image", "P", "--device", "tpu"], "auto, cpu, cuda"),
        (["--image", "P", "--dtype", "float8000"], "unknown dtype"),
        (["--image", "P", "--qwen_model_name", "only/one"], "both names"),
        (["--image", "P", "--model", "F", "--qwen-model-name", "a/b"], "exclude each other"),
        (["--image", "P", "--model", "F", "--fusion", "concat"], "--fusion can't change"),
        (["--image", "P", "--model", "F", "--rounds", "3"], "--rounds is of the benchmark alone"),
        (["--image", "P", "--benchmark", "--temperature", "0.7"], "the benchmark is greedy. Got: --temperature 0.7"),
        (["--image", "P", "--benchmark", "--seed", "0"], "Got: --seed 0"),
        (["--image", "P", "--device", "meta"], "there is no such meta device here"),
    ],
)
def test_errors_are_one_line(
    flags: list[str], says: str, folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(picture) if f == "P" else str(folder) if f == "F" else f for f in flags]
    if "--model" not in flags and "--qwen_model_name" not in flags:
        flags += ["--model", str(folder)]
    assert main(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_fusion_is_for_a_pair_of_checkpoints(tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--image", str(picture), "--fusion", "gated"]) == 2, "the demo model's is fixed as well"
    assert "name two checkpoints" in capsys.readouterr().err
    pair = [str(tiny.save_qwen(tmp_path / "q")), str(tiny.save_dinov2(tmp_path / "d"))]
    names = ["--qwen_model_name", pair[0], "--dinov2_model_name", pair[1]]
    assert main([*names, "--fusion", "concat", "--image", str(picture), "--max_tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fusion"]["qwen_weight"] is None, "concat has no gate"


def test_as_a_module(
    folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `python -m` runs it, in this process: an interpreter of its own would import for seconds."""
    flags = ["--model", str(folder), "--image", str(picture), "--max_tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["infer", *flags])
    monkeypatch.delitem(sys.modules, "model_core.cli.infer")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("model_core.cli.infer", run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    assert "qwen_weight" in capsys.readouterr().out
