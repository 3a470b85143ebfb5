"""What a load owes at least: counted from the model, and never more than was measured on the machine that gave it."""

from __future__ import annotations

import pytest
import torch

from model_core.analysis.floors import Floor, Peak, floor_of, measure_peak
from model_core.analysis.flops import tower_flops
from model_core.language.decoder import Decoder
from tests.model_core import tiny

GRID = (1, 8, 8)


def test_a_request_owes_its_towers_its_prompt_and_its_part_of_the_steps() -> None:
    model = tiny.trained_model()
    peak = Peak(flops_per_second=1e9, bytes_per_second=1e6)
    both = floor_of(model, frozenset({"qwen", "dinov2"}), (GRID,), 30, 11, peak)
    qwen = floor_of(model, frozenset({"qwen"}), (GRID,), 30, 11, peak)
    text = floor_of(model, frozenset(), (), 30, 11, peak)
    towers = tower_flops(model.config, GRID)
    assert both.prompt_seconds - qwen.prompt_seconds == pytest.approx(towers["dinov2"] / 1e9)
    assert qwen.prompt_seconds - text.prompt_seconds == pytest.approx(towers["qwen"] / 1e9)
    layer = model.model.language_model.layers[0]
    products = sum(m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear))
    assert text.prompt_seconds == pytest.approx(2 * 30 * products * len(model.model.language_model.layers) / 1e9)
    everything = sum(p.nbytes for p in model.model.language_model.parameters())
    embedding = model.get_input_embeddings().weight.nbytes
    assert text.step_seconds == pytest.approx((everything - embedding + model.lm_head.weight.nbytes) / 1e6)


def test_joined_weights_owe_what_single_ones_do() -> None:
    model, peak = tiny.trained_model(), Peak(1e9, 1e6)
    before = floor_of(model, frozenset(), (), 30, 11, peak)
    Decoder(model.model.language_model, model.lm_head, joins_weights=True)
    after = floor_of(model, frozenset(), (), 30, 11, peak)
    assert (after.prompt_seconds, after.step_seconds) == pytest.approx((before.prompt_seconds, before.step_seconds))


def test_shares_are_of_the_load_as_it_was() -> None:
    floor = Floor(prompt_seconds=0.05, step_seconds=0.002, num_tokens=26)
    assert floor.shares({"requests_per_second": 5.0, "tpot_ms_p50": 4.0}, 1) == pytest.approx(
        {"request_floor_share": 0.5, "step_floor_share": 0.5}
    )
    assert floor.shares({"requests_per_second": 5.0}, 10) == pytest.approx({"request_floor_share": 5 * 0.055})


def test_a_peak_is_the_best_of_several_tries() -> None:
    times = iter(range(100_000))
    slow_then_fast = [8, 8, 4, 2, 4, 8]

    def clock() -> float:
        """Pairs of looks: a work of so many seconds between them."""
        look = next(times)
        return look // 2 * 100 + (look % 2) * slow_then_fast[look // 2 % 6]

    peak = measure_peak(torch.device("cpu"), torch.float32, clock)
    assert peak == Peak(2 * 2048**3 / 2, 2**28 / 2)
