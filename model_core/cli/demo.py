"""`dve demo build` trains a demo model from nothing; `dve demo eval` scores the embedded one, or another."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model_core.cli.load_flags import number
from model_core.errors import CheckpointMismatchError, DualVisionError

#: What a build in one go may take unless told otherwise; the long recipe takes what it takes.
_MINUTES = 90.0


def build_parser() -> argparse.ArgumentParser:
    """Two commands, build and eval."""
    parser = argparse.ArgumentParser(prog="dve demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="train a demo model; a second call continues where one stopped")
    build.add_argument("--recipe", choices=("short", "long"), default="short",
                       help="short: in one go; long: that of the embedded weights, hours on two cores")  # fmt: skip
    build.add_argument("--out", type=Path, help="checkpoint folder (default: `model` in the folder of --work)")
    build.add_argument("--work", type=Path, default=Path("build/demo"), help="progress is kept here")
    build.add_argument("--device", default="auto", help="auto, cpu, cuda")
    length = build.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=minutes,
                        help="shorten every stage so that all of it, scores included, takes so long on this machine, "
                        "as a few steps are timed (default: 90 for short, none for long)")  # fmt: skip
    length.add_argument("--scale", type=float, help="share of every stage's steps instead, up to 1: nothing is timed")
    build.add_argument("--artwork", type=Path, help="where the artwork is kept (default: the user's cache)")
    build.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C",
                       help="lay a setting over the recipe, model_core/demo/config_demo.json or its _long")  # fmt: skip
    build.add_argument("--eval-count", type=number, default=400, help="held-out questions of each kind for the card")
    score = commands.add_parser("eval", help="score a demo model, fused and under each arm")
    score.add_argument("--model", type=Path, help="checkpoint folder (default: the embedded one)")
    score.add_argument("--count", type=number, default=400, help="questions of each kind")
    score.add_argument("--arms", default="fused,qwen-only,dinov2-only,blind,unfused", help="comma-separated")
    score.add_argument("--artwork", type=Path)
    score.add_argument("--device", default="auto")
    score.add_argument("--json", action="store_true", help="print the scores as JSON")
    return parser


def minutes(text: str) -> float:
    """A duration above nothing."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0, such as 90")
    return value


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
    begun_at = time.monotonic()
    from model_core.cli.train import DONE, load_for_training, train_recipe
    from model_core.demo.build import demo_recipe, has_begun, last_ends, trained_minutes
    from model_core.demo.publish import publish
    from model_core.training.runs import FINAL, read_begun

    options: dict[str, Any] = {"device": args.device, "artwork": args.artwork, "overrides": args.overrides}
    scale = args.scale if args.scale is not None else _fitting_share(args, options, begun_at)
    config = demo_recipe(args.work, args.recipe, scale=scale, **options)
    final = args.work / FINAL
    if not final.exists():
        code = train_recipe(config, args.work if has_begun(args.work) else None, go_on="the same command")
        if code != DONE:
            return code
    begun_with = (read_begun(args.work) or {}).get("recipe_fingerprint")
    if begun_with != config.fingerprint():  # while there are steps left, the trainer says it, and says how
        raise CheckpointMismatchError(
            "the build in this folder is done, and was another", value=f"{args.work}: recipe {begun_with}",
            allowed=f"recipe {config.fingerprint()}, by the --recipe, --scale and --set given now",
            fix="Give those that it was built with, or another --work",
        )  # fmt: skip
    out, trained = args.out or args.work / "model", trained_minutes(args.work)
    print(f"trained for {trained:.0f} minutes in {args.work} (remove it to train anew); scoring ...")
    begun = load_for_training(config)
    history = (
        f"`dve demo build --recipe {args.recipe} --scale {scale:g}`, seed {config.seed}, "
        f"{trained:.1f} minutes of training."
    )
    publish(
        last_ends(config, args.work), out, config, _scenes(config, begun), history=history,
        eval_count=args.eval_count, device=str(begun.model.device),
    )  # fmt: skip
    print(f"wrote {out}: dve serve --model {out}")
    return 0


def _fitting_share(args: argparse.Namespace, options: dict[str, Any], begun_at: float) -> float:
    """Of the recipe's steps, chosen once a build: what it was begun with, or what the time allows."""
    from model_core.cli.train import load_for_training
    from model_core.demo.build import demo_recipe, has_begun
    from model_core.demo.pace import keep_share, kept_share, measure

    limit = args.minutes or (_MINUTES if args.recipe == "short" else None)
    kept = kept_share(args.work, args.recipe)
    if kept is not None:
        print(f"going on with {100 * kept:.4g} % of the recipe's steps, chosen when this build began", flush=True)
        return kept
    if limit is None or has_begun(args.work):  # begun with --scale: the run says how its recipe differs
        return 1.0
    config = demo_recipe(args.work, args.recipe, **options)
    print("timing a few steps of each kind ...", flush=True)
    loaded = load_for_training(config)
    pace = measure(config, loaded, _scenes(config, loaded))
    share = pace.share(config, 60 * limit - (time.monotonic() - begun_at), args.eval_count)
    keep_share(args.work, args.recipe, share, pace)
    seconds = " and ".join(f"{value:.2f}" for value in pace.seconds.values())
    about = (share * pace.of_training(config) + pace.of_scoring(args.eval_count)) / 60
    print(
        f"steps take {seconds} s here: {100 * share:.4g} % of the recipe's fit into {limit:g} minutes, about "
        f"{about:.0f} with the scores (the same again: --scale {share:g})",
        flush=True,
    )
    return share


def _scenes(config: Any, loaded: Any) -> Any:
    from model_core.processing.batch import InputFormat
    from model_core.training.data.source import build_source

    return build_source(config, InputFormat.of(loaded.processor, loaded.model.model.mrope_layout))


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
