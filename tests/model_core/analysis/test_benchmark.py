"""The benchmark warms up and times ONE encode: faults of earlier attempts."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from tests.model_core import tiny


def messages() -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": Image.new("RGB", (80, 80), "red")}, {"type": "text", "text": "?"}]
    return [{"role": "user", "content": parts}]


def test_one_encode_a_round_after_the_warm_up() -> None:
    encoder = tiny.encoder()
    calls = {"qwen": 0, "dinov2": 0}
    for name in calls:
        module = encoder.model.model.encoder_module(name)
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    found = encoder.benchmark(messages(), max_tokens=5, rounds=3)
    assert calls == {"qwen": 3 + 2, "dinov2": 3 + 2}
    assert found.rounds == 3
    assert found.output_tokens == 5, "end of turn is ignored, so that runs are comparable"
    assert found.image_tokens == 9
    assert set(found.encoder_ms) == {"qwen", "dinov2"}


def test_every_stage_has_a_figure_and_they_add_up() -> None:
    found = tiny.encoder().benchmark(messages(), max_tokens=4, rounds=2)
    stages = sum(found.encoder_ms.values()) + found.prefill_ms + found.preprocess_ms
    assert 0 < stages <= found.ttft_ms * 1.5
    assert found.tpot_ms > 0
    assert found.peak_memory_bytes > 10**6
    assert [row[0] for row in found.rows()][3:6] == ["preprocess", "encode qwen", "encode dinov2"]


def test_a_fresh_model_runs_no_second_encoder() -> None:
    found = tiny.encoder(tiny.dual_model()).benchmark(messages(), max_tokens=2, rounds=1)
    assert set(found.encoder_ms) == {"qwen"}
    assert found.to_dict()["device"] == "cpu"


@pytest.mark.parametrize("rounds", [1, 4])
def test_medians_are_over_the_rounds_asked_for(rounds: int) -> None:
    assert tiny.encoder().benchmark(messages(), max_tokens=2, rounds=rounds).rounds == rounds
