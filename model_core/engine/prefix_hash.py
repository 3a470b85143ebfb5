"""Names for blocks of tokens, so that equal prefixes are found: each name holds everything before it.

In: a root, token ids, the places and content keys of images. Out: one 16-byte name a full block. Placeholder
ids of images are all alike, so the key of an image, and where in it a block begins, go into the names.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence

Span = tuple[int, int, bytes]


def prefix_root(*parts: str) -> bytes:
    """The name before the first block; each part framed by its length, so that ("ab", "c") is not ("a", "bc")."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode()
        digest.update(struct.pack("<q", len(data)) + data)
    return digest.digest()


class PrefixHasher:
    """`root` tells apart whatever makes equal ids mean other keys and values: model, arm, weights, preprocessing."""

    def __init__(self, root: bytes, block_size: int) -> None:
        self.root, self.block_size = root, block_size

    def extend(self, hashes: list[bytes], token_ids: Sequence[int], spans: Sequence[Span] = ()) -> None:
        """Append the names of the full blocks that have none yet. spans: (first, end, key), in order."""
        size = self.block_size
        for start in range(len(hashes) * size, len(token_ids) - size + 1, size):
            digest = hashlib.blake2b(hashes[-1] if hashes else self.root, digest_size=16)
            digest.update(array("i", token_ids[start : start + size]).tobytes())
            for first, end, key in spans:
                if first < start + size and end > start:
                    digest.update(struct.pack("<qq", start - first, len(key)) + key)
            hashes.append(digest.digest())
