"""A word looks at the cells that it means: a loss on one attention head of the demo's language model.

Every question about a thing begins with finding it. Left to the answers alone, that look-up emerges late and all at
once, after more steps than two cores have time for; but scenes know which cells a noun means, so one head of the
first layer is told. A noun for what is not in the picture looks at the first token, which is how "no" is seen.
Guided attention as in Liu et al. 2016 (1605.09553), for a single head.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from model_core.demo.questions import plural_of
from model_core.demo.scenes import CLASS_NAMES

LAYER, HEAD = 0, 0


class Lookup:
    """Watches the guided head during one forward; `loss` then says how much of each noun's look went astray."""

    def __init__(self, tokenizer: Any, language_model: nn.Module, device: torch.device) -> None:
        config = language_model.config
        self.attention = language_model.layers[LAYER].self_attn
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.kv_head = HEAD * config.num_key_value_heads // config.num_attention_heads
        self.class_of = torch.zeros(len(tokenizer), dtype=torch.long, device=device)
        for index, name in enumerate(CLASS_NAMES[1:], start=1):
            for phrase in (f" {name}", f" {plural_of(name)}"):
                # A name of several tokens is known at its last one.
                self.class_of[tokenizer.encode(phrase, add_special_tokens=False)[-1]] = index
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None

    @contextmanager
    def watching(self) -> Any:
        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self._seen = (hidden, *kwargs["position_embeddings"])

        handle = self.attention.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def loss(self, input_ids: Tensor, is_image: Tensor, cell_class: Tensor, may_attend: Tensor) -> Tensor:
        """Mean over nouns of -log (share of the head's attention that falls where it should).

        input_ids, is_image: (B, T); cell_class: (B, cells), in the order of the image tokens; may_attend: (B, 1, T, T).
        """
        hidden, cos, sin = self._seen
        meant = self.class_of[input_ids].masked_fill(is_image, 0)  # (B, T)
        row, place = meant.nonzero(as_tuple=True)
        shows = torch.zeros_like(input_ids).masked_scatter(is_image, cell_class.to(input_ids.device))
        allowed = may_attend[row, 0, place]  # (N, T)
        target = (shows[row] == meant[row, place, None]) & allowed  # a question before its picture sees none
        target[:, 0] |= ~target.any(-1)
        query = self.attention.q_proj(hidden)[..., HEAD * self.head_dim : (HEAD + 1) * self.head_dim]
        key = self.attention.k_proj(hidden)[..., self.kv_head * self.head_dim : (self.kv_head + 1) * self.head_dim]
        query, key = apply_rotary_pos_emb(query[:, None].float(), key[:, None].float(), cos.float(), sin.float())
        # All pairs, then each noun's row once: a gather of keys would add up its gradient in no fixed order.
        scores = (query[:, 0] @ key[:, 0].transpose(1, 2) * self.head_dim**-0.5)[row, place]  # (N, T)
        scores = scores.masked_fill(~allowed, float("-inf"))
        hit = scores.masked_fill(~target, float("-inf")).logsumexp(-1)
        return (scores.logsumexp(-1) - hit).mean()
