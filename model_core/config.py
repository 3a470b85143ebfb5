"""The model's configuration: Qwen2.5-VL's own, a second encoder's, and how the two are fused.

In: two Hugging Face configurations and the fusion settings; out: one `config.json`. It knows no weight
and no device. (transformers' configuration base imports torch, so this module is not torch-free.)
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, Qwen2_5_VLConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from model_core.errors import ConfigError

#: 518 px squared at patch 14, the resolution DINOv2 was last trained at (2304.07193, appendix B).
DINOV2_MAX_PATCHES = 1369


def check_dropout(dropout: float) -> None:
    """Raises ConfigError: it is no chance that leaves something."""
    if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        allowed, fix = "0 up to, not including, 1", "Leave it out for 0"
        raise ConfigError("dropout is out of range", value=dropout, allowed=allowed, fix=fix, param="dropout")


class DualVisionConfig(Qwen2_5_VLConfig):
    """Configuration of `DualVisionModel`.

    Adds to `Qwen2_5_VLConfig`:
        dinov2_config: configuration of the second encoder (`dinov2` or `dinov2_with_registers`).
        encoder: name of the second encoder, or `package.module:Class` for one of your own.
        fusion: name of the fusion strategy, or `package.module:Class` for one of your own.
        common_dim: width both encoders are projected to; None means the language model's width.
        dropout: on fused tokens, in training only.
        static_weights: the fixed weights of `fusion="static"`, one an encoder, summing to 1.
        dinov2_max_patches: above this many patches the second encoder sees a shrunk image and its
            features are resized back (budgeted mode, model.md section 3).
        qwen_model_name, dinov2_model_name: where the weights first came from; for people to read.
    """

    model_type = "dual_vision"
    sub_configs_defaults = {
        "vision_config": Qwen2_5_VLVisionConfig,
        "text_config": Qwen2_5_VLTextConfig,
        "dinov2_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov2"),
    }

    dinov2_config: Any = None
    encoder: str = "dinov2"
    fusion: str = "gated"
    common_dim: int | None = None
    dropout: float = 0.0
    static_weights: list[float] | None = None
    dinov2_max_patches: int = DINOV2_MAX_PATCHES
    qwen_model_name: str | None = None
    dinov2_model_name: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_dropout(self.dropout)
        if self.dinov2_max_patches < 4:
            raise ConfigError(
                "dinov2_max_patches is too small", value=self.dinov2_max_patches, allowed="4 (one cell) or more",
                fix=f"Raise it, or leave it out for {DINOV2_MAX_PATCHES}",
            )  # fmt: skip
        if self.common_dim is not None and self.common_dim < 1:
            raise ConfigError(
                "common_dim is out of range", value=self.common_dim, allowed="a positive integer or null",
                fix="Leave it out for the language model's width",
            )  # fmt: skip

    @classmethod
    def from_parts(cls, qwen: Qwen2_5_VLConfig, second: PreTrainedConfig, **fusion_settings: Any) -> DualVisionConfig:
        """Combine two loaded configurations, changing nothing in either."""
        base = qwen.to_dict()
        for key in ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map"):
            base.pop(key, None)
        return cls(**base, dinov2_config=second.to_dict(), **fusion_settings)

    @property
    def llm_dim(self) -> int:
        return self.text_config.hidden_size

    @property
    def fusion_dim(self) -> int:
        """common_dim with its default resolved."""
        return self.common_dim if self.common_dim is not None else self.llm_dim

    @property
    def merge_size(self) -> int:
        return self.vision_config.spatial_merge_size
