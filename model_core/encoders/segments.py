"""Attention over packed segments: equal-length windows of all images go through one call instead of a loop over every
window. Same weights and names as transformers' module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
    eager_attention_forward,
)
from transformers.utils.generic import is_flash_attention_requested

from model_core.rows import Move


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """How packed segments are grouped: (how many, their length) each, and how their rows get there; None where all
    have one length."""

    groups: list[tuple[int, int]]
    move: Move | None

    @classmethod
    def from_bounds(cls, bounds: list[int], device: torch.device) -> SegmentPlan:
        """bounds: where segments begin and the last ends. device: where the rows are."""
        lengths = [end - start for start, end in pairwise(bounds)]
        numbers: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            numbers.setdefault(length, []).append(number)
        groups = [(len(members), length) for length, members in numbers.items()]
        if len(groups) == 1:
            return cls(groups, None)
        return cls(groups, Move.pad(lengths, [(m, length) for length, m in numbers.items()], device))


def attend_by_length(
    parts: tuple[Tensor, Tensor, Tensor], plan: SegmentPlan, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Packed query, key and value (S, H, dh) -> (S, H * dh), each segment alone.

    attend: (n, size, H, dh) of each for n segments of one length -> (n, size, H, dh).
    """
    rows, move = parts[0].shape[0], plan.move
    if move is None:
        return attend(*(x.unflatten(0, plan.groups[0]) for x in parts)).reshape(rows, -1)
    sizes = [count * length for count, length in plan.groups]
    split = [move(x).split(sizes) for x in parts]
    done = [
        attend(*(x.unflatten(0, group) for x in own)).flatten(0, 1)
        for group, own in zip(plan.groups, zip(*split, strict=True), strict=True)
    ]
    return move.undo(torch.cat(done)).reshape(rows, -1)


class SegmentVisionAttention(Qwen2_5_VLVisionAttention):
    """Vision attention over packed segments, one batched call for each distinct segment length."""

    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = staticmethod(
        apply_rotary_pos_emb_vision
    )

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if is_flash_attention_requested(self.config):  # the variable-length kernel needs no grouping
            return super().forward(hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs)
        length = hidden_states.shape[0]
        qkv = self.qkv(hidden_states).reshape(length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(1, 0, 2, 3).unbind(0)  # each (S, H, dh)
        query, key = self.rotate(query, key, *position_embeddings)
        plan = getattr(cu_seqlens, "segment_plan", None)
        plan = plan or SegmentPlan.from_bounds(cu_seqlens.tolist(), hidden_states.device)
        return self.proj(attend_by_length((query, key, value), plan, self._attend))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """n segments of one length, (n, size, H, dh) each -> (n, size, H, dh)."""
        attend: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask=None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            is_causal=False,
        )
        return out


def install_segment_attention(visual: nn.Module) -> None:
    """Swap each block's attention for ours around the SAME projections; a second call changes nothing."""
    for block in visual.blocks:
        if isinstance(block.attn, SegmentVisionAttention):
            continue
        with torch.device("meta"):
            attention = SegmentVisionAttention(block.attn.config)
        attention.qkv, attention.proj = block.attn.qkv, block.attn.proj
        attention.train(block.attn.training)
        block.attn = attention
