"""`dve-demo` before its first step: its architecture, its tokenizer, its picture format.

In: a seed and sizes; out: a model that was never trained, and its processor. Named as `new_model` of the demo's recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Dinov2Config, GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model_core.config import DualVisionConfig
from model_core.demo.alignment import attend_by_likeness
from model_core.demo.birth import attend_as_trained
from model_core.demo.tokenizer import build_tokenizer
from model_core.model import DualVisionModel
from model_core.processing.processor import DualVisionProcessor

MODEL_ID = "dve-demo"
#: Pictures are scaled to 25 to 36 cells: in fewer, four things are too small to be counted; two cores serve these.
MIN_PIXELS, MAX_PIXELS = 140 * 140, 168 * 168
CONTEXT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Sizes:
    """hidden: the language model's width, a multiple of 128; vision_hidden: both encoders', a multiple of 64."""

    hidden: int = 256
    llm_layers: int = 5
    vision_hidden: int = 192
    vision_layers: int = 6
    dinov2_layers: int = 6


def blank_model(*, seed: int, **sizes: int) -> tuple[DualVisionModel, DualVisionProcessor]:
    """A model at birth, a function of its arguments. sizes: as `Sizes` has them."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DualVisionModel(build_config(Sizes(**sizes), tokenizer))
    attend_by_likeness(model.model.language_model)
    attend_as_trained(model.model.visual, model.model.second, seed=seed)
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id
    )
    images = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    return model, DualVisionProcessor(images, tokenizer)


def build_config(sizes: Sizes, tokenizer: PreTrainedTokenizerFast) -> DualVisionConfig:
    """Qwen2.5-VL's and DINOv2's own architectures, small."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.get_added_vocab()}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.llm_layers,
        "num_attention_heads": sizes.hidden // 64,
        "num_key_value_heads": sizes.hidden // 128,
        "intermediate_size": sizes.hidden * 3,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
    }
    vision: dict[str, Any] = {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_hidden,
        "num_heads": sizes.vision_hidden // 64,
        "intermediate_size": 512,
        "out_hidden_size": sizes.hidden,
        "window_size": 112,
        "fullatt_block_indexes": [sizes.vision_layers // 2 - 1, sizes.vision_layers - 1],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
    }
    qwen = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    dinov2 = Dinov2Config(
        hidden_size=sizes.vision_hidden,
        num_hidden_layers=sizes.dinov2_layers,
        num_attention_heads=sizes.vision_hidden // 64,
        image_size=168,
        patch_size=14,
    )
    names = {"qwen_model_name": f"{MODEL_ID} (trained from scratch)", "dinov2_model_name": f"{MODEL_ID} (likewise)"}
    return DualVisionConfig.from_parts(qwen, dinov2, fusion="gated", **names)
