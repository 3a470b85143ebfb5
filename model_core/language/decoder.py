"""A lean forward of Qwen2.5's decoder over the SAME modules transformers holds.

It calls the projections, norms and MLPs as modules (so LoRA and hooks stay in effect) and leaves out
the mask building, output capturing and cache objects around them. Positions are always given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from model_core.errors import ConfigError
from model_core.language.kv_cache import BatchCache

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Decoder:
    """Prefill one sequence, or decode one token for all rows of a `BatchCache`."""

    def __init__(self, language_model: nn.Module, lm_head: nn.Module) -> None:
        config = language_model.config
        if "sliding_attention" in config.layer_types:
            raise ConfigError(
                "sliding-window layers are not served",
                value="use_sliding_window=true",
                allowed="false, as Qwen2.5-VL ships",
            )
        self.model, self.lm_head, self.config = language_model, lm_head, config
        self.head_dim = config.hidden_size // config.num_attention_heads

    def new_cache(self) -> BatchCache:
        weight = self.model.embed_tokens.weight
        return BatchCache(
            self.config.num_hidden_layers,
            self.config.num_key_value_heads,
            self.head_dim,
            device=weight.device,
            dtype=weight.dtype,
        )

    def prefill(self, embeds: Tensor, positions: Tensor, cache: BatchCache, row: int) -> Tensor:
        """Run a whole prompt into `row`.

        Args:
            embeds: (T, D); positions: (3, T).
        Returns:
            hidden states (T, D), normed, ready for `logits`.
        """

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.write(layer, row, 0, key[0], value[0])
            return self._sdpa(query, keys[None], values[None], is_causal=True)

        hidden = self._layers(embeds[None], positions[:, None], attend)
        cache.lengths[row] = embeds.shape[0]
        return hidden[0]

    def decode(self, token_ids: Tensor, positions: Tensor, cache: BatchCache) -> Tensor:
        """One token for each row of the cache.

        Args:
            token_ids: (B,); positions: (B,) rotary positions (the same on all three axes for text).
        Returns:
            logits (B, V) float32.
        """
        cache.reserve_next()
        device = token_ids.device
        slots = torch.tensor(cache.lengths, device=device)
        length = max(cache.lengths) + 1
        mask = (torch.arange(length, device=device) <= slots[:, None])[:, None, None]  # (B, 1, 1, length)
        is_even = min(cache.lengths) + 1 == length

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.append(layer, slots, key[:, :, 0], value[:, :, 0], length)
            return self._sdpa(query, keys, values, mask=None if is_even else mask)

        embeds = self.model.embed_tokens(token_ids)[:, None]
        hidden = self._layers(embeds, positions.expand(3, -1)[..., None], attend)
        cache.lengths = [n + 1 for n in cache.lengths]
        return self.logits(hidden[:, 0])

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).float()

    def _layers(self, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """hidden (B, T, D), positions (3, B, T) -> normed hidden (B, T, D)."""
        cos, sin = self.model.rotary_emb(hidden, positions)
        for i, layer in enumerate(self.model.layers):
            x, attention = layer.input_layernorm(hidden), layer.self_attn
            query, key, value = (
                proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
            )  # (B, H or K, T, dh)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            mixed = attend(i, query, key, value).transpose(1, 2).flatten(2)
            hidden = hidden + attention.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.norm(hidden)

    def _sdpa(
        self, query: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        grouped = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=is_causal and query.shape[2] > 1, enable_gqa=grouped
        )
