"""The recipe of `dve-demo`: its size, its stages, and the seeds that make a build repeatable.

Encoders first, on dense labels (which thing, colour and letter is in which cell); then fusion and the
language model on their features; then everything together. Training all of it from scratch on answers
alone does not take off in the time there is (DECISIONS.md).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from transformers import Dinov2Config, PreTrainedTokenizerFast, Qwen2_5_VLConfig

from model_core.config import DualVisionConfig

MODEL_ID = "dve-demo"
#: Pictures are scaled to 16 to 25 cells: what a small model can learn and two cores can serve.
MIN_PIXELS, MAX_PIXELS = 112 * 112, 140 * 140
CONTEXT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of the curriculum. `trains` names components: encoders (or qwen, its tower alone), fusion, llm.
    Encoders that don't train run without grad, and not at all where only the dense loss counts.

    dense_weight, answer_weight: weights of the per-cell loss and of the language loss.
    kinds: shares of the scene kinds, in the order of scenes.KINDS; None is the scenes' own mix.
    decay_steps: length of the learning rate's cosine; None is the stage. A longer one leaves it high at the end.
    encoder_dropout: chance that an image loses one encoder, as an arm does (never both).
    """

    name: str
    steps: int
    trains: tuple[str, ...]
    learning_rate: float
    dense_weight: float
    answer_weight: float
    encoder_dropout: float = 0.0
    batch_size: int = 64
    kinds: tuple[float, ...] | None = None
    decay_steps: int | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything a build depends on besides the artwork."""

    stages: tuple[Stage, ...]
    seed: int = 20261123
    sizes: tuple[tuple[int, int], ...] = ((112, 112), (112, 112), (140, 140), (112, 168), (168, 112))
    hidden: int = 256
    llm_layers: int = 5
    vision_hidden: int = 192
    vision_layers: int = 6
    dinov2_layers: int = 6

    @property
    def fingerprint(self) -> str:
        """Of every number in it: a build goes on only under the recipe that it began with."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def scaled(self, factor: float) -> Recipe:
        """The same curriculum with every stage's steps times `factor`, at least one each."""

        def scale(steps: int) -> int:
            return max(1, round(steps * factor))

        return replace(
            self,
            stages=tuple(
                replace(s, steps=scale(s.steps), decay_steps=scale(s.decay_steps) if s.decay_steps else None)
                for s in self.stages
            ),
        )


#: Shares of single, pair, group, shapes, word, page. Letters are learnt slowest and a page has four times a word's;
#: what takes comparing or counting is learnt slower than a name.
TO_SEE = (0.26, 0.14, 0.14, 0.12, 0.1, 0.24)
TO_READ = (0.08, 0.04, 0.04, 0.04, 0.2, 0.6)
TO_ANSWER = (0.12, 0.24, 0.21, 0.2, 0.23, 0.0)
#: Last come those that are learnt last: which of several shapes is meant, how many there are, and words.
TO_FINISH = (0.08, 0.12, 0.27, 0.27, 0.26, 0.0)

RECIPE = Recipe(
    stages=(
        Stage("see", 1000, ("encoders",), 2e-3, dense_weight=1.0, answer_weight=0.0, kinds=TO_SEE, decay_steps=1300),
        Stage("spell", 600, ("qwen",), 1.5e-3, dense_weight=1.0, answer_weight=0.0, kinds=TO_READ),
        Stage("join", 350, ("fusion", "llm"), 2e-3, 0.0, 1.0, encoder_dropout=0.2, kinds=TO_ANSWER, decay_steps=700),
        Stage(
            "all",
            300,
            ("encoders", "fusion", "llm"),
            1.2e-3,
            0.5,
            1.0,
            encoder_dropout=0.2,
            kinds=TO_ANSWER,
            decay_steps=350,
        ),
        Stage("spell more", 600, ("qwen",), 1.2e-3, dense_weight=1.0, answer_weight=0.0, kinds=TO_READ),
        Stage("finish", 400, ("encoders", "fusion", "llm"), 1.2e-3, 0.5, 1.0, encoder_dropout=0.2, kinds=TO_FINISH),
    )
)


def build_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> DualVisionConfig:
    """Qwen2.5-VL's and DINOv2's own architectures, small."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.get_added_vocab()}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden,
        "num_hidden_layers": recipe.llm_layers,
        "num_attention_heads": recipe.hidden // 64,
        "num_key_value_heads": recipe.hidden // 128,
        "intermediate_size": recipe.hidden * 3,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
    }
    vision: dict[str, Any] = {
        "depth": recipe.vision_layers,
        "hidden_size": recipe.vision_hidden,
        "num_heads": recipe.vision_hidden // 64,
        "intermediate_size": 512,
        "out_hidden_size": recipe.hidden,
        "window_size": 112,
        "fullatt_block_indexes": [recipe.vision_layers // 2 - 1, recipe.vision_layers - 1],
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
        hidden_size=recipe.vision_hidden,
        num_hidden_layers=recipe.dinov2_layers,
        num_attention_heads=recipe.vision_hidden // 64,
        image_size=140,
        patch_size=14,
    )
    names = {"qwen_model_name": f"{MODEL_ID} (trained from scratch)", "dinov2_model_name": f"{MODEL_ID} (likewise)"}
    return DualVisionConfig.from_parts(qwen, dinov2, fusion="gated", **names)
