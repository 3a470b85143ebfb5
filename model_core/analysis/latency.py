"""Speed of a closed loop of requests, in the terms of `vllm bench serve`. Pure arithmetic: no torch, no clock.

For one request:
    TTFT  sent to the first piece of the answer.
    E2E   sent to the last.
    TPOT  (E2E - TTFT) / (tokens - 1), where there are two tokens or more.
    ITL   each gap between two pieces; those of all requests are taken together.
For a round: answered requests and their output tokens, each over the time from the first sent to the last ended.
Percentiles are interpolated linearly, as numpy's are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

#: Figures of which two contenders are compared. Above 1 is better for the first two, below 1 for the rest.
THROUGHPUTS = ("requests_per_second", "output_tokens_per_second")
LATENCIES = tuple(f"{name}_ms_{at}" for name in ("ttft", "tpot", "itl", "e2e") for at in ("p50", "p95", "mean"))
STAGES = ("queue", "preprocess", "encode", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """One request. `start`, `pieces` and `end` are readings of one clock, in seconds.

    pieces: when each piece of the answer came; empty where the answer comes whole.
    end: when the last of it came. error: what went wrong, None for an answer.
    """

    start: float
    end: float
    pieces: tuple[float, ...] = ()
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    error: str | None = None

    @property
    def e2e(self) -> float:
        return self.end - self.start

    @property
    def ttft(self) -> float | None:
        return self.pieces[0] - self.start if self.pieces else None

    @property
    def tpot(self) -> float | None:
        if self.ttft is None or self.num_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.num_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.pieces)]


@dataclass(frozen=True, slots=True)
class LoadRound:
    """One round of one contender.

    num_short: answers with fewer tokens than were asked for, which make a throughput incomparable.
    figures: by name; THROUGHPUTS, LATENCIES (milliseconds) and whatever else was measured.
    """

    num_ok: int
    num_errors: int
    num_short: int
    first_error: str | None
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Level:
    """The rounds of one concurrency, by contender; as many of each."""

    concurrency: int
    rounds: Mapping[str, list[LoadRound]]

    def medians(self, name: str) -> dict[str, float]:
        """Each figure's median over the rounds that have it."""
        found: dict[str, list[float]] = {}
        for one in self.rounds[name]:
            for key, value in one.figures.items():
                found.setdefault(key, []).append(value)
        return {key: statistics.median(values) for key, values in found.items()}

    def ratios(self) -> dict[str, float]:
        """The first contender's figure over the second's, round by round; the medians of those. Empty for one."""
        names = list(self.rounds)
        if len(names) < 2:
            return {}
        pairs = list(zip(self.rounds[names[0]], self.rounds[names[1]], strict=True))
        found = {}
        for key in (*THROUGHPUTS, *LATENCIES):
            quotients = [a.figures[key] / b.figures[key] for a, b in pairs if key in a.figures and b.figures.get(key)]
            if quotients:
                found[key] = statistics.median(quotients)
        return found

    def to_dict(self) -> dict[str, object]:
        return {
            "concurrency": self.concurrency,
            "rounds": {name: [asdict(one) for one in rounds] for name, rounds in self.rounds.items()},
            "medians": {name: self.medians(name) for name in self.rounds},
            "ratios": self.ratios(),
        }


def alternate(names: Sequence[str], num_rounds: int) -> Iterator[str]:
    """A B A B ...: whatever drifts on the machine falls on both contenders alike."""
    for _ in range(num_rounds):
        yield from names


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks. `values` may be in any order and must not be empty."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(timings: Sequence[RequestTiming], seconds: float, num_tokens: int) -> LoadRound:
    """A round's figures. A latency that no request has is left out.

    Args:
        seconds: from the first request sent to the last ended.
        num_tokens: asked for in each answer.
    """
    answered = [one for one in timings if one.error is None]
    errors = [one.error for one in timings if one.error is not None]
    figures = {
        "requests_per_second": len(answered) / seconds,
        "output_tokens_per_second": sum(one.num_tokens for one in answered) / seconds,
    }
    if answered:
        figures["prompt_tokens"] = statistics.fmean(one.num_prompt_tokens for one in answered)
    spreads = {
        "ttft": [one.ttft for one in answered if one.ttft is not None],
        "tpot": [one.tpot for one in answered if one.tpot is not None],
        "itl": [gap for one in answered for gap in one.gaps],
        "e2e": [one.e2e for one in answered],
    }
    for name, values in spreads.items():
        if values:
            figures[f"{name}_ms_p50"] = 1000 * percentile(values, 50)
            figures[f"{name}_ms_p95"] = 1000 * percentile(values, 95)
            figures[f"{name}_ms_mean"] = 1000 * statistics.fmean(values)
    return LoadRound(
        num_ok=len(answered),
        num_errors=len(errors),
        num_short=sum(one.num_tokens < num_tokens for one in answered),
        first_error=errors[0] if errors else None,
        seconds=seconds,
        figures=figures,
    )


def stage_shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """`{stage}_time_share`: of the time that requests spent in all stages. Requests of one batch count the batch's
    time each, so this tells where requests wait, not what the machine computes."""
    total = sum(seconds.values())
    return {f"{name}_time_share": value / total for name, value in seconds.items()} if total > 0 else {}


def hit_ratios(hits: Mapping[str, float], lookups: Mapping[str, float]) -> dict[str, float]:
    """`{cache}_cache_hit_ratio` of every cache that was asked at all."""
    return {f"{name}_cache_hit_ratio": hits.get(name, 0.0) / asked for name, asked in lookups.items() if asked > 0}
