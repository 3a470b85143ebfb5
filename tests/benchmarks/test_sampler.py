"""The benchmark runs beside another checkout, and its table says what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import sampler


def test_it_measures_every_kind_on_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    root = str(Path(__file__).parents[2])
    sampler.main(["--rounds", "1", "--rows", "1,2", "--vocab", "512", "--seconds", "0.01", "--against", root])
    table = capsys.readouterr().out
    assert all(name in table for name in sampler.KINDS)
    assert table.count("x") >= 2 * len(sampler.KINDS)
