"""The benchmark runs, and its table says what was measured."""

from __future__ import annotations

import pytest

from benchmarks import metrics_cost


def test_it_measures_both_sides_and_a_scrape(capsys: pytest.CaptureFixture[str]) -> None:
    assert metrics_cost.main(["--rounds", "2", "--streams", "2", "--tokens", "4", "--free"]) in (0, 1)
    table = capsys.readouterr().out
    assert all(row in table for row in ("with metrics, CPU", "without, CPU", "a scrape, CPU", "throughput lost"))
