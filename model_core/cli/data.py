"""`dve data validate FILE`: what of a training file can be used, and what is wrong with the rest, row by row.

In: flags; out: a report, and an exit code: 0, 2 for a wrong call, 78 for data that is refused. Without a model it
checks all that needs no tokenizer, and says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_core.cli.load_flags import number
from model_core.errors import DualVisionError

if TYPE_CHECKING:
    from model_core.processing.batch import InputFormat
    from model_core.training.data.scan import RowProblem, ScanReport

BAD_DATA = 78
_TYPES = ("conversation", "vqa", "captioning", "medical_vqa")
_SHOWN = 50


def build_parser() -> argparse.ArgumentParser:
    """validate."""
    parser = argparse.ArgumentParser(prog="dve data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    validate = commands.add_parser("validate", help="check a training file before it is trained on")
    validate.add_argument(
        "file", type=Path, help="JSON, JSON lines, a zip of them with images, Parquet, datasets folder"
    )
    validate.add_argument("--type", choices=_TYPES, default="conversation", help="what its rows are (default: any)")
    validate.add_argument(
        "--image_root", "--image-root", type=Path, help="where images lie (default: the file's folder)"
    )
    validate.add_argument("--json", action="store_true", help="print the whole report as JSON")
    validate.add_argument("--max-rows", "--max_rows", type=number, help="look at the first N rows only")
    validate.add_argument("--model", help="folder or hub id: count tokens and labels as this model would")
    validate.add_argument(
        "--max-tokens", "--max_tokens", type=number, help="with --model: longest sample (default: 4096)"
    )
    validate.add_argument(
        "--decode", action="store_true", help="decode every picture to its last pixel, which is slower"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where every row can be used, else 78."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.max_tokens is not None and args.model is None:
        parser.error("--max-tokens needs --model, whose tokenizer counts them")
    from model_core.processing.images import ImageLimits
    from model_core.training.data.multi import DATASET_TYPES
    from model_core.training.data.scan import Checks, scan

    try:
        fmt = None if args.model is None else _format_of(args.model)
        limits = ImageLimits() if fmt is None else fmt.limits
        dataset = DATASET_TYPES[args.type](args.file, args.image_root)
        report = scan(dataset, Checks(limits, fmt, args.max_tokens or 4096, args.decode), max_rows=args.max_rows)
    except DualVisionError as error:
        if args.json:
            print(json.dumps({"valid": False, "code": error.code, "error": str(error)}, indent=2))
        print(f"dve data {args.command}: error: {error}", file=sys.stderr)
        return BAD_DATA
    if args.json:
        said: dict[str, Any] = {"valid": not report.errors, "file": str(args.file), "tokens_counted": fmt is not None}
        print(json.dumps(said | report.to_json(), indent=2))
    else:
        _show(args.file, report, num_all=len(dataset), has_tokens=fmt is not None)
    return BAD_DATA if report.errors else 0


def _format_of(model: str) -> InputFormat:
    """How this model sees samples, without its weights."""
    from model_core.checkpoint import load_processor
    from model_core.language.rope import MropeLayout
    from model_core.processing.batch import InputFormat

    processor = load_processor(model)
    # Positions in time depend on tokens_per_second; nothing here is a position.
    layout = MropeLayout(processor.patch_spec.merge_size, 1, processor.tokens_per_cell)
    return InputFormat(processor.tokenizer, processor.special, processor.patch_spec, layout)


def _show(path: Path, report: ScanReport, *, num_all: int, has_tokens: bool) -> None:
    for problem in report.errors[:_SHOWN]:
        print(f"error: {problem}")
    if len(report.errors) > _SHOWN:
        print(f"... and {len(report.errors) - _SHOWN} more errors; --json has all")
    others: dict[tuple[str, str], list[RowProblem]] = {}
    for problem in report.problems:
        if problem.severity != "error":
            key = "" if problem.code == "duplicate" else problem.message  # that one names another row each time
            others.setdefault((problem.code, key), []).append(problem)
    for (code, message), found in others.items():
        rows = ", ".join(str(one.row) for one in found[:10]) + (", ..." if len(found) > 10 else "")
        print(f"{found[0].severity}: {len(found)} rows: {code}{f': {message}' if message else ''}: rows {rows}")
    seen = "rows" if report.num_rows == num_all else f"of {num_all} rows looked at"
    print(f"{path}: {report.num_rows} {seen}, {report.num_rows - len(report.errors)} can be used")
    if has_tokens:
        print(f"{int(report.lengths.sum())} tokens, {int(report.num_labels.sum())} of them labels, the longest sample "
              f"{int(report.lengths.max(initial=0))}")  # fmt: skip
    else:
        print("lengths and labels were not counted: give --model to have its tokenizer do it")


if __name__ == "__main__":
    raise SystemExit(main())
