"""Small real models and a byte tokenizer for tests: the true architectures, a few thousand parameters."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model_core.checkpoint import Loaded
from model_core.config import DualVisionConfig
from model_core.encoder import DualVisionEncoder
from model_core.model import DualVisionModel
from model_core.processing.processor import DualVisionProcessor

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif p.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, behind Qwen's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=SPECIAL[1:]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def token_id(token: str) -> int:
    return byte_tokenizer().convert_tokens_to_ids(token)


def qwen_config(*, tie: bool = True, context: int = 2048) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(byte_tokenizer()),
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.15,  # so that answers vary instead of repeating one token
            "tie_word_embeddings": tie,
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tie,
    )


def dinov2_config(*, registers: int = 0, **more: Any) -> Dinov2Config | Dinov2WithRegistersConfig:
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    shape |= more
    return Dinov2WithRegistersConfig(num_register_tokens=registers, **shape) if registers else Dinov2Config(**shape)


def dual_config(fusion: str = "gated", *, registers: int = 0, **settings: Any) -> DualVisionConfig:
    return DualVisionConfig.from_parts(qwen_config(), dinov2_config(registers=registers), fusion=fusion, **settings)


def qwen_model(seed: int = 0, *, tie: bool = True) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(qwen_config(tie=tie)).eval()


def dual_model(fusion: str = "gated", *, seed: int = 0, **settings: Any) -> DualVisionModel:
    """A fresh dual model on the weights of `qwen_model(seed)`."""
    torch.manual_seed(seed + 1)
    model = DualVisionModel(dual_config(fusion, **settings)).eval()
    model.load_state_dict(qwen_model(seed).state_dict(), strict=False)
    return model


def trained_model(fusion: str = "gated", *, seed: int = 0, **settings: Any) -> DualVisionModel:
    """A dual model whose fusion does something: every fusion tensor moved by noise."""
    model = dual_model(fusion, seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.fusion.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name in model.fusion.encoder_names:
            mean = getattr(model.fusion.means, name)
            mean.add_(torch.randn(mean.shape, generator=generator))
        model.fusion.means.count.fill_(1)
    return model


def processor(max_pixels: int = 112 * 112) -> DualVisionProcessor:
    return DualVisionProcessor(Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=max_pixels), byte_tokenizer())


def save_qwen(folder: Path, dtype: torch.dtype = torch.float32, *, tie: bool = True) -> Path:
    """Qwen's half as its own checkpoint."""
    qwen_model(tie=tie).to(dtype).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def save_dinov2(folder: Path, registers: int = 0, **more: Any) -> Path:
    torch.manual_seed(5)
    AutoModel.from_config(dinov2_config(registers=registers, **more)).save_pretrained(folder)
    return folder


def encoder(model: DualVisionModel | None = None, **kwargs: Any) -> DualVisionEncoder:
    model = model or trained_model()
    made = processor()
    made.tokens_per_cell = model.fusion.tokens_per_cell
    return DualVisionEncoder.from_loaded(Loaded(model, made), "tiny", **kwargs)


def pixels(*grids: tuple[int, int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random patches for these patch grids; a still image's two frames are the same."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for t, h, w in grids:
        frames = 1 if t == 1 else 2
        patch = torch.randn(t * h * w, 3, frames, 14 * 14, generator=generator)
        parts.append(patch.expand(-1, -1, 2, -1).reshape(t * h * w, -1))
    return torch.cat(parts), torch.tensor(grids)
