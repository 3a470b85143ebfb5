"""Blocks: all or nothing, shared by their owners, kept for whoever comes back."""

from __future__ import annotations

import pytest

from model_core.engine.block_manager import BlockManager
from model_core.engine.prefix_hash import PrefixHasher, prefix_root
from model_core.errors import ConfigError

ROOT = prefix_root("model", "fused")


def names(count: int) -> list[bytes]:
    return [bytes([n]) for n in range(count)]


def filled(blocks: BlockManager, count: int) -> list[int]:
    """A sequence that owns `count` full, named blocks."""
    owned: list[int] = []
    assert blocks.allocate(owned, count * blocks.block_size)
    for block, name in zip(owned, names(count), strict=True):
        blocks.register(block, name)
    return owned


def test_allocation_is_all_or_nothing() -> None:
    blocks, owned = BlockManager(3, 4), []
    assert not blocks.allocate(owned, 13)
    assert (owned, blocks.num_free) == ([], 3)
    assert blocks.allocate(owned, 9)
    assert len(set(owned)) == 3
    assert blocks.allocate(owned, 12), "there is room left in the last block"
    assert not blocks.allocate(owned, 13)
    assert blocks.usage_ratio == 1.0
    blocks.free(owned)
    assert (owned, blocks.num_free, blocks.usage_ratio) == ([], 3, 0.0)


def test_a_prefix_is_shared_and_outlives_its_first_owner() -> None:
    blocks = BlockManager(4, 4)
    first = filled(blocks, 2)
    shared, second = list(first), []
    assert blocks.match([*names(2), b"unknown"]) == shared
    assert blocks.allocate(second, 12, shared)
    assert second[:2] == shared
    blocks.free(first)
    assert blocks.match(names(2)) == shared
    assert blocks.num_free == 1
    blocks.free(second)
    assert blocks.num_free == 4
    assert blocks.match(names(2)) == shared, "nobody owns them, but they are known"


def test_what_was_used_longest_ago_goes_first_and_a_tail_before_its_head() -> None:
    blocks = BlockManager(3, 4)
    blocks.free(filled(blocks, 3))
    other: list[int] = []
    assert blocks.allocate(other, 4)
    assert len(blocks.match(names(3))) == 2, "the last block of the prefix went"
    again: list[int] = []
    assert blocks.allocate(again, 8, blocks.match(names(2)))
    assert blocks.num_free == 0
    assert not blocks.allocate(other, 8), "shared blocks can't be taken while somebody owns them"


def test_kept_blocks_that_are_wanted_as_a_prefix_are_no_room() -> None:
    """A hit on the last kept blocks was counted both as hit and as room."""
    blocks = BlockManager(2, 4)
    blocks.free(filled(blocks, 2))
    owned: list[int] = []
    assert not blocks.allocate(owned, 12, blocks.match(names(2)))
    assert (owned, blocks.num_free) == ([], 2)
    assert blocks.match(names(2))


def test_equal_content_is_named_once() -> None:
    blocks = BlockManager(4, 4)
    first, second = filled(blocks, 1), filled(blocks, 1)
    assert blocks.match(names(1)) == first
    blocks.free(second)
    assert blocks.num_free == 3
    blocks.free(first)
    assert blocks.match(names(1))


def test_reset_forgets_content_and_leaves_owners_alone() -> None:
    blocks = BlockManager(4, 4)
    kept, live = filled(blocks, 1), []
    blocks.free(kept)
    assert blocks.allocate(live, 8, blocks.match(names(1)))
    blocks.reset_cache()
    assert blocks.match(names(1)) == []
    assert blocks.num_free == 2
    blocks.free(live)
    assert blocks.num_free == 4


def test_our_own_faults_are_loud() -> None:
    blocks = BlockManager(2, 4)
    owned = filled(blocks, 1)
    twice = list(owned)
    blocks.free(owned)
    with pytest.raises(RuntimeError, match="freed twice"):
        blocks.free(twice)
    with pytest.raises(RuntimeError, match="nobody's"):
        blocks.register(1, b"x")
    with pytest.raises(ConfigError, match=r"0 of 16 tokens"):
        BlockManager(0, 16)


def test_without_prefix_caching_nothing_is_known() -> None:
    blocks = BlockManager(2, 4, enable_prefix_caching=False)
    blocks.free(filled(blocks, 2))
    assert blocks.match(names(2)) == []


def hashed(ids: list[int], *spans: tuple[int, int, bytes], root: bytes = ROOT) -> list[bytes]:
    found: list[bytes] = []
    PrefixHasher(root, 4).extend(found, ids, spans)
    return found


def test_a_name_holds_everything_before_it_and_full_blocks_only() -> None:
    ids = list(range(11))
    assert len(hashed(ids)) == 2
    assert hashed(ids)[:1] == hashed(ids[:4])
    assert hashed([9, *ids[1:]])[1] != hashed(ids)[1], "the same block behind another one"
    assert hashed(ids, root=prefix_root("model", "blind"))[0] != hashed(ids)[0]
    assert prefix_root("ab", "c") != prefix_root("a", "bc")


def test_names_grow_as_they_would_have_been_made_at_once() -> None:
    hasher, found = PrefixHasher(ROOT, 4), []
    for end in range(30):
        hasher.extend(found, list(range(end)), [(3, 9, b"image")])
    assert found == hashed(list(range(29)), (3, 9, b"image"))


def test_an_image_is_known_by_its_content_and_its_place() -> None:
    ids = [7] * 16
    one = hashed(ids, (2, 10, b"cat"))
    assert hashed(ids, (2, 10, b"dog"))[0] != one[0]
    assert hashed(ids, (3, 11, b"cat"))[0] != one[0]
    assert hashed(ids, (2, 6, b"cat"), (6, 10, b"cat"))[1] != one[1], "two images of half the size"
    assert hashed(ids, (12, 16, b"cat"))[2] == hashed(ids)[2], "an image behind a block is no part of it"
