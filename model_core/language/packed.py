"""The decoder's forward over whole packed samples, with gradients: what training runs.

It is the layer that serving runs module by module (`decoder.py`), so that LoRA and hooks count in both, with an
attention that keeps samples apart: on CUDA one variable-length kernel, elsewhere one causal call for all samples of
about one length. Within a sample, blocks that can't see each other (several questions behind one picture) cost a mask
of that sample alone. No mask of S x S is ever made. It holds no cache and takes no logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_core.language.decoder import Rotate, decode_layer, rotate
from model_core.language.varlen import FLASH_DTYPES, flash_varlen, torch_varlen
from model_core.rows import Move

#: Samples whose lengths round up to the same multiple share a call: 64 questions of 45 lengths were 45 calls a layer.
_PADDED_TO = 32
#: (S, H, dh), (S, K, dh), (S, K, dh) -> (S, H * dh)
PackedAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Is told each layer's number, its query (S, H, dh) and its key (S, K, dh), both rotated.
Watch = Callable[[int, Tensor, Tensor], None]


def packed_hidden(
    language_model: nn.Module,
    embeds: Tensor,
    positions: Tensor,
    lengths: Sequence[int],
    *,
    blocks: Tensor | None = None,
    watch: Watch | None = None,
    recompute: Callable[[], tuple[Any, Any]] | None = None,
    use_flash_attention: bool = False,
    rotate: Rotate = rotate,
    keep: Tensor | None = None,
) -> Tensor:
    """Hidden states of samples that can't see each other.

    Args:
        embeds: (S, D); positions: (3, S) rotary positions; lengths: tokens of each sample, S in all.
        blocks: (S,) within each sample: 0 is seen by all that follows, n > 0 by itself alone. Without it all is causal.
        recompute: activations inside a layer are computed again in the backward pass instead of kept, under the
            contexts that it gives for the first time and for the second.
        rotate: how queries and keys get their positions.
        keep: (R,) the places whose states are wanted, in order; None: all. The last layer computes no others to their
            end: nobody looks at them any more.
    Returns:
        (S, D), or (R, D), after the final norm.
    """
    cos, sin = language_model.rotary_emb(embeds[None], positions[:, None])
    attention = packed_attention(lengths, embeds.device, blocks=blocks, use_flash_attention=use_flash_attention)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if watch is not None:
            watch(layer, query, key)
        return attention(query, key, value)

    hidden = embeds
    for number, layer in enumerate(language_model.layers):
        is_last = number == len(language_model.layers) - 1
        run = partial(decode_layer, layer, number, attend=attend, rotate=rotate, keep=keep if is_last else None)
        if recompute is not None and torch.is_grad_enabled():
            hidden = checkpoint(run, hidden, cos, sin, use_reentrant=False, context_fn=recompute)
        else:
            hidden = run(hidden, cos, sin)
    return language_model.norm(hidden)


def packed_attention(
    lengths: Sequence[int], device: torch.device, *, blocks: Tensor | None = None, use_flash_attention: bool
) -> PackedAttention:
    """The attention for samples of these lengths: flash-attn's or torch's varlen on CUDA in 16 bits, SDPA elsewhere and
    wherever there are blocks, which no such kernel knows."""
    by_length = partial(_by_length, groups=_groups(lengths, device, blocks))
    if device.type != "cuda" or blocks is not None:
        return by_length
    kernel = flash_varlen() if use_flash_attention else torch_varlen()
    if kernel is None:
        return by_length
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(lengths)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.dtype not in FLASH_DTYPES:
            return by_length(query, key, value)
        return kernel(query, key, value, bounds, bounds, longest, longest, causal=True).flatten(1)

    return attend


@dataclass(frozen=True, slots=True)
class _Groups:
    """Samples of about one length each time: how many, the length they are padded to, and (n, 1, T, T) what may be
    seen; None is causal. Padding comes last, where no token looks. move: from end to end to group after group."""

    members: list[tuple[int, int, Tensor | None]]
    move: Move


def _groups(lengths: Sequence[int], device: torch.device, blocks: Tensor | None) -> _Groups:
    alike: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        alike.setdefault(-(-length // _PADDED_TO), []).append(number)
    own = None if blocks is None else blocks.to(device).split(list(lengths))
    sized = [(numbers, max(lengths[i] for i in numbers)) for numbers in alike.values()]
    masks = [
        None if own is None else may_attend(_stacked([own[i] for i in numbers], longest)) for numbers, longest in sized
    ]
    members = [(len(numbers), longest, mask) for (numbers, longest), mask in zip(sized, masks, strict=True)]
    return _Groups(members, Move.pad(lengths, sized, device))


def _stacked(blocks: Sequence[Tensor], length: int) -> Tensor:
    """(T_i,) each -> (n, length); padding is a block of its own."""
    return torch.stack([F.pad(x, (0, length - len(x)), value=-1) for x in blocks])


def may_attend(blocks: Tensor) -> Tensor:
    """Blocks (n, T) -> (n, 1, T, T) bool: backwards, to block 0 and to the token's own block."""
    query, key = blocks[:, :, None], blocks[:, None, :]
    causal = torch.ones(blocks.shape[1], blocks.shape[1], dtype=torch.bool, device=blocks.device).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]


def _by_length(query: Tensor, key: Tensor, value: Tensor, *, groups: _Groups) -> Tensor:
    """One call for each group."""
    sizes = [count * length for count, length, _ in groups.members]
    parts = [groups.move(x).split(sizes) for x in (query, key, value)]
    done = []
    for (count, length, mask), *group in zip(groups.members, *parts, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in group)  # (n, H or K, T, dh)
        has_groups = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=has_groups)
        done.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    return groups.move.undo(torch.cat(done))
