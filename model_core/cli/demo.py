"""`dve demo build` trains the embedded demo model from nothing; `dve demo eval` scores it on held-out pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model_core.cli.load_flags import number
from model_core.errors import DualVisionError


def build_parser() -> argparse.ArgumentParser:
    """Two commands, build and eval."""
    parser = argparse.ArgumentParser(prog="dve demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="train the demo model; a second call continues where one stopped")
    build.add_argument("--out", type=Path, help="checkpoint folder (default: the embedded one in this source tree)")
    build.add_argument("--work", type=Path, default=Path("build/demo"), help="progress is kept here")
    build.add_argument("--device", default="auto", help="auto, cpu, cuda")
    build.add_argument("--scale", type=float, default=1.0, help="share of every stage's steps; below 1 for a trial")
    build.add_argument("--artwork", type=Path, help="where the artwork is kept (default: the user's cache)")
    build.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C",
                       help="lay a setting over the recipe, model_core/demo/config_demo.json")  # fmt: skip
    build.add_argument("--eval-count", type=number, default=400, help="held-out questions of each kind for the card")
    score = commands.add_parser("eval", help="score a demo model, fused and under each arm")
    score.add_argument("--model", type=Path, help="checkpoint folder (default: the embedded one)")
    score.add_argument("--count", type=number, default=400, help="questions of each kind")
    score.add_argument("--arms", default="fused,qwen-only,dinov2-only,blind,unfused", help="comma-separated")
    score.add_argument("--artwork", type=Path)
    score.add_argument("--device", default="auto")
    score.add_argument("--json", action="store_true", help="print the scores as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; an error that a user can put right is one line on stderr and 2."""
    args = build_parser().parse_args(argv)
    try:
        return _build(args) if args.command == "build" else _eval(args)
    except DualVisionError as error:
        print(f"dve demo: error: {error}", file=sys.stderr)
        return 2


def _build(args: argparse.Namespace) -> int:
    # The trainer and transformers take seconds to import; --help should not.
    from model_core.cli.train import DONE, load_for_training, train_recipe
    from model_core.demo.build import demo_recipe, has_begun, last_ends, trained_minutes
    from model_core.demo.publish import default_out, publish
    from model_core.processing.batch import InputFormat
    from model_core.training.data.source import build_source
    from model_core.training.runs import FINAL

    config = demo_recipe(
        args.work, scale=args.scale, device=args.device, artwork=args.artwork, overrides=args.overrides
    )
    final = args.work / FINAL
    if not final.exists():
        code = train_recipe(config, args.work if has_begun(args.work) else None, go_on="the same command")
        if code != DONE:
            return code
    out, minutes = args.out or default_out(), trained_minutes(args.work)
    print(f"trained for {minutes:.0f} minutes in {args.work} (remove it to train anew); scoring ...")
    begun = load_for_training(config)
    source: Any = build_source(config, InputFormat.of(begun.processor, begun.model.model.mrope_layout))
    history = f"`dve demo build`, seed {config.seed}, {minutes:.1f} minutes of training."
    ends = last_ends(config, args.work)
    if len(ends) > 1:
        history += f" The weights are the mean of the ends of the last {len(ends)} stages."
    publish(ends, out, config, source, history=history, eval_count=args.eval_count, device=str(begun.model.device))
    print(f"wrote {out}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from model_core.checkpoint import quiet_unless_terminal
    from model_core.demo.artwork import load_artwork
    from model_core.demo.publish import score_arms
    from model_core.demo.scoring import render_table
    from model_core.demo_model import demo_folder
    from model_core.encoder import DualVisionEncoder

    quiet_unless_terminal()
    encoder = DualVisionEncoder.from_pretrained(args.model or demo_folder(), device=args.device)
    arms = score_arms(encoder, load_artwork(args.artwork), args.count, args.arms.split(","))
    if args.json:
        print(json.dumps({arm: scores.to_dict() for arm, scores in arms.items()}, indent=2))
    else:
        print(render_table(arms))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
