"""TTFT, TPOT, ITL, E2E against timelines made by hand; rounds that alternate; medians of ratios, round by round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_core.analysis.latency import (
    Level,
    LoadRound,
    RequestTiming,
    alternate,
    hit_ratios,
    percentile,
    stage_shares,
    summarise,
)

# Sent at 10 s; five tokens in four pieces; the last frame (usage) comes a little after the last piece.
TIMELINE = RequestTiming(start=10.0, end=12.0, pieces=(10.5, 11.0, 11.25, 11.75), num_tokens=5, num_prompt_tokens=94)


def test_one_request_by_hand() -> None:
    assert TIMELINE.ttft == 0.5
    assert TIMELINE.e2e == 2.0
    assert TIMELINE.tpot == (2.0 - 0.5) / (5 - 1)
    assert TIMELINE.gaps == [0.5, 0.25, 0.5]


def test_one_token_has_no_time_per_further_token() -> None:
    assert RequestTiming(0.0, 1.0, (1.0,), num_tokens=1).tpot is None
    assert RequestTiming(0.0, 1.0, (), num_tokens=8).ttft is None


def test_a_round_by_hand() -> None:
    other = RequestTiming(start=10.0, end=14.0, pieces=(11.5, 14.0), num_tokens=3, num_prompt_tokens=96)
    broken = RequestTiming(start=10.0, end=10.1, error="503 full")
    found = summarise([TIMELINE, broken, other], seconds=4.0, num_tokens=5)
    assert (found.num_ok, found.num_errors, found.num_short, found.first_error) == (2, 1, 1, "503 full")
    figures = found.figures
    assert figures["requests_per_second"] == 0.5, "a failed request is none"
    assert figures["output_tokens_per_second"] == 2.0
    assert figures["prompt_tokens"] == 95
    assert (figures["ttft_ms_p50"], figures["ttft_ms_mean"]) == (1000, 1000)
    assert figures["ttft_ms_p95"] == pytest.approx(1450)
    assert figures["e2e_ms_p50"] == 3000
    assert figures["tpot_ms_mean"] == pytest.approx(1000 * (0.375 + 1.25) / 2)
    assert figures["itl_ms_p50"] == 500, "the gaps of all requests are one heap: 250, 500, 500, 2500"
    assert figures["itl_ms_mean"] == pytest.approx(937.5)


def test_a_round_in_which_all_failed_has_no_latency() -> None:
    found = summarise([RequestTiming(0.0, 1.0, error="no")], seconds=1.0, num_tokens=5)
    assert found.figures == {"requests_per_second": 0.0, "output_tokens_per_second": 0.0}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.sampled_from([0, 5, 50, 95, 99, 100]))
def test_percentiles_are_numpys(values: list[float], percent: int) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-9)


def test_rounds_alternate() -> None:
    assert list(alternate(["A", "B"], 3)) == ["A", "B", "A", "B", "A", "B"]
    assert list(alternate(["A"], 2)) == ["A", "A"]


def made(tokens: float, ttft: float) -> LoadRound:
    return LoadRound(1, 0, 0, None, 1.0, {"output_tokens_per_second": tokens, "ttft_ms_p50": ttft, "other": 1.0})


def test_ratios_are_taken_round_by_round() -> None:
    ours, theirs = [made(100, 5), made(60, 4), made(90, 9)], [made(50, 10), made(60, 8), made(30, 10)]
    level = Level(8, {"A": ours, "B": theirs})
    assert level.medians("A")["output_tokens_per_second"] == 90
    assert level.ratios() == {"output_tokens_per_second": 2.0, "ttft_ms_p50": 0.5}, "90/50 would be 1.8"
    assert Level(8, {"A": ours}).ratios() == {}
    assert set(level.to_dict()) == {"concurrency", "rounds", "medians", "ratios"}


def test_a_figure_that_a_contender_lacks_has_no_ratio() -> None:
    whole = LoadRound(1, 0, 0, None, 1.0, {"output_tokens_per_second": 50.0})
    assert Level(1, {"A": [made(100, 5)], "B": [whole]}).ratios() == {"output_tokens_per_second": 2.0}


def test_shares_and_hit_rates() -> None:
    assert stage_shares({"queue": 1.0, "decode": 3.0}) == {"queue_time_share": 0.25, "decode_time_share": 0.75}
    assert stage_shares({"queue": 0.0}) == {}
    assert hit_ratios({"prefix": 3.0}, {"prefix": 4.0, "qwen": 0.0}) == {"prefix_cache_hit_ratio": 0.75}
