"""DualVisionModel: Qwen2.5-VL whose image features are fused with a second encoder's.

It IS a `Qwen2_5_VLForConditionalGeneration`: only the features that its base model splices at the
image placeholders differ, so `generate`, PEFT, device maps, FSDP and other engines work as they do for Qwen.
Pixels become language-model tokens by `encode_images`, then `fuse`; `embed_images` is both. The engine keeps features
between the two, and has them from `infer_images`, the same encoders without gradients; training calls the two itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from model_core.config import DualVisionConfig
from model_core.encoders import build_encoders
from model_core.encoders.segments import install_segment_attention
from model_core.errors import ConfigError, InvalidRequestError
from model_core.fusion import FusionOutput, FusionStrategy, build_fusion
from model_core.language.rope import MropeLayout, mrope_positions
from model_core.types import ARM_REMOVES, Arm
from model_core.vision_tokens import Grid, cell_counts, cell_grids


class DualVisionBackbone(Qwen2_5_VLModel):
    """Qwen's base model plus the second encoder (kept under its own name) and `fusion`."""

    config: DualVisionConfig

    def __init__(self, config: DualVisionConfig) -> None:
        super().__init__(config)
        install_segment_attention(self.visual)
        self.encoders = build_encoders(config)  # a plain dict: adapters, not modules
        self.second_name = next(name for name in self.encoders if name != "qwen")
        self.add_module(self.second_name, self.encoders[self.second_name].build())
        self.fusion: FusionStrategy = build_fusion(config, {n: e.output_dim for n, e in self.encoders.items()})
        # Each mean by name: for the whole module transformers would cast the count as well.
        self._keep_in_fp32_modules_strict = {f"fusion.means.{name}" for name in self.encoders}
        self.post_init()

    @property
    def second(self) -> nn.Module:
        return getattr(self, self.second_name)

    def encoder_module(self, name: str) -> nn.Module:
        return self.visual if name == "qwen" else self.second

    @property
    def mrope_layout(self) -> MropeLayout:
        vision = self.config.vision_config
        return MropeLayout(vision.spatial_merge_size, vision.tokens_per_second, self.fusion.tokens_per_cell)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers initialises children first and each with its generic normal distribution, which
        # would break the identity at birth: a strategy that was not loaded is reset as a whole.
        if isinstance(module, FusionStrategy):
            if not any(getattr(p, "_is_hf_initialized", False) for p in module.parameters()):
                module.reset_parameters()
        else:
            super()._initialize_weights(module, is_custom_code)

    def embed_images(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor,
        arms: Sequence[Arm] | None = None,
        *,
        removed: Tensor | None = None,
        want_contributions: bool = False,
    ) -> FusionOutput:
        """Pixels to tokens of the language model: `encode_images`, then `fuse`.

        Args:
            pixel_values: (sum t*h*w, 3*f*p*p) CLIP-normalised patches in Qwen's order.
            grid_thw: (I, 3) patch grids; a video is one row.
            arms: what to take away, one an image; None is `fused` for all.
            removed: (I, E) bool instead of arms, for encoder dropout and coalitions.
            want_contributions: also return each encoder's share of the output.
        Returns:
            FusionOutput; the tokens of image i are rows of its own grid alone.
        """
        features = self.encode_images(pixel_values, grid_thw, self.needed_encoders(arms, removed))
        grids = cell_grids(grid_thw, self.config.merge_size)
        return self.fuse(features, grids, arms, removed=removed, want_contributions=want_contributions)

    def encode_images(self, pixel_values: Tensor, grid_thw: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Features (S, C_e) BEFORE fusion, by encoder name."""
        return {n: self.encoders[n].encode(self.encoder_module(n), pixel_values, grid_thw).tokens for n in names}

    def infer_images(self, pixel_values: Tensor, grid_thw: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """As `encode_images`, to rounding, by the shortest way that an encoder knows without gradients."""
        return {n: self.encoders[n].infer(self.encoder_module(n), pixel_values, grid_thw).tokens for n in names}

    def fuse(
        self,
        features: Mapping[str, Tensor],
        grids: tuple[Grid, ...],
        arms: Sequence[Arm] | None = None,
        *,
        removed: Tensor | None = None,
        want_contributions: bool = False,
    ) -> FusionOutput:
        """Fuse encoded images; `grids` are cells. An encoder left out of `features` counts as removed."""
        unfused = None
        if arms is not None:
            removed = self._removed(arms)
            unfused = torch.tensor([arm == "unfused" for arm in arms])
        return self.fusion(features, grids, removed, unfused, want_contributions)

    def needed_encoders(self, arms: Sequence[Arm] | None, removed: Tensor | None = None) -> list[str]:
        """The encoders that can change the output. While the second is silent (a fresh model) it is skipped,
        except in training, where its projector needs its features to get a gradient."""
        if arms is not None:
            removed = self._removed(arms)
        needed = [n for e, n in enumerate(self.encoders) if removed is None or not bool(removed[:, e].all())]
        if arms is not None and "unfused" in arms and "qwen" not in needed:
            needed.insert(0, "qwen")
        if not torch.is_grad_enabled() and not self.fusion.is_trained:
            needed = [n for n in needed if n == "qwen"]
        return needed

    def _removed(self, arms: Sequence[Arm]) -> Tensor:
        # An arm names the original's two encoders; a user's own second encoder stands in for DINOv2.
        names = {"qwen": "qwen", "dinov2": self.second_name}
        return torch.tensor([[n in {names[r] for r in ARM_REMOVES[arm]} for n in self.encoders] for arm in arms])

    def _features(self, pixel_values: Tensor, grid_thw: Tensor) -> BaseModelOutputWithPooling:
        output = self.embed_images(pixel_values, grid_thw)
        counts = cell_counts(cell_grids(grid_thw, self.config.merge_size))
        split = [n * self.fusion.tokens_per_cell for n in counts]
        return BaseModelOutputWithPooling(last_hidden_state=output.q, pooler_output=output.tokens.split(split))

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Fused tokens as `pooler_output`, one tensor (N, D) an image."""
        return self._features(pixel_values, image_grid_thw)

    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Fused tokens as `pooler_output`, one tensor (t*N, D) a video."""
        return self._features(pixel_values_videos, video_grid_thw)

    def get_rope_index(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """transformers' signature over the pure `mrope_positions`: (3, B, T) positions, (B, 1) deltas."""
        images = iter([] if image_grid_thw is None else [tuple(g) for g in image_grid_thw.tolist()])
        videos = iter([] if video_grid_thw is None else [tuple(g) for g in video_grid_thw.tolist()])
        seconds = iter([] if second_per_grid_ts is None else [float(s) for s in second_per_grid_ts])
        layout, n = self.mrope_layout, self.fusion.tokens_per_cell
        positions = torch.zeros(3, *input_ids.shape, dtype=torch.long)
        deltas = []
        for row, types in enumerate(mm_token_type_ids.tolist()):
            keep = [True] * len(types) if attention_mask is None else attention_mask[row].bool().tolist()
            kept = [kind for kind, is_kept in zip(types, keep, strict=True) if is_kept]
            row_images = _take(images, kept.count(1), layout.merge_size, n)
            row_videos = _take(videos, kept.count(2), layout.merge_size, n)
            row_seconds = [next(seconds, 1.0) for _ in row_videos]
            found, delta = mrope_positions(kept, row_images, row_videos, row_seconds, layout)
            positions[:, row, torch.tensor(keep)] = found
            deltas.append(delta)
        return positions.to(input_ids.device), torch.tensor(deltas, device=input_ids.device).unsqueeze(1)


def _take(grids: Any, num_tokens: int, merge_size: int, tokens_per_cell: int) -> list[tuple[int, int, int]]:
    """The next grids that fill `num_tokens` placeholders."""
    taken = []
    while num_tokens > 0:
        grid = next(grids, None)
        if grid is None:
            raise InvalidRequestError(
                "there are more image placeholders than images", value=f"{num_tokens} left over",
                allowed="a grid for every image and video in input_ids",
                fix="Take input_ids and the grids from one call of the processor",
            )  # fmt: skip
        taken.append(grid)
        num_tokens -= grid[0] * grid[1] * grid[2] // merge_size**2 * tokens_per_cell
    return taken


class DualVisionModel(Qwen2_5_VLForConditionalGeneration):
    """The whole model: `DualVisionBackbone` under `model`, Qwen's `lm_head`. Shapes as in transformers."""

    config: DualVisionConfig
    config_class = DualVisionConfig
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock", "Dinov2Layer", "Dinov2WithRegistersLayer"]

    def __init__(self, config: DualVisionConfig) -> None:
        if config.vision_config.out_hidden_size != config.llm_dim:
            raise ConfigError(
                "the vision tower's output is not as wide as the language model",
                value=config.vision_config.out_hidden_size,
                allowed=str(config.llm_dim),
                fix="Take config.json from one checkpoint, or set vision_config.out_hidden_size to this",
            )
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.loss_type = "ForConditionalGeneration"  # transformers looks it up by class name, and knows not ours
        self.model = DualVisionBackbone(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @property
    def fusion(self) -> FusionStrategy:
        return self.model.fusion

    def embed_images(self, *args: Any, **kwargs: Any) -> FusionOutput:
        """See `DualVisionBackbone.embed_images`."""
        return self.model.embed_images(*args, **kwargs)

    @torch.no_grad()
    def calibrate(self, batches: Any) -> int:
        """Gather the means m_e that the arms put in an absent encoder's place, over these images.

        Args:
            batches: iterable of (pixel_values, grid_thw).
        Returns:
            the number of tokens seen.
        Raises:
            InvalidRequestError: there was no batch; the means are left as they were.
        """
        count = self.fusion.means.set_from(self._project(*batch) for batch in batches)
        if not count:
            raise InvalidRequestError(
                "calibrate was given no images", value=0, allowed="at least one batch",
                fix="Give batches of (pixel_values, grid_thw); an iterator gives them only once",
            )  # fmt: skip
        return count

    def _project(self, pixel_values: Tensor, grid_thw: Tensor) -> dict[str, Tensor]:
        features = self.model.encode_images(pixel_values, grid_thw, self.model.encoders)
        return self.fusion.project(features, len(features["qwen"]))


def register() -> None:
    """Teach transformers' Auto classes the model type; a second call changes nothing."""
    AutoConfig.register(DualVisionConfig.model_type, DualVisionConfig, exist_ok=True)
    AutoModel.register(DualVisionConfig, DualVisionModel, exist_ok=True)
    AutoModelForImageTextToText.register(DualVisionConfig, DualVisionModel, exist_ok=True)


register()
