"""`dve checkpoints`: the steps of a run's folder: list them, look into one, remove what is not to be kept.

In: a run folder; out: tables, or fewer folders, and an exit code: 0, 2 for what can't be done. It loads no weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model_core.cli.table import print_table
from model_core.errors import ConfigError, DualVisionError
from model_core.manifest import verify_folder
from model_core.training.config import CheckpointConfig
from model_core.training.runs import LATEST, RunFolder, StepFolder, read_trainer


def build_parser() -> argparse.ArgumentParser:
    """list, inspect, prune."""
    parser = argparse.ArgumentParser(prog="dve checkpoints", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="a run's complete steps, the newest first")
    listing.add_argument("run", type=Path, help="the run's folder (output_dir)")
    inspect = commands.add_parser("inspect", help="one step: where it stands, what trains, whether its files are whole")
    inspect.add_argument("step", type=Path, help="a step-N folder, or a run folder for its newest")
    inspect.add_argument("--json", action="store_true", help="print trainer.json's content")
    prune = commands.add_parser("prune", help="remove steps")
    prune.add_argument("run", type=Path)
    prune.add_argument("--keep_last", "--keep-last", type=int, default=2)
    prune.add_argument("--drop_stage_ends", "--drop-stage-ends", action="store_true", help="the ends of stages as well")
    prune.add_argument("--drop_best", "--drop-best", action="store_true", help="the best one as well")
    prune.add_argument("--dry_run", "--dry-run", action="store_true", help="say what would go")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; what a user can put right is one line on stderr and 2."""
    args = build_parser().parse_args(argv)
    try:
        {"list": _list, "inspect": _inspect, "prune": _prune}[args.command](args)
    except DualVisionError as error:
        print(f"dve checkpoints {args.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _steps(run: RunFolder) -> list[StepFolder]:
    steps = run.steps()
    if not steps:
        raise ConfigError(
            "there is no complete step in this folder", value=str(run.path), allowed="the output_dir of a run",
            fix="Name the folder that holds the run's step-N folders",
        )  # fmt: skip
    return steps


def _list(args: argparse.Namespace) -> None:
    run = RunFolder(args.run)
    best = run.best()
    rows = []
    for one in _steps(run):
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in one.metrics.items())
        size = sum(file.stat().st_size for file in one.path.rglob("*") if file.is_file())
        marks = "best" if best == one.path.resolve() else ""
        rows.append([one.path.name, str(one.stage), one.reason, f"{size / 2**20:.1f}", metrics, marks])
    print_table(str(args.run), ["step", "stage", "saved at", "MiB", "metrics", ""], rows)


def _inspect(args: argparse.Namespace) -> None:
    folder: Path = args.step
    if (folder / LATEST).exists():
        folder = (folder / LATEST).resolve()
    verify_folder(folder, deep=True)
    content = read_trainer(folder)
    if args.json:
        print(json.dumps(content, indent=2))
        return
    position: dict[str, Any] = content["position"]
    print(f"{folder}: every file is as it was written")
    print(", ".join(f"{name} {value}" for name, value in position.items()))
    for row in content["freeze"]["rows"]:
        print(f"{row['component']:<18} {row['total']:>14,} total {row['trainable']:>14,} trainable  {row['state']}")
    print(f"trained tokens: {content['trained_tokens']:,}; optimizer steps: {content['optimizer']['num_steps']}")
    for name, value in content["scores"].get("latest", {}).items():
        print(f"{name}: {value:.4f}")


def _prune(args: argparse.Namespace) -> None:
    run = RunFolder(args.run)
    _steps(run)
    if args.keep_last < 1:
        raise ConfigError(
            "a run keeps its newest step", value=args.keep_last, allowed="1 or more",
            fix="Raise --keep_last, or leave it out", param="keep_last",
        )  # fmt: skip
    keep = CheckpointConfig(
        keep_last=args.keep_last, keep_best=not args.drop_best, keep_stage_ends=not args.drop_stage_ends
    )
    gone = run.surplus(keep) if args.dry_run else run.prune(keep)
    for folder in gone:
        print(f"{'would remove' if args.dry_run else 'removed'} {folder}")
    print(f"{len(gone)} of {len(gone) + len(run.steps()) - (len(gone) if args.dry_run else 0)} steps")


if __name__ == "__main__":
    raise SystemExit(main())
