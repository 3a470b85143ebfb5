"""Runs the model for the engine: images to fused tokens, prompts to first logits, rows to next logits.

Knows tensors and one clock; knows no queue, no sampling and no text.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from model_core.engine.sequence import Sequence
from model_core.errors import RequestFailedError
from model_core.fusion.attribution import describe_fusion
from model_core.language.decoder import Decoder
from model_core.model import DualVisionModel
from model_core.processing.batch import InputFormat, normalise_pixels
from model_core.types import ARM_REMOVES
from model_core.vision_tokens import cell_counts, cell_grids

Clock = Callable[[], float]
SCORE_ROWS = 256


class ModelRunner:
    """The model on its device, with one cache for all running rows."""

    def __init__(self, model: DualVisionModel, fmt: InputFormat, clock: Clock) -> None:
        self.model, self.fmt, self.clock = model, fmt, clock
        self.decoder = Decoder(model.model.language_model, model.lm_head)
        self.cache = self.decoder.new_cache()
        self.device = model.device
        self.encoder_seconds: dict[str, float] = dict.fromkeys(model.model.encoders, 0.0)
        self.num_images_encoded = 0

    @torch.inference_mode()
    def encode(self, sequences: Items[Sequence]) -> None:
        """Give every sequence its `embeds` and `fusion`; all their images go through one encode and one fusion."""
        with_images = [s for s in sequences if s.inputs.pixels is not None]
        if with_images:
            self._encode_images(with_images)
        for sequence in sequences:
            if sequence.fusion is None:
                sequence.fusion = ()

    def _encode_images(self, sequences: list[Sequence]) -> None:
        backbone, start = self.model.model, self._now()
        pixels = np.concatenate([s.inputs.pixels for s in sequences])
        pixel_values = normalise_pixels(pixels, self.fmt.patches, self.device)
        grid_thw = torch.tensor([g for s in sequences for g in s.inputs.grids])
        arms = [s.request.arm for s in sequences for _ in s.inputs.grids]
        features: dict[str, Tensor] = {}
        spent: dict[str, float] = {}
        for name in backbone.needed_encoders(arms):
            begin = self._now()
            features |= backbone.encode_images(pixel_values, grid_thw, [name])
            spent[name] = self._now() - begin
            self.encoder_seconds[name] += spent[name]
        grids = cell_grids(grid_thw, self.model.config.merge_size)
        want = any(s.request.encode_only for s in sequences)
        output = backbone.fuse(features, grids, arms, want_contributions=want)
        lengths = [n * backbone.fusion.tokens_per_cell for n in cell_counts(grids)]
        notes = [w for s in sequences for w in s.inputs.warnings]
        trained = backbone.fusion.is_trained
        has_means = int(backbone.fusion.means.count) > 0
        calibrated = [has_means or not ARM_REMOVES[arm] or arm == "unfused" for arm in arms]
        described = describe_fusion(
            output, list(backbone.encoders), lengths, is_trained=trained, is_calibrated=calibrated, warnings=notes
        )
        parts, seconds = output.tokens.split(lengths), self._now() - start
        self.num_images_encoded += len(lengths)
        at = 0
        for sequence in sequences:
            end = at + len(sequence.inputs.grids)
            sequence.embeds = torch.cat(parts[at:end])
            sequence.fusion = tuple(described[at:end])
            sequence.encode_seconds, sequence.encoder_seconds = seconds, spent
            at = end

    @torch.inference_mode()
    def prefill(self, sequence: Sequence) -> Tensor:
        """Run the prompt into a new cache row. Returns hidden states (T, D).

        Raises:
            RequestFailedError: the features are not finite, or don't fill the placeholders.
        """
        start = self._now()
        inputs = sequence.inputs
        embeds = self.decoder.model.embed_tokens(torch.tensor(inputs.input_ids, device=self.device))  # (T, D)
        if sequence.embeds is not None:
            if not bool(torch.isfinite(sequence.embeds).all()):
                raise RequestFailedError("an image gave features that are not finite", fix="Try another image")
            is_image = torch.tensor(inputs.token_types, device=self.device) > 0
            if int(is_image.sum()) != sequence.embeds.shape[0]:
                raise RequestFailedError(
                    "image tokens and placeholders differ",
                    value=f"{sequence.embeds.shape[0]} and {int(is_image.sum())}",
                )
            embeds[is_image] = sequence.embeds.to(embeds.dtype)
            sequence.embeds = None
        sequence.row = self.cache.add_row(len(inputs.input_ids))
        hidden = self.decoder.prefill(embeds, inputs.positions.to(self.device), self.cache, sequence.row)
        sequence.prefilled_at = self._now()
        sequence.prefill_seconds = sequence.prefilled_at - start
        return hidden

    @torch.inference_mode()
    def first_logits(self, hidden: Tensor) -> Tensor:
        """(V,) for the token after the prompt."""
        return self.decoder.logits(hidden[-1:])[0]

    @torch.inference_mode()
    def score(self, hidden: Tensor, token_ids: Items[int]) -> list[float]:
        """log p of each of the last len(token_ids) tokens of the sequence, natural logarithm."""
        rows = hidden[-len(token_ids) - 1 : -1].split(SCORE_ROWS)  # a whole answer's logits can be gigabytes
        wanted = torch.tensor(token_ids, device=self.device)[:, None].split(SCORE_ROWS)
        scored = [
            self.decoder.logits(part).log_softmax(-1).gather(1, ids)[:, 0]
            for part, ids in zip(rows, wanted, strict=True)
        ]
        return torch.cat(scored).tolist()

    @torch.inference_mode()
    def decode(self, rows: Items[Sequence]) -> Tensor:
        """Next logits (B, V) of the sequences in row order."""
        tokens = torch.tensor([s.token_ids[-1] for s in rows], device=self.device)
        positions = torch.tensor([s.next_position for s in rows], device=self.device)
        return self.decoder.decode(tokens, positions, self.cache)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()
