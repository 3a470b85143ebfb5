"""Decoder layers with fewer and larger products, over the very parameters transformers holds.

q, k and v are one product, gate and up are one, residuals are added inside the last product of a block. The
joined weights are not copies: each parameter becomes a view of its part, so training, saving and state dicts see
what they saw. On a CPU products then run over copies in oneDNN's layout (linear.py), up to COPIED_BYTES of them.
A layer that holds anything but plain linear modules without hooks (LoRA, a debugger) is not joined, and one that
changes later is noticed: `is_current` is asked before every forward. Only a write through `.data` escapes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_core.language.kv_cache import Attend
from model_core.linear import COPIED_BYTES, PackedProduct, PlainProduct, Product, can_use_onednn

_JOINED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, eq=False)
class FusedLayer:
    """Products of one layer: qkv by ((H + 2K) * dh, D), out (D, H * dh), gate_up (2 * F, D), down (D, F)."""

    input_norm: Tensor
    qkv: Product
    out: Product
    post_norm: Tensor
    gate_up: Product
    down: Product


class FusedLayers:
    """All layers of one language model, or nothing: `build` gives None where any layer can't be joined."""

    def __init__(self, model: nn.Module, layers: list[FusedLayer], watched: list[_Watched]) -> None:
        config = model.config
        self._layers, self._watched = layers, watched
        self._hooks = [hooks for one in watched for hooks in one.hooks]
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.width, self.inner = config.hidden_size, config.intermediate_size
        self.eps = config.rms_norm_eps

    @classmethod
    def build(cls, model: nn.Module, *, packs: bool = True) -> FusedLayers | None:
        """packs: copies in oneDNN's layout where they are faster; without, one copy of the weights is all there is."""
        if model.config.hidden_act != "silu" or any(_Watched.of(layer) is None for layer in model.layers):
            return None
        # A parameter made in inference mode could never be trained again, and a step may be what calls us.
        product = product_for(sum(p.nbytes for p in model.layers.parameters()), packs=packs)
        with torch.inference_mode(mode=False), torch.no_grad():
            layers = [_join(layer, product) for layer in model.layers]
        return cls(model, layers, [_Watched.of(layer) for layer in model.layers])

    @property
    def copied_bytes(self) -> int:
        return sum(
            product.copied_bytes
            for layer in self._layers
            for product in (layer.qkv, layer.out, layer.gate_up, layer.down)
        )

    def is_current(self) -> bool:
        """Do the joined weights still stand for the model's? False after a cast, a move, LoRA or a new hook."""
        return not any(self._hooks) and all(one.is_unchanged() for one in self._watched)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """hidden (S, D), cos and sin (S, dh) -> (S, D) before the last norm."""
        half, heads, shape = self.head_dim // 2, self.num_heads + self.num_kv_heads, (self.width,)
        cos, sin = cos[:, None], sin[:, None].clone()
        sin[..., :half].neg_()  # rotate_half turns (a, b) into (-b, a): the sign moves into the sine
        for i, layer in enumerate(self._layers):
            x = F.rms_norm(hidden, shape, layer.input_norm, self.eps)
            qkv = layer.qkv(x).unflatten(-1, (-1, self.head_dim))
            turned = qkv[:, :heads]
            turned = torch.addcmul(turned * cos, turned.roll(half, -1), sin)
            mixed = attend(i, turned[:, : self.num_heads], turned[:, self.num_heads :], qkv[:, heads:])
            hidden = layer.out.added_to(hidden, mixed)
            gate, up = layer.gate_up(F.rms_norm(hidden, shape, layer.post_norm, self.eps)).split(self.inner, -1)
            hidden = layer.down.added_to(hidden, F.silu(gate).mul_(up))
        return hidden


class _Watched:
    """What of a layer must stay as it was when it was joined."""

    def __init__(self, layer: nn.Module, places: list[tuple[dict[str, Any], str, nn.Module]]) -> None:
        self._places = places
        self._parameters = [p for _, _, m in places for p in m.parameters(recurse=False)]
        self._state = self._now()
        modules = [layer, layer.self_attn, layer.mlp, *(m for _, _, m in places)]
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    @classmethod
    def of(cls, layer: nn.Module) -> _Watched | None:
        places = []
        for owner in (layer.self_attn, layer.mlp, layer):
            for name, module in owner._modules.items():
                if name in _JOINED and type(module) is not nn.Linear:
                    return None
                if name in _JOINED or name.endswith("layernorm"):
                    places.append((owner._modules, name, module))
        found = cls(layer, places)
        # Parameters born in inference mode can't change their data outside it, where it would be safe to.
        is_inference = any(parameter.is_inference() for parameter in found._parameters)
        return None if is_inference or any(found.hooks) else found

    def is_unchanged(self) -> bool:
        return self._now() == self._state and all(modules[name] is module for modules, name, module in self._places)

    def _now(self) -> list[int]:
        """Where the weights lie and how often they were written."""
        return [number for p in self._parameters for number in (p.data_ptr(), p._version)]


class JoinedHead:
    """The product that ends in logits, over `lm_head`'s weight."""

    def __init__(self, lm_head: nn.Module, *, packs: bool = True) -> None:
        self._module, weight = lm_head, lm_head.weight
        self._hooks = [lm_head._forward_hooks, lm_head._forward_pre_hooks]
        self._product = product_for(weight.nbytes, packs=packs)(weight.data, lm_head.bias)
        self._weight, self._state = weight, (weight.data_ptr(), weight._version)

    @classmethod
    def build(cls, lm_head: nn.Module, *, packs: bool = True) -> JoinedHead | None:
        hooks = lm_head._forward_hooks or lm_head._forward_pre_hooks
        if type(lm_head) is not nn.Linear or hooks or lm_head.weight.is_inference():
            return None
        with torch.inference_mode(mode=False), torch.no_grad():
            return cls(lm_head, packs=packs)

    @property
    def copied_bytes(self) -> int:
        return self._product.copied_bytes

    def is_current(self) -> bool:
        weight = self._module.weight
        is_same = weight is self._weight and (weight.data_ptr(), weight._version) == self._state
        return is_same and not any(self._hooks)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V)."""
        return self._product(hidden)


def product_for(num_bytes: int, *, packs: bool = True) -> Callable[[Tensor, Tensor | None], Product]:
    """What to multiply with by weights of so many bytes in all. packs: a copy may be kept."""

    def product(weight: Tensor, bias: Tensor | None) -> Product:
        if packs and num_bytes <= COPIED_BYTES and can_use_onednn(weight):
            return PackedProduct(weight, bias)
        return PlainProduct(weight, bias)

    return product


def _join(layer: nn.Module, product: Callable[[Tensor, Tensor | None], Product]) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    bias = _as_one([m.bias for m in projections]) if projections[0].bias is not None else None
    return FusedLayer(
        input_norm=layer.input_layernorm.weight.data,
        qkv=product(_as_one([m.weight for m in projections]), bias),
        out=product(attention.o_proj.weight.data, None),
        post_norm=layer.post_attention_layernorm.weight.data,
        gate_up=product(_as_one([mlp.gate_proj.weight, mlp.up_proj.weight]), None),
        down=product(mlp.down_proj.weight.data, None),
    )


def _as_one(parts: Sequence[nn.Parameter]) -> Tensor:
    """One tensor, of which the parameters are views from now on. Parts that already are one stay where they are."""
    first, end = parts[0].data, parts[0].data.data_ptr()
    for part in parts:
        if part.data.data_ptr() != end or not part.data.is_contiguous():
            break
        end += part.data.nbytes
    else:
        rows = sum(part.shape[0] for part in parts)
        if first.untyped_storage().nbytes() >= (rows * first.stride(0) + first.storage_offset()) * first.itemsize:
            return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    joined = torch.cat([part.data for part in parts])
    at = 0
    for part in parts:
        part.data = joined[at : at + part.shape[0]]
        at += part.shape[0]
    return joined
