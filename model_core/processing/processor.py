"""DualVisionProcessor: transformers' side of preprocessing, for `generate` and for other engines.

Text with one placeholder an image in, model inputs out, like Qwen2_5_VLProcessor, with two differences:
videos are lists of frames (no torchvision), and a strategy may ask for more than one token a cell.
The service and the trainer use `batch.prepare_inputs`, which also keeps user text out of control tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model_core.config import DualVisionConfig
from model_core.encoders.base import PixelSpec
from model_core.errors import ConfigError, InvalidRequestError
from model_core.fusion import strategy_class
from model_core.processing.chat import SpecialIds
from model_core.processing.images import Patches, PatchSpec, frames_to_patches, normalise, open_image


class DualVisionProcessor(ProcessorMixin):
    """image_processor: Qwen's, which holds the pixel budget; tokenizer: Qwen's; both saved beside the model."""

    return_mm_token_type_ids = True

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.tokens_per_cell = 1
        self.special = SpecialIds.from_tokenizer(tokenizer)
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = self.special.image, self.special.video
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, config: DualVisionConfig | None = None, **kwargs: Any
    ) -> DualVisionProcessor:
        """From a dual checkpoint or from a Qwen2.5-VL one; hub id or folder."""
        hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        processor = cls(Qwen2VLImageProcessorPil.from_pretrained(name, **hub), tokenizer)
        if config is None:
            found = DualVisionConfig.get_config_dict(name, **hub)[0]
            config = (
                DualVisionConfig.from_dict(found) if found.get("model_type") == DualVisionConfig.model_type else None
            )
        if config is not None:
            processor.tokens_per_cell = strategy_class(config.fusion).tokens_per_cell
        return processor

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """tokenizer files and `preprocessor_config.json`."""
        self.image_processor._processor_class = self.__class__.__name__
        self.tokenizer._processor_class = self.__class__.__name__
        return [
            *self.tokenizer.save_pretrained(save_directory, **kwargs),
            *self.image_processor.save_pretrained(save_directory, **kwargs),
        ]

    @property
    def patch_spec(self) -> PatchSpec:
        p = self.image_processor
        return PatchSpec(
            patch_size=p.patch_size,
            merge_size=p.merge_size,
            temporal_patch_size=p.temporal_patch_size,
            min_pixels=p.size["shortest_edge"],
            max_pixels=p.size["longest_edge"],
            image_mean=tuple(p.image_mean),
            image_std=tuple(p.image_std),
        )

    def check_patches(self, config: DualVisionConfig) -> None:
        """DINOv2's pixels are recovered from Qwen's, so both sides must mean the same patches. Raises ConfigError."""
        given, expected = self.patch_spec, PixelSpec.from_config(config)
        for name in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"):
            if getattr(given, name) != getattr(expected, name):
                raise ConfigError(
                    f"the preprocessor's {name} is not the model's",
                    value=getattr(given, name),
                    allowed=str(getattr(expected, name)),
                    fix="Take preprocessor_config.json and config.json from one checkpoint",
                )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Sequence[Sequence[Image.Image]] | None = None,
        *,
        fps: float | Sequence[float] = 2.0,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of `DualVisionModel.generate`.

        Args:
            images: PIL images (or bytes) in the order of their placeholders over all texts.
            text: one text or several, with `<|image_pad|>` / `<|video_pad|>` once an image or video.
            videos: lists of frames; `apply_chat_template` gives a list of those for each conversation.
            fps: frames a second, one number or one a video.
        Returns:
            input_ids, attention_mask, mm_token_type_ids (B, T); pixel_values (N, 1176),
            image_grid_thw (I, 3); likewise for videos, with second_per_grid_ts.
        """
        if return_tensors != "pt":
            raise InvalidRequestError(
                "only PyTorch tensors are made", value=return_tensors, allowed="pt",
                fix="Leave return_tensors out, and convert the tensors afterwards",
            )  # fmt: skip
        texts = [text] if isinstance(text, str) else list(text or [])
        stills = [] if images is None else [images] if isinstance(images, (bytes, Image.Image)) else _flatten(images)
        clips = _clips(videos)
        spec = self.patch_spec
        image_patches = [frames_to_patches([_rgb(image)], spec) for image in stills]
        video_patches = [frames_to_patches([_rgb(frame) for frame in clip], spec) for clip in clips]
        data = self._text(texts, image_patches, video_patches, kwargs.get("padding_side", "left")) if texts else {}
        if image_patches:
            data |= _pixels(image_patches, spec, "pixel_values", "image_grid_thw")
        if video_patches:
            rates = [float(fps)] * len(clips) if isinstance(fps, (int, float)) else [float(f) for f in fps]
            data |= _pixels(video_patches, spec, "pixel_values_videos", "video_grid_thw")
            data["second_per_grid_ts"] = torch.tensor([spec.temporal_patch_size / rate for rate in rates])
        return BatchFeature(data)

    def _text(
        self, texts: list[str], images: list[Patches], videos: list[Patches], side: str
    ) -> dict[str, torch.Tensor]:
        queues = {1: iter(images), 2: iter(videos)}
        rows = []
        for one in texts:
            ids: list[int] = []
            types: list[int] = []
            for token in self.tokenizer.encode(one, add_special_tokens=False):
                kind = {self.image_token_id: 1, self.video_token_id: 2}.get(token, 0)
                n = 1 if not kind else self._count(next(queues[kind], None))
                ids, types = ids + [token] * n, types + [kind] * n
            rows.append((ids, types))
        if any(next(queue, None) is not None for queue in queues.values()):
            raise InvalidRequestError(
                "there are more images than placeholders", value=len(images) + len(videos),
                allowed="a placeholder in the text for each",
                fix="Write one for each, as apply_chat_template does, or leave images out",
            )  # fmt: skip
        length = max(len(ids) for ids, _ in rows)

        def padded(values: list[int], fill: int) -> list[int]:
            fills = [fill] * (length - len(values))
            return fills + values if side == "left" else values + fills

        return {
            "input_ids": torch.tensor([padded(ids, self.tokenizer.pad_token_id) for ids, _ in rows]),
            "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows]),
            "mm_token_type_ids": torch.tensor([padded(types, 0) for _, types in rows]),
        }

    def _count(self, patches: Patches | None) -> int:
        if patches is None:
            raise InvalidRequestError(
                "there are more image placeholders than images", value="none left for a placeholder",
                allowed="an image or a video for each", fix="Give the missing ones, or take placeholders out",
            )  # fmt: skip
        t, h, w = patches.grid
        return t * h * w // self.image_processor.merge_size**2 * self.tokens_per_cell

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **_: Any) -> dict[str, list[int]]:
        """Placeholders needed for images of (height, width); other engines ask before they see pixels."""
        sizes = image_sizes or []
        patches = [self.image_processor.get_number_of_image_patches(*size, {}) for size in sizes]
        per_cell = self.image_processor.merge_size**2
        tokens = [n // per_cell * self.tokens_per_cell for n in patches]
        return {"num_image_tokens": tokens, "num_image_patches": patches}

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"]


def _flatten(images: Any) -> list[Any]:
    return [x for item in images for x in (item if isinstance(item, (list, tuple)) else [item])]


def _clips(videos: Any) -> list[Sequence[Any]]:
    """Lists of frames, from one list of them or one a conversation."""
    clips = list(videos or [])
    is_nested = any(isinstance(item, (list, tuple)) for clip in clips for item in clip)
    return [clip for item in clips for clip in item] if is_nested else clips


def _rgb(image: Any) -> Image.Image:
    return open_image(image, allow_paths=False).image


def _pixels(patches: list[Patches], spec: PatchSpec, pixels: str, grid: str) -> dict[str, torch.Tensor]:
    values = normalise(np.concatenate([p.pixels for p in patches]), spec)
    return {pixels: torch.from_numpy(values), grid: torch.tensor([p.grid for p in patches])}


AutoProcessor.register(DualVisionConfig, DualVisionProcessor, exist_ok=True)
