"""Fused tokens to numbers for people: routing weights, entropy, contribution share (model.md section 6).

A gate weight is a ROUTING weight: the gate can be rescaled against its projector, so it is no measure
of importance. The contribution share is what reaches the output; reliance is measured in compare.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model_core.fusion.base import FusionOutput
from model_core.types import FusionWeights

#: Weights closer than this are a tie: a fresh gate gives exactly equal ones.
TIE = 1e-6
UNCALIBRATED = (
    "the checkpoint carries no means yet: the encoder that was taken away is replaced by zeros "
    "(training gathers them, or DualVisionModel.calibrate)"
)
UNTRAINED = "fusion is not trained: the second encoder changes nothing yet, and weights say nothing"


def describe_fusion(
    output: FusionOutput,
    names: Sequence[str],
    lengths: Sequence[int],
    *,
    is_trained: bool,
    is_calibrated: Sequence[bool] = (),
    warnings: Sequence[tuple[str, ...]] = (),
) -> list[FusionWeights]:
    """One entry an image.

    Args:
        lengths: rows of `output.tokens` that belong to each image.
        is_calibrated: for each image, False if an encoder was taken away and the checkpoint has no means.
        warnings: what decoding each image had to say.
    """
    table = None if output.weights is None else output.weights.detach().float().cpu().tolist()
    tokens = output.tokens.detach().float().split(list(lengths))
    is_parallel = output.q.shape == output.tokens.shape
    own = output.q.detach().float().split(list(lengths)) if is_parallel else None
    shares = None
    if output.contributions is not None:
        shares = {n: u.detach().float().split(list(lengths)) for n, u in output.contributions.items()}
    found = []
    for i in range(len(lengths)):
        weights = None if table is None else dict(zip(names, table[i], strict=True))
        notes = tuple(warnings[i]) if i < len(warnings) else ()
        if i < len(is_calibrated) and not is_calibrated[i]:
            notes = (*notes, UNCALIBRATED)
        found.append(
            FusionWeights(
                weights=weights,
                dominant_encoder=None if weights is None else dominant(weights),
                fusion_trained=is_trained,
                entropy=None if weights is None else entropy(weights),
                contribution=None
                if shares is None
                else contribution_share(tokens[i], {n: s[i] for n, s in shares.items()}),
                relative_update=None if own is None else _relative_update(tokens[i], own[i]),
                warnings=notes if is_trained else (*notes, UNTRAINED),
            )
        )
    return found


def dominant(weights: Mapping[str, float]) -> str:
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    return "tie" if len(ordered) > 1 and ordered[0][1] - ordered[1][1] <= TIE else ordered[0][0]


def entropy(weights: Mapping[str, float]) -> float:
    """0: one encoder takes all; 1: all the same."""
    return -sum(w * math.log(w) for w in weights.values() if w > 0) / math.log(len(weights))


def contribution_share(y: Tensor, parts: Mapping[str, Tensor]) -> dict[str, float] | None:
    """c_e = max(0, |y|_1 - |y - u_e|_1), normalised (ALTI, 2203.04212, section 3); None where all are 0.

    y, u_e: (N, D).
    """
    total = y.abs().sum()
    raw = {name: max(0.0, float(total - (y - u).abs().sum())) for name, u in parts.items()}
    norm = sum(raw.values())
    return {name: value / norm for name, value in raw.items()} if norm > 0 else None


def _relative_update(y: Tensor, q: Tensor) -> float | None:
    norm = float(torch.linalg.vector_norm(q))
    return float(torch.linalg.vector_norm(y - q)) / norm if norm > 0 else None


def summarise_weights(fusion: Sequence[FusionWeights] | None, encoders: Sequence[str]) -> dict[str, Any]:
    """`{name}_weight` averaged over images, `dominant_encoder`, and `images` one by one."""
    found = list(fusion or ())
    means = None
    if found and all(f.weights is not None for f in found):
        means = {name: sum(f.weights[name] for f in found) / len(found) for name in encoders}
    images = [
        {f"{name}_weight": None if f.weights is None else f.weights[name] for name in encoders}
        | {
            "dominant_encoder": f.dominant_encoder,
            "entropy": f.entropy,
            "contribution": None if f.contribution is None else dict(f.contribution),
            "relative_update": f.relative_update,
            "warnings": list(f.warnings),
        }
        for f in found
    ]
    return {f"{name}_weight": None if means is None else means[name] for name in encoders} | {
        "dominant_encoder": None if means is None else dominant(means),
        "entropy": None if means is None else entropy(means),
        "fusion_trained": all(f.fusion_trained for f in found),
        "images": images,
    }
