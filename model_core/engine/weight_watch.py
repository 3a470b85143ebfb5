"""Has somebody changed the model's weights? What caches hold was computed with the old ones.

In: a model. Out: yes or no since the last question. It sees what torch counts: changes in place, by an optimizer or by
hand; not such through `.data`, after which the engine's `reset_caches` has to be called.
"""

from __future__ import annotations

from torch import Tensor, nn


class WeightWatch:
    """Parameters and buffers of one model, the carried means among them."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors: list[Tensor] = [t for t in (*model.parameters(), *model.buffers()) if not t.is_inference()]
        self._seen = self._count()

    def has_changed(self) -> bool:
        """Since this was asked last, or since the beginning."""
        before, self._seen = self._seen, self._count()
        return before != self._seen

    def _count(self) -> int:
        return sum([t._version for t in self._tensors])
