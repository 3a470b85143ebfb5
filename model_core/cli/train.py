"""`dve train`: a recipe, trained. Prints what trains and how it goes, and leaves a model folder.

In: a recipe's file and flags; out: a run folder, and an exit code: 0 done, 74 the disk is full, 75 a checkpoint was
saved on request and `--resume` goes on, 78 the recipe or the data is at fault, 79 the deadline passed, 1 anything else.
A supervisor reads events and sets deadlines through two open files (`training_pipe.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_core.cli.training_pipe import Control, EventPipe
from model_core.errors import (
    CheckpointError,
    ConfigError,
    DualVisionError,
    InputError,
    ModelNotFoundError,
    StorageFullError,
)
from model_core.published import is_disk_full, is_variant
from model_core.training.config import TRAINING_MODES, TrainConfig, load_config
from model_core.training.display import Display, summary_text

if TYPE_CHECKING:
    from model_core.checkpoint import Loaded
    from model_core.training.reports import Outcome
    from model_core.training.trainer import DualVisionTrainer

DONE, FAILED, STORAGE_FULL, CHECKPOINTED, REFUSED = 0, 1, 74, 75, 78
#: The command line's names of the original's flags -> theirs in freeze_config.
FLAGS = {
    "freeze_qwen_vision": "freeze_qwen_vision",
    "freeze_dinov2": "freeze_dinov2",
    "freeze_llm": "freeze_llm",
    "freeze_fusion": "freeze_fusion_layers",
    "freeze_projections": "freeze_projections",
}


def build_parser() -> argparse.ArgumentParser:
    """Flags as users of the original know them, with underscores or dashes."""
    parser = argparse.ArgumentParser(prog="dve train", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, type=Path, help="the recipe, as `dve configs create` writes it")
    parser.add_argument("--training_mode", "--training-mode", choices=TRAINING_MODES,
                        help="what trains, instead of the recipe's mode and freeze flags; flags given here refine it. "
                        "A recipe with rules or a curriculum is refused: the error says what to do")  # fmt: skip
    for flag in FLAGS:
        names = dict.fromkeys((f"--{flag}", f"--{flag.replace('_', '-')}"))
        parser.add_argument(*names, action="store_true", help="on top of the mode or of the recipe")
    parser.add_argument("--resume", type=Path, metavar="PATH",
                        help="a run folder (its newest step), or one step of it; what trains is as the run began, "
                        "unless mode or flags are given again")  # fmt: skip
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C",
                        help="lay a setting over the recipe, as often as wanted")  # fmt: skip
    parser.add_argument("--verdict", action="store_true",
                        help="end with fused against unfused on held-out data, with intervals and costs; answers are "
                        "generated for it even where evaluation.num_answers is 0 (then 64)")  # fmt: skip
    parser.add_argument("--dry_run", "--dry-run", action="store_true",
                        help="check recipe, model, data, output folder and what --resume names; print the table, and "
                        "train nothing")  # fmt: skip
    parser.add_argument("--peak_tflops", "--peak-tflops", type=float, metavar="N",
                        help="the device's dense peak, to show MFU (default: by its name, if known)")  # fmt: skip
    parser.add_argument("--events-fd", type=int, metavar="N", help="for a supervisor: events go to this open file")
    parser.add_argument("--control-fd", type=int, metavar="N", help="for a supervisor: commands come from this one")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train. What is wrong is one line on stderr, and an `error` event where someone listens."""
    args = build_parser().parse_args(argv)
    pipe = EventPipe(args.events_fd)
    try:
        return _run(args, pipe)
    except StorageFullError as error:
        return _leave_full_disk(pipe, error.code, str(error))
    except DualVisionError as error:
        is_final = _is_final(error)
        pipe.fail(error.code, str(error), retry=not is_final)
        print(f"dve train: error: {error}", file=sys.stderr)
        return REFUSED if is_final else FAILED
    except Exception as error:  # the border of the process: a supervisor must hear of it
        if is_disk_full(error):
            return _leave_full_disk(pipe, StorageFullError.code, f"the disk is full ({error})")
        pipe.fail("internal_error", f"{type(error).__name__}: {error}", retry=True)
        raise


def _leave_full_disk(pipe: EventPipe, code: str, message: str) -> int:
    """Last words may find no room either, and must not change the exit code: what is still buffered is let go."""
    with suppress(OSError):
        pipe.fail(code, message, retry=True)
    for stream, text in ((sys.stderr, f"dve train: error: {message}\n"), (sys.stdout, "")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return STORAGE_FULL


def _is_final(error: DualVisionError) -> bool:
    """Will the same recipe on the same data fail again? A lost disk or a broken number may not."""
    if error.code in ("nan_loss", "out_of_memory", "freeze_violation"):
        return True
    return isinstance(error, (ConfigError, InputError, ModelNotFoundError, CheckpointError))


def _run(args: argparse.Namespace, pipe: EventPipe) -> int:
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        fix = "Give the device's dense peak, or leave it out"
        raise ConfigError("--peak_tflops is out of range", value=args.peak_tflops, allowed="above 0", fix=fix)
    flags = {name: True for flag, name in FLAGS.items() if getattr(args, flag)}
    config = load_config(args.config, args.overrides).with_freeze(args.training_mode, flags)
    says_what_trains = flags or args.training_mode or any(one.startswith(config.FREEZE_KEYS) for one in args.overrides)
    if args.resume is not None and not says_what_trains and args.events_fd is None:  # a supervisor's recipe is whole
        config = _with_freeze_of_run(config, args)
    control = Control(args.control_fd)
    control.start()
    return train_recipe(
        config, args.resume, (pipe,), control,
        dry_run=args.dry_run, wants_verdict=args.verdict, peak_tflops=args.peak_tflops,
    )  # fmt: skip


def _with_freeze_of_run(config: TrainConfig, args: argparse.Namespace) -> TrainConfig:
    """The recipe with what trains as in the run that goes on, whose own command line may have said it.

    Nothing is judged here: where the rest differs too, the resume says so.
    """
    from model_core.training.runs import read_begun

    begun = read_begun(args.resume)
    if begun is None:
        return config
    try:
        restored = config.with_freeze_of(begun["recipe"])
    except ConfigError:
        return config
    if restored != config and restored.fingerprint() == begun["recipe_fingerprint"]:
        freeze = restored.freeze.model_dump(exclude_none=True, exclude_defaults=True, mode="json")
        print(f"--resume: what trains is as the run began, whatever {args.config} says: {json.dumps(freeze)}")
    return restored


def train_recipe(
    config: TrainConfig, resume: Path | None = None, listeners: tuple[Any, ...] = (), control: Control | None = None, *,
    dry_run: bool = False, wants_verdict: bool = False, peak_tflops: float | None = None, go_on: str = "",
) -> int:  # fmt: skip
    """Train a recipe to its end, or until it is told to stop; the exit code. Raises DualVisionError.

    go_on: what the user does to go on with a run that was stopped, where it is not `dve train` that was called.
    """
    # torch is imported from here on: a wrong recipe is told at once.
    from model_core.checkpoint import quiet_unless_terminal
    from model_core.trainer import run_hooks
    from model_core.training.data.source import build_source, problems_of
    from model_core.training.loggers import build_loggers
    from model_core.training.trainer import DualVisionTrainer

    quiet_unless_terminal()
    if wants_verdict:
        from model_core.cli.verdict import require_floor

        require_floor(config)
    build_loggers(config)  # what one lacks is told before a model is loaded
    if config.val_data_path is None:
        config.require_no_evaluation()
    loaded = load_for_training(config)
    fmt = _input_format(loaded)
    source = build_source(config, fmt, split="train")
    val = build_source(config, fmt, split="val") if config.val_data_path else None
    display = Display(sys.stdout, _check_commands(config))
    hooks = run_hooks(loaded, (display, *listeners), peak_tflops=peak_tflops)
    trainer = DualVisionTrainer(
        loaded.model, source, val, config, processor=loaded.processor, hooks=hooks, write=not dry_run
    )
    if dry_run or resume is not None:  # a new run's events tell it
        display.problems(problems_of(source, val))
    if dry_run:
        if resume is not None:
            trainer.resume(resume)
        trainer.run_folder.check_free(config, resume)
        print(trainer.table.render())
        print(f"{trainer.curriculum.total_steps} steps in {len(trainer.curriculum.stages)} stages; nothing was trained")
        return DONE
    if control is not None:
        control.attach(trainer)
    with _stops_on_signals(trainer), display:
        if resume is not None:
            trainer.resume(resume)
        outcome = trainer.train()
    if not outcome.is_finished:
        way = go_on or f"--resume {trainer.run_folder.path} beside the same --config and --set"
        print(f"saved on request after {outcome.position.global_step} steps; go on with {way}")
        return CHECKPOINTED
    _finish(config, trainer, outcome, wants_verdict=wants_verdict)
    return DONE


def _check_commands(config: TrainConfig) -> dict[tuple[str, str], str]:
    """What lists the problems of all rows, by split and data set."""
    named = [("train", one.name, one.data_path, one.image_root) for one in config.train_sources()]
    if config.val_data_path is not None:
        named.append(("val", None, config.val_data_path, None))
    commands = {}
    for split, name, path, own_root in named:
        root = own_root or config.image_root
        words = ["dve", "data", "validate", path, *(("--image_root", root) if root else ())]
        commands[split, name or Path(path).stem] = shlex.join(words)
    return commands


def load_for_training(config: TrainConfig) -> Loaded:
    """The model that a recipe begins with; float32 where it computes in float32.

    Raises:
        ConfigError, CheckpointError.
    """
    import torch

    from model_core.checkpoint import Loaded, LoadOptions, combine_checkpoints, load_checkpoint
    from model_core.demo_model import demo_folder
    from model_core.plugins import load_part
    from model_core.training.saving import whole_model
    from model_core.variant import load_variant

    source = config.model_source()
    options = LoadOptions(config.device, None, config.use_flash_attention)
    if source.new is not None:
        model, processor = load_part(source.new.name, "model builder")(seed=config.seed, **source.new.options)
        return Loaded(model.to(options.resolve_device()), processor)
    on_cuda = options.resolve_device().type == "cuda"
    if config.precision == "float32" or (config.precision == "auto" and not on_cuda):
        options = replace(options, dtype=torch.float32)
    start = None if config.start_from is None else Path(config.start_from)
    if start is not None and not is_variant(start):
        with whole_model(start, Path(config.output_dir)) as folder:
            return load_checkpoint(folder, options)
    if source.pair is not None:
        base = combine_checkpoints(*source.pair, options, **source.settings)
    else:
        base = load_checkpoint(source.model or demo_folder(), options)
    return base if start is None else load_variant(start, base)


def _input_format(loaded: Loaded) -> Any:
    from model_core.processing.batch import InputFormat

    return InputFormat.of(loaded.processor, loaded.model.model.mrope_layout)


@contextmanager
def _stops_on_signals(trainer: DualVisionTrainer) -> Iterator[None]:
    """SIGTERM and SIGINT save and stop; a second one does what it would have done without this."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _frame: Any) -> None:
        signal.signal(number, before[signal.Signals(number)])
        trainer.request_stop()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(config: TrainConfig, trainer: DualVisionTrainer, outcome: Outcome, *, wants_verdict: bool) -> None:
    folder = trainer.run_folder.path
    print(summary_text(outcome, stops_early=config.early_stopping is not None))
    if wants_verdict:
        from model_core.cli.verdict import verdict

        found = verdict(trainer)
        (folder / "verdict.json").write_text(json.dumps(found.to_json(), indent=2) + "\n")
        print(found.render())
    if outcome.summary.get("curves"):
        print(f"curves: {outcome.summary['curves']}")


if __name__ == "__main__":
    raise SystemExit(main())
