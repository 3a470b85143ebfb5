"""The benchmark runs, and its table says what was measured."""

from __future__ import annotations

import pytest

from benchmarks import metrics_cost


def test_it_measures_both_sides_and_a_scrape(capsys: pytest.CaptureFixture[str]) -> None:
    assert metrics_cost.main(["--rounds", "2", "--streams", "2", "--tokens", "4", "--free"]) in (0, 1)
    table = capsys.readouterr().out
    assert all(row in table for row in ("with metrics, CPU", "without, CPU", "a scrape, CPU", "throughput lost"))


def test_what_histograms_put_off_is_done_within_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values were sorted at the scrape, after the clock had been read: their cost was in no figure."""
    waiting: list[int] = []
    scrape = metrics_cost.Side.scrape

    def look(self: metrics_cost.Side) -> float:
        waiting.append(
            sum(len(t._pending) for h in self.app.state.parts.metrics.histograms for t in h._tallies.values())
        )
        return scrape(self)

    monkeypatch.setattr(metrics_cost.Side, "scrape", look)
    metrics_cost.main(["--rounds", "2", "--streams", "2", "--tokens", "4", "--free"])
    assert waiting == [0, 0]


@pytest.mark.parametrize(("with_", "code"), [((1.0, 1.0, 1.0), 0), ((1.0, 1.0, 1.1), 1), ((1.1, 1.1, 1.1), 1)])
def test_it_passes_only_where_the_whole_interval_is_within_the_bar(
    monkeypatch: pytest.MonkeyPatch, with_: tuple[float, ...], code: int
) -> None:
    async def measured(_: object) -> tuple[list[tuple[float, float]], float]:
        return [(one, 1.0) for one in with_], 0.0

    monkeypatch.setattr(metrics_cost, "measure", measured)
    assert metrics_cost.main([]) == code
