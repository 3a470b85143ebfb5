"""How a run looks: the parameter table, a progress bar on a terminal, plain lines in a pipe.

In: events; out: text. It keeps no more than a bar needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from model_core.training.events import Event

if TYPE_CHECKING:
    from model_core.training.reports import Outcome

#: Told as they come. Steps have the bar; where there is none, about a hundred of them are told.
_SHOWN = ("stage", "freeze", "switched", "evaluation", "checkpoint", "resumed", "early_stopping")
_LINES_OF_A_RUN = 100
#: Rows that are named at the start.
_PROBLEMS = 20


class Display:
    """A listener of events; as a context manager it keeps the bar while the run goes on."""

    def __init__(self, stream: TextIO, checks: Mapping[tuple[str, str], str] | None = None) -> None:
        """checks: the command that lists what is wrong with all rows, by split and data set's name."""
        self._checks = checks or {}
        self._console = Console(file=stream, highlight=False, markup=False)
        if not self._console.is_terminal:
            self._console.width = 240
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"), console=self._console,
            )  # fmt: skip

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        if event.kind == "step":
            self._step(event)
        elif event.kind == "validated":
            self.say(event.message)
            self.problems(event.data)
        elif event.kind == "evaluation":
            self.say(f"step {event.global_step}: {_evaluation(event.data)}")
        elif event.kind in ("freeze", "switched"):
            self.say(event.message)
        elif event.kind in _SHOWN or event.kind.startswith("warning:"):
            word = "warning" if event.kind.startswith("warning:") else event.kind
            self.say(f"step {event.global_step}: {word}: {event.message}")

    def problems(self, found: Mapping[str, Any]) -> None:
        """Name the rows that a scan found something in; found: `problems_of`."""
        for line in _problem_lines(found, self._checks):
            self.say(line)

    def _step(self, event: Event) -> None:
        total, figures = event.data["num_steps_total"], step_figures(event.data)
        if self._bar is None:
            if event.global_step % max(1, total // _LINES_OF_A_RUN) == 0 or event.global_step == total:
                self.say(f"step {event.global_step}/{total}: {figures}")
            return
        if self._task is None:
            self._task = self._bar.add_task("training", total=total, figures="")
        self._bar.update(
            self._task, completed=event.global_step, description=f"stage {event.stage} epoch {event.data['epoch']}",
            figures=figures,
        )  # fmt: skip

    def say(self, text: str) -> None:
        """Above the bar, where there is one."""
        self._console.print(text, soft_wrap=True)


def step_figures(data: Mapping[str, Any]) -> str:
    """Losses, speed, the share of time that data was waited for, gate means, MFU where it is known.

    Steps that no answer is asked of have no language loss to show; then those that they have."""
    auxiliary = data.get("auxiliary_losses") or {}
    parts = [f"loss {data['loss']:.4f}"] if data["num_label_tokens"] or not auxiliary else []
    parts += [f"{name} {loss:.3f}" for name, loss in auxiliary.items()]
    if data["tokens_per_second"]:
        whole = data["seconds"] + data["data_wait_seconds"]
        parts += [f"{data['tokens_per_second']:.0f} tok/s", f"data wait {data['data_wait_seconds'] / whole:.0%}"]
    if data.get("mfu") is not None:
        parts.append(f"MFU {data['mfu']:.1%}")
    if data.get("gate"):
        means = "/".join(f"{mean:.2f}" for mean in data["gate"]["mean"])
        parts.append(f"gate {means}{' COLLAPSED' if data['gate']['gate_collapsed'] else ''}")
    return ", ".join(parts)


def _problem_lines(found: Mapping[str, Any], checks: Mapping[tuple[str, str], str]) -> list[str]:
    """A line for each of the first problems, and one for how the rest of them are listed."""
    shown = found["problems"][:_PROBLEMS]
    lines = []
    for one in shown:
        word = "set aside" if one["severity"] == "error" else one["severity"]
        where = "validation data, " * (one.get("split") == "val")
        lines.append(f"{word}: {where}{one['file']} row {one['row']}: {one['code']}: {one['message']}")
    left = found["num_problems"] - len(shown)
    if left:
        data_sets = dict.fromkeys((one.get("split", ""), one["dataset"]) for one in found["problems"][_PROBLEMS:])
        commands = "; ".join(checks[one] for one in data_sets if one in checks)
        lines.append(f"... and {left} more{': ' if commands else ''}{commands}")
    return lines


def _evaluation(data: Mapping[str, Any]) -> str:
    names = ("val_loss", "unfused_loss", "val_accuracy", "unfused_accuracy")
    return ", ".join(f"{name} {data[name]:.4f}" for name in names if data.get(name) is not None)


def summary_text(outcome: Outcome, *, stops_early: bool) -> str:
    """What came of a run. stops_early: the result is the best step and not the last one."""
    summary = outcome.summary
    lines = [f"trained: {s['training_mode'] or 'custom'}, {s['steps']} steps" for s in summary["stages"]]
    for switch in summary["switches"]:
        lines.append(f"switched: to {switch['training_mode'] or 'custom'}, after {switch['step']} steps")
    start, end = summary["scores"]["start"], summary["scores"]["latest"]
    if stops_early and outcome.best is not None:
        end = summary["scores"]["best"] or end
    for name, value in end.items():
        before = f" (start {start[name]:.4f})" if name in start else ""
        lines.append(f"{name}: {value:.4f}{before}")
    if outcome.best is not None:
        lines.append(f"best checkpoint: {outcome.best.name}, {summary['scores']['best_value']:.4f}")
    if summary["quarantined"]:
        lines.append(f"samples set aside: {len(summary['quarantined'])}")
    lines.append("model: in memory alone" if outcome.final is None else f"model: {outcome.final}")
    return "\n".join(lines)
