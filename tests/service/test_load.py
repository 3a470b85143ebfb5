"""The load generator against an endpoint that says what the test wrote, frame by frame; `dve bench serve` as a program.

No test asserts a time: clocks tick once a look.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from urllib.request import urlopen

import pytest
from aiohttp import web
from PIL import Image

from model_core.analysis.latency import RequestTiming
from model_core.errors import ConfigError
from service import cli
from service.load import (
    Endpoint,
    first_model,
    metric_figures,
    open_session,
    parse_metrics,
    read_metrics,
    request_body,
    run_load,
    send,
)
from tests.service.conftest import LiveServer


def frame(**chunk: object) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def piece(**delta: object) -> bytes:
    return frame(choices=[{"index": 0, "delta": delta}])


USAGE = frame(choices=[], usage={"prompt_tokens": 94, "completion_tokens": 5})
DONE = b"data: [DONE]\n\n"
ANSWER = [piece(role="assistant", content=""), piece(content="a"), piece(content=""), piece(content="bc"), USAGE, DONE]
METRICS = """\
# TYPE dve_prefix_cache_queries_total counter
dve_prefix_cache_queries_total {queries}
# TYPE dve_prefix_cache_hits_total counter
dve_prefix_cache_hits_total {hits}
# TYPE dve_encoder_cache_hits_total counter
dve_encoder_cache_hits_total{{encoder="qwen"}} {hits}
# TYPE dve_encoder_cache_misses_total counter
dve_encoder_cache_misses_total{{encoder="qwen"}} {hits}
dve_encoder_cache_misses_total{{encoder="dinov2"}} 4
# TYPE dve_request_decode_time_seconds histogram
dve_request_decode_time_seconds_sum {hits}
dve_request_decode_time_seconds_count 1
# TYPE dve_request_queue_time_seconds histogram
dve_request_queue_time_seconds_sum {queries}
dve_request_queue_time_seconds_count 1
"""


@dataclass
class FakeEndpoint:
    """Answers every chat request with `frames`; `barrier`: as many requests must be in flight at once."""

    url: str = ""
    frames: list[bytes] = field(default_factory=lambda: list(ANSWER))
    status: int = 200
    models: object = field(default_factory=lambda: {"data": [{"id": "its/model"}]})
    metrics: str = METRICS.format(queries=10, hits=5)
    barrier: int = 1
    bodies: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0
    log: list[str] | None = None

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        self._barrier = asyncio.Barrier(self.barrier)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(self.models)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        if self.log is not None:
            self.log.append(body["model"])
        if self.status != 200:
            return web.json_response({"error": {"message": "the queue is full", "code": "full"}}, status=self.status)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await self._barrier.wait()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for data in self.frames:
            await response.write(data)
        self.num_open -= 1
        return response


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeEndpoint]]:
    """serve(**what) starts a FakeEndpoint on a free loopback port, in a thread of its own."""
    ends: list[Callable[[], None]] = []

    def start(**what: object) -> FakeEndpoint:
        fake, ready, loop = FakeEndpoint(**what), threading.Event(), asyncio.new_event_loop()
        stopped = asyncio.Event()

        async def main() -> None:
            runner = web.AppRunner(fake.app(), access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            ready.set()
            await stopped.wait()
            await runner.cleanup()

        thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
        thread.start()

        def end() -> None:
            loop.call_soon_threadsafe(stopped.set)
            thread.join(20)
            loop.close()

        ends.append(end)
        assert ready.wait(20)
        return fake

    yield start
    for end in ends:
        end()


class Clock:
    """A second passes at every look."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def ask(fake: FakeEndpoint, count: int = 1, streams: int = 1, key: str = "") -> list[RequestTiming]:
    async def main() -> list[RequestTiming]:
        async with open_session(key, 20) as session:
            bodies = [request_body("m", f"Question {n}", None, 5) for n in range(count)]
            return (await run_load(session, Endpoint(fake.url, "m"), bodies, streams, Clock()))[0]

    return asyncio.run(main())


def test_a_piece_is_a_frame_with_text(serve: Callable[..., FakeEndpoint]) -> None:
    async def main(fake: FakeEndpoint) -> RequestTiming:
        async with open_session("", 20) as session:
            return await send(session, Endpoint(fake.url, "m"), request_body("m", "?", None, 5), Clock())

    # Sent at 1; frames at 2 (role), 3 ("a"), 4 (no text), 5 ("bc"), 6 (usage).
    assert asyncio.run(main(serve())) == RequestTiming(1.0, 6.0, (3.0, 5.0), num_tokens=5, num_prompt_tokens=94)


def test_tokens_without_text_are_still_an_answer(serve: Callable[..., FakeEndpoint]) -> None:
    (timing,) = ask(serve(frames=[piece(role="assistant"), USAGE, DONE]))
    assert (timing.error, timing.num_tokens, timing.pieces) == (None, 5, (timing.end,))


def test_the_request_is_greedy_streamed_and_of_a_fixed_length(serve: Callable[..., FakeEndpoint]) -> None:
    fake = serve()
    ask(fake, key="secret")
    (body,) = fake.bodies
    assert fake.keys == ["Bearer secret"]
    assert (body["temperature"], body["max_tokens"], body["ignore_eos"]) == (0, 5, True)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert body["messages"] == [{"role": "user", "content": [{"type": "text", "text": "Question 0"}]}]


def test_the_picture_stands_before_the_question() -> None:
    content = json.loads(request_body("m", "?", b"\xff\xd8 picture", 5))["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"]
    assert content[0]["image_url"]["url"] == "data:image/jpeg;base64,/9ggcGljdHVyZQ=="


def test_the_streams_are_full_and_no_fuller(serve: Callable[..., FakeEndpoint]) -> None:
    fake = serve(barrier=3)  # would wait for ever for a third
    timings = ask(fake, count=6, streams=3)
    assert [one.error for one in timings] == [None] * 6
    assert fake.most_open == 3
    assert sorted(body["messages"][0]["content"][0]["text"] for body in fake.bodies) == [
        f"Question {n}" for n in range(6)
    ]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"status": 503}, "503 the queue is full"),
        ({"frames": [piece(content="a"), frame(error={"message": "out of memory"})]}, "out of memory"),
        ({"frames": ANSWER[:4]}, "the stream broke off after 2 pieces"),
        ({"frames": [b"data: {oops\n\n"]}, "JSONDecodeError"),
    ],
)
def test_a_failed_request_says_why(what: dict, says: str, serve: Callable[..., FakeEndpoint]) -> None:
    timings = ask(serve(**what), count=2)
    assert len(timings) == 2, "the others go on"
    for timing in timings:
        assert says in timing.error
        assert "\n" not in timing.error


def test_an_endpoint_that_is_not_there() -> None:
    (timing,) = ask(FakeEndpoint(url="http://127.0.0.1:1"))
    assert "ClientConnectorError" in timing.error


def test_the_first_model_is_asked_for(serve: Callable[..., FakeEndpoint]) -> None:
    async def main(url: str) -> str:
        async with open_session("", 20) as session:
            return await first_model(session, url)

    assert asyncio.run(main(serve().url)) == "its/model"
    for broken in (serve(models={"data": []}), serve(models=[1]), FakeEndpoint(url="http://127.0.0.1:1")):
        with pytest.raises(ConfigError, match="lists no models"):
            asyncio.run(main(broken.url))


# Metrics


def test_what_the_servers_metrics_tell() -> None:
    before = parse_metrics(METRICS.format(queries=10, hits=5))
    after = parse_metrics(METRICS.format(queries=18, hits=7))
    assert metric_figures(before, after) == {
        "qwen_cache_hit_ratio": 0.5,
        "prefix_cache_hit_ratio": 0.25,
        "queue_time_share": 0.8,
        "preprocess_time_share": 0.0,
        "encode_time_share": 0.0,
        "prefill_time_share": 0.0,
        "decode_time_share": 0.2,
    }, "dinov2 was not asked in between"
    assert metric_figures({}, {("vllm:prefix_cache_hits_total", ""): 3.0}) == {}


def test_an_endpoint_without_metrics(serve: Callable[..., FakeEndpoint]) -> None:
    async def main(fake: FakeEndpoint) -> object:
        async with open_session("", 20) as session:
            return await read_metrics(session, fake.url)

    assert asyncio.run(main(serve(metrics="<html>no</html> {"))) == {}
    assert asyncio.run(main(FakeEndpoint(url="http://127.0.0.1:1"))) == {}


# The command


def bench(*flags: str) -> int:
    return cli.main(["bench", "serve", "-n", "2", "--tokens", "5", "--size", "56", *flags])


def test_two_endpoints_in_turn(serve: Callable[..., FakeEndpoint], capsys: pytest.CaptureFixture[str]) -> None:
    log: list[str] = []
    ours, theirs = serve(log=log), serve(log=log)
    flags = [
        "--pause",
        "0.1",
        "--url",
        ours.url + "/v1/",
        "--model",
        "A",
        "--against",
        theirs.url,
        "--against-model",
        "B",
        "--seed",
        "3",
    ]
    assert bench(*flags, "-c", "1", "--rounds", "2", "--json") == 0
    assert log == ["A", "B", *["A", "A", "B", "B"] * 2], "one to warm up each, then round by round"
    found = json.loads(capsys.readouterr().out)
    (level,) = found["levels"]
    assert level["ratios"].keys() >= {"output_tokens_per_second", "ttft_ms_p50", "e2e_ms_p95"}
    assert level["medians"]["A"]["prompt_tokens"] == 94
    pictures = [body["messages"][0]["content"][0]["image_url"]["url"] for body in ours.bodies]
    assert len(set(pictures)) == len(pictures) == 5, "no picture comes twice, the warm-up's neither"
    assert [body["messages"] for body in ours.bodies[1:]] == [body["messages"] for body in theirs.bodies[1:]]
    with urlopen(pictures[0]) as response:
        assert Image.open(BytesIO(response.read())).size == (56, 56)


def test_two_models_of_one_server_share_no_picture(
    serve: Callable[..., FakeEndpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    fake = serve()
    assert bench("--url", fake.url, "--against-model", "its/model@qwen-only", "-c", "1", "--rounds", "2") == 0
    pictures = [body["messages"][0]["content"][0]["image_url"]["url"] for body in fake.bodies]
    assert len(set(pictures)) == len(pictures) == 10
    assert {body["model"] for body in fake.bodies} == {"its/model", "its/model@qwen-only"}
    assert "B = its/model@qwen-only" in capsys.readouterr().out


def test_both_endpoints_are_sampled_alike(
    serve: Callable[..., FakeEndpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = serve(), serve()
    flags = f"--url {ours.url} --model m --against {theirs.url} --against-model m --text --pause 0 -c 1 --rounds 1"
    assert bench(*flags.split(), *["--temperature", "0.7", "--top-p", "0.9", "--top-k", "50", "--seed", "3"]) == 0
    assert ours.bodies[1:] == theirs.bodies[1:], "after one of its own to warm up each"
    fields = ("temperature", "top_p", "top_k", "seed")
    assert [[body[name] for name in fields] for body in ours.bodies] == [[0.7, 0.9, 50, 3 + n] for n in (0, 2, 3)]
    assert "temperature 0.7, top_p 0.9, top_k 50" in capsys.readouterr().out


def test_without_a_seed_none_is_sent_and_greedy_sends_nothing_more(serve: Callable[..., FakeEndpoint]) -> None:
    fake = serve()
    assert bench("--url", fake.url, "-c", "1", "--rounds", "1", "--text", "--temperature", "1") == 0
    assert bench("--url", fake.url, "-c", "1", "--rounds", "1", "--text", "--seed", "3") == 0
    assert not any("seed" in body for body in fake.bodies)
    assert [body.get("top_k") for body in fake.bodies] == [0, 0, 0, None, None, None]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--temperature 2.5", "0 to 2"),
        ("--temperature nan", "0 to 2"),
        ("--temperature 1 --top-p 0", "above 0, at most 1"),
        ("--temperature 1 --top-k -1", "0 (off) or more"),
        ("--top-p 0.9", "greedy answers have no use"),
    ],
)
def test_sampling_that_does_not_exist_is_one_line(flags: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--url", "http://127.0.0.1:1", *flags.split()) == 2
    assert says in capsys.readouterr().err


def test_one_picture_in_all(serve: Callable[..., FakeEndpoint], capsys: pytest.CaptureFixture[str]) -> None:
    fake = serve()
    assert bench("--url", fake.url, "--same", "-c", "1,2", "--rounds", "1") == 0
    assert len({body["messages"][0]["content"][0]["image_url"]["url"] for body in fake.bodies}) == 1
    shown = capsys.readouterr().out
    assert "c=2" in shown
    assert "one 56 px picture in all" in shown


def test_errors_are_counted_told_and_exit_1(
    serve: Callable[..., FakeEndpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    fake = serve(status=503)
    assert bench("--url", fake.url, "-c", "1", "--rounds", "2", "--text") == 1
    shown = capsys.readouterr().out
    assert "4 errors, the first: 503 the queue is full" in shown


def test_short_answers_are_told(serve: Callable[..., FakeEndpoint], capsys: pytest.CaptureFixture[str]) -> None:
    short = [*ANSWER[:4], frame(choices=[], usage={"completion_tokens": 3}), DONE]
    assert bench("--url", serve(frames=short).url, "-c", "1", "--rounds", "1", "--text") == 0
    assert "2 answers were shorter than asked" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://127.0.0.1:1"])
def test_an_address_that_leads_nowhere_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--url", url) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert url in captured.err


def test_against_our_own_server(shared: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--url", shared.url, "--text", "-c", "2", "--rounds", "1") == 0
    shown = capsys.readouterr().out
    for words in ("A = fake/model:1", "TTFT p50, ms", "requests' time in prefill, %"):
        assert words in shown


def test_a_missing_extra_is_told_in_one_line() -> None:
    code = "import sys; sys.modules['aiohttp'] = None; from service.cli import main; sys.exit(main(['bench', 'serve']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "the extra 'bench'" in done.stderr
