"""How recent images were routed: a bounded memory of served requests, and statistics over it.

In: one `Served` a finished chat request. Out: rolling statistics, or one request's own weights. It
refuses to keep anything of the request but its ids, its key's, its model's name and its fusion weights.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model_core.types import FusionWeights

_NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Served:
    """`request_id` is the x-request-id, `completion_id` the answer's own id: either finds it, for the same key."""

    key_id: str
    request_id: str
    completion_id: str
    model: str
    created_unix: int
    fusion: tuple[FusionWeights, ...]


class FusionHistory:
    """The last `max_requests` requests. Belongs to the event loop; no locks."""

    def __init__(self, max_requests: int = 10_000) -> None:
        self._max_requests = max_requests
        self._served: OrderedDict[str, Served] = OrderedDict()
        #: (key id, request id) -> completion id
        self._completions: dict[tuple[str, str], str] = {}

    def add(self, served: Served) -> None:
        key = served.completion_id
        self._served[key] = served
        self._completions[served.key_id, served.request_id] = key
        while len(self._served) > self._max_requests:
            _, oldest = self._served.popitem(last=False)
            # A client may reuse a request id: then the newer request owns the entry.
            if self._completions.get((oldest.key_id, oldest.request_id)) == oldest.completion_id:
                del self._completions[oldest.key_id, oldest.request_id]

    def find(self, key_id: str, request_id: str) -> Served | None:
        """Request ids are the clients' words: another key's are not there."""
        served = self._served.get(self._completions.get((key_id, request_id), request_id))
        return served if served is not None and served.key_id == key_id else None

    def recent_images(self, window: int) -> Iterator[tuple[str, FusionWeights]]:
        """(model, weights) of the last `window` images, the newest first."""
        left = window
        for served in reversed(self._served.values()):
            for weights in reversed(served.fusion):
                if left == 0:
                    return
                left -= 1
                yield served.model, weights


def weight_statistics(images: Sequence[FusionWeights], encoders: Sequence[str]) -> dict[str, object]:
    """Mean, population sd, entropy, histogram (ten equal bins over 0..1) and dominant counts.

    Images whose strategy has no gate are counted in `images` and in `without_gate`, and enter no mean.
    """
    gated = [image.weights for image in images if image.weights is not None]
    entropies = [image.entropy for image in images if image.entropy is not None]
    dominant = {name: 0 for name in (*encoders, "tie")}
    for image in images:
        if image.weights is not None:
            name = image.dominant_encoder or "tie"
            dominant[name] = dominant.get(name, 0) + 1
    return {
        "images": len(images),
        "without_gate": len(images) - len(gated),
        "encoders": {name: _moments([w[name] for w in gated if name in w]) for name in encoders},
        "entropy": _mean(entropies),
        "dominant_encoder": dominant,
    }


def _moments(values: Sequence[float]) -> dict[str, object]:
    mean = _mean(values)
    histogram = [0] * _NUM_BINS
    for value in values:
        histogram[min(max(int(value * _NUM_BINS), 0), _NUM_BINS - 1)] += 1
    sd = None if mean is None else math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return {"mean": mean, "sd": sd, "histogram": histogram}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
