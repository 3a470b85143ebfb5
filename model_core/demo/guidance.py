"""What the demo's build teaches beside the answers: what is in each cell, words that look like it, and where to look.

In: a pack's view with the `targets` of batches.py; out: five losses. Named as `auxiliary_loss` of the demo's recipe;
its read-outs train with the model and never leave the run's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_core.demo import spelling
from model_core.demo.alignment import WordAlignment
from model_core.demo.labels import MAX_COUNT, MAX_SPOT
from model_core.demo.lookup import LAYER, Asked, Lookup
from model_core.demo.scenes import CLASS_NAMES, COLOUR_NAMES
from model_core.demo.spelling import Spelling
from model_core.language.packed import may_attend
from model_core.training.auxiliary import AuxiliaryLoss, PackView
from model_core.training.data.packs import PackedBatch

NUM_LETTERS = 27
_IGNORED = -100


class DenseHeads(nn.Module):
    """Linear read-outs of each encoder's cells.

    Both learn what is in a cell, its colour and where the object's middle is. Letters are asked of Qwen's tower
    only and how many there are of DINOv2 only: one was taught to read and the other knows one object from the
    next, in life as here, so that there is something to learn from which of them an answer relied on.
    """

    def __init__(self, dims: Mapping[str, int]) -> None:
        super().__init__()
        self.classes = nn.ModuleDict({n: nn.Linear(d, len(CLASS_NAMES)) for n, d in dims.items()})
        self.colours = nn.ModuleDict({n: nn.Linear(d, len(COLOUR_NAMES) + 1) for n, d in dims.items()})
        self.places = nn.ModuleDict({n: nn.Linear(d, 2) for n, d in dims.items()})
        self.letters = nn.Linear(dims["qwen"], 2 * NUM_LETTERS)
        self.spots = nn.Linear(dims["qwen"], 2 * (MAX_SPOT + 1))
        self.counts = nn.Linear(dims["dinov2"], 2 * (MAX_COUNT + 1))
        self.shares = nn.Linear(dims["dinov2"], 1)

    def forward(self, features: Mapping[str, Tensor], cells: Mapping[str, Tensor], num_pictures: int) -> Tensor:
        """features: (N, C_e) by encoder, those that there are, of pictures of one size -> the summed loss."""
        losses = []

        # What an object only touches is neither its cell nor background: whatever is said there is right.
        touched = (cells["painted"] > 0) & (cells["class"] == 0)

        def read(head: nn.Linear, x: Tensor, name: str, weight: float) -> None:
            target = (
                cells[name].masked_fill(touched, _IGNORED) if name in ("class", "colour") else cells[name].flatten()
            )
            losses.append(weight * _weighted(head(x).view(len(target), -1), target))

        for name, x in ((n, f.float()) for n, f in features.items()):
            read(self.classes[name], x, "class", 1.0)
            read(self.colours[name], x, "colour", 0.5)
            losses.append(F.mse_loss(self.places[name](x), cells["places"]))
        if "qwen" in features:
            read(self.letters, features["qwen"].float(), "letters", 1.5)
            read(self.spots, features["qwen"].float(), "spots", 0.5)
        if "dinov2" in features:
            x = features["dinov2"].float()
            read(self.counts, x, "counts", 0.5)
            # A density of things, as in Lempitsky and Zisserman 2010: where it is read right on average, so is its sum
            # over a kind's cells. Its logarithm is what a head's score of a cell must be to count.
            log_shares = self.shares(x)[:, 0].clamp(max=2.0)
            losses.append(4.0 * F.poisson_nll_loss(log_shares, cells["shares"], log_input=True))
            losses.append(2.0 * miscounted(log_shares.exp(), cells, num_pictures))
        return torch.stack(losses).sum()


def miscounted(read: Tensor, cells: Mapping[str, Tensor], num_pictures: int) -> Tensor:
    """How far the shares read from a kind's cells are from summing to how many of it the picture shows.

    Each share alone may be nearly right and their sum wrong by one; and the sum is what counting takes."""
    classes = cells["painted"].view(num_pictures, -1)
    is_same = ((classes[:, :, None] == classes[:, None]) & (classes > 0)[:, None]).to(read.dtype)
    sums, counts = (is_same @ x.view(num_pictures, -1, 1) for x in (read, cells["shares"].to(read.dtype)))
    return F.smooth_l1_loss(sums[..., 0][classes > 0], counts[..., 0][classes > 0], beta=0.5)


def _weighted(logits: Tensor, target: Tensor, background: float = 0.1) -> Tensor:
    """Cross entropy in which class 0, the background, which is most of every picture, counts a tenth."""
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = background
    return F.cross_entropy(logits, target, weight=weight)


class DemoGuidance(AuxiliaryLoss):
    """cells: DenseHeads. alignment: fused tokens that look like their words. look, tally, spell: the guided heads."""

    names = ("cells", "alignment", "look", "tally", "spell")

    def __init__(self, model: Any, processor: Any, *, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        backbone, tokenizer = model.model, processor.tokenizer
        self.heads = DenseHeads({name: encoder.output_dim for name, encoder in backbone.encoders.items()})
        self._words = model.get_input_embeddings  # a bound method: the embedding is the model's, not this module's
        text = model.config.text_config
        self._alignment = WordAlignment(tokenizer, model.lm_head.weight.device)
        self._lookup = Lookup(tokenizer, text.num_attention_heads, text.num_key_value_heads)
        self._image_token_id = model.config.image_token_id
        self._spelling = Spelling(tokenizer, self._image_token_id)
        self._spelling_layer = min(spelling.LAYER, text.num_hidden_layers - 1)
        self.watched_layers = tuple({LAYER, self._spelling_layer})

    def forward(self, view: PackView) -> dict[str, Tensor]:
        device = self.heads.letters.weight.device
        cells = {name: target.to(device) for name, target in view.pack.targets.items()}
        found = {}
        if view.features:
            found["cells"] = self.heads(view.features, cells, len(view.pack.grids))
        if view.fused is not None and view.attention:
            found["alignment"] = self._alignment.loss(view.fused.tokens, cells, self._words().weight)
            heads = _padded(self._lookup.heads(*view.attention[LAYER]), view.pack)
            found["look"], found["tally"] = self._lookup.loss(asked(view.pack, self._image_token_id), heads)
            spell = self._spelling.loss(view.pack, *view.attention[self._spelling_layer])
            found |= {} if spell is None else {"spell": spell}
        return found


def asked(pack: PackedBatch, image_token_id: int) -> Asked:
    """A pack's rows side by side, with what the cells behind their image tokens show."""
    is_image = pack.input_ids == image_token_id
    shows, touched = (
        torch.zeros_like(pack.input_ids).masked_scatter(is_image, pack.targets[name]) for name in ("class", "painted")
    )
    shares = torch.zeros(len(pack.input_ids)).masked_scatter(is_image, pack.targets["shares"])
    return Asked(
        _padded(pack.input_ids, pack),
        _padded(shows, pack),
        _padded(touched, pack),
        _padded(shares, pack),
        may_attend(_padded(pack.blocks, pack, value=-1))[:, 0],
    )


def _padded(packed: Tensor, pack: PackedBatch, value: int = 0) -> Tensor:
    """(S, ...) -> (B, T, ...). Not torch's pad_sequence, whose gradient copies the whole result once a sample."""
    longest, last = max(pack.sample_lengths), (0, 0) * (packed.ndim - 1)
    rows = packed.split(list(pack.sample_lengths))
    return torch.stack([F.pad(row, (*last, 0, longest - len(row)), value=value) for row in rows])
