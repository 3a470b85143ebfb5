"""Several engines that one thread turns as if they were one: the base model's, and one for each variant in memory.

In: work prepared by a `Member`. Out: the same events and sums of counters. Each step is one step of one engine, the
next in turn among those that have work, so that no model starves another. A variant whose step raises ends its own
requests and is broken; the base's fault is everybody's. It refuses to know where models come from and what they weigh.

`prepare`, `fork` and what says how busy a member is may be used anywhere; the rest belongs to the engine's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any
from weakref import WeakSet

from model_core.errors import RequestFailedError
from model_core.types import Engine, EngineStats, GenerationRequest, ModelInfo, TokenEvent
from service.logs import log_failure

#: Of a snapshot, what may fall again: it is summed over the engines that have work, the rest over all there ever were.
_GAUGES = frozenset({"num_running", "num_waiting", "num_encoding", "kv_cache_usage_ratio", "encoder_cache_bytes"})
_COUNTERS = tuple(f.name for f in fields(EngineStats) if f.name not in _GAUGES)


@dataclass(frozen=True, slots=True)
class Routed:
    """What a member's engine has prepared, and the way there."""

    member: Member
    request_id: str
    prepared: Any


@dataclass(slots=True, eq=False, weakref_slot=True)
class Member:
    """One model in memory. Whoever holds it may use it, also after it was taken off the list of models.

    num_bytes: its memory beside the base's. num_active: admitted requests, counted on the event loop. is_broken: its
    engine raised outside of any request; written by the engine's thread.
    """

    engine: Engine
    num_bytes: int = 0
    num_active: int = 0
    is_broken: bool = False
    _ids: set[str] = field(default_factory=set)
    _seen: EngineStats = field(default_factory=EngineStats)

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    def prepare(self, request: GenerationRequest) -> Routed:
        return Routed(self, request.request_id, self.engine.prepare(request))

    def fork(self, routed: Routed, request: GenerationRequest) -> Routed:
        return Routed(self, request.request_id, self.engine.fork(routed.prepared, request))


class Fleet:
    """An `Engine` of engines; see `model_core.types.Engine`. Its own `info` and `prepare` are the base's."""

    def __init__(self, base: Engine) -> None:
        self.info = base.info
        self.base = Member(base)
        self._turns: deque[Member] = deque()  # those with work, the next in turn first
        self._member_of: dict[str, Member] = {}
        self._members: WeakSet[Member] = WeakSet()  # all that ever had work and are still held by somebody
        self._others = _NOTHING  # counters of all variants, whether in memory or not

    def prepare(self, request: GenerationRequest) -> Routed:
        return self.base.prepare(request)

    def fork(self, prepared: Routed, request: GenerationRequest) -> Routed:
        return prepared.member.fork(prepared, request)

    def add_request(self, prepared: Routed) -> None:
        member, request_id = prepared.member, prepared.request_id
        if member.is_broken:
            raise _broke(member)
        member.engine.add_request(prepared.prepared)
        member._ids.add(request_id)
        self._member_of[request_id] = member
        self._members.add(member)
        if member not in self._turns:
            self._turns.append(member)

    def abort(self, request_id: str) -> None:
        member = self._member_of.pop(request_id, None)
        if member is None:
            return
        member._ids.discard(request_id)
        member.engine.abort(request_id)
        self._settle(member)

    def step(self) -> list[TokenEvent]:
        if not self._turns:
            return []
        member = self._turns[0]
        self._turns.rotate(-1)
        try:
            events = member.engine.step()
        except Exception as error:  # the engine loop's border: a variant's fault is its own
            if member is self.base:
                raise
            log_failure("a variant's engine broke", error)
            member.is_broken = True
            failed = _broke(member)
            events = [TokenEvent(request_id, error=failed) for request_id in sorted(member._ids)]
        for event in events:
            if event.is_terminal:
                member._ids.discard(event.request_id)
                self._member_of.pop(event.request_id, None)
        lost = self._settle(member)
        return [*events, *lost] if lost else events

    def _settle(self, member: Member) -> list[TokenEvent]:
        """Count what a variant did. A member without work leaves the turns; what it then still has it forgot."""
        if member is not self.base and not member.is_broken:
            now = member.engine.stats()
            self._others, member._seen = _grown(self._others, now, member._seen), now
        if not member.is_broken and member.engine.has_work():
            return []
        if member in self._turns:
            self._turns.remove(member)
        lost = [TokenEvent(i, error=RequestFailedError("the engine lost it")) for i in sorted(member._ids)]
        for request_id in member._ids:
            self._member_of.pop(request_id, None)
        member._ids.clear()
        return lost

    def reset_caches(self) -> None:
        for member in {self.base, *self._members}:
            member.engine.reset_caches()

    def token_text(self, token_id: int) -> tuple[str, list[int]]:
        return self.base.engine.token_text(token_id)

    def has_work(self) -> bool:
        return bool(self._turns)

    def stats(self) -> EngineStats:
        base = self.base.engine.stats()
        if self._others is _NOTHING:
            return base
        total = _grown(base, self._others, _NOTHING)
        busy = [member._seen for member in self._turns if member is not self.base]
        return replace(total, **{name: _over_all(name, [base, *busy]) for name in _GAUGES})


_NOTHING = EngineStats()


def _grown(total: EngineStats, now: EngineStats, before: EngineStats) -> EngineStats:
    """`total`, its counters grown by what happened from `before` to `now`."""
    return replace(
        total,
        **{name: _plus(getattr(total, name), getattr(now, name), getattr(before, name)) for name in _COUNTERS},
    )


def _broke(member: Member) -> RequestFailedError:
    return RequestFailedError(
        "the model broke", value=member.info.model_id, allowed="a model whose engine runs",
        fix="POST /v1/models/{id}/load loads it again, .../rollback goes to the version before",
    )  # fmt: skip


def _plus(total: Any, now: Any, before: Any) -> Any:
    if not isinstance(now, Mapping):
        return total + now - before
    empty: Any = {} if any(isinstance(value, Mapping) for value in now.values()) else 0
    grown = {key: _plus(total.get(key, empty), value, before.get(key, empty)) for key, value in now.items()}
    return {**total, **grown}


def _over_all(name: str, snapshots: list[EngineStats]) -> Any:
    values = [getattr(one, name) for one in snapshots]
    if name == "kv_cache_usage_ratio":
        return max(values)
    if name == "encoder_cache_bytes":
        return {key: sum(value.get(key, 0) for value in values) for key in {k for value in values for k in value}}
    return sum(values)
