"""A run's curves: the gate's columns bear the encoders' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from model_core.training.curves import draw_curves
from model_core.training.events import Event, EventLog


def test_the_gates_lines_are_named_after_the_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path)
    for step in (1, 2):
        log.tell(Event(0, step, "step", "", {"loss": 1 / step, "gate": {"mean": [0.25 * step, 1 - 0.25 * step]}}))
    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    draw_curves(tmp_path, ("qwen", "dinov2"))
    gate = drawn[0].axes[1]
    lines = {line.get_label(): list(line.get_ydata()) for line in gate.get_lines()}
    assert lines == {"qwen": [0.25, 0.5], "dinov2": [0.75, 0.5]}
    assert [text.get_text() for text in gate.get_legend().get_texts()] == ["qwen", "dinov2"]
