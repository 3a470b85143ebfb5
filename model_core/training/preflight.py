"""Will it fit? The memory of serving and of training in each mode, before any of it is allocated.

In: a model on the meta device, a freeze table, the shape of a pack; out: bytes by what they are for. Weights and
optimizer are exact (`cost.state_bytes`). Activations are what autograd keeps for the backward pass, counted by hand
from the layers' arithmetic; attention is taken to be a kernel that keeps no table of pairs. It allocates nothing and
asks no device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from model_core.training.cost import state_bytes
from model_core.training.freeze import FreezeTable

#: Logits of a pack that are alive at once at most, see `losses.py`: values, their softmax, its gradient.
_LOGITS_AT_ONCE = 1 << 26
_COPIES_OF_LOGITS = 3
_BEFORE_THE_SPLICE = frozenset({"qwen_vision", "merger", "dinov2", "projections", "gate", "output_projector"})
#: Of the estimate, for what the allocator can't hand out again, and for what is not counted.
MARGIN = 0.15
#: A CUDA context with its libraries, measured for none of our cards: what the field reckons with.
CUDA_CONTEXT_BYTES = 600 << 20


@dataclass(frozen=True, slots=True)
class PackLimits:
    """The largest pack that a recipe allows. vision_tokens: after merging, of all its images together."""

    max_tokens: int
    vision_tokens: int
    label_tokens: int


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes by what they are for."""

    parts: Mapping[str, int]
    margin_ratio: float = MARGIN

    @property
    def total_bytes(self) -> int:
        return int(sum(self.parts.values()) * (1 + self.margin_ratio))


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One transformer layer: widths of the stream, of queries, of keys or values, and of the MLP's middle."""

    hidden: int
    query: int
    key: int
    middle: int
    is_gated: bool
    is_rms: bool
    num_layers: int

    def kept_bytes(self, *, width: int, trains: bool) -> int:
        """For one token of one layer. width: bytes of an activation. A frozen product keeps only its weight."""
        whole = 1 if trains else 0
        attention = width * (2 * self.query + 2 * self.key) + whole * width * self.query
        scales = 0 if self.is_rms else 2 * width * self.hidden * whole  # DINOv2's layer scale
        return self._norm_bytes(width, whole) + attention + self.mlp_bytes(width=width, trains=trains) + scales

    def mlp_bytes(self, *, width: int, trains: bool) -> int:
        """Of these the MLP's and its norm's: what a last layer has only where somebody reads what it says."""
        whole = 1 if trains else 0
        middles = (3 if self.is_gated else 1) + whole
        return self._norm_bytes(width, whole) + width * self.middle * middles

    def _norm_bytes(self, width: int, whole: int) -> int:
        # RMSNorm computes in float32 and keeps that copy; LayerNorm keeps its input, two numbers a row beside.
        norm = 4 * self.hidden + whole * width * self.hidden if self.is_rms else width * self.hidden
        return norm + whole * width * self.hidden


def training_need(
    config: Any, table: FreezeTable, limits: PackLimits, *, weight_bytes: int, width: int,
    recompute: Collection[str] = (), is_cuda: bool = False,
) -> MemoryNeed:  # fmt: skip
    """What one process needs to train under this freeze table.

    Args:
        config: a DualVisionConfig.
        weight_bytes: of a stored weight; width: of an activation. 4 and 2 together are autocast.
        recompute: the recipe's gradient_checkpointing.
    """
    parts = dict(state_bytes(table, weight_bytes=weight_bytes))
    parts["activations"] = activation_bytes(config, table, limits, width=width, recompute=recompute)
    if weight_bytes > width:
        # Autocast's copy of every weight that a gradient goes through, kept until that gradient has come.
        parts["casts"] = width * _weights_on_the_way(table)
    if is_cuda:
        parts["context"] = CUDA_CONTEXT_BYTES
    return MemoryNeed(parts)


def activation_bytes(
    config: Any, table: FreezeTable, limits: PackLimits, *, width: int, recompute: Collection[str] = ()
) -> int:
    """Kept between forward and backward by one pack of the largest size."""
    trained = table.trainable_components
    if not trained:
        return 0
    llm = _kept(llm_block(config), limits.max_tokens, width, trains="llm" in trained, recompute="llm" in recompute)
    if "llm" not in recompute:  # where it is computed again, the layer held at one time may be any
        unread = max(0, limits.max_tokens - limits.label_tokens)
        llm -= unread * llm_block(config).mlp_bytes(width=width, trains="llm" in trained)
    total = llm + _logits_bytes(config, limits, width, trains="llm" in trained)
    merge = config.merge_size**2
    patches = limits.vision_tokens * merge
    if trained & {"qwen_vision", "merger"}:
        again = "qwen_vision" in recompute
        total += _kept(qwen_block(config), patches, width, trains="qwen_vision" in trained, recompute=again)
    if "dinov2" in trained:
        total += _kept(dinov2_block(config), patches, width, trains=True, recompute="dinov2" in recompute)
    if trained & _BEFORE_THE_SPLICE:
        # Projected, normalised, weighted, summed and projected again.
        second = getattr(config.dinov2_config, "hidden_size", 0) * merge
        total += width * limits.vision_tokens * (4 * config.fusion_dim + 2 * config.llm_dim + 2 * second)
    return total


def serving_need(
    num_parameters: int, *, weight_bytes: int, kv_cache_bytes: int, encoder_cache_bytes: int, step_bytes: int,
    is_cuda: bool = False,
) -> MemoryNeed:  # fmt: skip
    """What the server needs: its weights, its caches, and what one engine step computes with."""
    parts = {
        "weights": num_parameters * weight_bytes, "kv cache": kv_cache_bytes, "encoder cache": encoder_cache_bytes,
        "step": step_bytes,
    }  # fmt: skip
    if is_cuda:
        parts["context"] = CUDA_CONTEXT_BYTES
    return MemoryNeed(parts)


def step_bytes(config: Any, num_tokens: int, *, width: int) -> int:
    """One engine step without gradients: a few streams of the widest layer, and the logits of its rows."""
    block = llm_block(config)
    return width * num_tokens * (4 * block.hidden + 3 * block.middle) + 4 * config.text_config.vocab_size * 64


def largest_pack(
    config: Any, table: FreezeTable, limits: PackLimits, available_bytes: int, **settings: Any
) -> PackLimits | None:
    """The recipe's pack, halved until it fits; None where not even 16 tokens do. settings: as `training_need`."""
    while limits.max_tokens >= 16:
        if training_need(config, table, limits, **settings).total_bytes <= available_bytes:
            return limits
        limits = PackLimits(limits.max_tokens // 2, limits.vision_tokens // 2, max(limits.label_tokens // 2, 1))
    return None


def llm_block(config: Any) -> BlockShape:
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    return BlockShape(
        text.hidden_size, text.num_attention_heads * head, text.num_key_value_heads * head, text.intermediate_size,
        True, True, text.num_hidden_layers,
    )  # fmt: skip


def qwen_block(config: Any) -> BlockShape:
    vision = config.vision_config
    width = vision.hidden_size
    return BlockShape(width, width, width, vision.intermediate_size, True, True, vision.depth)


def dinov2_block(config: Any) -> BlockShape:
    """A second encoder of the user's own is taken to be a plain vision transformer of the same names."""
    second = config.dinov2_config
    width = getattr(second, "hidden_size", 0)
    is_gated = bool(getattr(second, "use_swiglu_ffn", False))
    middle = int(width * getattr(second, "mlp_ratio", 4))
    if is_gated:
        middle = (middle * 2 // 3 + 7) // 8 * 8
    return BlockShape(width, width, width, middle, is_gated, False, getattr(second, "num_hidden_layers", 0))


def _kept(block: BlockShape, num_tokens: int, width: int, *, trains: bool, recompute: bool) -> int:
    layer = num_tokens * block.kept_bytes(width=width, trains=trains)
    if not recompute:
        return block.num_layers * layer
    return block.num_layers * num_tokens * block.hidden * width + layer


def _logits_bytes(config: Any, limits: PackLimits, width: int, *, trains: bool) -> int:
    rows = limits.label_tokens * config.text_config.vocab_size
    hidden = limits.label_tokens * config.llm_dim * width * (1 + trains)
    return min(rows, _LOGITS_AT_ONCE) * 4 * _COPIES_OF_LOGITS + hidden


def _weights_on_the_way(table: FreezeTable) -> int:
    """Of the parts that a gradient goes through: the language model always, what lies before it if it trains."""
    trained = table.trainable_components
    on_the_way = {"llm"} | (trained & _BEFORE_THE_SPLICE)
    if trained & {"qwen_vision", "merger", "dinov2", "projections"}:
        on_the_way |= {"projections", "output_projector"}
    return sum(row.total for row in table.rows if row.component in on_the_way)
