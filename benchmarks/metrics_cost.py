"""What the metrics cost: the same application over the same engine, with its metrics and without, turn and turn about.

    python -m benchmarks.metrics_cost [--rounds 30] [--streams 8] [--tokens 48] [--free]

Without: every counter, gauge and histogram does nothing, no request is recorded, no step observed. With: all of them.
The engine is the demo model's, on one thread, since threads that spin while they wait would be counted too; `--free`
takes one that costs nothing, so that only the service is left: the worst case. A round's cost is the CPU time of the
process, all threads, with the sorting of what its histograms put down (histogram.py), which a scrape would do later;
what is compared are neighbours, so that a drift of the machine is in both. A scrape, its sorting done, is timed by
itself and counted as often as the shipped Prometheus comes. Bar: 2 % of throughput.

It exits with 0 only if the whole interval is within the bar: one that reaches over it has not shown that the bar holds,
whatever its median. More rounds make it narrower.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import service.admission
import service.main
from benchmarks.api_overhead import FreeEngine, call
from model_core.types import EngineStats, TokenEvent
from service.histogram import Histogram
from service.metrics import Metrics
from service.settings import JobSettings, Settings

_BAR = 0.02
#: As deploy/prometheus has it.
_SCRAPE_EVERY_SECONDS = 15.0


class Nothing:
    """A metric, and a recorder, that do nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def labels(self, *_: object) -> Nothing:
        return self

    def inc(self, *_: object) -> None: ...

    def observe(self, *_: object) -> None: ...

    def set(self, *_: object) -> None: ...

    def finish(self, *_: object) -> None: ...

    def clear(self) -> None: ...


class AllMetrics(Metrics):
    """The application's metrics, which knows its histograms."""

    def __init__(self) -> None:
        self.histograms: list[Histogram] = []
        super().__init__()

    def _histogram(self, *args: Any) -> Histogram:
        self.histograms.append(super()._histogram(*args))
        return self.histograms[-1]

    def sort(self) -> None:
        for histogram in self.histograms:
            histogram.sort()


class NoMetrics(Metrics):
    """The application's metrics, none of which counts."""

    def _counter(self, *_: Any) -> Any:
        return Nothing()

    _gauge = _histogram = _counter

    def observe_step(self, events: Sequence[TokenEvent]) -> None: ...

    def observe_turn(self, before: EngineStats, after: EngineStats) -> None: ...

    def sort(self) -> None: ...

    def set_caches(self, stats: EngineStats) -> None: ...

    def exposition(self) -> bytes:
        return b""


class Side:
    """One application. Its recorder is put in place for the time of a round."""

    def __init__(self, metrics: type[AllMetrics | NoMetrics], engine: Any, streams: int) -> None:
        self._recorder = service.admission.RequestRecorder if metrics is AllMetrics else Nothing
        with replaced(service.main, "Metrics", metrics):
            folder = Path(tempfile.mkdtemp())
            settings = Settings(max_num_seqs=streams, log_level="error", data_dir=folder)
            self.app, self.client = service.main.build_app(settings, JobSettings(data_dir=folder), lambda: engine)

    async def round(self, bodies: Sequence[bytes]) -> float:
        """CPU seconds of all requests at once."""
        with replaced(service.admission, "RequestRecorder", self._recorder):
            begin = time.process_time()
            answers = await asyncio.gather(*(call(self.app, body) for body in bodies))
            self.app.state.parts.metrics.sort()
            spent = time.process_time() - begin
        if {status for status, _ in answers} != {200}:
            raise SystemExit(f"a request was answered with {[status for status, _ in answers]}")
        return spent

    def scrape(self) -> float:
        """CPU seconds of one."""
        parts, begin = self.app.state.parts, time.process_time()
        bridge = parts.client.bridge()
        parts.metrics.set_bridge(bridge)
        parts.metrics.set_caches(bridge.stats)
        parts.metrics.exposition()
        return time.process_time() - begin


@contextmanager
def replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def bodies_of(rng: random.Random, args: argparse.Namespace, model: str) -> list[bytes]:
    """Streams, each of its own text, so that no prompt is in a cache."""
    asked = {"model": model, "max_tokens": args.tokens, "ignore_eos": True, "stream": True}
    texts = [f"what is number {rng.randrange(10**9)}?" for _ in range(args.streams)]
    return [json.dumps(asked | {"messages": [{"role": "user", "content": text}]}).encode() for text in texts]


async def measure(args: argparse.Namespace) -> tuple[list[tuple[float, float]], float]:
    """CPU seconds with and without, round by round; and of a scrape."""
    engine: Any = FreeEngine() if args.free else demo_engine(args.streams)
    sides = [Side(AllMetrics, engine, args.streams), Side(NoMetrics, engine, args.streams)]
    rng, model = random.Random(args.seed), engine.info.model_id
    found: list[tuple[float, float]] = []
    scrapes: list[float] = []
    for side in sides:
        side.client.start()
        await side.client.wait_loaded()
    try:
        for number in range(args.rounds + 2):
            order = (0, 1) if number % 2 else (1, 0)
            spent = {index: await sides[index].round(bodies_of(rng, args, model)) for index in order}
            if number >= 2:  # the first rounds warm up
                found.append((spent[0], spent[1]))
                scrapes.append(sides[0].scrape())
    finally:
        for side in sides:
            await side.client.stop()
            side.app.state.parts.desk.store.close()
    return found, statistics.median(scrapes)


def demo_engine(streams: int) -> Any:
    import torch  # which --free does without

    from model_core.encoder import DualVisionEncoder
    from model_core.engine.config import EngineConfig

    torch.set_num_threads(1)
    encoder = DualVisionEncoder(engine_config=EngineConfig(max_num_seqs=streams, kv_cache_bytes=64 * 2**20))
    encoder.warm_up()
    return encoder.engine


def interval(ratios: Sequence[float], seed: int) -> tuple[float, float, float]:
    """The median, and its 95 % interval by resampling."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--free", action="store_true", help="an engine that costs nothing")
    args = parser.parse_args(argv)
    logging.disable(logging.INFO)
    try:
        found, scrape_seconds = asyncio.run(measure(args))
    finally:
        logging.disable(logging.NOTSET)
    # Throughput for the same processor time: without over with.
    scraping = scrape_seconds / _SCRAPE_EVERY_SECONDS
    lost, low, high = interval([1 - without / with_ + scraping for with_, without in found], args.seed)
    tokens = args.streams * args.tokens
    table = Table("what", "measured", "bar")
    for name, index in (("with metrics", 0), ("without", 1)):
        seconds = statistics.median(pair[index] for pair in found)
        table.add_row(f"{name}, CPU", f"{seconds / tokens * 1e6:.1f} us a token", "")
    table.add_row("a scrape, CPU", f"{scrape_seconds * 1e3:.1f} ms", "")
    table.add_row("throughput lost", f"{lost:+.2%} (95 %: {low:+.2%} to {high:+.2%})", f"{_BAR:.0%}")
    Console().print(table)
    return int(high > _BAR)


if __name__ == "__main__":
    raise SystemExit(main())
