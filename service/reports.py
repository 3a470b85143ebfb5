"""FusionWeights and Comparisons as JSON objects: the vendor's part of every answer.

In: what the engine and the analysis report. Out: plain dictionaries. It refuses to know requests or routes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from model_core.analysis.compare import ArmResult, Comparison
from model_core.types import FusionWeights, Timings

#: A request's stages, in order; `Timings` has `{stage}_seconds` of each.
STAGES = ("queue", "preprocess", "encode", "prefill", "decode")


def fusion_entry(weights: FusionWeights, encoders: Sequence[str]) -> dict[str, Any]:
    """`{qwen_weight, dinov2_weight, dominant_encoder, warnings}`; weights null where there is no gate."""
    values = weights.weights
    entry: dict[str, Any] = {f"{name}_weight": None if values is None else values.get(name) for name in encoders}
    dominant = weights.dominant_encoder
    entry["dominant_encoder"] = dominant if dominant is not None or values is None else "tie"
    entry["warnings"] = list(weights.warnings)
    return entry


def fusion_entries(fusion: Iterable[FusionWeights], encoders: Sequence[str]) -> list[dict[str, Any]]:
    return [fusion_entry(weights, encoders) for weights in fusion]


def analysis_entry(index: int, weights: FusionWeights, encoders: Sequence[str]) -> dict[str, Any]:
    return {
        "index": index,
        **fusion_entry(weights, encoders),
        "entropy": weights.entropy,
        "contribution": None if weights.contribution is None else dict(weights.contribution),
        "relative_update": weights.relative_update,
        "fusion_trained": weights.fusion_trained,
    }


def mean_weights(fusion: Sequence[FusionWeights], encoders: Sequence[str]) -> dict[str, Any]:
    """The mean over images, and the encoder that dominates it."""
    gated = [weights.weights for weights in fusion if weights.weights is not None]
    if not gated:
        return {**{f"{name}_weight": None for name in encoders}, "dominant_encoder": None}
    means = {name: sum(weights.get(name, 0.0) for weights in gated) / len(gated) for name in encoders}
    first, second = sorted(means.values(), reverse=True)[:2] if len(means) > 1 else (1.0, 0.0)
    dominant = "tie" if first - second < 1e-6 else max(means, key=lambda name: means[name])
    return {**{f"{name}_weight": mean for name, mean in means.items()}, "dominant_encoder": dominant}


def to_comparison(comparison: Comparison, encoders: Sequence[str]) -> dict[str, Any]:
    """A Comparison as JSON: each arm's answer and likelihood, then the sums."""
    by_token = comparison.reliance_by_token
    reliance = comparison.reliance
    return {
        "fusion": [analysis_entry(i, weights, encoders) for i, weights in enumerate(comparison.fusion)],
        "answers": {arm: _arm_entry(result) for arm, result in comparison.arms.items()},
        "reliance": None
        if reliance is None or by_token is None
        else {name: {"sum": reliance[name], "tokens": list(by_token[name])} for name in reliance},
        "shapley": None if comparison.shapley is None else dict(comparison.shapley),
        "interaction": comparison.interaction,
        "encoder_seconds": dict(comparison.encoder_seconds),
    }


def _arm_entry(result: ArmResult) -> dict[str, Any]:
    answer = result.answer
    return {
        "content": answer.text,
        "finish_reason": answer.finish_reason,
        "completion_tokens": answer.usage.completion_tokens if answer.usage else 0,
        "same_as_fused": result.first_divergence is None,
        "first_divergence": result.first_divergence,
        "log_likelihood": None
        if result.log_likelihood is None
        else {
            "sum": result.log_likelihood,
            "mean": result.log_likelihood_per_token,
            "tokens": list(result.token_log_likelihoods),
        },
        "seconds": _seconds(answer.timings),
    }


def _seconds(timings: Timings | None) -> dict[str, Any] | None:
    if timings is None:
        return None
    stages = {stage: getattr(timings, f"{stage}_seconds") for stage in STAGES}
    return {**stages, "total": sum(stages.values()), "encoders": dict(timings.encoder_seconds)}
