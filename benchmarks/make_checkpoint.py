"""Write random checkpoints of the real architectures, to measure speed with: weights that mean nothing cost the same.

    python benchmarks/make_checkpoint.py OUT tiny|mid|3b|7b

OUT/qwen and OUT/dinov2 are in the format of the public checkpoints, which transformers, other servers and this project
(`--qwen_model_name OUT/qwen --dinov2_model_name OUT/dinov2`) load. OUT/dual is both with a fusion between them that is
not the identity, so that the second encoder does change the answer and is not skipped.

| size | qwen | dinov2 | dtype | disk, all three |
|---|---|---|---|---|
| tiny | 9.5 M | 3.0 M | float32 | 0.1 GB |
| mid | 450 M | 22 M | bfloat16 | 2 GB |
| 3b | 3.75 B, the public shape | DINOv2-L | bfloat16 | 16 GB |
| 7b | 8.29 B, the public shape | DINOv2-L | bfloat16 | 34 GB |

`--parts dual` writes that folder alone, half of the disk. The memory taken is that of the weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model_core.analysis.workload import draw_picture
from model_core.checkpoint import assemble, quiet_unless_terminal, save_checkpoint
from model_core.config import DualVisionConfig
from model_core.model import DualVisionModel
from model_core.processing.images import decode_image, normalise, to_patches
from model_core.processing.processor import DualVisionProcessor

PARTS = ("qwen", "dinov2", "dual")
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TRAINED_VOCAB = 4096
MIN_PIXELS, MAX_PIXELS = 56 * 56, 1280 * 28 * 28
#: Of the second encoder's projector: moves the tokens by a tenth to a third of their length.
FUSION_STD = 0.002

#: One placeholder an image; parts may be named as OpenAI's API does or as Qwen does.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Shape:
    """Widths, depths and heads of one size; `vocab` 0 is the tokenizer's own, `ties` shares it with the head."""

    text: dict[str, int]
    vision: dict[str, int]
    dinov2: dict[str, int]
    mrope_section: tuple[int, int, int]
    dtype: torch.dtype = torch.bfloat16
    vocab: int = 0
    ties: bool = True


def _text(width: int, depth: int, heads: int, kv_heads: int, inner: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
    }


def _vision(width: int, depth: int, heads: int, inner: int) -> dict[str, int]:
    return {"hidden_size": width, "depth": depth, "num_heads": heads, "intermediate_size": inner}


def _dinov2(width: int, depth: int, heads: int) -> dict[str, int]:
    return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}


_REAL_VISION, _DINOV2_L = _vision(1280, 32, 16, 3420), _dinov2(1024, 24, 16)
SHAPES = {
    "tiny": Shape(
        _text(256, 6, 4, 2, 768), _vision(192, 6, 3, 512), _dinov2(192, 6, 3), (8, 12, 12), dtype=torch.float32
    ),
    "mid": Shape(_text(896, 24, 14, 2, 4864), _vision(640, 16, 10, 1712), _dinov2(384, 12, 6), (8, 12, 12)),
    # As Qwen/Qwen2.5-VL-3B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct and facebook/dinov2-large have them.
    "3b": Shape(_text(2048, 36, 16, 2, 11008), _REAL_VISION, _DINOV2_L, (16, 24, 24), vocab=151936),
    "7b": Shape(_text(3584, 28, 28, 4, 18944), _REAL_VISION, _DINOV2_L, (16, 24, 24), vocab=152064, ties=False),
}


def build_tokenizer(vocab_size: int = 0, num_files: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the standard library's sources: English enough, and on every machine.

    vocab_size: filled up to it with words that no text is split into but that every id has, since a random model
    answers with any id; 0 leaves it as learnt.
    """
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:num_files]
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED_VOCAB,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learnt.train([str(path) for path in sources], trainer)
    described = json.loads(learnt.to_str())["model"]
    vocab, merges = described["vocab"], [tuple(pair) for pair in described["merges"]]
    space = "\u0120"  # how byte-level BPE writes a space
    for token_id in range(len(vocab), vocab_size):
        vocab[f"{space}word{token_id}"] = token_id
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen_config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    depth = shape.vision["depth"]
    # Layers that look at the whole picture: four as in the public model, two in a shallow tower.
    stride = depth // (4 if depth >= 32 else 2)
    ends = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    return Qwen2_5_VLConfig(
        text_config={
            **shape.text,
            **ends,
            "pad_token_id": ids["<|endoftext|>"],
            "vocab_size": max(shape.vocab, len(tokenizer)),
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": shape.ties,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": list(shape.mrope_section),
            },
        },
        vision_config={
            **shape.vision,
            "fullatt_block_indexes": list(range(stride - 1, depth, stride)),
            "out_hidden_size": shape.text["hidden_size"],
            "window_size": 112,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=shape.ties,
    )


def build_parts(shape: Shape, device: str) -> tuple[Any, Any, PreTrainedTokenizerFast]:
    """Qwen, DINOv2 and a tokenizer, random from seed 0, made in their own dtype on `device`."""
    tokenizer = build_tokenizer(shape.vocab)
    torch.manual_seed(0)
    with torch.device(device):
        qwen = Qwen2_5_VLForConditionalGeneration._from_config(qwen_config(shape, tokenizer), dtype=shape.dtype)
        config = Dinov2Config(**shape.dinov2, image_size=518, patch_size=14)
        dinov2 = Dinov2Model._from_config(config, dtype=shape.dtype)
    qwen.generation_config.eos_token_id = tokenizer.eos_token_id
    qwen.generation_config.pad_token_id = tokenizer.pad_token_id
    return qwen.eval(), dinov2.eval(), tokenizer


def build_dual(qwen: Any, dinov2: Any, tokenizer: PreTrainedTokenizerFast) -> tuple[DualVisionModel, Any]:
    """Both around the same weights, with a fusion that lets the second encoder through, and means to stand in."""
    model = assemble(DualVisionConfig.from_parts(qwen.config, dinov2.config), qwen, dinov2).eval()
    with torch.no_grad():
        for parameter in model.fusion.silent_parameters():
            parameter.normal_(std=FUSION_STD)
    processor = DualVisionProcessor(Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS), tokenizer)
    model.calibrate(_pictures(processor, model.device))
    return model, processor


def _pictures(processor: DualVisionProcessor, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    patches = [to_patches(decode_image(draw_picture(seed, 224)).image, processor.patch_spec) for seed in range(4)]
    return [
        (torch.from_numpy(normalise(one.pixels, processor.patch_spec)).to(device), torch.tensor([one.grid]))
        for one in patches
    ]


def save_qwen(qwen: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """As the public folder has it: other servers look for the processor by these names."""
    qwen.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_checkpoint(out: Path, shape: Shape, parts: Sequence[str] = PARTS, device: str = "cpu") -> dict[str, int]:
    """Write the folders that `parts` names below `out`; OUT/dual must not be there yet.

    Returns:
        parameters of each part.
    Raises:
        OSError: the disk has too little room.
    """
    qwen, dinov2, tokenizer = build_parts(shape, device)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in (("qwen", qwen), ("dinov2", dinov2))}
    sizes["dual"] = sizes["qwen"] + sizes["dinov2"]
    out.mkdir(parents=True, exist_ok=True)
    need = sum(sizes[part] for part in parts) * shape.dtype.itemsize
    free = shutil.disk_usage(out).free
    if need > free:
        raise OSError(f"{out} has {free / 1e9:.1f} GB free and {need / 1e9:.1f} GB are needed; choose fewer --parts")
    if "qwen" in parts:
        save_qwen(qwen, tokenizer, out / "qwen")
    if "dinov2" in parts:
        dinov2.save_pretrained(out / "dinov2")
    if "dual" in parts:  # last: it takes the two apart
        save_checkpoint(*build_dual(qwen, dinov2, tokenizer), out / "dual")
    return {part: sizes[part] for part in parts}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if the disk is too small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write below")
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated: qwen, dinov2, dual")
    parser.add_argument("--device", default="cpu", help="where the random numbers are drawn; cuda is fast")
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown part {', '.join(unknown)}; allowed: {', '.join(PARTS)}")
    quiet_unless_terminal()
    try:
        sizes = make_checkpoint(args.out, SHAPES[args.size], parts, args.device)
    except OSError as error:
        parser.exit(1, f"make_checkpoint: error: {error}\n")
    for part, count in sizes.items():
        print(f"{args.out / part}: {count / 1e6:.1f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
