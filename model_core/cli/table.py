"""Figures as tables: drawn on a terminal, as Markdown of any width in a pipe. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from model_core.analysis.latency import Level

_PIPE_WIDTH = 240
_UNITS = {"requests_per_second": "requests/s", "output_tokens_per_second": "output tokens/s"}
_SHARES = {
    "_cache_hit_ratio": "cache hits, {}, %",
    "_time_share": "requests' time in {}, %",
    "_wall_share": "wall time in {}, %",
    "_floor_share": "floor of a {} over measured, %",
}


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """The title above, the first column to the left, the others to the right; notes below, one a line."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH  # or rich would cut the columns to 80
    table = Table(box=box.ROUNDED if console.is_terminal else box.MARKDOWN)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(title, soft_wrap=True)
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True)


def print_levels(title: str, levels: Sequence[Level], notes: Sequence[str] = ()) -> None:
    """One column a concurrency and contender, one row a figure; with two contenders their ratio beside them."""
    headings = ["median of the rounds"]
    columns: list[dict[str, str]] = []
    for level in levels:
        names = list(level.rounds)
        for name in names:
            headings.append(f"c={level.concurrency} {name}" if len(names) > 1 else f"c={level.concurrency}")
            columns.append(_column(level, name))
        if len(names) > 1:
            headings.append(f"{names[0]}/{names[1]}")
            columns.append({label_of(key): f"{value:.2f}x" for key, value in level.ratios().items()})
    labels = dict.fromkeys(label for column in columns for label in column)
    rows = [[label, *(column.get(label, "") for column in columns)] for label in labels]
    print_table(title, headings, rows, [*notes, *_complaints(levels)])


def label_of(key: str) -> str:
    """`ttft_ms_p50` as people write it: TTFT p50, ms."""
    for ending, label in _SHARES.items():
        if key.endswith(ending):
            return label.format(key.removesuffix(ending))
    name, found, at = key.partition("_ms_")
    return f"{name.upper()} {at}, ms" if found else _UNITS.get(key, key.replace("_", " "))


def _column(level: Level, name: str) -> dict[str, str]:
    rounds = level.rounds[name]
    shown = {"rounds": str(len(rounds)), "answers": str(sum(one.num_ok for one in rounds))}
    shown["errors"] = str(sum(one.num_errors for one in rounds))
    for key, value in level.medians(name).items():
        is_share = key.endswith(tuple(_SHARES))
        shown[label_of(key)] = f"{100 * value:.1f}" if is_share else f"{value:.4g}" if value < 1000 else f"{value:.0f}"
    return shown


def _complaints(levels: Sequence[Level]) -> list[str]:
    """What makes the figures above less than they seem."""
    found = []
    for level in levels:
        for name, rounds in level.rounds.items():
            where = f"c={level.concurrency} {name}"
            errors = sum(one.num_errors for one in rounds)
            short = sum(one.num_short for one in rounds)
            if errors:
                first = next(one.first_error for one in rounds if one.first_error is not None)
                found.append(f"{where}: {errors} errors, the first: {first}")
            if short:
                found.append(f"{where}: {short} answers were shorter than asked, so its tokens/s are not comparable")
    return found
