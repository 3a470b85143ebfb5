"""Features of pictures by encoder: from the cache, or from one forward of each encoder over what it lacks.

In: patches with their keys, and arms. Out: features in the pictures' order, and the seconds of each encoder. On CUDA
the encoders run on streams of their own, side by side. Knows no request, no fusion and no text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model_core.engine.encoder_cache import EncoderCache
from model_core.model import DualVisionModel
from model_core.processing.batch import normalise_pixels
from model_core.processing.images import PatchSpec
from model_core.types import Arm
from model_core.vision_tokens import Grid

Clock = Callable[[], float]
#: What one encoder has to compute: it gives tokens (S, C_e).
Forward = Callable[[], Tensor]
#: Features by encoder name and image key, of one request: (n, C_e) each.
Held = dict[tuple[str, bytes], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class EncoderInput:
    """One picture. key: of its content. grid: (t, h, w) in patches. pixels: uint8 (t * h * w, P)."""

    key: bytes
    grid: Grid
    pixels: np.ndarray


class Lanes(Protocol):
    """Where the encoders' forwards run."""

    def run(self, forwards: Mapping[str, Forward]) -> tuple[dict[str, Tensor], Callable[[], dict[str, float]]]:
        """All results, and what tells each one's seconds once they are computed."""


class EncoderPass:
    """`seconds` by encoder and `num_images`, over all passes; a picture counts once for each encoder.

    `batch_sizes`: by encoder, how many forwards had so many pictures. `num_tokens`: by encoder, cells of all forwards.
    """

    def __init__(
        self,
        model: DualVisionModel,
        patches: PatchSpec,
        features: EncoderCache,
        clock: Clock,
        lanes: Lanes | None = None,
    ) -> None:
        self.model, self.features = model, features
        self.seconds: dict[str, float] = dict.fromkeys(model.model.encoders, 0.0)
        self.num_images = 0
        self.batch_sizes: dict[str, Counter[int]] = {name: Counter() for name in model.model.encoders}
        self.num_tokens: Counter[str] = Counter()
        self._patches = patches
        self._lanes = lanes or (CudaLanes(model.device) if model.device.type == "cuda" else OneLane(clock))

    def lacking(self, images: Sequence[EncoderInput], arms: Sequence[Arm], held: Held) -> list[int]:
        """Cells that each image's pass would compute: none of one that is kept, held, or a repetition."""
        seen: set[bytes] = set()
        found = []
        for image, arm in zip(images, arms, strict=True):
            names = self.model.model.needed_encoders([arm])
            is_here = all((n, image.key) in held or (n, image.key) in self.features for n in names)
            found.append(0 if is_here or image.key in seen else self._num_cells(image.grid))
            seen.add(image.key)
        return found

    def run_ahead(self, images: Sequence[EncoderInput], arms: Sequence[Arm], held: Held) -> dict[str, float]:
        """Compute what these images lack and put it into `held`, for a `run` that comes later. Returns the seconds."""
        features, spent = self._gather(images, arms, held)
        for name, parts in features.items():
            held.update({(name, key): part for key, part in parts.items()})
        return spent

    def run(
        self, images: Sequence[EncoderInput], arms: Sequence[Arm], held: Held | None = None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """images and their arms, I of each -> features (S, C_e) of all of them by encoder, and this pass's seconds.

        An encoder that no arm needs is left out; where only some need it the others' cells are zeros (the
        encoder's mean comes in later). held: features that earlier passes have left for these images.
        """
        found, spent = self._gather(images, arms, held or {})
        grids = [image.grid for image in images]
        features = {
            name: self._lay_out(name, [kept.get(image.key) for image in images], grids) for name, kept in found.items()
        }
        return features, dict.fromkeys(found, 0.0) | spent

    def _gather(
        self, images: Sequence[EncoderInput], arms: Sequence[Arm], held: Held
    ) -> tuple[dict[str, dict[bytes, Tensor]], dict[str, float]]:
        """Features by encoder and image, held, kept or computed now, and the seconds of what was computed."""
        backbone = self.model.model
        needs = {arm: backbone.needed_encoders([arm]) for arm in set(arms)}
        found: dict[str, dict[bytes, Tensor]] = {}
        missing: dict[str, list[EncoderInput]] = {}
        for name in backbone.encoders:
            wanted = [image for image, arm in zip(images, arms, strict=True) if name in needs[arm]]
            if wanted:
                found[name], lacks = self._look_up(name, wanted, held)
                if lacks:
                    missing[name] = lacks
        spent = self._compute(missing, found)
        return found, spent

    def _look_up(
        self, name: str, wanted: Sequence[EncoderInput], held: Held
    ) -> tuple[dict[bytes, Tensor], list[EncoderInput]]:
        """What is there, and what must be computed: a picture that comes twice in a pass is encoded once."""
        found: dict[bytes, Tensor] = {}
        lacks: dict[bytes, EncoderInput] = {}
        for image in wanted:
            if image.key in found or image.key in lacks:
                continue
            # What is held was counted as a miss when it was computed, and is no hit of the cache now.
            features = held.get((name, image.key))
            if features is None:
                features = self.features.get(name, image.key)
            if features is None:
                lacks[image.key] = image
            else:
                found[image.key] = features
        return found, list(lacks.values())

    def _compute(
        self, missing: Mapping[str, list[EncoderInput]], found: Mapping[str, dict[bytes, Tensor]]
    ) -> dict[str, float]:
        if not missing:
            return {}
        upload = _Uploads(self._patches, self.model.device)
        forwards = {name: self._forward(name, *upload(lacks)) for name, lacks in missing.items()}
        tokens, seconds = self._lanes.run(forwards)
        parts = {
            name: tokens[name].split([self._num_cells(image.grid) for image in lacks])
            for name, lacks in missing.items()
        }
        flags = torch.stack([torch.isfinite(part).all() for group in parts.values() for part in group]).tolist()
        is_sound = iter(flags)
        for name, lacks in missing.items():
            self.num_images += len(lacks)
            self.batch_sizes[name][len(lacks)] += 1
            self.num_tokens[name] += sum(self._num_cells(image.grid) for image in lacks)
            for image, part in zip(lacks, parts[name], strict=True):
                found[name][image.key] = part
                if next(is_sound):  # or one bad forward would fail this picture for as long as it is kept
                    self.features.put(name, image.key, part)
        spent = seconds()
        for name, value in spent.items():
            self.seconds[name] += value
        return spent

    def _forward(self, name: str, values: Tensor, grids: Tensor) -> Forward:
        return lambda: self.model.model.infer_images(values, grids, [name])[name]

    def _lay_out(self, name: str, parts: list[Tensor | None], grids: Sequence[Grid]) -> Tensor:
        """One after the other; zeros where an image's arm takes this encoder away."""
        width = self.model.model.encoders[name].output_dim
        like = next(part for part in parts if part is not None)
        return torch.cat(
            [
                like.new_zeros(self._num_cells(grid), width) if part is None else part
                for part, grid in zip(parts, grids, strict=True)
            ]
        )

    def _num_cells(self, grid: Grid) -> int:
        return grid[0] * grid[1] * grid[2] // self.model.config.merge_size**2


class OneLane:
    """One after the other, timed by a clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def run(self, forwards: Mapping[str, Forward]) -> tuple[dict[str, Tensor], Callable[[], dict[str, float]]]:
        out: dict[str, Tensor] = {}
        spent: dict[str, float] = {}
        for name, forward in forwards.items():
            begin = self._clock()
            out[name] = forward()
            spent[name] = self._clock() - begin
        return out, lambda: spent


class CudaLanes:
    """A stream for each encoder; the caller's stream waits for all. Seconds are the device's own, which overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[str, torch.cuda.Stream] = {}

    def run(self, forwards: Mapping[str, Forward]) -> tuple[dict[str, Tensor], Callable[[], dict[str, float]]]:
        caller = torch.cuda.current_stream(self._device)
        out: dict[str, Tensor] = {}
        marks: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        for name, forward in forwards.items():
            stream = self._streams.setdefault(name, torch.cuda.Stream(self._device))
            stream.wait_stream(caller)
            marks[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.cuda.stream(stream):
                marks[name][0].record(stream)
                out[name] = forward()
                marks[name][1].record(stream)
        for name, tokens in out.items():
            caller.wait_stream(self._streams[name])
            # Or the allocator could give this memory away on the lane while the caller's stream still reads it. What
            # the lane reads of the caller's needs no such mark: the caller waits before it can free anything.
            tokens.record_stream(caller)

        def seconds() -> dict[str, float]:
            for _, end in marks.values():
                end.synchronize()
            return {name: begin.elapsed_time(end) / 1000 for name, (begin, end) in marks.items()}

        return out, seconds


class _Uploads:
    """Pixels on the device for one pass: both encoders mostly lack the same pictures, and share one upload."""

    def __init__(self, patches: PatchSpec, device: torch.device) -> None:
        self._patches, self._device = patches, device
        self._done: dict[tuple[bytes, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Sequence[EncoderInput]) -> tuple[Tensor, Tensor]:
        """Normalised patches and grids (I, 3) of these pictures."""
        keys = tuple(image.key for image in images)
        if keys not in self._done:
            pixels = np.concatenate([image.pixels for image in images])
            values = normalise_pixels(pixels, self._patches, self._device)
            self._done[keys] = values, torch.tensor([image.grid for image in images])
        return self._done[keys]
