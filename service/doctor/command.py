"""`dve doctor`: every question asked, every answer a line, and an exit code.

In: argv and the environment. Out: a table or JSON; 0 where nothing failed, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from model_core.errors import ConfigError
from service.doctor import host
from service.doctor.finding import Finding, of_error, ok
from service.doctor.jobs import look_at_jobs
from service.doctor.machine import ask_machine, machine_findings
from service.settings import JobSettings, Settings, WorkerSettings, load_all_settings

_SECONDS = 300.0


def main(argv: Sequence[str] | None = None) -> int:
    """0: nothing failed; warnings do not count."""
    args = build_parser().parse_args(argv)
    try:
        settings = load_all_settings(args.set)
    except ConfigError as error:
        # In the words of the start; of what contradicts itself nothing else can be said.
        findings = [host.python(), of_error("settings", error, "Change the setting that it names")]
    else:
        findings = diagnose(*settings, deep=args.deep, seconds=args.seconds)
    sys.stdout.write(to_json(findings) + "\n") if args.json else show(findings)
    return int(any(finding.state == "fail" for finding in findings))


def build_parser() -> argparse.ArgumentParser:
    """The settings come from the environment, as the server's do."""
    parser = argparse.ArgumentParser(
        prog="dve doctor", description="Say whether a server and a worker with these settings would run here.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; may be repeated")
    parser.add_argument("--deep", action="store_true", help="hash every byte of the model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help="that torch and the model may take (default: %(default)g)"
    )
    return parser


def diagnose(
    settings: Settings, jobs: JobSettings, worker: WorkerSettings, *, deep: bool = False, seconds: float = _SECONDS
) -> list[Finding]:
    """Every line, in the order of a start."""
    of_jobs, skew = look_at_jobs(jobs)
    return [
        ok("settings", "none contradicts another"),
        host.python(),
        host.packages(),
        *machine_findings(ask_machine(settings, deep=deep, seconds=seconds)),
        host.data_folder(settings.data_dir),
        host.disk(settings.data_dir),
        *of_jobs,
        *host.ports(settings, worker),
        host.keys(settings),
        host.clock(skew),
        host.tracing(),
    ]


def to_json(findings: Sequence[Finding]) -> str:
    is_well = all(finding.state != "fail" for finding in findings)
    return json.dumps({"ok": is_well, "findings": [asdict(finding) for finding in findings]}, indent=2)


def show(findings: Sequence[Finding]) -> None:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 240)
    table = Table(box=None, show_header=False, pad_edge=False)
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for one in findings:
        table.add_row(one.name, one.state, one.detail, style=None if one.state == "ok" else colours[one.state])
        if one.remedy:
            table.add_row("", "", f"-> {one.remedy}")
    console.print(table)
    counts = {state: sum(one.state == state for one in findings) for state in colours}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))
