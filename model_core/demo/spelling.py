"""The next letter looks at its spot: a loss on one attention head of the demo's language model.

A word is spelt letter by letter. With a tower from which 91 % of words could be read, the language model read 70 %: two
in five of its errors had lost or doubled a letter. So a head is told which cells the next letter stands on.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model_core.training.data.packs import PackedBatch

#: Two layers are there to count how far the answer is.
LAYER, HEAD = 2, 0
_LEAST_LETTERS = 3


class Spelling:
    """Finds the words that a pack's answers spell, and asks whether each letter was looked for in its place."""

    def __init__(self, tokenizer: Any, image_token_id: int) -> None:
        self.image_token_id = image_token_id
        self.is_letter = torch.zeros(len(tokenizer), dtype=torch.bool)
        self.is_letter[tokenizer.convert_tokens_to_ids(list(string.ascii_lowercase))] = True

    def loss(self, pack: PackedBatch, query: Tensor, key: Tensor) -> Tensor | None:
        """query (S, H, dh), key (S, K, dh), rotated -> mean of -log (share of the look on the letter's cells), over
        letters; None where the pack spells nothing."""
        found = []
        for at, cells, length, begin, end in self.words(pack):
            # Letter k is told by the token before it.
            asking = torch.arange(begin - 1, end - 1)
            scores = query[at + asking, HEAD].float() @ key[at : at + length, HEAD].float().T * query.shape[-1] ** -0.5
            own = slice(at, at + length)
            allowed = torch.arange(length) <= asking[:, None]
            if pack.blocks is not None:
                blocks = pack.blocks[own]
                allowed &= (blocks == 0) | (blocks == blocks[begin])
            is_image = pack.input_ids[own] == self.image_token_id
            spots = pack.targets["spots"][cells : cells + int(is_image.sum())]  # (cells, 2)
            wanted = torch.zeros(len(asking), length, dtype=torch.bool)
            numbers = torch.arange(1, len(asking) + 1)
            wanted[:, is_image] = (spots[None] == numbers[:, None, None]).any(-1)
            shown = wanted.any(-1)
            allowed, wanted = (x[shown].to(query.device) for x in (allowed, wanted))
            look = scores[shown.to(query.device)].masked_fill(~allowed, float("-inf"))
            found.append(look.logsumexp(-1) - look.masked_fill(~wanted, float("-inf")).logsumexp(-1))
        return torch.cat(found).mean() if found else None

    def words(self, pack: PackedBatch) -> Iterator[tuple[int, int, int, int, int]]:
        """Of each spelt word behind its picture: its sample's first token, first cell and length; and, counted from
        the sample's first token, where its letters begin and end."""
        at = cells = 0
        for length, sample in zip(pack.sample_lengths, pack.samples, strict=True):
            labels = pack.labels[at : at + length]
            is_image = pack.input_ids[at : at + length] == self.image_token_id
            last_image = int(is_image.nonzero()[-1])
            for begin, end in _runs(labels != -100):
                letters = labels[begin : end - 1]  # without the end of the turn
                is_spelt = len(letters) >= _LEAST_LETTERS and bool(self.is_letter[letters].all())
                if sample.dataset == "word" and is_spelt and begin > last_image:
                    yield at, cells, length, begin, end - 1
            at, cells = at + length, cells + int(is_image.sum())


def _runs(mask: Tensor) -> list[tuple[int, int]]:
    edge = torch.tensor([False])
    padded = torch.cat([edge, mask, edge])
    change = (padded[1:] != padded[:-1]).nonzero().flatten().tolist()
    return list(zip(change[::2], change[1::2], strict=True))
