"""The benchmark of jobs runs on real processes and shows every row; its figures are for RESULTS, not for a test."""

from __future__ import annotations

import pytest

from benchmarks import job_times


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_it_prints_its_four_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert job_times.main(["--rounds", "1", "--jobs", "20", "--pages", "2"]) == 0
    printed = capsys.readouterr().out
    for row in ("created to running", "a step's line", "succeeded to the first answer", "a page of 100, 20 queued"):
        assert row in printed


def test_every_row_has_its_bar(capsys: pytest.CaptureFixture[str]) -> None:
    job_times.show({"first": [3.0], "running": [0.4, 1.5], "event": [0.1], "answer": [2.0], "page": [0.01] * 3}, 1000)
    lines = capsys.readouterr().out.splitlines()
    assert any("created to running" in line and "1.500" in line and "< 2 s" in line for line in lines)
    assert any("1000 queued" in line and "0.010" in line and "< 0.05 s" in line for line in lines)
