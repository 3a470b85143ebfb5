"""A lean forward of Qwen2.5's decoder over the SAME parameters transformers holds.

It leaves out the mask building, output capturing and cache objects. Plain layers run joined (fused.py), single tokens
and short prompts on CPUs through compiled loops (compiled.py); layers with LoRA or hooks run module by module, so that
these stay in effect. Tokens of all sequences of a step are packed into one row, so that every weight is read once a
step; only attention tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from model_core.errors import ConfigError
from model_core.language import compiled
from model_core.language.compiled import CompiledHead, CompiledLayers, KernelLoader
from model_core.language.fused import FusedLayers, JoinedHead
from model_core.language.kv_cache import Attend, CacheShape

#: (S, H, dh), (S, K, dh) and cos, sin (1, S, dh) -> both turned
Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Decoder:
    """Packed tokens to hidden states to logits. Holds no state of any sequence."""

    def __init__(
        self,
        language_model: nn.Module,
        lm_head: nn.Module,
        *,
        joins_weights: bool = True,
        kernels: KernelLoader | None = None,
    ) -> None:
        """kernels: who gives compiled loops; None: everything runs through torch."""
        config = language_model.config
        if "sliding_attention" in config.layer_types:
            raise ConfigError(
                "sliding-window layers are not served",
                value="use_sliding_window=true",
                allowed="false, as Qwen2.5-VL ships",
                fix="Use a checkpoint whose layers all see the whole context",
            )
        self.model, self.lm_head, self.config = language_model, lm_head, config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self._kernels = kernels if joins_weights and not compiled.find_fault(language_model, lm_head) else None
        self._layers: CompiledLayers | None = None
        self._layers_stand_on: tuple = ()
        self._compiled_head: CompiledHead | None = None
        self._fused: FusedLayers | None = None
        self._head: JoinedHead | None = None
        if joins_weights:
            self._join()

    def joined(self) -> FusedLayers | None:
        """The joined layers, another object whenever their weights moved; None: it runs module by module."""
        if self._fused is not None and not self._fused.is_current():
            self._fused = FusedLayers.build(self.model, packs=self._kernels is None)
        return self._fused

    def _join(self) -> None:
        """Where loops are or will be compiled, they hold the one copy of the weights that there may be."""
        packs = self._kernels is None
        self._fused = FusedLayers.build(self.model, packs=packs)
        self._head = JoinedHead.build(self.lm_head, packs=packs)

    def compiled_layers(self, num_rows: int) -> CompiledLayers | None:
        """What takes a step of so many tokens, if compiled loops may stand for the modules now."""
        kernel = self._kernel() if num_rows <= compiled.MAX_ROWS else None
        joined, around = None if kernel is None else self.joined(), (self.model.rotary_emb, self.model.norm)
        if joined is None or any(m._forward_hooks or m._forward_pre_hooks for m in around):
            return None
        stand_on = (joined, *around, self.model.norm.weight.data_ptr())
        if stand_on != self._layers_stand_on:
            fault = compiled.find_fault(self.model, self.lm_head)  # another type may be why the weights moved
            self._layers = None if fault else CompiledLayers(self.model, kernel)
            self._layers_stand_on = stand_on
        return self._layers

    def compile_loops(self, *, wait: bool) -> None:
        """Begin to compile what steps may run through, or see to it that they do from now on."""
        if self._kernels is not None:
            (self._kernels.wait if wait else self._kernels.begin)()

    def _kernel(self) -> ModuleType | None:
        if self._kernels is None:
            return None
        kernel = self._kernels.get()
        if self._kernels.refusal:
            self._kernels = None
            self._join()
        return kernel

    @property
    def cache_shape(self) -> CacheShape:
        weight = self.model.embed_tokens.weight
        config = self.config
        return CacheShape(
            config.num_hidden_layers, config.num_key_value_heads, self.head_dim, weight.device, weight.dtype
        )

    @property
    def copied_bytes(self) -> int:
        """Of copies in another layout than the weights have (linear.py, compiled.py), those to come included."""
        if self._kernels is not None:
            return compiled.copied_bytes(self.model, self.lm_head)
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
            self._head, self._compiled_head = JoinedHead.build(self.lm_head, packs=self._kernels is None), None
        if self._head is None:
            return self.lm_head(hidden).float()
        kernel = self._kernel() if hidden.shape[0] <= compiled.MAX_ROWS else None
        if kernel is None or hidden.dtype != torch.float32 or hidden.device.type != "cpu":
            return self._head.forward(hidden).float()
        if self._compiled_head is None:
            self._compiled_head = CompiledHead(self.lm_head, kernel)
        return self._compiled_head.forward(hidden)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' rotary embedding of packed tokens (S, H, dh) and (S, K, dh); cos, sin: (1, S, dh)."""
    query, key = apply_rotary_pos_emb(query[None], key[None], cos, sin, unsqueeze_dim=2)
    return query[0], key[0]


def decode_layer(
    layer: nn.Module, number: int, hidden: Tensor, cos: Tensor, sin: Tensor, *, attend: Attend, rotate: Rotate = rotate,
    keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One decoder layer, module by module, over packed tokens (S, D); cos, sin: (1, S, dh).

    keep: (R,) places to compute to the end, which is most of the work; all are looked at. -> (S or R, D)
    """
    x, attention = layer.input_layernorm(hidden), layer.self_attn
    query, key, value = (
        proj(x).unflatten(-1, (-1, attention.head_dim))
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # (S, H or K, dh)
    query, key = rotate(query, key, cos, sin)
    found = attend(number, query, key, value)
    if keep is not None:
        hidden, found = hidden[keep], found[keep]
    hidden = hidden + attention.o_proj(found)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
