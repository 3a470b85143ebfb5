"""The word of a verdict: what two intervals say together."""

from __future__ import annotations

import pytest

from model_core.cli.verdict import Interval, word_of

LOWER, HIGHER, OPEN = Interval(-0.2, -0.3, -0.1), Interval(0.2, 0.1, 0.3), Interval(0.0, -0.1, 0.1)


@pytest.mark.parametrize(
    ("loss", "accuracy", "word"),
    [
        (LOWER, None, "fused is better on this data"),
        (LOWER, HIGHER, "fused is better on this data"),
        (OPEN, HIGHER, "fused is better on this data"),
        (HIGHER, None, "unfused is better on this data: do not deploy the fusion"),
        (OPEN, LOWER, "unfused is better on this data: do not deploy the fusion"),
        (LOWER, LOWER, "mixed on this data: by the loss fused, by the answers unfused is better"),
        (HIGHER, HIGHER, "mixed on this data: by the loss unfused, by the answers fused is better"),
        (OPEN, OPEN, "no difference can be shown on this data"),
        (OPEN, None, "no difference can be shown on this data"),
    ],
)
def test_loss_and_answers_both_speak(loss: Interval, accuracy: Interval | None, word: str) -> None:
    """Below 0 is better of a loss, above 0 of answers."""
    assert word_of(loss, accuracy) == word
