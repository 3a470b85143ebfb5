"""More at once than there is room for: those that were admitted are served rightly, the rest cost nothing."""

import asyncio
import json
import threading
from collections import Counter

import httpx
import pytest

from tests.service.conftest import LiveServer, ask
from tests.service.fakes import FakeEngine

CHAT = "/v1/chat/completions"
NUM_SEQS, NUM_WAITING = 16, 64


def post_all(live: LiveServer, count: int, is_stream: bool) -> list[httpx.Response]:
    """All at once; the engine is held until every refusal has come, so that who is admitted is known."""
    admitted, refused, is_full = NUM_SEQS + NUM_WAITING, count - NUM_SEQS - NUM_WAITING, threading.Event()

    async def post_each() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=count, max_keepalive_connections=0)
        num_refused = 0
        async with httpx.AsyncClient(base_url=live.url, timeout=60, limits=limits) as client:

            async def post(i: int) -> httpx.Response:
                nonlocal num_refused
                response = await client.post(CHAT, json=ask(f"number {i}", images=2, stream=is_stream))
                num_refused += response.status_code == 503
                if num_refused == refused:
                    is_full.set()
                return response

            return await asyncio.gather(*(post(i) for i in range(count)))

    def release() -> None:
        assert is_full.wait(60)
        live.engine.wait_until(lambda: len(live.engine.rows) == admitted, 60)
        live.engine.release()

    live.engine.hold()
    releasing = threading.Thread(target=release)
    releasing.start()
    answers = asyncio.run(post_each())
    releasing.join(60)
    return answers


def said(response: httpx.Response, is_stream: bool) -> str:
    if not is_stream:
        return response.json()["choices"][0]["message"]["content"]
    frames = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    return "".join(frame["choices"][0]["delta"].get("content") or "" for frame in frames)


def check_overload(live: LiveServer, count: int, is_stream: bool) -> None:
    answers = post_all(live, count, is_stream)
    room = NUM_SEQS + NUM_WAITING
    assert Counter(answer.status_code for answer in answers) == {200: room, 503: count - room}
    for answer in answers:
        if answer.status_code == 200:
            assert said(answer, is_stream) == "a red fox"
        else:
            assert answer.json()["error"]["code"] == "server_overloaded"
            assert answer.headers["retry-after"] == "1"
    # Nothing of a refused request was decoded, and nobody's place is lost.
    assert live.engine.num_decoded == 2 * room
    assert len(live.engine.seen) == room
    assert live.chat().status_code == 200


@pytest.mark.parametrize("is_stream", [False, True])
def test_two_hundred_at_once_on_a_queue_of_64(start, is_stream: bool):
    check_overload(start(FakeEngine(), max_num_seqs=NUM_SEQS, max_waiting=NUM_WAITING), 200, is_stream)


@pytest.mark.heavy
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_thousand_at_once_on_a_queue_of_64(start, is_stream: bool):
    check_overload(start(FakeEngine(), max_num_seqs=NUM_SEQS, max_waiting=NUM_WAITING), 1000, is_stream)


def test_a_request_past_its_deadline_while_it_queues_costs_nothing(start):
    """The engine's own clock and ours both know the deadline; whoever sees it first, it is a timeout."""
    live = start(max_num_seqs=1, max_waiting=1, request_timeout_seconds=0.3, batch_window_seconds=0.0)
    live.engine.hold()
    late = live.chat(images=1)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    assert late.headers["x-should-retry"] == "false"
    live.engine.wait_until(lambda: live.engine.aborted)
    assert live.engine.num_steps == 0
    live.engine.release()
    assert live.chat().status_code == 200
