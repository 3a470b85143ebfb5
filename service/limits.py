"""Limits of one key: requests a minute, and requests at once.

In: a key's id as a request begins and ends, a clock. Out: leave to go on, with what is left, or an error that says
when to come back. It keeps a few numbers a key and refuses to know anything of the request.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from service.errors import ConcurrencyLimitError, RateLimitError

#: Sums of floats: a token that came a nanosecond early counts.
_WHOLE = 1 - 1e-9


@dataclass(slots=True)
class _Standing:
    """`tokens` as of `since`: requests that the key may still begin."""

    tokens: float
    since: float
    num_running: int = 0


class KeyLimits:
    """A token bucket and a count for each key; 0 switches either off. Belongs to the event loop; no locks.

    A full bucket holds a minute's requests. There are as many standings as keys that were ever used: known ones only.
    """

    def __init__(self, requests_per_minute: int, max_concurrent: int, clock: Callable[[], float]) -> None:
        self._per_minute, self._max_concurrent, self._clock = requests_per_minute, max_concurrent, clock
        self._standings: dict[str, _Standing] = {}

    def __len__(self) -> int:
        return len(self._standings)

    def enter(self, key_id: str) -> None:
        """A request begins, and `leave` must follow; unless RateLimitError or ConcurrencyLimitError is raised."""
        standing = self._standing(key_id)
        if self._max_concurrent and standing.num_running >= self._max_concurrent:
            raise ConcurrencyLimitError(
                "too many requests of this key at once",
                value=f"{standing.num_running + 1}",
                allowed=f"at most {self._max_concurrent}",
                fix="Wait for one of them to end",
            )
        if self._per_minute:
            if standing.tokens < _WHOLE:
                raise self._refusal(standing)
            standing.tokens -= 1
        standing.num_running += 1

    def leave(self, key_id: str) -> None:
        self._standings[key_id].num_running -= 1

    def headers(self, key_id: str) -> dict[str, str]:
        """OpenAI's headers: the limit, what is left of it, and when all of it is there again."""
        if not self._per_minute:
            return {}
        standing = self._standing(key_id)
        until_full = (self._per_minute - standing.tokens) * 60 / self._per_minute
        return {
            "x-ratelimit-limit-requests": str(self._per_minute),
            "x-ratelimit-remaining-requests": str(int(standing.tokens + 1 - _WHOLE)),
            "x-ratelimit-reset-requests": _duration(until_full),
        }

    def _standing(self, key_id: str) -> _Standing:
        now = self._clock()
        standing = self._standings.setdefault(key_id, _Standing(float(self._per_minute), now))
        gained = (now - standing.since) * self._per_minute / 60
        standing.tokens, standing.since = min(standing.tokens + gained, float(self._per_minute)), now
        return standing

    def _refusal(self, standing: _Standing) -> RateLimitError:
        seconds = (1 - standing.tokens) * 60 / self._per_minute
        error = RateLimitError(
            "this key's requests of the minute are used up",
            value=f"the next one is free in {max(math.ceil(seconds), 1)} s",
            allowed=f"{self._per_minute} a minute",
            fix="Retry after that time",
        )
        error.retry_after_seconds = seconds
        return error


def _duration(seconds: float) -> str:
    """As Go writes it, and OpenAI: `350ms`, `6s`, `1m0s`."""
    milliseconds = math.ceil(round(seconds * 1000, 3))
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    whole, minutes = milliseconds / 1000 % 60, milliseconds // 60_000
    return f"{minutes}m{whole:g}s" if minutes else f"{whole:g}s"
