"""What the engine may hold and do at once. Derived from the device where it is not asked for."""

from __future__ import annotations

from dataclasses import dataclass

from model_core.errors import ConfigError
from model_core.language.kv_cache import CacheShape

BLOCK_SIZE = 16
_CPU_CACHE_BYTES = 2**30
_GPU_ENCODE_TOKENS, _CPU_ENCODE_TOKENS = 4096, 256


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine.

    max_num_seqs: sequences that run at once. max_num_batched_tokens: tokens of one step, prompts in chunks.
    max_encode_tokens: image tokens that one pass of the encoders computes; an image above it goes alone, and a request
        with more takes several passes. None: 256 on a CPU, where a larger pass is no faster an image and all of it
        waits for the last one; 4096 elsewhere.
    overlaps_steps: the next decode step is launched before the host has read what the last one chose. None: where there
        is a GPU that would wait meanwhile; on a CPU both are work of the same cores.
    encode_window_seconds: how long a picture may wait for company while others are being answered.
    max_context_tokens: the longest sequence, at most the model's own; None is the model's own, or what a derived cache
        can hold.
    kv_cache_bytes: keys and values of running sequences and the copies of prefixes beside them. None derives it from
        the device. encoder_cache_bytes: 0 keeps no features.
    shrinks_context: a cache that was asked for and can't hold the context shortens it instead of being refused: for
        variants, whose caches are shares of a budget.
    joins_weights: the decoder's products joined, its parameters becoming views of larger ones; False leaves them alone.
    compiles_decode: on a CPU, decode steps in float32 run through loops that another process compiles meanwhile; only
        with joined weights.
    variant_bytes: left free on a GPU for variants beside this model; None is an eighth of what is free.
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    max_encode_tokens: int | None = None
    encode_window_seconds: float = 0.0
    max_context_tokens: int | None = None
    kv_cache_bytes: int | None = None
    shrinks_context: bool = False
    encoder_cache_bytes: int = 256 * 2**20
    enable_prefix_caching: bool = True
    joins_weights: bool = True
    overlaps_steps: bool | None = None
    compiles_decode: bool = True
    variant_bytes: int | None = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_encode_tokens", "max_context_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                fix = "Raise it, or leave it out"
                raise ConfigError(f"{name} is out of range", value=getattr(self, name), allowed="1 or more", fix=fix)
        if self.encode_window_seconds < 0:
            raise ConfigError(
                "encode_window_seconds is out of range", value=self.encode_window_seconds, allowed="0 or more",
                fix="Leave it out, and no picture waits",
            )  # fmt: skip
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                "a step can't hold one token of every sequence",
                value=f"max_num_batched_tokens={self.max_num_batched_tokens}, max_num_seqs={self.max_num_seqs}",
                allowed="max_num_batched_tokens of at least max_num_seqs",
                fix="Raise max_num_batched_tokens, or lower max_num_seqs",
            )

    def encode_tokens_on(self, device_type: str) -> int:
        """`max_encode_tokens`, by the device where it was left open."""
        if self.max_encode_tokens is not None:
            return self.max_encode_tokens
        return _CPU_ENCODE_TOKENS if device_type == "cpu" else _GPU_ENCODE_TOKENS

    def overlaps_on(self, device_type: str) -> bool:
        """`overlaps_steps`, by the device where it was left open."""
        return device_type == "cuda" if self.overlaps_steps is None else self.overlaps_steps

    def context_of(self, model_tokens: int) -> int:
        """The longest sequence that is wanted of a model whose own context is `model_tokens`.

        Raises:
            ConfigError: more was asked for than the model has.
        """
        if self.max_context_tokens is None:
            return model_tokens
        if self.max_context_tokens > model_tokens:
            raise ConfigError(
                "max_context_tokens is more than the model's own context", value=self.max_context_tokens,
                allowed=f"up to {model_tokens}", fix="Lower it, or leave it out",
            )  # fmt: skip
        return self.max_context_tokens

    def check_encode_tokens(self, smallest_image: int) -> None:
        """Raises ConfigError: not one image fits a pass, with both numbers. smallest_image: tokens it comes to."""
        if self.max_encode_tokens is not None and self.max_encode_tokens < smallest_image:
            raise ConfigError(
                "no image fits a pass of the encoders", value=f"max_encode_tokens={self.max_encode_tokens}",
                allowed=f"at least {smallest_image}, the tokens of this model's smallest image",
                fix="Raise max_encode_tokens, or leave it out",
            )  # fmt: skip

    def num_blocks(
        self, shape: CacheShape, free_device_bytes: int | None, max_context_tokens: int, *, copies: int = 1
    ) -> int:
        """Blocks of the cache. More than all sequences could ever fill are never taken.

        Args:
            copies: how often the store may hold a block: 2 where kept prefixes lie beside the running rows.
        Raises:
            ConfigError: the cache that was asked for can't hold one sequence of this context, or one that was derived
                not one block, with both numbers.
        """
        budget = self.kv_cache_bytes
        if budget is None:
            budget = _CPU_CACHE_BYTES if free_device_bytes is None else self._share_of(free_device_bytes)
        block_bytes = shape.token_bytes * BLOCK_SIZE * copies
        sequence_blocks = -(-max_context_tokens // BLOCK_SIZE)
        blocks = min(budget // block_bytes, self.max_num_seqs * sequence_blocks)
        may_shrink = self.shrinks_context or (self.kv_cache_bytes is None and self.max_context_tokens is None)
        if blocks < (least := 1 if may_shrink else sequence_blocks):
            what = "one block" if may_shrink else "one sequence of the context"
            fix = "Raise kv_cache_bytes, or free memory on the device"
            raise ConfigError(
                f"the KV cache can't hold {what}",
                value=f"{budget} bytes, {blocks * BLOCK_SIZE} tokens",
                allowed=f"at least {least * block_bytes} bytes, {least * BLOCK_SIZE} tokens",
                fix=fix if may_shrink else f"{fix}, or lower max_context_tokens",
            )
        return blocks

    def _share_of(self, free_bytes: int) -> int:
        kept_back = free_bytes // 8 if self.variant_bytes is None else self.variant_bytes
        return int(max(free_bytes - kept_back, 0) * 0.85)
