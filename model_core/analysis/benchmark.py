"""Times one question about one picture, stage by stage: warm-up first, synchronised, medians.

Encoder milliseconds each (one encode, counted once), prefill, time to first token, time per output
token, peak memory. Takes its clock as an argument; prints nothing.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from model_core.errors import ConfigError
from model_core.types import Engine, GenerationRequest

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Milliseconds are medians over `rounds`; peak memory is of the process on CPU, of the device on CUDA."""

    device: str
    dtype: str
    rounds: int
    prompt_tokens: int
    image_tokens: int
    output_tokens: int
    preprocess_ms: float
    prefill_ms: float
    ttft_ms: float
    tpot_ms: float
    peak_memory_bytes: int
    encoder_ms: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table."""
        encoders = [(f"encode {name}", f"{ms:.2f} ms") for name, ms in self.encoder_ms.items()]
        return [
            ("device, dtype", f"{self.device}, {self.dtype}"),
            ("rounds", str(self.rounds)),
            ("tokens: prompt (image), output", f"{self.prompt_tokens} ({self.image_tokens}), {self.output_tokens}"),
            ("preprocess", f"{self.preprocess_ms:.2f} ms"),
            *encoders,
            ("prefill", f"{self.prefill_ms:.2f} ms"),
            ("TTFT", f"{self.ttft_ms:.2f} ms"),
            ("TPOT", f"{self.tpot_ms:.2f} ms"),
            ("peak memory", f"{self.peak_memory_bytes / 2**20:.0f} MiB"),
        ]


def run_benchmark(
    engine: Engine, request: GenerationRequest, clock: Clock, *, rounds: int = 10, warmup: int = 2,
    prepare: Callable[[GenerationRequest], Any] | None = None,
) -> Benchmark:  # fmt: skip
    """Answer `request` alone, `warmup` + `rounds` times, end of turn ignored.

    Args:
        prepare: how to prepare a request; None is the engine's own (which opens no local path).
    """
    if rounds < 1 or warmup < 0:
        fix = "Measure at least one round, after 0 or more to warm up"
        raise ConfigError("the benchmark's rounds are out of range", value=rounds, allowed="1 or more", fix=fix)
    is_cuda = engine.info.device.startswith("cuda")
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(engine.info.device)
    samples: list[dict[str, float]] = []
    encoders: dict[str, list[float]] = {}
    request = replace(request, sampling=replace(request.sampling, ignore_eos=True))
    for round_number in range(warmup + rounds):
        one = replace(request, request_id=f"bench-{round_number}")
        sample, last = _one(engine, one, clock, prepare or engine.prepare)
        if round_number >= warmup:
            samples.append(sample)
            for name, seconds in last.timings.encoder_seconds.items():
                encoders.setdefault(name, []).append(seconds)

    def median(name: str) -> float:
        return 1000 * statistics.median(sample[name] for sample in samples)

    return Benchmark(
        device=engine.info.device,
        dtype=engine.info.dtype,
        rounds=rounds,
        prompt_tokens=last.usage.prompt_tokens,
        image_tokens=last.usage.image_tokens,
        output_tokens=last.usage.completion_tokens,
        preprocess_ms=median("preprocess"),
        prefill_ms=median("prefill"),
        ttft_ms=median("ttft"),
        tpot_ms=median("tpot"),
        peak_memory_bytes=torch.cuda.max_memory_allocated(engine.info.device) if is_cuda else _peak_rss_bytes(),
        encoder_ms={name: 1000 * statistics.median(seconds) for name, seconds in encoders.items()},
    )


def _one(engine: Engine, request: GenerationRequest, clock: Clock, prepare: Callable[..., Any]) -> tuple[dict, Any]:
    engine.reset_caches()  # the same picture again would be a look-up
    start = clock()
    engine.add_request(prepare(request))
    first = last = None
    while last is None:
        for event in engine.step():
            first = first if first is not None else clock()
            if event.error is not None:
                raise event.error
            if event.is_terminal:
                last = event
    steps = max(1, last.usage.completion_tokens - 1)
    sample = {
        "preprocess": last.timings.preprocess_seconds,
        "prefill": last.timings.prefill_seconds,
        "ttft": first - start,
        "tpot": (clock() - first) / steps,
    }
    return sample, last


def _peak_rss_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
