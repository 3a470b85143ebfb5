"""What streams are made of, without a socket: pieces, a client that takes none, inboxes, deadlines."""

from __future__ import annotations

import asyncio
import json

import pytest

from model_core.errors import RequestFailedError
from model_core.types import TokenEvent
from service.deadline import Deadline
from service.errors import DrainingError, RequestTimeoutError
from service.inbox import Inbox
from service.streaming import DONE, SseResponse
from tests.service.conftest import LiveServer, ask


def respond(pieces, send, stall_seconds: float = 20.0) -> list[str]:
    """Runs a response whose client never leaves; tells what was closed."""
    closed = []

    async def close() -> None:
        closed.append("closed")

    async def receive() -> dict:
        await asyncio.Event().wait()
        return {}

    async def main() -> None:
        response = SseResponse(pieces(), close, request_id="r", headers={}, stall_seconds=stall_seconds)
        async with asyncio.timeout(20):
            await response({"type": "http"}, receive, send)

    asyncio.run(main())
    return closed


def test_one_write_a_piece_and_none_behind_the_last():
    sent = []

    async def pieces():
        yield b"data: 1\n\n"
        yield b"data: 2\n\n" + DONE

    async def send(message: dict) -> None:
        sent.append(message)

    assert respond(pieces, send) == ["closed"]
    assert [(m["body"], m["more_body"]) for m in sent[1:]] == [
        (b"data: 1\n\n", True), (b"data: 2\n\n" + DONE, False),
    ]  # fmt: skip


def test_an_error_is_the_last_frame():
    sent = []

    async def pieces():
        yield b"data: 1\n\n"
        raise RequestFailedError("NaN in secret text")

    async def send(message: dict) -> None:
        sent.append(message)

    assert respond(pieces, send) == ["closed"]
    last = sent[-1]
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "request_failed"
    assert (last["more_body"], b"secret" in last["body"]) == (False, False)


def test_a_send_that_stalls_ends_the_stream():
    """Under another server than ours nothing else would notice."""
    taken = []

    async def pieces():
        for _ in range(10):
            yield b"data: 1\n\n"

    async def send(message: dict) -> None:
        taken.append(message)
        if len(taken) == 3:
            await asyncio.Event().wait()

    assert respond(pieces, send, stall_seconds=0.05) == ["closed"]
    assert len(taken) == 3


def test_a_slow_engine_is_no_stall():
    sent = []

    async def pieces():
        await asyncio.sleep(0.2)  # the slowness under test, four stall times long
        yield DONE

    async def send(message: dict) -> None:
        sent.append(message)

    respond(pieces, send, stall_seconds=0.05)
    assert sent[-1]["body"] == DONE


@pytest.mark.parametrize("text", ['"', "\\", "\n", "\x00", "\u20ac", "\U0001f600", "\ud800", "</script>"])
def test_a_frame_of_text_is_the_json_that_it_would_be(start, text: str):
    """Its head and tail are written once for all frames; the text between them must not be able to break out."""
    from tests.service.fakes import FakeEngine

    class Saying(FakeEngine):
        def prepare(self, request):
            row = super().prepare(request)
            row.words = (text, "")
            return row

    live: LiveServer = start(Saying())
    for include_usage in (True, False):
        body = ask(stream=True, stream_options={"include_usage": include_usage})
        lines = live.http.post("/v1/chat/completions", json=body).text.split("\n\n")
        frames = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        role, said, end = frames[:3]
        assert said["choices"][0]["delta"] == {"content": text}
        assert said.keys() == end.keys() == role.keys() - {"fusion"}
        assert said["choices"][0].keys() == end["choices"][0].keys()


# Inboxes


def event(text: str = "x", **more) -> TokenEvent:
    return TokenEvent("r", text, **more)


def test_a_late_reader_gets_all_at_once_and_begin_is_told_once():
    async def main() -> None:
        seen, begun = [], []
        inbox = Inbox(seen.append, lambda: begun.append(1), is_patient=False)
        for text in "abc":
            inbox.put(event(text))
        assert [e.text for e in await inbox.take()] == ["a", "b", "c"]
        taking = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        inbox.put(event("d"))
        assert [e.text for e in await taking] == ["d"]
        inbox.put(event(error=RequestFailedError("x")))
        assert (len(seen), begun) == (4, [1]), "errors are no tokens"

    asyncio.run(main())


def test_a_patient_reader_is_woken_by_the_end_alone():
    async def main() -> None:
        inbox = Inbox(lambda _: None, lambda: None, is_patient=True)
        inbox.put(event("a"))
        taking = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        inbox.put(event("b"))
        await asyncio.sleep(0)
        assert not taking.done()
        inbox.put(event("", finish_reason="stop"))
        assert [e.text for e in await taking] == ["a", "b", ""]

    asyncio.run(main())


# Deadlines


def test_the_end_comes_into_what_is_awaited_and_what_will_be():
    async def main() -> None:
        deadline = Deadline(asyncio.get_running_loop().time() + 60)
        inbox = Inbox(lambda _: None, lambda: None, is_patient=True)
        deadline.watch(inbox, "r")
        waiting = asyncio.ensure_future(deadline.bound(asyncio.Event().wait()))
        await asyncio.sleep(0)
        deadline.end(lambda: DrainingError("going"))
        deadline.end(lambda: RequestTimeoutError("the first end counts"))
        with pytest.raises(DrainingError):
            await waiting
        with pytest.raises(DrainingError):
            await deadline.bound(asyncio.Event().wait())
        (last,) = await inbox.take()
        assert isinstance(last.error, DrainingError)
        deadline.close()

    asyncio.run(main())


def test_a_deadline_ends_by_itself_and_a_cancelled_caller_is_just_cancelled():
    async def main() -> None:
        deadline = Deadline(asyncio.get_running_loop().time() + 0.01)
        with pytest.raises(RequestTimeoutError):
            await deadline.bound(asyncio.Event().wait())
        assert deadline.is_past
        later = Deadline(asyncio.get_running_loop().time() + 60)
        caller = asyncio.ensure_future(later.bound(asyncio.Event().wait()))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        later.close()

    asyncio.run(main())
