"""Limits of a key, on a clock that the test turns: a bucket of a minute's requests, and a count of those under way."""

from __future__ import annotations

import pytest

from service.errors import ConcurrencyLimitError, RateLimitError
from service.limits import KeyLimits


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


def left(limits: KeyLimits, key_id: str = "a") -> tuple[str, str]:
    headers = limits.headers(key_id)
    return headers["x-ratelimit-remaining-requests"], headers["x-ratelimit-reset-requests"]


def test_a_minutes_requests_may_come_at_once_and_no_more(clock: Clock) -> None:
    limits = KeyLimits(3, 0, clock)
    seen = []
    for _ in range(3):
        limits.enter("a")
        seen.append(left(limits))
    assert seen == [("2", "20s"), ("1", "40s"), ("0", "1m0s")]
    with pytest.raises(RateLimitError) as caught:
        limits.enter("a")
    assert caught.value.retry_after_seconds == 20
    assert left(limits) == ("0", "1m0s"), "what is refused costs nothing"
    limits.enter("b")  # another key has its own


@pytest.mark.parametrize("per_minute", [1, 7, 50, 60, 90, 1000, 60_000])
def test_the_time_that_it_names_is_enough_and_not_too_long(clock: Clock, per_minute: int) -> None:
    limits = KeyLimits(per_minute, 0, clock)
    for _ in range(per_minute):
        limits.enter("a")
    for _ in range(5):
        with pytest.raises(RateLimitError) as caught:
            limits.enter("a")
        seconds = caught.value.retry_after_seconds
        clock.time += seconds * 0.9
        with pytest.raises(RateLimitError):
            limits.enter("a")
        clock.time += seconds * 0.1
        limits.enter("a")


def test_a_long_rest_fills_the_bucket_once(clock: Clock) -> None:
    limits = KeyLimits(2, 0, clock)
    limits.enter("a")
    clock.time += 3600
    assert left(limits) == ("2", "0ms")
    limits.enter("a")
    limits.enter("a")
    with pytest.raises(RateLimitError):
        limits.enter("a")


def test_only_so_many_at_once(clock: Clock) -> None:
    limits = KeyLimits(0, 2, clock)
    limits.enter("a")
    limits.enter("a")
    with pytest.raises(ConcurrencyLimitError) as caught:
        limits.enter("a")
    assert caught.value.retry_after_seconds == 1
    limits.enter("b")
    limits.leave("a")
    limits.enter("a")
    assert limits.headers("a") == {}


def test_a_refusal_by_one_limit_costs_nothing_of_the_other(clock: Clock) -> None:
    limits = KeyLimits(2, 1, clock)
    limits.enter("a")
    for _ in range(5):
        with pytest.raises(ConcurrencyLimitError):
            limits.enter("a")
    limits.leave("a")
    limits.enter("a")
    limits.leave("a")
    with pytest.raises(RateLimitError) as caught:
        limits.enter("a")
    assert not isinstance(caught.value, ConcurrencyLimitError)
    clock.time += 30
    limits.enter("a")  # the refused one took no place


def test_without_limits_nothing_is_told_or_refused(clock: Clock) -> None:
    limits = KeyLimits(0, 0, clock)
    for _ in range(1000):
        limits.enter("a")
    assert limits.headers("a") == {}


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.0, "60ms"), (0.02, "40ms"), (0.06, "0ms"), (-58.94, "59s"), (-59.94, "1m0s")]
)
def test_times_are_told_as_openai_tells_them(clock: Clock, seconds: float, told: str) -> None:
    limits = KeyLimits(1000, 0, clock)
    limits.enter("a")
    # Turned back, the clock stands for a bucket that is emptier.
    clock.time += seconds
    assert left(limits)[1] == told
