"""Runs the model for the engine: images to fused tokens, packed chunks to hidden states, rows to logits.

Knows tensors and one clock; knows no queue, no sampling and no text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from model_core.engine.decode_graphs import DecodeGraphs
from model_core.engine.encoder_cache import EncoderCache
from model_core.engine.encoder_pass import EncoderInput, EncoderPass
from model_core.engine.scheduler import Chunk
from model_core.engine.sequence import Sequence
from model_core.errors import RequestFailedError
from model_core.fusion.attribution import describe_fusion
from model_core.language.compiled import count_fitting
from model_core.language.decoder import Decoder
from model_core.language.kv_cache import KVStore, Work
from model_core.model import DualVisionModel
from model_core.processing.batch import InputFormat
from model_core.types import ARM_REMOVES, Arm
from model_core.vision_tokens import Grid, cell_counts

Clock = Callable[[], float]
SCORE_ROWS = 256


class ModelRunner:
    """The model on its device. Stateless between steps but for the caches that it is given."""

    def __init__(
        self,
        model: DualVisionModel,
        decoder: Decoder,
        fmt: InputFormat,
        clock: Clock,
        *,
        store: KVStore,
        features: EncoderCache,
        graphs: DecodeGraphs | None = None,
        owns_features: bool = True,
    ) -> None:
        """owns_features: False where another engine's runner holds them too, and counts them."""
        self.owns_features = owns_features
        self.model, self.decoder, self.fmt, self.clock = model, decoder, fmt, clock
        self.store, self.features, self.graphs = store, features, graphs
        self.device = model.device
        self.encoders = EncoderPass(model, fmt.patches, features, clock)

    @torch.inference_mode()
    def encode(self, sequences: Items[Sequence]) -> None:
        """Give every sequence its `embeds` and `fusion`; all their images go through one encode and one fusion."""
        with_images = [s for s in sequences if s.inputs.pixels is not None]
        if with_images:
            self._encode_images(with_images)
        for sequence in sequences:
            if sequence.fusion is None:
                sequence.fusion = ()

    def lacking(self, sequence: Sequence) -> list[int]:
        """Cells of each of its images that no pass has computed yet."""
        images = _images_of(sequence)
        return self.encoders.lacking(images, [sequence.request.arm] * len(images), sequence.held_features)

    @torch.inference_mode()
    def encode_ahead(self, sequence: Sequence, images: Items[int]) -> None:
        """Compute these of a sequence's images now and leave the rest for later passes."""
        start, chosen = self._now(), [_images_of(sequence)[i] for i in images]
        spent = self.encoders.run_ahead(chosen, [sequence.request.arm] * len(chosen), sequence.held_features)
        _add_seconds(sequence, self._now() - start, spent)

    def _encode_images(self, sequences: list[Sequence]) -> None:
        backbone, start = self.model.model, self._now()
        arms: list[Arm] = [s.request.arm for s in sequences for _ in s.inputs.grids]
        merge = self.model.config.merge_size
        grids: tuple[Grid, ...] = tuple((t, h // merge, w // merge) for s in sequences for t, h, w in s.inputs.grids)
        images = [image for s in sequences for image in _images_of(s)]
        held = {place: features for s in sequences for place, features in s.held_features.items()}
        features, spent = self.encoders.run(images, arms, held)
        want = any(s.request.encode_only for s in sequences)
        output = backbone.fuse(features, grids, arms, want_contributions=want)
        lengths = [n * backbone.fusion.tokens_per_cell for n in cell_counts(grids)]
        has_means = int(backbone.fusion.means.count) > 0
        described = describe_fusion(
            output,
            list(backbone.encoders),
            lengths,
            is_trained=backbone.fusion.is_trained,
            is_calibrated=[has_means or not ARM_REMOVES[arm] or arm == "unfused" for arm in arms],
            warnings=[w for s in sequences for w in s.inputs.warnings],
        )
        parts, seconds = output.tokens.split(lengths), self._now() - start
        at = 0
        for sequence in sequences:
            end = at + len(sequence.inputs.grids)
            sequence.embeds = torch.cat(parts[at:end])
            sequence.fusion = tuple(described[at:end])
            _add_seconds(sequence, seconds, spent)
            sequence.held_features.clear()
            at = end
            self._check_embeds(sequence)

    def _check_embeds(self, sequence: Sequence) -> None:
        """Raises RequestFailedError: the features are not finite, or don't fill the placeholders."""
        if not bool(torch.isfinite(sequence.embeds).all()):
            raise RequestFailedError("an image gave features that are not finite", fix="Try another image")
        sequence.image_places = [i for i, kind in enumerate(sequence.inputs.token_types) if kind]
        if len(sequence.image_places) != sequence.embeds.shape[0]:
            raise RequestFailedError(
                "image tokens and placeholders differ",
                value=f"{sequence.embeds.shape[0]} and {len(sequence.image_places)}",
            )

    @torch.inference_mode()
    def run(self, chunks: Items[Chunk[Sequence]], chosen: Tensor | None = None) -> Tensor:
        """One packed forward. Chunks of one token first. Returns hidden states (S, D) in the chunks' order.

        chosen: (S,) on the device, the tokens of single-token chunks that the host does not know yet.
        """
        work = [Work(c.sequence, c.start, c.length, c.sequence.blocks) for c in chunks]
        ids = chosen
        if ids is None:
            ids = [i for c in chunks for i in c.sequence.ids_between(c.start, c.start + c.length)]
        pictured = [c.sequence.images_between(c.start, c.start + c.length) for c in chunks]
        positions = self._positions(chunks)
        if self.graphs is not None and len(ids) == len(chunks) and all(first == last for first, last in pictured):
            hidden = self.graphs.run(ids, positions, work)
            if hidden is not None:
                return hidden
        embeds = self.decoder.embed(torch.as_tensor(ids, device=self.device))  # (S, D)
        at = 0
        for c, (first, last) in zip(chunks, pictured, strict=True):
            if first != last:
                places = torch.tensor(c.sequence.image_places[first:last]) - c.start + at
                embeds[places.to(self.device)] = c.sequence.embeds[first:last].to(embeds.dtype)
            at += c.length
        return self._forward(embeds, positions, work)

    def _forward(self, embeds: Tensor, positions: Tensor, work: Items[Work]) -> Tensor:
        """Single tokens and short prompts through compiled loops if there are such; the rest, or all, through torch."""
        pieces, tokens = count_fitting(work)
        layers = self.decoder.compiled_layers(tokens) if tokens else None
        rows = self.store.dense(work[:pieces]) if layers is not None else None
        if rows is None:
            return self.decoder.forward(embeds, positions.to(self.device), self.store.begin(work))
        hidden = layers.forward(embeds[:tokens], positions[:, :tokens], rows)
        if pieces == len(work):
            return hidden
        attend = self.store.begin(work[pieces:])
        return torch.cat([hidden, self.decoder.forward(embeds[tokens:], positions[:, tokens:], attend)])

    def _positions(self, chunks: Items[Chunk[Sequence]]) -> Tensor:
        """(3, S) on the host: the prompt's own, then one by one from where the prompt's end."""
        parts: list[Tensor] = []
        singles: list[int] = []

        def flush() -> None:
            if singles:
                parts.append(torch.tensor(singles).expand(3, -1))
                singles.clear()

        for c in chunks:
            inputs, end = c.sequence.inputs, c.start + c.length
            n = len(inputs.input_ids)
            if c.start < n:
                flush()
                parts.append(inputs.positions[:, c.start : min(end, n)])
            singles.extend(range(max(c.start, n) + inputs.delta, end + inputs.delta))
        flush()
        return torch.cat(parts, dim=1)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: Items[int]) -> Tensor:
        """(len(rows), V) float32 of these rows of `run`'s result."""
        picked = hidden if len(rows) == hidden.shape[0] else hidden[torch.tensor(rows, device=self.device)]
        return self.decoder.logits(picked)

    @torch.inference_mode()
    def score(self, hidden: Tensor, chunk: Chunk[Sequence]) -> list[float]:
        """log p, natural logarithm, of those scored tokens that the chunk's hidden states predict.

        hidden: (length, D) of this chunk alone.
        """
        sequence = chunk.sequence
        n, scored = sequence.num_prompt, sequence.request.score_token_ids
        first = n - len(scored) - 1  # the place that predicts the first of them
        begin, end = max(chunk.start, first), min(chunk.start + chunk.length, n - 1)
        scores: list[float] = []
        for at in range(begin, end, SCORE_ROWS):  # a whole answer's logits can be gigabytes
            stop = min(at + SCORE_ROWS, end)
            wanted = torch.tensor(scored[at - first : stop - first], device=self.device)[:, None]
            logits = self.decoder.logits(hidden[at - chunk.start : stop - chunk.start])
            scores += logits.log_softmax(-1).gather(1, wanted)[:, 0].tolist()
        return scores

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def _images_of(sequence: Sequence) -> list[EncoderInput]:
    inputs = sequence.inputs
    if inputs.pixels is None:
        return []
    ends = np.cumsum([t * h * w for t, h, w in inputs.grids])
    pixels = np.split(inputs.pixels, ends[:-1])
    return [
        EncoderInput(key, grid, part)
        for (_, _, key), grid, part in zip(inputs.spans, inputs.grids, pixels, strict=True)
    ]


def _add_seconds(sequence: Sequence, seconds: float, by_encoder: Mapping[str, float]) -> None:
    sequence.encode_seconds += seconds
    for name, spent in by_encoder.items():
        sequence.encoder_seconds[name] = sequence.encoder_seconds.get(name, 0.0) + spent
