"""The benchmark of the HTTP layer runs and counts what it says; its figures are for RESULTS, not for a test."""

import asyncio

from benchmarks import api_overhead
from service.main import build_app
from service.settings import JobSettings, Settings


def test_it_prints_its_four_figures(capsys):
    api_overhead.main(["--requests", "3", "--streams", "4", "--tokens", "5"])
    printed = capsys.readouterr().out
    assert "200 KB request, p50" in printed
    assert "events, 4 streams, wall" in printed


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
