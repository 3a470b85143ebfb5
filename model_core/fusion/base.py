"""What a fusion strategy is: aligned features of every encoder in, tokens for the language model out.

The base class owns what all strategies share, so that none can get it wrong: the LayerNorm in front of
the projectors, the arms ("without encoder e" means z_e is replaced by its carried mean BEFORE the
gate, model.md section 4), and the carried means. A strategy sees only the z's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model_core.vision_tokens import Grid, image_index

#: In training the carried means follow the moving features over about this many tokens.
MEAN_WINDOW_TOKENS = 200_000


@dataclass(frozen=True, slots=True)
class FusionOutput:
    """tokens: (S * tokens_per_cell, D), image after image; q: (S, D) Qwen's own tokens;
    weights: (I, E) float32 summing to 1, or None; contributions: u_e (rows, D) by encoder, on request."""

    tokens: Tensor
    weights: Tensor | None
    q: Tensor
    contributions: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class FusionInputs:
    """z: (S, C_e) by encoder, in the order of the gate's columns; grids: cells (t, h, w) of each image."""

    z: Mapping[str, Tensor]
    grids: tuple[Grid, ...]
    want_contributions: bool = False
    lengths: list[int] = field(default_factory=list)


class EncoderMeans(nn.Module):
    """m_e: the mean z of each encoder and the number of tokens behind it. They travel in the checkpoint."""

    def __init__(self, dims: Mapping[str, int]) -> None:
        super().__init__()
        for name, dim in dims.items():
            self.register_buffer(name, torch.zeros(dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Any, recurse: bool = True) -> EncoderMeans:
        """Moves with the model, but stays float32: in bfloat16 a running mean stops running."""
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = getattr(self, name)
            if now.is_floating_point() and now.dtype != torch.float32:
                setattr(self, name, now.float() if before.is_meta else before.to(now.device, torch.float32))
        return self

    @torch.no_grad()
    def observe(self, z: Mapping[str, Tensor], max_count: int) -> None:
        """Fold these tokens in: a running mean, and a moving one once `max_count` tokens were seen."""
        n = next(iter(z.values())).shape[0]
        seen = min(int(self.count), max_count)
        for name, tokens in z.items():
            mean = getattr(self, name)
            mean.lerp_(tokens.detach().float().mean(0).to(mean.dtype), n / (seen + n))
        self.count.add_(n)

    @torch.no_grad()
    def set_from(self, batches: Iterable[Mapping[str, Tensor]]) -> int:
        """Replace by the exact means over all these z's; the number of tokens. Unchanged if there are none."""
        sums: dict[str, Tensor] = {}
        count = 0
        for z in batches:
            for name, tokens in z.items():
                total = tokens.detach().float().sum(0).cpu().double()
                sums[name] = sums[name] + total if name in sums else total
            count += next(iter(z.values())).shape[0]
        for name, total in sums.items():
            getattr(self, name).copy_(total / count)
        if count:
            self.count.fill_(count)
        return count

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()


class FusionStrategy(nn.Module, ABC):
    """One way to fuse. Subclass it, implement `fuse` and `reset_parameters`, name it in the config.

    Class attributes:
        has_gate: `fuse` returns weights.
        is_identity_at_birth: a fresh model answers exactly as Qwen does.
        has_residual: Qwen's tokens go around the bottleneck, so common_dim may be below the LLM width.
        tokens_per_cell: fused tokens for each cell of the grid.
    """

    has_gate = False
    is_identity_at_birth = True
    has_residual = False
    tokens_per_cell = 1

    def __init__(self, dims: Mapping[str, int], common_dim: int, dropout: float = 0.0) -> None:
        """dims: C_e by encoder; Qwen's, the first, equals the language model's width D."""
        super().__init__()
        self.dims = dict(dims)
        self.encoder_names = tuple(dims)
        self.llm_dim = dims["qwen"]
        self.common_dim = common_dim
        self.norms = nn.ModuleDict({name: nn.LayerNorm(dim) for name, dim in dims.items() if name != "qwen"})
        self.dropout = nn.Dropout(dropout)
        self.means = EncoderMeans(dims)

    @abstractmethod
    def fuse(self, inputs: FusionInputs) -> FusionOutput:
        """Fuse packed images; row i of the output may depend on its own image alone."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Birth: where `is_identity_at_birth`, the output must equal Qwen's tokens to the bit."""

    @abstractmethod
    def silent_parameters(self) -> list[Tensor]:
        """Tensors that are all zero exactly as long as the second encoder can't change the output."""

    @property
    def is_trained(self) -> bool:
        """False while the second encoder provably changes nothing (a fresh model). Weights that a device map keeps
        elsewhere until their module runs can't be looked at, and prove nothing."""
        silent = self.silent_parameters()
        return not silent or any(p.is_meta or bool(p.count_nonzero()) for p in silent)

    def project(self, features: Mapping[str, Tensor | None], rows: int) -> dict[str, Tensor]:
        """Features as z: Qwen's as they are, others normalised; a missing encoder is its mean everywhere."""
        z = {}
        for name in self.encoder_names:
            tokens = features.get(name)
            if tokens is None:
                tokens = self.mean_of(name).expand(rows, -1)
            elif name in self.norms:
                norm = self.norms[name]
                tokens = norm(tokens.to(norm.weight.dtype))
            z[name] = tokens
        return z

    def mean_of(self, name: str) -> Tensor:
        dtype = next(self.parameters()).dtype if any(True for _ in self.parameters()) else None
        mean: Tensor = getattr(self.means, name)
        return mean if dtype is None else mean.to(dtype)

    def forward(
        self,
        features: Mapping[str, Tensor | None],
        grids: tuple[Grid, ...],
        removed: Tensor | None = None,
        unfused: Tensor | None = None,
        want_contributions: bool = False,
    ) -> FusionOutput:
        """Fuse aligned features.

        Args:
            features: (S, C_e) by encoder; None where no image of the batch needs that encoder.
            grids: cells of each image, S in all.
            removed: (I, E) bool, encoders to replace by their mean, image by image (the arms).
            unfused: (I,) bool, images whose output is Qwen's own tokens.
            want_contributions: also return each encoder's share u_e of the output.
        """
        lengths = [t * h * w for t, h, w in grids]
        z = self.project(features, sum(lengths))
        if self.training and torch.is_grad_enabled():
            self.means.observe(z, MEAN_WINDOW_TOKENS)
        rows = image_index(lengths, z["qwen"].device)
        if removed is not None:
            for column, name in enumerate(self.encoder_names):
                mask = removed[:, column].to(rows.device)
                if bool(mask.any()):
                    z[name] = torch.where(mask[rows, None], self.mean_of(name).to(z[name].dtype), z[name])
        output = self.fuse(FusionInputs(z, grids, want_contributions, lengths))
        if unfused is None or not bool(unfused.any()):
            return output
        n = self.tokens_per_cell
        mask = unfused.to(output.tokens.device)[rows].repeat_interleave(n)[:, None]
        own = features["qwen"]
        tokens = torch.where(mask, own.repeat_interleave(n, dim=0), output.tokens)
        return FusionOutput(tokens, output.weights, output.q, output.contributions)


def expand_rows(per_image: Tensor, lengths: list[int]) -> Tensor:
    """(I,) -> (S, 1): each image's scalar beside each of its rows."""
    return per_image[image_index(lengths, per_image.device), None]


def identity_(weight: Tensor) -> None:
    """[I; 0] or [I 0]: ones on the diagonal, zero elsewhere."""
    with torch.no_grad():
        nn.init.zeros_(weight)
        n = min(weight.shape)
        weight[:n, :n].fill_diagonal_(1.0)
