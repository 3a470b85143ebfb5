"""A word looks at the cells that it means: losses on two attention heads of the demo's language model.

Every question about a thing begins with finding it. Left to the answers alone, that look-up emerges late and all at
once, after more steps than two cores have time for; but scenes know which cells a noun means, so two heads of the
first layer are told. One looks at all cells of the thing, or at the first token if it is not there, which is how "no"
is seen. The other counts: it gives as much of its look to each of the n things that are meant, spread over the thing's
cells by how much of it they hold, as to the first token, so that 1 / (n + 1) stays there. Attention is a mean and can't
count by itself; beside a token that is always there it can. (The thing's middle cell alone was tried first: a middle
near a cell's border is in either cell, and a fifth of them were taken wrongly.)
Guided attention as in Liu et al. 2016 (1605.09553), for single heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_core.demo.canvas import SHAPES
from model_core.demo.questions import plural_of
from model_core.demo.scenes import CLASS_NAMES

LAYER, HEAD, TALLY_HEAD = 0, 0, -1


class Lookup:
    """The guided heads of one layer: `loss` says how much of each noun's look went astray."""

    def __init__(self, tokenizer: Any, num_heads: int, num_key_value_heads: int) -> None:
        self.num_heads, self.group = num_heads, num_heads // num_key_value_heads
        nouns = {name: [name] for name in CLASS_NAMES[1:]} | {"shape": list(SHAPES)}
        #: (nouns + 1, classes): which classes of cells noun number n means; row 0 is no noun.
        self.means = torch.zeros(len(nouns) + 1, len(CLASS_NAMES), dtype=torch.bool)
        for index, names in enumerate(nouns.values(), start=1):
            self.means[index, [CLASS_NAMES.index(name) for name in names]] = True
        self.phrases = _phrases(tokenizer, list(nouns))

    def nouns(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> the number of the noun that a token stands for, else 0. Of two that fit, the longer is meant."""
        found = [[0] * input_ids.shape[1] for _ in range(len(input_ids))]
        for ids, numbers in zip(input_ids.tolist(), found, strict=True):
            at = 0
            while at < len(ids):
                fits = (one for one in self.phrases.get(ids[at], ()) if tuple(ids[at : at + len(one[0])]) == one[0])
                phrase, number, offset = next(fits, ((0,), 0, 0))
                numbers[at + offset] = number
                at += len(phrase)
        return torch.tensor(found)

    def heads(self, query: Tensor, key: Tensor) -> Tensor:
        """(S, H, dh) and (S, K, dh), rotated -> (S, 2, 2, dh): of the looking and the counting head, query and key."""
        found = []
        for head in (HEAD % self.num_heads, TALLY_HEAD % self.num_heads):
            found.append(torch.stack([query[:, head], key[:, head // self.group]], dim=1))
        return torch.stack(found, dim=1)

    def loss(self, asked: Asked, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over nouns of -log (share of the look that falls where it should), and of KL(tally | the tally's look).

        heads: (B, T, 2, 2, dh), of `heads`.
        """
        noun = self.nouns(asked.input_ids)
        row, place = noun.nonzero(as_tuple=True)
        device = heads.device
        if not len(row):
            return heads.sum() * 0.0, heads.sum() * 0.0
        allowed = asked.may_attend[row, place]  # (N, T)
        # A question before its picture sees none.
        means, seen = self.means[noun[row, place]], allowed
        target = means.gather(1, asked.shows[row]) & seen
        target[:, 0] |= ~target.any(-1)
        touched = means.gather(1, asked.touched[row]) & seen
        wanted = (asked.shares[row] * touched).to(device)
        row, place, allowed, target = (x.to(device) for x in (row, place, allowed, target))
        scores = _scores(heads[:, :, 0], row, place).masked_fill(~allowed, float("-inf"))
        look = scores.logsumexp(-1) - scores.masked_fill(~target, float("-inf")).logsumexp(-1)
        scores = _scores(heads[:, :, 1], row, place).masked_fill(~allowed, float("-inf"))
        wanted[:, 0] = 1.0  # one look for the first token, and one for each thing, spread over its cells
        wanted = wanted / wanted.sum(-1, keepdim=True)
        said = scores.log_softmax(-1).masked_fill(wanted == 0, 0.0)
        return look.mean(), (torch.special.xlogy(wanted, wanted) - wanted * said).sum(-1).mean()


def _scores(head: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """(B, T, 2, dh) -> (N, T): what the head gives each token, seen from each noun."""
    q, k = head.float().unbind(2)
    # All pairs, then each noun's row once: a gather of keys would add up its gradient in no fixed order.
    return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5)[row, place]


@dataclass(frozen=True, slots=True)
class Asked:
    """Rows of a pack, padded: (B, T) each, may_attend (B, T, T).

    shows: the class of an image token's cell, else 0. touched: the class that paints most of the cell, perhaps not the
    cell's own; shares: of that class's things that lie in it.
    """

    input_ids: Tensor
    shows: Tensor
    touched: Tensor
    shares: Tensor
    may_attend: Tensor


def _phrases(tokenizer: Any, nouns: Sequence[str]) -> dict[int, list[tuple[tuple[int, ...], int, int]]]:
    """By first token, the longest first: a phrase's tokens, its noun's number, and which token stands for it.

    The first layer sees a token alone, not those before it, so it must be one that tells the noun: of "horse|s" the
    first ("s" is half of all plurals' last), of "hot| dog" the first. The fewest nouns have it; then the last such.
    """
    encoded = [
        (tuple(tokenizer.encode(f" {form}", add_special_tokens=False)), number)
        for number, noun in enumerate(nouns, start=1)
        for form in dict.fromkeys((noun, plural_of(noun)))
    ]
    owners: dict[int, set[int]] = {}
    for ids, number in encoded:
        for token in ids:
            owners.setdefault(token, set()).add(number)
    by_first: dict[int, list[tuple[tuple[int, ...], int, int]]] = {}
    for ids, number in encoded:
        vague = [_how_vague(tokenizer, owners, ids, at) for at in range(len(ids))]
        by_first.setdefault(ids[0], []).append((ids, number, vague.index(min(vague))))
    for found in by_first.values():
        found.sort(key=lambda one: -len(one[0]))
    return by_first


def _how_vague(tokenizer: Any, owners: dict[int, set[int]], ids: tuple[int, ...], at: int) -> tuple[bool, int, int]:
    """Pieces of a letter or two also spell other words."""
    is_piece = len(tokenizer.convert_ids_to_tokens(ids[at])) < 3
    return is_piece, len(owners[ids[at]]), -at
