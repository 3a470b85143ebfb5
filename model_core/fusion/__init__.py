"""The fusion strategies that come with the project, by name. One file and one line add another."""

from __future__ import annotations

from collections.abc import Mapping

from model_core.config import DualVisionConfig
from model_core.errors import ConfigError
from model_core.fusion.base import FusionOutput, FusionStrategy
from model_core.fusion.concat import ConcatFusion
from model_core.fusion.cross_attention import CrossAttentionFusion
from model_core.fusion.gated import GatedFusion, TokenGatedFusion
from model_core.fusion.interleave import InterleaveFusion
from model_core.fusion.residual import GatedResidualFusion
from model_core.fusion.static import StaticFusion
from model_core.plugins import load_class

__all__ = ["STRATEGIES", "FusionOutput", "FusionStrategy", "build_fusion", "strategy_class"]

STRATEGIES: dict[str, type[FusionStrategy]] = {
    "gated": GatedFusion,
    "gated_residual": GatedResidualFusion,
    "token_gated": TokenGatedFusion,
    "concat": ConcatFusion,
    "cross_attention": CrossAttentionFusion,
    "interleave": InterleaveFusion,
    "static": StaticFusion,
}


def strategy_class(name: str) -> type[FusionStrategy]:
    return load_class(name, STRATEGIES, FusionStrategy, "fusion strategy")


def build_fusion(config: DualVisionConfig, dims: Mapping[str, int]) -> FusionStrategy:
    """The configured strategy over encoders of these widths, as it is at birth.

    Raises:
        ConfigError: unknown name; a common_dim below the LLM width without a residual path; static
            weights for a strategy that has none.
    """
    cls, common_dim = strategy_class(config.fusion), config.fusion_dim
    if common_dim < config.llm_dim and not cls.has_residual:
        raise ConfigError(
            f"common_dim {common_dim} is below the language model's width {config.llm_dim}, so "
            f"'{config.fusion}' would lose information before it is trained",
            value=common_dim,
            allowed=f"{config.llm_dim} or more",
            fix="Leave common_dim out, or choose a strategy with a residual path: "
            + ", ".join(name for name, strategy in STRATEGIES.items() if strategy.has_residual),
        )
    extra: dict[str, object] = {}
    if config.static_weights is not None:
        if not issubclass(cls, StaticFusion):
            raise ConfigError(
                "static_weights need fusion='static'", value=config.fusion, allowed="static",
                fix="Leave static_weights out, or name that fusion",
            )  # fmt: skip
        extra["weights"] = config.static_weights
    if issubclass(cls, CrossAttentionFusion):
        extra["merge_size"] = config.merge_size
    fusion = cls(dims, common_dim, config.dropout, **extra)
    if not next(fusion.parameters()).is_meta:
        fusion.reset_parameters()
    return fusion
