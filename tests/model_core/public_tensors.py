"""Every tensor of the published Qwen2.5-VL and DINOv2, by its name on the hub and with its shape.

Written down from the architectures, not asked of the library that loads them.
"""

from __future__ import annotations

from collections.abc import Mapping

Shapes = dict[str, tuple[int, ...]]


def under(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def linear(outputs: int, inputs: int, *, bias: bool = True) -> Shapes:
    return {"weight": (outputs, inputs)} | ({"bias": (outputs,)} if bias else {})


def norm(width: int, *, bias: bool = False) -> Shapes:
    return {"weight": (width,)} | ({"bias": (width,)} if bias else {})


def gated_mlp(width: int, inner: int, *, bias: bool) -> Shapes:
    return {
        **under("gate_proj", linear(inner, width, bias=bias)),
        **under("up_proj", linear(inner, width, bias=bias)),
        **under("down_proj", linear(width, inner, bias=bias)),
    }


def qwen_layer(hidden: int, keys: int, inner: int) -> Shapes:
    """keys: width of all key heads together."""
    return {
        **under("input_layernorm", norm(hidden)),
        **under("self_attn.q_proj", linear(hidden, hidden)),
        **under("self_attn.k_proj", linear(keys, hidden)),
        **under("self_attn.v_proj", linear(keys, hidden)),
        **under("self_attn.o_proj", linear(hidden, hidden, bias=False)),
        **under("post_attention_layernorm", norm(hidden)),
        **under("mlp", gated_mlp(hidden, inner, bias=False)),
    }


def qwen_vision(width: int, depth: int, inner: int, out: int, patch: int = 14) -> Shapes:
    block = {
        **under("norm1", norm(width)),
        **under("attn.qkv", linear(3 * width, width)),
        **under("attn.proj", linear(width, width)),
        **under("norm2", norm(width)),
        **under("mlp", gated_mlp(width, inner, bias=True)),
    }
    return {
        "patch_embed.proj.weight": (width, 3, 2, patch, patch),
        **{name: shape for n in range(depth) for name, shape in under(f"blocks.{n}", block).items()},
        **under("merger.ln_q", norm(width)),
        **under("merger.mlp.0", linear(4 * width, 4 * width)),
        **under("merger.mlp.2", linear(out, 4 * width)),
    }


def qwen(
    hidden: int, layers: int, keys: int, inner: int, vocabulary: int, *, tied: bool, vision: tuple[int, int, int]
) -> Shapes:
    """vision: width, depth, MLP. Names begin with `visual.` or `model.`; there is a head where it is not tied."""
    layer = qwen_layer(hidden, keys, inner)
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        **{name: shape for n in range(layers) for name, shape in under(f"model.layers.{n}", layer).items()},
        **under("model.norm", norm(hidden)),
        **under("visual", qwen_vision(*vision, hidden)),
        **({} if tied else {"lm_head.weight": (vocabulary, hidden)}),
    }


def dinov2(
    hidden: int, layers: int, *, registers: int, is_swiglu: bool, image: int = 518, patch: int = 14, ratio: int = 4
) -> Shapes:
    inner = hidden * ratio
    if is_swiglu:
        half = (int(inner * 2 / 3) + 7) // 8 * 8
        mlp = under("weights_in", linear(2 * half, hidden)) | under("weights_out", linear(hidden, half))
    else:
        mlp = under("fc1", linear(inner, hidden)) | under("fc2", linear(hidden, inner))
    layer = {
        **under("norm1", norm(hidden, bias=True)),
        **under("attention.attention.query", linear(hidden, hidden)),
        **under("attention.attention.key", linear(hidden, hidden)),
        **under("attention.attention.value", linear(hidden, hidden)),
        **under("attention.output.dense", linear(hidden, hidden)),
        "layer_scale1.lambda1": (hidden,),
        **under("norm2", norm(hidden, bias=True)),
        **under("mlp", mlp),
        "layer_scale2.lambda1": (hidden,),
    }
    return {
        "embeddings.cls_token": (1, 1, hidden),
        "embeddings.mask_token": (1, hidden),
        "embeddings.position_embeddings": (1, 1 + (image // patch) ** 2, hidden),
        **({"embeddings.register_tokens": (1, registers, hidden)} if registers else {}),
        "embeddings.patch_embeddings.projection.weight": (hidden, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (hidden,),
        **{name: shape for n in range(layers) for name, shape in under(f"encoder.layer.{n}", layer).items()},
        **under("layernorm", norm(hidden, bias=True)),
    }
