"""Several engines as one: each in its turn, each one's events its own, counters that never fall."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model_core.errors import RequestFailedError
from model_core.types import ChatMessage, GenerationRequest, SamplingParams, TextPart
from service.fleet import Fleet, Member
from tests.service.fakes import INFO, FakeEngine


def request(request_id: str, text: str = "count", max_tokens: int = 4) -> GenerationRequest:
    return GenerationRequest(request_id, (ChatMessage("user", (TextPart(text),)),), SamplingParams(max_tokens))


def variant(name: str, **more) -> Member:
    return Member(FakeEngine(info=replace(INFO, model_id=name), **more))


def run(fleet: Fleet) -> list[str]:
    """Request ids in the order in which they got a token, until nobody has work."""
    order = []
    while fleet.has_work():
        order += [event.request_id for event in fleet.step()]
    return order


def test_each_engine_steps_in_its_turn_however_much_the_others_have() -> None:
    fleet, red, blue = Fleet(FakeEngine()), variant("red"), variant("blue")
    for member, ids in ((fleet.base, ("b1", "b2", "b3")), (red, ("r1",)), (blue, ("x1",))):
        for request_id in ids:
            fleet.add_request(member.prepare(request(request_id)))
    assert run(fleet) == ["b1", "b2", "b3", "r1", "x1"] * 4
    assert (fleet.base.engine.num_steps, red.engine.num_steps, blue.engine.num_steps) == (4, 4, 4)


def test_an_abort_reaches_the_engine_that_has_the_request() -> None:
    fleet, red = Fleet(FakeEngine()), variant("red")
    fleet.add_request(fleet.prepare(request("b")))
    routed = red.prepare(request("r"))
    fleet.add_request(routed)
    fleet.add_request(fleet.fork(routed, request("r2")))
    assert [r.request_id for r in red.engine.forked] == ["r2"]
    fleet.abort("r")
    fleet.abort("nobody")
    assert (red.engine.aborted, fleet.base.engine.aborted) == (["r"], [])
    assert set(run(fleet)) == {"b", "r2"}


def test_a_variant_that_breaks_ends_its_own_requests_alone() -> None:
    fleet, red = Fleet(FakeEngine()), variant("red")
    fleet.add_request(fleet.prepare(request("b")))
    for request_id, text in (("r1", "count"), ("r2", "die")):
        fleet.add_request(red.prepare(request(request_id, text)))
    events = [event for _ in range(2) for event in fleet.step()]
    assert [(e.request_id, type(e.error)) for e in events[1:]] == [
        ("r1", RequestFailedError),
        ("r2", RequestFailedError),
    ]
    assert red.is_broken
    with pytest.raises(RequestFailedError):
        fleet.add_request(red.prepare(request("r3")))
    assert run(fleet) == ["b"] * 3


def test_the_bases_fault_is_everybodys() -> None:
    fleet = Fleet(FakeEngine())
    fleet.add_request(fleet.prepare(request("b", "die")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fleet.step()


def test_a_request_that_an_engine_forgot_is_told_while_others_run() -> None:
    fleet, red = Fleet(FakeEngine()), variant("red")
    fleet.add_request(fleet.prepare(request("b", max_tokens=40)))
    fleet.add_request(red.prepare(request("r", "lose")))
    events = [event for _ in range(2) for event in fleet.step()]
    assert [(e.request_id, type(e.error)) for e in events] == [("b", type(None)), ("r", RequestFailedError)]
    fleet.add_request(red.prepare(request("r")))


def test_counters_are_of_all_engines_that_ever_worked_and_gauges_of_those_at_work() -> None:
    counters = {"num_preemptions": 2, "encoder_cache_hits": {"qwen": 4}, "encoder_batches": {"qwen": {1: 3}}}
    gauges = {"kv_cache_usage_ratio": 0.25, "encoder_cache_bytes": {"qwen": 10}}
    fleet, red = Fleet(FakeEngine(counters={**counters, **gauges})), variant("red", counters={**counters, **gauges})
    assert fleet.stats() == fleet.base.engine.stats()
    red.engine.counters["kv_cache_usage_ratio"] = 0.5
    fleet.add_request(red.prepare(request("r")))
    fleet.step()
    during = fleet.stats()
    assert (during.num_preemptions, during.num_running, during.kv_cache_usage_ratio) == (4, 1, 0.5)
    assert (during.encoder_cache_hits, during.encoder_batches) == ({"qwen": 8}, {"qwen": {1: 6}})
    assert during.encoder_cache_bytes == {"qwen": 20}
    red.engine.counters["num_preemptions"] = 5
    run(fleet)
    del red
    after = fleet.stats()
    assert (after.num_preemptions, after.num_running, after.kv_cache_usage_ratio) == (7, 0, 0.25)
    assert after.num_steps == 4
    assert fleet.stats() == after, "looking does not count"


def test_reset_reaches_every_engine_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[str] = []
    monkeypatch.setattr(FakeEngine, "reset_caches", lambda self: reset.append(self.info.model_id), raising=False)
    fleet, red = Fleet(FakeEngine()), variant("red")
    fleet.add_request(red.prepare(request("r")))
    run(fleet)
    fleet.reset_caches()
    assert sorted(reset) == sorted([INFO.model_id, "red"])
