"""What crosses to an engine in another process arrives as it was sent."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.engine_process import ProcessEngine, Wire, pack_event, pack_request, unpack_event, unpack_request
from model_core.errors import RequestFailedError
from model_core.types import (
    ChatMessage,
    FusionWeights,
    GenerationRequest,
    ImagePart,
    ModelInfo,
    SamplingParams,
    TextPart,
    Timings,
    TokenEvent,
    Usage,
)

REQUEST = GenerationRequest(
    "r",
    (
        ChatMessage("system", (TextPart("be kind"),)),
        ChatMessage("user", (ImagePart(b"\x00\xff", 5000, "low"), TextPart("what?"), ImagePart(b"more"))),
    ),
    SamplingParams(max_tokens=3, temperature=0.5, seed=4, stop=("x",), stop_token_ids=(7,)),
    "qwen-only",
    priority=2,
    timeout_seconds=1.5,
    fetch_seconds=0.25,
)
FIRST = TokenEvent("r", "a", (5,), (FusionWeights({"qwen": 0.25}, "qwen", True, 0.5, warnings=("w",)),))
LAST = TokenEvent(
    "r",
    "b",
    (6,),
    finish_reason="stop",
    usage=Usage(3, 2, 4, 1, (16,)),
    timings=Timings(1.0, encoder_seconds={"q": 2.0}),
)
INFO = ModelInfo("m", "fp", "gated", True, ("qwen",), 100, device="cpu", dtype="float32", num_parameters=1)


@pytest.fixture
def wires() -> Iterator[tuple[Wire, Wire]]:
    here, there = (Wire(end) for end in socket.socketpair())
    yield here, there
    here.close()
    there.close()


def test_requests_and_events_arrive_whole(wires: tuple[Wire, Wire]) -> None:
    here, there = wires
    told, blob = pack_request(REQUEST)
    here.send({"add": told}, blob)
    received, pictures = there.receive()
    assert unpack_request(received["add"], pictures) == REQUEST
    engine = ProcessEngine(here, INFO)
    engine.add_request(engine.prepare(REQUEST))
    assert engine.has_work() and there.receive()[0]["add"]["id"] == "r"
    there.send({"events": [pack_event(FIRST)], "stats": {"num_steps": 4}})
    assert engine.step() == [FIRST] and engine.stats().num_steps == 4
    there.send({"events": [pack_event(LAST)], "stats": {}})
    assert engine.step() == [LAST] and not engine.has_work()


def test_errors_and_aborted_requests(wires: tuple[Wire, Wire]) -> None:
    failed = unpack_event(pack_event(TokenEvent("r", error=RequestFailedError("too bad"))))
    assert isinstance(failed.error, RequestFailedError) and "too bad" in str(failed.error)
    here, there = wires
    engine = ProcessEngine(here, INFO, {"r"})
    engine.abort("r")
    assert there.receive()[0] == {"abort": "r"}
    there.send({"events": [pack_event(FIRST)], "stats": {}})
    assert engine.step() == [], "nobody waits for what came too late"


@pytest.mark.parametrize("more", [{"sampling": SamplingParams(logprobs=1)}, {"encode_only": True}])
def test_what_the_measurement_does_not_need_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(RequestFailedError, match="for measuring"):
        pack_request(GenerationRequest("r", REQUEST.messages, **more))
