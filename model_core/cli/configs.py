"""`dve configs create` writes the shipped training recipes, `dve configs keys` lists what may stand in one, `dve config
validate` checks one of the user's.

In: flags; out: files, or what a recipe says in plain words, and an exit code: 0, 2 for a wrong call, 78 for a recipe
that is refused. It loads no model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from model_core.cli.recipe_page import recipe_page
from model_core.errors import ConfigError, DualVisionError
from model_core.training.config import COMPONENTS, Stage, TrainConfig, load_config
from model_core.training.freeze import trained_components

SCENARIOS = Path(__file__).parents[1] / "training" / "scenarios"
#: The recipes of the demo model. Listed, and not among those to begin one's own from: their data are generated.
DEMO_RECIPES = tuple(SCENARIOS.parents[1] / "demo" / f"config_{name}.json" for name in ("demo", "demo_long"))
BAD_CONFIG = 78


def build_parser() -> argparse.ArgumentParser:
    """create, list, keys, validate."""
    parser = argparse.ArgumentParser(prog="dve configs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="write the shipped recipes and the template config.json")
    create.add_argument("--out", type=Path, default=Path("configs"), help="folder (default: configs)")
    create.add_argument("--force", action="store_true", help="replace files that were edited")
    commands.add_parser("list", help="the shipped recipes: purpose, cost, expected outcome")
    commands.add_parser("keys", help="every key with its type, default and meaning, and examples: RECIPES.md")
    validate = commands.add_parser("validate", help="check a recipe and print its stages")
    validate.add_argument("file", type=Path)
    validate.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    validate.add_argument("--json", action="store_true", help="print the whole recipe, defaults included, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; a recipe that is refused is one line on stderr and 78."""
    args = build_parser().parse_args(argv)
    try:
        if args.command == "create":
            return _create(args.out, force=args.force)
        if args.command == "list":
            return _list()
        if args.command == "keys":
            sys.stdout.write(recipe_page())
            return 0
        config = load_config(args.file, args.overrides)
        for stage in config.stages():
            _check_trains(stage)
    except DualVisionError as error:
        print(f"dve configs {args.command}: error: {error}", file=sys.stderr)
        return BAD_CONFIG
    if args.json:
        print(json.dumps(config.model_dump(mode="json"), indent=2))
    else:
        _describe(args.file, config)
    return 0


def _create(out: Path, *, force: bool) -> int:
    shipped = {path.name: path.read_text() for path in sorted(SCENARIOS.glob("*.json"))}
    edited = [name for name, text in shipped.items() if (out / name).exists() and (out / name).read_text() != text]
    if edited and not force:
        raise ConfigError(
            "files of these names are there and say something else",
            value=", ".join(str(out / name) for name in edited),
            allowed="a folder without them", fix="Choose another --out, or --force to replace them",
        )  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in shipped.items():
            (out / name).write_text(text)
            print(out / name)
    except OSError as error:
        raise ConfigError(
            f"the recipes can't be written ({error.strerror})", value=str(out), allowed="a folder that can be written",
            fix="Choose another --out",
        ) from error  # fmt: skip
    return 0


def _list() -> int:
    for path in (*sorted(SCENARIOS.glob("*.json")), *DEMO_RECIPES):
        note = load_config(path).note
        print(f"{path.name}\n  {note.purpose}\n  cost: {note.cost}\n  expected: {note.expected}")
    return 0


def _check_trains(stage: Stage) -> None:
    """Raises ConfigError for a stage that no model could train anything in; a rule may still name parameters."""
    if not trained_components(stage.freeze) and not any(rule.train for rule in stage.freeze.rules):
        raise ConfigError(
            f"nothing is left to train in stage {stage.index}",
            value=stage.freeze.model_dump(exclude_defaults=True, mode="json"),
            allowed="at least one component that is not frozen", fix="Leave one of the flags out",
            param="freeze_config",
        )  # fmt: skip


def _describe(path: Path, config: TrainConfig) -> None:
    print(f"{path}: valid, fingerprint {config.fingerprint()}")
    model = config.new_model and f"new, by {config.new_model.name}"
    model = model or config.model or " + ".join(n for n in (config.qwen_model_name, config.dinov2_model_name) if n)
    print(f"model: {model or 'the embedded demo model'}")
    for stage in config.stages():
        print(f"stage {stage.index}: {_stage_line(stage, has_adapters=bool(config.lora.groups))}")
    if config.val_data_path is None:
        try:
            config.require_no_evaluation()
        except ConfigError as error:
            print(f"warning: {error}")
    if config.batch_source is not None:
        print(f"data: made by {config.batch_source.name}")
        return
    if not config.datasets and config.train_data_path is None:
        print("warning: no training data is named: train_data_path or datasets")
        return
    named = [*(source.data_path for source in config.train_sources()), config.val_data_path]
    for missing in [name for name in named if name is not None and not Path(name).exists()]:
        print(f"warning: {missing} is not here")


def _stage_line(stage: Stage, *, has_adapters: bool) -> str:
    flags = [f"{name}={str(value).lower()}" for name, value in stage.freeze.flags.items()]
    trained = trained_components(stage.freeze)
    trains = "trains " + (" ".join(name for name in COMPONENTS if name in trained) or "what its rules name")
    parts = [*([stage.training_mode] if stage.training_mode else []), *flags, trains]
    if stage.freeze.rules:
        parts.append(f"{len(stage.freeze.rules)} rules")
    parts.append(f"{stage.epochs} epoch{'s' * (stage.epochs != 1)}")
    if stage.steps is not None:
        parts.append(f"at most {stage.steps} steps")
    parts += [f"{name} loss times {weight:g}" for name, weight in stage.loss_weights.items()]
    shown = trained | ({"lora"} if has_adapters else set())
    parts.append(
        "rates " + " ".join(f"{name} {rate:g}" for name, rate in stage.learning_rates.items() if name in shown)
    )
    if stage.encoder_dropout:
        parts.append(f"encoder dropout {stage.encoder_dropout:g}")
    return ", ".join(parts) + (f": {stage.description}" if stage.description else "")


if __name__ == "__main__":
    raise SystemExit(main())
