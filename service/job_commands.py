"""`dve jobs`: the training jobs of a server, in the terminal.

In: argv, and the URL and key of a server. Out: tables, live progress, and an exit code: of `watch` 0 if the job has
succeeded and 1 if it ended otherwise, 2 for what the user can put right. It talks HTTP alone and opens no store.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from model_core.errors import ConfigError
from service.api_client import ApiClient, ServerUnreachableError
from service.settings import client_access

JOBS = "/v1/fine_tuning/jobs"
_ENDED = ("succeeded", "failed", "cancelled")
#: A stream that breaks off is taken up again behind its last event so often without a new one.
_MAX_BREAKS = 10
_VERBS = {"cancel": "end it; what it has saved stays", "pause": "save and stop it", "resume": "let it go on"}


def build_parser() -> argparse.ArgumentParser:
    """list, show, watch, cancel, pause, resume."""
    parser = argparse.ArgumentParser(prog="dve jobs", description=__doc__, allow_abbrev=False)
    parser.add_argument("--url", help="the server (default: DVE_URL, else DVE_HOST and DVE_PORT)")
    parser.add_argument("--key-file", type=Path, help="file with an API key (default: DVE_API_KEY)")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the latest jobs, newest first")
    listing.add_argument("--limit", type=int, default=20, help="how many, 1 to 100 (default: 20)")
    listing.add_argument("--json", action="store_true", help="print the server's JSON")
    show = commands.add_parser("show", help="one job: status, progress, what trains, checkpoints")
    show.add_argument("job")
    show.add_argument("--json", action="store_true", help="print the server's JSON")
    watch = commands.add_parser("watch", help="follow a job until it ends")
    watch.add_argument("job")
    for verb, text in _VERBS.items():
        commands.add_parser(verb, help=text).add_argument("job")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Raises DualVisionError: no server, a refusal, a key file that can't be read."""
    args = build_parser().parse_args(argv)
    url, key = client_access()
    if args.key_file is not None:
        key = _read_key(args.key_file)
    client = ApiClient(args.url or url, key)
    # Into a pipe nothing is cut: programs read it.
    console = Console(highlight=False, soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 400)
    commands: Mapping[str, Callable[[ApiClient, Console, argparse.Namespace], int]] = {
        "list": _list, "show": _show, "watch": _watch,
    }  # fmt: skip
    return commands.get(args.command, _ask)(client, console, args)


def _read_key(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(
            "the key file can't be read", value=str(path), allowed=f"a key in ASCII ({error})",
            fix="Correct --key-file or what it names, or leave it out and set DVE_API_KEY",
        ) from None  # fmt: skip


def _path(job: str, rest: str = "") -> str:
    return f"{JOBS}/{quote(job, safe='')}{rest}"


def _list(client: ApiClient, console: Console, args: argparse.Namespace) -> int:
    page = client.get(JOBS, {"limit": args.limit})
    if args.json:
        sys.stdout.write(json.dumps(page, indent=2) + "\n")
        return 0
    table = Table(
        Column("job", no_wrap=True, min_width=38), "status", "progress", "model", "created", "result", box=None
    )
    for job in page["data"]:
        created = datetime.fromtimestamp(job["created_at"]).strftime("%Y-%m-%d %H:%M")
        table.add_row(
            job["id"], _status(job), _progress(job), job["model"], created, job["fine_tuned_model"] or _error(job)
        )
    console.print(table)
    if page["has_more"]:
        console.print(f"there are more: --limit {min(args.limit * 5, 100)}")
    return 0


def _show(client: ApiClient, console: Console, args: argparse.Namespace) -> int:
    job = client.get(_path(args.job))
    checkpoints = client.get(_path(args.job, "/checkpoints"), {"limit": 100})["data"]
    if args.json:
        sys.stdout.write(json.dumps({"job": job, "checkpoints": checkpoints}, indent=2) + "\n")
        return 0
    fusion = job["fusion"]
    rows = {
        "job": job["id"], "status": _status(job), "progress": _progress(job), "attempt": fusion["attempt"],
        "model": job["model"], "training file": job["training_file"], "seed": job["seed"],
        "trains": json.dumps(fusion["freeze"] or fusion["curriculum"] or "the recipe's default"),
        "result": job["fine_tuned_model"], "error": _error(job),
    }  # fmt: skip
    table = Table(box=None, show_header=False)
    for name, value in rows.items():
        if value not in (None, ""):
            table.add_row(name, str(value))
    for checkpoint in checkpoints:
        metrics = {k: v for k, v in checkpoint["metrics"].items() if v is not None and k != "step"}
        shown = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        table.add_row(f"step {checkpoint['step_number']}", f"{checkpoint['fine_tuned_model_checkpoint']} {shown}")
    console.print(table)
    return 0


def _ask(client: ApiClient, console: Console, args: argparse.Namespace) -> int:
    job = client.post(_path(args.job, f"/{args.command}"))
    console.print(f"{job['id']}: {_status(job)}")
    return 0


def _watch(client: ApiClient, console: Console, args: argparse.Namespace) -> int:
    job = client.get(_path(args.job))
    columns = (
        TextColumn("{task.fields[status]}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.fields[steps]}"),
        TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    # Without a terminal rich draws no bar; the lines are enough.
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None, status=job["status"], steps="?", figures="")
        for event in _follow(client, args.job):
            _report(event, progress, bar, console)
    job = client.get(_path(args.job))
    console.print(f"{job['id']}: {_status(job)} {job['fine_tuned_model'] or _error(job)}".rstrip())
    return 0 if job["status"] == "succeeded" else 1


def _follow(client: ApiClient, job: str) -> Any:
    """Every event once, over as many connections as it takes."""
    last, breaks = None, 0
    while True:
        query = {"stream": "true"} | ({"after": last} if last else {})
        try:
            for event in client.events(_path(job, "/events"), query):
                last, breaks = event["id"], 0
                yield event
            return
        except ServerUnreachableError:
            breaks += 1
            if breaks > _MAX_BREAKS:
                raise


def _report(event: Mapping[str, Any], progress: Progress, bar: TaskID, console: Console) -> None:
    data = event["data"]
    if data["kind"] == "step":
        total = data.get("num_steps_total")
        figures = _figures(data)
        progress.update(bar, completed=data["step"], total=total, steps=total or "?", figures=figures)
        if console.is_terminal:
            return
    elif "status" in data:
        progress.update(bar, status=data["status"])
    figures = f" {_figures(data)}" if event["type"] == "metrics" else ""
    when = datetime.fromtimestamp(event["created_at"]).strftime("%H:%M:%S")
    console.print(f"{when} {event['level']:<5} {event['message']}{figures}")


def _figures(data: Mapping[str, Any]) -> str:
    """What there is of loss, gate and speed."""
    gate = data.get("gate") if isinstance(data.get("gate"), dict) else {}
    named = {
        "loss": data.get("train_loss"), "val loss": data.get("valid_loss"), "gate": (gate or {}).get("mean"),
        "tokens/s": data.get("tokens_per_second"),
    }  # fmt: skip
    return " ".join(f"{name} {value:.4g}" for name, value in named.items() if isinstance(value, int | float))


def _status(job: Mapping[str, Any]) -> str:
    asked = job["fusion"]["requested_action"]
    return f"{job['status']} ({asked} asked)" if asked else str(job["status"])


def _progress(job: Mapping[str, Any]) -> str:
    progress = job["fusion"]["progress"]
    if progress["ratio"] is None:
        return str(progress["global_step"] or "")
    return f"{progress['global_step']}/{progress['num_steps']} {progress['ratio']:.0%}"


def _error(job: Mapping[str, Any]) -> str:
    error = job["error"]
    return f"{error['code']}: {error['message']}" if error else ""
