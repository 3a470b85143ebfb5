"""A word looks at the cells that it means: losses on two attention heads of the demo's language model.

Every question about a thing begins with finding it. Left to the answers alone, that look-up emerges late and all at
once, after more steps than two cores have time for; but scenes know which cells a noun means, so two heads of the
first layer are told. One looks at all cells of the thing, or at the first token if it is not there, which is how "no"
is seen. The other counts: it looks evenly at the first token and at the middle cell of each of the n things that are
meant, so that 1 / (n + 1) of its look stays on the first token. Attention is a mean and can't count by itself; beside a
token that is always there it can.
Guided attention as in Liu et al. 2016 (1605.09553), for single heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from model_core.demo.canvas import SHAPES
from model_core.demo.questions import plural_of
from model_core.demo.scenes import CLASS_NAMES

LAYER, HEAD, TALLY_HEAD = 0, 0, -1
_MIDDLE = 2  # see labels.cell_middles


class Lookup:
    """Watches the guided heads during one forward; `loss` then says how much of each noun's look went astray."""

    def __init__(self, tokenizer: Any, language_model: nn.Module, device: torch.device) -> None:
        config = language_model.config
        self.attention = language_model.layers[LAYER].self_attn
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_heads = config.num_attention_heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        nouns = {name: [name] for name in CLASS_NAMES[1:]} | {"shape": list(SHAPES)}
        #: (nouns + 1, classes): which classes of cells noun number n means; row 0 is no noun.
        self.means = torch.zeros(len(nouns) + 1, len(CLASS_NAMES), dtype=torch.bool, device=device)
        for index, names in enumerate(nouns.values(), start=1):
            self.means[index, [CLASS_NAMES.index(name) for name in names]] = True
        self.phrases = _phrases(tokenizer, list(nouns))
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None

    @contextmanager
    def watching(self) -> Any:
        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self._seen = (hidden, *kwargs["position_embeddings"])

        handle = self.attention.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

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
        return torch.tensor(found, device=input_ids.device)

    def loss(
        self, input_ids: Tensor, is_image: Tensor, cells: dict[str, Tensor], may_attend: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean over nouns of -log (share of the look that falls where it should), and of KL(even look | the tally's).

        input_ids, is_image: (B, T); cells: class and middles of (B, gh, gw), in the order of the image tokens;
        may_attend: (B, 1, T, T).
        """
        noun = self.nouns(input_ids)  # (B, T)
        row, place = noun.nonzero(as_tuple=True)
        allowed = may_attend[row, 0, place]  # (N, T)
        shows, middles = (
            torch.zeros_like(input_ids).masked_scatter(is_image, cells[what].to(input_ids.device))[row]
            for what in ("class", "middles")
        )
        # A question before its picture sees none.
        meant = self.means[noun[row, place]].gather(1, shows) & allowed  # (N, T)
        target = meant.clone()
        target[:, 0] |= ~meant.any(-1)
        scores = self._scores(HEAD, row, place, allowed)
        look = scores.logsumexp(-1) - scores.masked_fill(~target, float("-inf")).logsumexp(-1)
        counted = meant & (middles == _MIDDLE)
        counted[:, 0] = True
        scores = self._scores(TALLY_HEAD, row, place, allowed)
        n = counted.sum(-1)
        even = scores.masked_fill(~counted, 0.0).sum(-1) / n
        return look.mean(), (scores.logsumexp(-1) - even - n.log()).mean()

    def _scores(self, head: int, row: Tensor, place: Tensor, allowed: Tensor) -> Tensor:
        """(N, T): what the head gives each token, seen from each noun; -inf where it may not look."""
        hidden, cos, sin = self._seen
        head %= self.num_heads
        at, kv_at = head * self.head_dim, head // self.group * self.head_dim
        query = self.attention.q_proj(hidden)[..., at : at + self.head_dim]
        key = self.attention.k_proj(hidden)[..., kv_at : kv_at + self.head_dim]
        query, key = apply_rotary_pos_emb(query[:, None].float(), key[:, None].float(), cos.float(), sin.float())
        # All pairs, then each noun's row once: a gather of keys would add up its gradient in no fixed order.
        scores = (query[:, 0] @ key[:, 0].transpose(1, 2) * self.head_dim**-0.5)[row, place]
        return scores.masked_fill(~allowed, float("-inf"))


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
