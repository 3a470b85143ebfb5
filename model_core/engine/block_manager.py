"""Who owns which block of the KV cache, and which blocks nobody owns but are worth keeping.

Pure accounting: block ids, owners counted, names of content (prefix_hash.py). What a block id stands for,
a place on the GPU or a kept copy on the CPU, is the store's affair (language/kv_cache.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from model_core.errors import ConfigError


class BlockManager:
    """A block is free, owned (by one sequence, or shared as a prefix by several), or kept: owned by nobody, but
    its content has a name and comes back as a hit until its room is needed, least recently used first."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(
                "a KV cache needs blocks", value=f"{num_blocks} of {block_size} tokens", allowed="1 or more"
            )
        self.num_blocks, self.block_size, self._is_naming = num_blocks, block_size, enable_prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners: dict[int, int] = {}
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that an allocation could take, kept ones included."""
        return len(self._free) + len(self._kept)

    @property
    def usage_ratio(self) -> float:
        return len(self._owners) / self.num_blocks

    def match(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix. Changes nothing."""
        found = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def allocate(self, owned: list[int], num_tokens: int, cached: Sequence[int] = ()) -> bool:
        """Make `owned` hold the blocks of `num_tokens` tokens, or change nothing and return False.

        cached: what `match` found for a sequence that owns nothing yet; these come first and are shared.
        """
        missing = -(-num_tokens // self.block_size) - len(owned) - len(cached)
        revived = sum(1 for block in cached if block in self._kept)
        if missing > self.num_free - revived:
            return False
        for block in cached:
            self._kept.pop(block, None)
            self._owners[block] = self._owners.get(block, 0) + 1
        owned.extend(cached)
        for _ in range(missing):
            block = self._take()
            self._owners[block] = 1
            owned.append(block)
        return True

    def register(self, block: int, name: bytes) -> None:
        """This owned block is full and holds that content. A copy of known content stays nameless."""
        if block not in self._owners:
            raise RuntimeError(f"block {block} is nobody's and can't be named")
        if self._is_naming and name not in self._block_of and block not in self._name_of:
            self._block_of[name], self._name_of[block] = block, name

    def free(self, owned: list[int]) -> None:
        """Give back everything, the last block first: a prefix's tail then goes before its head."""
        for block in reversed(owned):
            left = self._owners.get(block, 0) - 1
            if left < 0:
                raise RuntimeError(f"block {block} was freed twice")
            if left:
                self._owners[block] = left
                continue
            del self._owners[block]
            if block in self._name_of:
                self._kept[block] = None
            else:
                self._free.append(block)
        owned.clear()

    def reset_cache(self) -> None:
        """Forget all content. Owned blocks stay owned, and stay nameless for the rest of their owners' lives."""
        self._block_of.clear()
        self._name_of.clear()
        self._free.extend(self._kept)
        self._kept.clear()

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._name_of.pop(block)]
        return block
