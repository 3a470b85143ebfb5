"""`dve fit`: exact where it is exact, and the estimate of activations against what autograd keeps."""

from __future__ import annotations

import json
from typing import Any

import pytest

from model_core.cli import fit
from model_core.config import DualVisionConfig
from model_core.training.config import FreezeConfig
from model_core.training.freeze import resolve_freeze
from model_core.training.preflight import PackLimits, largest_pack, training_need
from tests.model_core.test_real_sizes import dinov2_config, dual, qwen_config


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    code = fit.main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_every_mode_of_the_demo_model_and_serving(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = report(capsys, "--memory", "16GiB", "--device", "cpu")
    assert code == fit.FITS
    by_name = {row["name"]: row for row in told["training"]}
    assert set(by_name) == {"full", "encoders_only", "llm_only", "fusion_only", "qwen_only", "dinov2_only"}
    assert by_name["full"]["parts"]["moments"] > by_name["fusion_only"]["parts"]["moments"] > 0
    assert told["serving"]["parts"]["weights"] == by_name["full"]["parts"]["weights"]


def test_what_does_not_fit_names_a_pack_that_does(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"training_mode": "full", "train_data_path": "x.json", "max_tokens": 4096}))
    code, told = report(capsys, "--config", str(recipe), "--memory", "2GiB", "--device", "cpu")
    asked = told["training"][0]
    assert code == fit.TOO_LARGE
    assert asked["asked"] and asked["missing_bytes"] > 0
    assert 16 <= asked["fitting_max_tokens"] < 4096
    code, _ = report(
        capsys, "--config", str(recipe), "--memory", "2GiB", "--device", "cpu",
        "--set", f"max_tokens={asked['fitting_max_tokens']}",
    )  # fmt: skip
    assert code == fit.FITS


def test_wrong_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main(["--model", "/no/such/folder"]) == fit.WRONG_CALL
    assert "no such" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fit.main(["--memory", "lots"])


@pytest.fixture(scope="module")
def seven_billion() -> tuple[DualVisionConfig, Any]:
    return DualVisionConfig.from_parts(qwen_config("7B"), dinov2_config("B", 4)), dual("7B", "B", 4)


def test_seven_billion_weights_on_one_card(seven_billion: tuple[DualVisionConfig, Any]) -> None:
    """Full training of 7B needs 18 bytes a weight and does not fit 80 GB; fusion alone does."""
    config, model = seven_billion
    limits, settings = PackLimits(4096, 2048, 1024), {"weight_bytes": 2, "width": 2, "is_cuda": True}
    needs = {
        mode: training_need(config, resolve_freeze(model, FreezeConfig(mode=mode)), limits, **settings).total_bytes
        for mode in ("full", "fusion_only")
    }
    assert needs["full"] > 140e9
    assert 20e9 < needs["fusion_only"] < 80e9


def test_recomputing_needs_less_and_a_smaller_pack_too(seven_billion: tuple[DualVisionConfig, Any]) -> None:
    config, model = seven_billion
    table = resolve_freeze(model, FreezeConfig(mode="fusion_only"))
    settings = {"weight_bytes": 2, "width": 2}
    limits = PackLimits(8192, 4096, 1024)
    kept = training_need(config, table, limits, **settings)
    again = training_need(config, table, limits, recompute=("llm",), **settings)
    assert again.parts["activations"] < kept.parts["activations"] / 4
    fitting = largest_pack(config, table, limits, kept.total_bytes - 1, **settings)
    assert fitting is not None
    assert fitting.max_tokens == 4096
    assert largest_pack(config, table, limits, 1 << 30, **settings) is None
