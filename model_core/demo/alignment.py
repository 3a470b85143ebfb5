"""Fused tokens that look like the words for what they show: a loss of the demo's build.

"Is there a dog?", "what colour is the star?" and "how many cats are there?" are one skill: to find the cells that
a word means. While a cell's token and its word have nothing in common, that skill has to be learnt thing by thing;
once they point the same way it is one likeness for all things, which attention finds within a few hundred steps.
The image-text contrast of CLIP (2103.00020, section 2.3), cell by cell and against the language model's own words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_core.demo.labels import MAX_COUNT
from model_core.demo.questions import plural_of
from model_core.demo.scenes import CLASS_NAMES, COLOUR_NAMES

SHARPNESS = 16.0


class WordAlignment:
    """Word tables by what they name: things (one and many), colours, numbers."""

    def __init__(self, tokenizer: Any, device: torch.device) -> None:
        names = CLASS_NAMES[1:]
        self.tables: dict[str, list[tuple[Tensor, Tensor]]] = {
            "class": [
                _table(tokenizer, [f" {n}" for n in names], device),
                _table(tokenizer, [f" {plural_of(n)}" for n in names], device),
            ],
            "colour": [_table(tokenizer, [f" {n}" for n in COLOUR_NAMES], device)],
            "count": [_table(tokenizer, [str(n) for n in range(1, MAX_COUNT + 1)], device)],
        }

    def loss(self, tokens: Tensor, cells: Mapping[str, Tensor], words: Tensor) -> Tensor:
        """tokens (S, D) fused, cells: labels of the S cells, words (V, D) the embedding -> mean over the tables."""
        targets = {
            "class": cells["painted"],
            "colour": cells["colour"],
            "count": cells["counts"][:, 0],  # of its own name
        }
        directions, losses = F.normalize(tokens.float(), dim=-1), []
        for name, tables in self.tables.items():
            target = targets[name].to(tokens.device)
            is_named = target > 0
            if not bool(is_named.any()):
                continue
            for ids, share in tables:
                # F.embedding, not an index: words come more than once, and its gradient adds up in a fixed order.
                named = F.normalize((F.embedding(ids, words).float() * share[..., None]).sum(1), dim=-1)  # (names, D)
                logits = SHARPNESS * directions[is_named] @ named.T
                losses.append(F.cross_entropy(logits, target[is_named] - 1))
        return torch.stack(losses).mean() if losses else tokens.sum() * 0.0


def _table(tokenizer: Any, phrases: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (n, most) and shares (n, most) that sum to 1: a name of several tokens is their mean."""
    encoded = [tokenizer.encode(phrase, add_special_tokens=False) for phrase in phrases]
    most = max(len(ids) for ids in encoded)
    ids = torch.tensor([e + [0] * (most - len(e)) for e in encoded], device=device)
    share = torch.tensor([[1 / len(e)] * len(e) + [0.0] * (most - len(e)) for e in encoded], device=device)
    return ids, share


@torch.no_grad()
def attend_by_likeness(language_model: nn.Module) -> None:
    """Let every layer's keys begin as the queries of their group's first head: like attends to like at birth."""
    config = language_model.config
    head_dim = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in language_model.layers:
        attention = layer.self_attn
        heads = attention.q_proj.weight.view(config.num_attention_heads, head_dim, -1)
        attention.k_proj.weight.copy_(heads[::group].reshape_as(attention.k_proj.weight))
