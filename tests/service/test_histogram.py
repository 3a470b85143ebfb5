"""The cheap histogram shows what prometheus_client's own shows, loses nothing between threads, and holds little."""

import random
import sys
import threading

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from service import histogram
from service.histogram import Histogram

BUCKETS = (0.001, 0.01, 0.1, 1.0, 2.5)


def exposition(registry: CollectorRegistry) -> list[str]:
    """Without the time at which prometheus_client made its own."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_it_shows_what_the_librarys_own_shows() -> None:
    rng, registries = random.Random(0), [CollectorRegistry(), CollectorRegistry()]
    # Multiples of 1/1024 add up to the same sum in any order.
    values = [*BUCKETS, 0.0, 3.0, 1e9, *(rng.randrange(4096) / 1024 for _ in range(500))]
    for kind, registry in zip((prometheus_client.Histogram, Histogram), registries, strict=True):
        plain = kind("dve_plain_seconds", "Plain.", (), buckets=BUCKETS, registry=registry)
        labelled = kind("dve_by_seconds", "By two.", ("a", "b"), buckets=BUCKETS, registry=registry)
        kind("dve_unseen_seconds", "Nobody came.", ("a",), buckets=BUCKETS, registry=registry)
        for number, value in enumerate(values):
            plain.observe(value)
            labelled.labels("x", str(number % 3)).observe(value)
    theirs, ours = map(exposition, registries)
    assert ours == theirs
    assert 'dve_by_seconds_bucket{a="x",b="2",le="2.5"}' in "\n".join(ours)


def test_a_name_is_taken_once() -> None:
    registry = CollectorRegistry()
    Histogram("dve_x_seconds", "One.", (), buckets=BUCKETS, registry=registry)
    with pytest.raises(ValueError, match="dve_x_seconds"):
        Histogram("dve_x_seconds", "Another.", (), buckets=BUCKETS, registry=registry)


def test_threads_that_observe_while_others_read_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histogram, "_MAX_PENDING", 16)
    registry = CollectorRegistry()
    metric = Histogram("dve_x_seconds", "Busy.", ("who",), buckets=BUCKETS, registry=registry)
    seen: list[float] = []
    done = threading.Event()

    def write(who: str) -> None:
        for _ in range(5000):
            metric.labels("shared").observe(0.5)
            metric.labels(who).observe(0.5)

    def read() -> None:
        while not done.is_set():
            seen.append(registry.get_sample_value("dve_x_seconds_count", {"who": "shared"}) or 0.0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        reader, writers = threading.Thread(target=read), [threading.Thread(target=write, args=(w,)) for w in "abcd"]
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        reader.join()
    finally:
        sys.setswitchinterval(interval)
    for who, count in (("shared", 20_000), *((w, 5000) for w in "abcd")):
        assert registry.get_sample_value("dve_x_seconds_count", {"who": who}) == count
        assert registry.get_sample_value("dve_x_seconds_sum", {"who": who}) == count / 2
    assert seen == sorted(seen)


def test_a_value_waits_in_bounded_room() -> None:
    tally = histogram.Tally((1.0, float("inf")))
    for _ in range(3 * histogram._MAX_PENDING + 5):
        tally.observe(0.5)
    assert len(tally._pending) == 5
    assert tally.read() == ([3 * histogram._MAX_PENDING + 5] * 2, (3 * histogram._MAX_PENDING + 5) / 2)
