"""A lean forward of Qwen2.5's decoder over the SAME parameters transformers holds.

It leaves out the mask building, output capturing and cache objects. Plain layers run joined (fused.py); layers
with LoRA or hooks run module by module, so that these stay in effect. Tokens of all sequences of a step are
packed into one row, so that every weight is read once a step; only attention tells them apart.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from model_core.errors import ConfigError
from model_core.language.fused import FusedLayers, JoinedHead
from model_core.language.kv_cache import Attend, CacheShape


class Decoder:
    """Packed tokens to hidden states to logits. Holds no state of any sequence."""

    def __init__(self, language_model: nn.Module, lm_head: nn.Module, *, joins_weights: bool = True) -> None:
        config = language_model.config
        if "sliding_attention" in config.layer_types:
            raise ConfigError(
                "sliding-window layers are not served",
                value="use_sliding_window=true",
                allowed="false, as Qwen2.5-VL ships",
            )
        self.model, self.lm_head, self.config = language_model, lm_head, config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self._fused = FusedLayers.build(language_model) if joins_weights else None
        self._head = JoinedHead.build(lm_head) if joins_weights else None

    def joined(self) -> FusedLayers | None:
        """The joined layers, another object whenever their weights moved; None: it runs module by module."""
        if self._fused is not None and not self._fused.is_current():
            self._fused = FusedLayers.build(self.model)
        return self._fused

    @property
    def cache_shape(self) -> CacheShape:
        weight = self.model.embed_tokens.weight
        config = self.config
        return CacheShape(
            config.num_hidden_layers, config.num_key_value_heads, self.head_dim, weight.device, weight.dtype
        )

    @property
    def copied_bytes(self) -> int:
        """Of copies in another layout than the weights have (linear.py)."""
        joined = 0 if self._fused is None else self._fused.copied_bytes
        return joined + (0 if self._head is None else self._head.copied_bytes)

    def embed(self, token_ids: Tensor) -> Tensor:
        """(S,) -> (S, D)."""
        return self.model.embed_tokens(token_ids)

    def forward(self, hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """One packed step.

        Args:
            hidden: (S, D) embeddings; positions: (3, S) rotary positions.
            attend: what the store's `begin` gave for these S tokens.
        Returns:
            hidden states (S, D), normed, ready for `logits`.
        """
        cos, sin = self.model.rotary_emb(hidden[None], positions[:, None])
        joined = self.joined()
        if joined is not None:
            return self.model.norm(joined.forward(hidden, cos[0], sin[0], attend))
        return self._by_module(hidden, cos, sin, attend)

    def _by_module(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        for i, layer in enumerate(self.model.layers):
            hidden = decode_layer(layer, i, hidden, cos, sin, attend=attend)
        return self.model.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) float32."""
        if self._head is not None and not self._head.is_current():
            self._head = JoinedHead.build(self.lm_head)
        head = self.lm_head if self._head is None else self._head.forward
        return head(hidden).float()


def decode_layer(layer: nn.Module, number: int, hidden: Tensor, cos: Tensor, sin: Tensor, *, attend: Attend) -> Tensor:
    """One decoder layer, module by module, over packed tokens (S, D); cos, sin: (1, S, dh)."""
    x, attention = layer.input_layernorm(hidden), layer.self_attn
    query, key, value = (
        proj(x).unflatten(-1, (-1, attention.head_dim))
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # (S, H or K, dh)
    query, key = apply_rotary_pos_emb(query[None], key[None], cos, sin, unsqueeze_dim=2)
    hidden = hidden + attention.o_proj(attend(number, query[0], key[0], value))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
