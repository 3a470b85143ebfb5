"""The result file of a job: a CSV of its steps with losses and accuracies, in the columns that OpenAI's has.

In: event files. Out: CSV text. A step that was trained again after a crash has one row, the first.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from service.supervisor.event_file import EventFile, TrainerEvent

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_FROM = {
    "step": {"train_loss": "loss", "train_accuracy": "accuracy"},
    "evaluation": {"valid_loss": "val_loss", "valid_mean_token_accuracy": "val_accuracy"},
}


def result_csv(files: Iterable[Path]) -> str:
    """The rows of all attempts' events, by step."""
    rows: dict[int, dict[str, Any]] = {}
    seen: set[tuple[int, int, str]] = set()
    for path in files:
        reader = EventFile(path)
        while events := reader.read():
            for event in events:
                if event.kind in _FROM and event.key not in seen:
                    seen.add(event.key)
                    rows.setdefault(event.global_step, {}).update(_cells(event))
    written = io.StringIO()
    writer = csv.DictWriter(written, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for step in sorted(rows):
        writer.writerow({"step": step, **rows[step]})
    return written.getvalue()


def _cells(event: TrainerEvent) -> Mapping[str, float]:
    named = {column: event.data.get(key) for column, key in _FROM[event.kind].items()}
    return {k: v for k, v in named.items() if isinstance(v, int | float) and math.isfinite(v)}
