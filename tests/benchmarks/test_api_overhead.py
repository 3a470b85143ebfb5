"""The benchmark of the HTTP layer runs and counts what it says; its figures are for RESULTS, not for a test."""

import asyncio

from benchmarks import api_overhead
from service.main import build_app
from service.settings import JobSettings, Settings


def test_it_prints_its_four_figures(capsys):
    api_overhead.main(["--rounds", "1", "--requests", "3", "--streams", "4", "--tokens", "5"])
    printed = capsys.readouterr().out
    assert "200 KB request, p50" in printed
    assert "events, 4 streams, wall" in printed


def test_ratios_are_taken_within_a_round(capsys):
    """A machine that slows down falls on both sides of a round, and on no ratio."""
    rounds = [[api_overhead.Figure("a", value, "ms", "2 ms")] for value in (1.0, 2.0, 30.0)]
    others = [[api_overhead.Figure("a", value, "ms", "2 ms")] for value in (2.0, 4.0, 60.0)]
    api_overhead.show(rounds, others)
    printed = capsys.readouterr().out
    assert all(shown in printed for shown in ("2.00 ms", "4.00 ms", "0.50x"))


def test_an_event_is_counted_for_every_token(tmp_path):
    async def count() -> tuple[int, int]:
        app, client = build_app(Settings(data_dir=tmp_path), JobSettings(data_dir=tmp_path), api_overhead.FreeEngine)
        client.start()
        await client.wait_loaded()
        try:
            return await api_overhead.call(app, api_overhead.chat_body(400, max_tokens=7, stream=True))
        finally:
            await client.stop()
            app.state.parts.desk.store.close()

    status, events = asyncio.run(count())
    assert (status, events) == (200, 1 + 7 + 1 + 1), "role, words, end, [DONE]"
