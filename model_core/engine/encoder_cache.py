"""Features of images already seen, by encoder, BEFORE fusion: they outlive a change of the gate or of the LLM.

In: (encoder name, image key, features); out: the same features, or None. Bounded in bytes over all encoders,
least recently used first. A key stands for the patches themselves (processing/batch.py), so a hit is exact.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from torch import Tensor

from model_core.errors import ConfigError


class EncoderCache:
    """`max_bytes` 0 keeps nothing; every lookup is then a miss."""

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ConfigError(
                "the encoder cache's size is negative", value=max_bytes, allowed="0 (off) or more bytes",
                fix="Set encoder_cache_bytes to 0 to keep nothing, or leave it out",
            )  # fmt: skip
        self.max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.evictions: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __contains__(self, place: tuple[str, bytes]) -> bool:
        """Are (encoder name, image key)'s features here? Counts nothing and makes nothing younger."""
        return place in self._kept

    def get(self, name: str, key: bytes) -> Tensor | None:
        """Features (n, C) of one image, read only; counts a hit or a miss."""
        found = self._kept.get((name, key))
        if found is None:
            self.misses[name] += 1
            return None
        self.hits[name] += 1
        self._kept.move_to_end((name, key))
        return found

    def put(self, name: str, key: bytes, features: Tensor) -> None:
        """Keep a copy of its own: a view of the batch would hold the whole batch. What can't fit is not kept."""
        if features.nbytes > self.max_bytes or (name, key) in self._kept:
            return
        self._kept[name, key] = features.clone()
        self.bytes[name] += features.nbytes
        while sum(self.bytes.values()) > self.max_bytes:
            (old_name, _), old = self._kept.popitem(last=False)
            self.bytes[old_name] -= old.nbytes
            self.evictions[old_name] += 1

    def clear(self, names: Iterable[str] | None = None) -> None:
        """Forget everything, or these encoders' features (their weights have changed)."""
        for name, key in list(self._kept):
            if names is None or name in names:
                self.bytes[name] -= self._kept.pop((name, key)).nbytes
