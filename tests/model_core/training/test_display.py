"""What a run shows: a bar where there is a terminal, and the rows that the scan found something in."""

from __future__ import annotations

import io
from typing import Any

import pytest

from model_core.training.display import Display
from model_core.training.events import Event


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int) -> Event:
    data = {
        "num_steps_total": 4, "epoch": 2, "loss": 0.5, "num_label_tokens": 8, "tokens_per_second": 100.0,
        "seconds": 3.0, "data_wait_seconds": 1.0, "gate": {"mean": [0.25, 0.75], "gate_collapsed": False},
    }  # fmt: skip
    return Event(1, number, "step", "", data)


def test_a_terminal_has_a_bar_with_the_figures_and_other_events_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with Display(stream) as display:
        display(step(2))
        display(Event(1, 2, "checkpoint", "step-2 (every)"))
        display(step(3))
    said = stream.getvalue()
    for text in ("stage 1 epoch 2", "3/4", "loss 0.5000", "100 tok/s", "data wait 25%", "gate 0.25/0.75"):
        assert text in said
    assert "step 2: checkpoint: step-2 (every)" in said
    assert "step 2/4" not in said, "the bar instead of a line a step"


def test_a_pipe_has_lines() -> None:
    stream = io.StringIO()
    with Display(stream) as display:
        display(step(3))
    assert stream.getvalue() == "step 3/4: loss 0.5000, 100 tok/s, data wait 25%, gate 0.25/0.75\n"


def problem(number: int, **changed: Any) -> dict[str, Any]:
    found = {"dataset": "train", "split": "train", "index": number - 1, "file": "train.json", "row": number}
    return found | {"severity": "error", "code": "image_not_found", "message": "gone"} | changed


def test_the_first_problems_are_named_and_the_rest_has_a_command() -> None:
    told = [problem(1), problem(2, split="val", file="val.json"), problem(3, severity="note", code="converted")]
    stream = io.StringIO()
    Display(stream).problems({"num_problems": 3, "problems": told})
    assert stream.getvalue().splitlines() == [
        "set aside: train.json row 1: image_not_found: gone",
        "set aside: validation data, val.json row 2: image_not_found: gone",
        "note: train.json row 3: converted: gone",
    ]
    stream = io.StringIO()
    many = {"num_problems": 700, "problems": [problem(number) for number in range(1, 501)]}
    Display(stream, {("train", "train"): "dve data validate data/train.json"})(
        Event(0, 0, "validated", "4 steps", many)
    )
    lines = stream.getvalue().splitlines()
    assert lines[0] == "4 steps" and lines[20].startswith("set aside: train.json row 20:")
    assert lines[21:] == ["... and 680 more: dve data validate data/train.json"]
