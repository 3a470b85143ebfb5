"""`dve bench offline` and `dve bench encoders` as a user calls them, on a small real model. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_core.analysis.latency import LATENCIES, STAGES, THROUGHPUTS
from model_core.analysis.throughput import run_closed_loop
from model_core.cli.bench import main
from model_core.cli.table import label_of
from model_core.types import ChatMessage, GenerationRequest, SamplingParams, TextPart
from tests.model_core import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("model") / "tiny"
    tiny.encoder().save_pretrained(target)
    return str(target)


def run_json(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert main([*flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_offline_against_generate(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "-c", "1,3", "-n", "4", "--tokens", "5", "--rounds", "2", "--size", "56", "--seed", "9"]
    found = run_json(capsys, "offline", *flags, "--generate")
    assert [level["concurrency"] for level in found["levels"]] == [1, 3]
    for level in found["levels"]:
        for rounds in level["rounds"].values():
            assert [(one["num_ok"], one["num_errors"], one["num_short"]) for one in rounds] == [(4, 0, 0)] * 2
        engine, generate = level["medians"]["engine"], level["medians"]["generate"]
        assert {*THROUGHPUTS, *LATENCIES} <= engine.keys()
        assert engine["prompt_tokens"] == generate["prompt_tokens"], "the same conversation on both sides"
        assert "ttft_ms_p50" not in generate, "a batch comes whole"
        assert engine["qwen_cache_hit_ratio"] == engine["dinov2_cache_hit_ratio"] == 0, "no picture comes twice"
        assert sum(engine[f"{stage}_time_share"] for stage in STAGES) == pytest.approx(1)
        assert {"output_tokens_per_second", "e2e_ms_p50"} <= level["ratios"].keys()
    assert found["machine"]["fusion_trained"] is True
    assert found["workload"]["seed"] == 9


def test_the_same_picture_is_encoded_once(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "-c", "1", "-n", "4", "--tokens", "2", "--rounds", "1", "--size", "56", "--same"]
    (level,) = run_json(capsys, "offline", *flags)["levels"]
    assert level["medians"]["engine"]["qwen_cache_hit_ratio"] == 0.75
    assert level["ratios"] == {}


def test_an_arm_and_text_alone(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "-c", "2", "-n", "2", "--tokens", "2", "--rounds", "1", "--arm", "qwen-only"]
    (level,) = run_json(capsys, "offline", *flags, "--size", "56")["levels"]
    assert "dinov2_cache_hit_ratio" not in level["medians"]["engine"]
    assert "step_floor_share" not in level["medians"]["engine"]
    given = ("--floors", "--peak-gflops", "1e6", "--peak-gbs", "1e6")
    (level,) = run_json(capsys, "offline", *flags, "--size", "56", *given)["levels"]
    assert 0 < level["medians"]["engine"]["request_floor_share"] < 1
    assert 0 < level["medians"]["engine"]["step_floor_share"] < 1
    (level,) = run_json(capsys, "offline", *flags, "--text")["levels"]
    assert level["rounds"]["engine"][0]["num_ok"] == 2
    assert "qwen_cache_hit_ratio" not in level["medians"]["engine"]


def test_sampling_as_a_load(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "-c", "2", "-n", "3", "--tokens", "3", "--rounds", "1", "--text", "--generate"]
    how = ["--temperature", "0.7", "--top-p", "0.9", "--top-k", "5", "--seed", "9"]
    found = run_json(capsys, "offline", *flags, *how)
    assert found["workload"]["sampling"] == {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 9}
    (level,) = found["levels"]
    assert [level["rounds"][name][0]["num_ok"] for name in ("engine", "generate")] == [3, 3]
    assert main(["offline", *flags, "--top-k", "5"]) == 2


def test_tables_for_people(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "-c", "1,2", "-n", "2", "--tokens", "2", "--rounds", "1", "--size", "56", "--generate"]
    assert main(["offline", *flags]) == 0
    shown = capsys.readouterr().out
    for words in (
        "c=2 engine",
        "c=1 generate",
        "engine/generate",
        "TTFT p50, ms",
        "output tokens/s",
        "cache hits, qwen",
    ):
        assert words in shown
    assert "tiny: 0." in shown
    flags = ["--model", folder, "--image-size", "56,84", "--batch", "1,2", "--rounds", "1", "--peak-gflops", "100"]
    assert main(["encoders", *flags]) == 0
    shown = capsys.readouterr().out
    for words in ("84 px, batch 2", "preprocess", "dinov2", "fusion", "images/s", "share of the peak, total, %"):
        assert words in shown


def test_encoders_in_json(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "--image-size", "84", "--batch", "3", "--rounds", "2", "--peak-gflops", "100"]
    (run,) = run_json(capsys, "encoders", *flags)["runs"]
    assert (run["image_size"], run["batch"], run["vision_tokens"]) == (84, 3, 9)
    assert list(run["stage_ms"]) == ["preprocess", "upload", "qwen", "dinov2", "fusion"]
    assert run["total_ms"] == pytest.approx(sum(run["stage_ms"].values()))
    shares = run["bound_shares"]
    assert shares["qwen"] == pytest.approx(run["gflop"]["qwen"] / (run["stage_ms"]["qwen"] / 1000 * 100))
    both = run["gflop"]["qwen"] + run["gflop"]["dinov2"]
    assert shares["total"] == pytest.approx(both / (run["total_ms"] / 1000 * 100))


def test_a_fresh_model_is_said_to_skip_its_second_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.encoder(tiny.dual_model()).save_pretrained(tmp_path / "fresh")
    flags = ["--model", str(tmp_path / "fresh"), "-c", "1", "-n", "1", "--tokens", "1", "--rounds", "1", "--size", "56"]
    assert main(["offline", *flags]) == 0
    assert "second encoder was skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["offline", "--model", "/no/such/folder"], "no such folder"),
        (["offline", "--generate", "--arm", "blind"], "knows no arms"),
        (["encoders", "--peak-gflops", "0"], "above 0"),
        (["offline", "--floors", "--peak-gbs", "0"], "above 0"),
        (["offline", "--peak-gflops", "100"], "together with --floors"),
        (["encoders", "--device", "tpu"], "auto, cpu, cuda"),
    ],
)
def test_errors_are_one_line(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert says in captured.err


@pytest.mark.parametrize("flags", [["-c", "0"], ["-c", "1,"], ["-n", "x"], ["--tokens", "-1"], ["--same", "--text"]])
def test_flags_that_mean_nothing_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["offline", *flags])
    assert end.value.code == 2
    assert flags[0] in capsys.readouterr().err


class Clock:
    """A second passes at every look."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_the_closed_loop_keeps_its_streams_full_and_no_fuller() -> None:
    encoder = tiny.encoder()
    engine, seen = encoder.engine, []
    original = engine.step

    def step() -> list:
        seen.append(len(engine._known))
        return original()

    engine.step = step
    requests = [
        GenerationRequest(
            f"r{number}", (ChatMessage("user", (TextPart("hi"),)),), SamplingParams(max_tokens=3, ignore_eos=True)
        )
        for number in range(5)
    ]
    run = run_closed_loop(engine, requests, 2, Clock())
    assert max(seen) == 2
    assert seen.count(1) < len(seen) // 2, "only the last request runs alone"
    assert len(run.timings) == 5
    assert {(one.num_tokens, len(one.pieces), one.error) for one in run.timings} == {(3, 3, None)}
    assert all(one.start < one.pieces[0] <= one.end for one in run.timings)
    assert sorted(one.start for one in run.timings)[:2] == [1.0, 1.0], "both streams start with the round"


def test_labels() -> None:
    assert label_of("ttft_ms_p95") == "TTFT p95, ms"
    assert label_of("dinov2_cache_hit_ratio") == "cache hits, dinov2, %"
    assert label_of("prefill_time_share") == "requests' time in prefill, %"
    assert label_of("step_floor_share") == "floor of a step over measured, %"
    assert label_of("prompt_tokens") == "prompt tokens"
