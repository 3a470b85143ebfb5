"""The load test: does a model that was just read compute what a model must?

In: a loaded model. Out: nothing, or CheckpointError with the first thing that is wrong. One small picture and one
text go through it: every number finite, shapes as the configuration says, gate weights summing to 1. It refuses to
judge answers.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from model_core.checkpoint import Loaded
from model_core.errors import CheckpointError

SIDE = 56
TEXT = "What is this?"
SUM_TOLERANCE = 1e-3


@torch.inference_mode()
def check_model(loaded: Loaded) -> None:
    """Raises CheckpointError."""
    model, processor = loaded.model, loaded.processor
    picture = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
    inputs = processor(images=picture, text=f"{processor.image_token}{TEXT}").to(model.device)
    fused = model.embed_images(inputs["pixel_values"], inputs["image_grid_thw"])
    num_tokens = int((inputs["mm_token_type_ids"] == 1).sum())
    _check_shape("fused tokens", fused.tokens, (num_tokens, model.config.llm_dim))
    _check_finite("fused tokens", fused.tokens)
    if fused.weights is not None:
        _check_shape("gate weights", fused.weights, (1, len(model.model.encoders)))
        total = float(fused.weights.sum())
        if not abs(total - 1) <= SUM_TOLERANCE or float(fused.weights.min()) < 0:
            raise _wrong("the gate's weights are no shares", fused.weights.tolist(), "0 or more each, 1 together")
    text = processor(text=TEXT).to(model.device)
    for name, one in (("a picture", inputs), ("a text", text)):
        logits = model(**one).logits
        _check_shape(f"logits of {name}", logits, (*one["input_ids"].shape, model.config.text_config.vocab_size))
        _check_finite(f"logits of {name}", logits)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise _wrong(f"the {name} have another shape", tuple(tensor.shape), str(shape))


def _check_finite(name: str, tensor: Tensor) -> None:
    num_bad = int((~torch.isfinite(tensor)).sum())
    if num_bad:
        raise _wrong(f"the {name} are not all finite", f"{num_bad} of {tensor.numel()}", "finite numbers")


def _wrong(what: str, seen: object, allowed: str) -> CheckpointError:
    return CheckpointError(f"load test: {what}", value=seen, allowed=allowed, fix="Train or copy it again")
