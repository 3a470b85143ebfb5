"""How far a load is from what the machine could do at most: arithmetic that is owed, weights that must be read.

A request owes its pictures' towers and its prompt at the speed of dense products, and for every token of the answer the
decoder's weights, read once a step for all streams together. What is left out (attention over the cache, norms,
sampling, HTTP) takes time all the same, so a share is a lower bound of how good the program is. In: a model, a load's
shape, the machine's two speeds, given or measured here. Out: shares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from model_core.analysis.flops import tower_flops
from model_core.model import DualVisionModel
from model_core.vision_tokens import Grid

Clock = Callable[[], float]
_SIDE, _STREAM_BYTES, _TRIES = 2048, 2**28, 5


@dataclass(frozen=True, slots=True)
class Peak:
    """Of one device and dtype: dense products and reading memory."""

    flops_per_second: float
    bytes_per_second: float


def measure_peak(device: torch.device, dtype: torch.dtype, clock: Clock) -> Peak:
    """The best of a few products of 2048 x 2048 and of a few products of a vector with 256 MiB."""
    square = torch.randn(_SIDE, _SIDE, device=device, dtype=dtype)
    columns = 4096
    wide = torch.zeros(_STREAM_BYTES // dtype.itemsize // columns, columns, device=device, dtype=dtype)
    row = torch.randn(columns, device=device, dtype=dtype)
    product = _best(lambda: square @ square, device, clock)
    stream = _best(lambda: wide @ row, device, clock)
    return Peak(2 * _SIDE**3 / product, wide.nbytes / stream)


def _best(work: Callable[[], Any], device: torch.device, clock: Clock) -> float:
    def timed() -> float:
        begin = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - begin

    timed()
    return min(timed() for _ in range(_TRIES))


@dataclass(frozen=True, slots=True)
class Floor:
    """What a request and a decode step take at least, in seconds on a machine that only did what is owed."""

    prompt_seconds: float
    step_seconds: float
    num_tokens: int

    def shares(self, figures: dict[str, float], concurrency: int) -> dict[str, float]:
        """`{what}_floor_share`: the floor over what was measured, of requests a second and of a step."""
        request = self.prompt_seconds + (self.num_tokens - 1) * self.step_seconds / concurrency
        found = {"request_floor_share": figures["requests_per_second"] * request}
        if figures.get("tpot_ms_p50"):
            found["step_floor_share"] = 1000 * self.step_seconds / figures["tpot_ms_p50"]
        return found


def floor_of(
    model: DualVisionModel,
    encoders: frozenset[str],
    grids: tuple[Grid, ...],
    num_prompt: int,
    num_tokens: int,
    peak: Peak,
) -> Floor:
    """Of one request.

    Args:
        encoders: those that its arm runs. grids: of its pictures, in patches. num_prompt: tokens of its prompt.
        num_tokens: of its answer.
    """
    language, head = model.model.language_model, model.lm_head.weight
    inside = [p for name, p in language.named_parameters() if not name.startswith("embed_tokens")]
    towers = sum(flops for grid in grids for name, flops in tower_flops(model.config, grid).items() if name in encoders)
    prompt = 2 * num_prompt * sum(p.numel() for p in inside if p.ndim == 2)
    read = sum(p.nbytes for p in inside) + head.nbytes
    return Floor((towers + prompt) / peak.flops_per_second, read / peak.bytes_per_second, num_tokens)
