"""`dve bench train` times training, mode by mode, packed and not, beside transformers' `Trainer` on the same samples.

In: flags; out: a table, or with --json every round, and an exit code. The model's weights do not matter and are not
written; the data is drawn from a number.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_core.analysis.peaks import peak_flops_per_second
from model_core.analysis.training_load import TrainingLoad
from model_core.cli.load_flags import number, numbers
from model_core.cli.table import print_table
from model_core.errors import ConfigError, DualVisionError
from model_core.training.config import TRAINING_MODES, TrainConfig, parse_config

if TYPE_CHECKING:
    from model_core.analysis.training_speed import Contender, Measured

#: What one card of 80 GB and more is measured with; the figures to aim at are of packs of 4096 tokens.
_GPU: dict[str, Any] = {
    "device": "cuda", "samples": 256, "batch_size": 64, "image_size": [224, 1008], "words": [1, 400],
    "max_tokens": 4096, "trainer": False, "unpacked": False, "recompute": ["llm", "qwen_vision"],
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "device": "auto", "samples": 32, "batch_size": 8, "image_size": [56, 224], "words": [1, 160],
    "max_tokens": 4096, "trainer": True, "unpacked": True, "recompute": [],
}  # fmt: skip
#: Model FLOP utilisation to aim at: at least, and excellent.
_MFU_GOOD, _MFU_EXCELLENT = 0.35, 0.45
_MIB = 2**20


def build_parser() -> argparse.ArgumentParser:
    """The load, the contenders, the machine."""
    parser = argparse.ArgumentParser(prog="dve bench train", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="a dual checkpoint, folder or hub id (default: the demo model)")
    parser.add_argument("--modes", type=_modes, default=list(TRAINING_MODES), help="full,fusion_only (default: all)")
    parser.add_argument("-n", "--samples", type=number, help="samples of an epoch, which is a round (32)")
    parser.add_argument("--batch-size", type=number, help="samples of a step, on all sides (8)")
    parser.add_argument("--max-tokens", type=number, help="of a pack (4096)")
    parser.add_argument("--image-size", type=_span, help="smallest and largest side in pixels (56,224)")
    parser.add_argument("--words", type=_span, help="of the shortest and the longest answer (1,160)")
    parser.add_argument("--rounds", type=number, default=3, help="of each contender; medians are shown")
    parser.add_argument("--trainer", action=argparse.BooleanOptionalAction, help="also transformers' Trainer")
    parser.add_argument("--unpacked", action=argparse.BooleanOptionalAction, help="also one sample a pack")
    parser.add_argument("--recompute", type=_components, help="gradient_checkpointing: llm,qwen_vision,dinov2 or none")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--peak-tflops", type=float, help="the device's dense peak, for MFU (default: by its name)")
    parser.add_argument("--apart", action="store_true",
                        help="one after the other, each alone in memory, not in turns (--gpu does)")  # fmt: skip
    parser.add_argument("--cpu-time", action="store_true",
                        help="count this process's processor time: on a machine with other work")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--gpu", action="store_true", help="a load for one large card; other flags still count")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; what a user can put right is one line on stderr and 2."""
    args = parse(argv)
    try:
        found = bench(args)
    except DualVisionError as error:
        print(f"dve bench train: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_json(), indent=2)) if args.json else show(found)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags, with what nobody gave filled in: it depends on --gpu."""
    args = build_parser().parse_args(argv)
    args.apart = args.apart or args.gpu
    for name, value in (_GPU if args.gpu else _DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


@dataclass(frozen=True, slots=True)
class Found:
    """All that was measured, and on what."""

    machine: dict[str, Any]
    load: dict[str, Any]
    measured: list[Measured]
    peak_flops_per_second: float | None
    is_gpu_preset: bool = False

    def of(self, mode: str, kind: str) -> Measured | None:
        return next((one for one in self.measured if (one.mode, one.kind) == (mode, kind)), None)

    def to_json(self) -> dict[str, Any]:
        peak = self.peak_flops_per_second
        rows = [one.to_json() | {"mfu": one.utilisation(peak), **self.ratios(one)} for one in self.measured]
        return {
            "command": "train", "machine": self.machine, "load": self.load, "peak_flops_per_second": peak, "runs": rows
        }  # fmt: skip

    def ratios(self, one: Measured) -> dict[str, float | None]:
        """Over Trainer in the same mode, and over the same kind in full."""
        peer, full = self.of(one.mode, "Trainer"), self.of("full", one.kind)
        return {
            "over_trainer": None if peer is None else one.ratio(peer),
            "over_full": None if full is None else one.ratio(full),
        }


def bench(args: argparse.Namespace) -> Found:
    """Load the model, draw the data, train.

    Raises:
        ConfigError: flags that fit neither each other nor the model; as `load_checkpoint`.
    """
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        fix = "Give the device's dense peak, or leave it out"
        raise ConfigError("--peak-tflops is out of range", value=args.peak_tflops, allowed="above 0", fix=fix)
    if args.samples % args.batch_size:
        raise ConfigError(
            "a round must be whole steps", value=f"{args.samples} samples, {args.batch_size} a step",
            allowed="samples that the batch size divides", fix="Change --samples or --batch-size",
        )  # fmt: skip
    from model_core.analysis.training_speed import measure, measure_apart
    from model_core.checkpoint import quiet_unless_terminal
    from model_core.cli.train import load_for_training

    quiet_unless_terminal()
    with tempfile.TemporaryDirectory() as folder:
        load = TrainingLoad(args.samples, tuple(args.image_size), tuple(args.words), args.seed)
        data = load.write(Path(folder))
        loaded = load_for_training(recipe(args, data, "full", packed=True))
        machine = _machine(args.model, loaded)
        makers = _makers(args, data, loaded, _peak(args, machine))
        rounds = measure_apart(makers, args.rounds) if args.apart else measure(list(makers.values()), args.rounds)
        measured = list(rounds)
    order = [(mode, kind) for mode in args.modes for kind in ("packed", "unpacked", "Trainer")]
    measured.sort(key=lambda one: order.index((one.mode, one.kind)))
    shape = asdict(load) | {"batch_size": args.batch_size, "max_tokens": args.max_tokens, "recompute": args.recompute}
    shape["is_cpu_time"] = args.cpu_time
    return Found(machine, shape, measured, _peak(args, machine), args.gpu)


def recipe(args: argparse.Namespace, data: Path, mode: str, *, packed: bool) -> TrainConfig:
    """The same work for everybody: no gate loss, nothing hidden, one rate that moves next to nothing."""
    return parse_config(
        {
            **({"model": args.model} if args.model else {}), "device": args.device, "training_mode": mode,
            "batch_size": args.batch_size if packed else 1, "max_tokens": args.max_tokens,
            "gradient_accumulation_steps": 1 if packed else args.batch_size,
            "num_epochs": args.rounds + 4, "learning_rate": 1e-7, "lr_schedule": "constant", "warmup_ratio": 0.0,
            "losses": {"diversity_loss": "none", "encoder_dropout": 0.0}, "gradient_checkpointing": args.recompute,
            "train_data_path": str(data), "image_root": str(data.parent), "loggers": [], "seed": args.seed,
        }
    )  # fmt: skip


def _makers(
    args: argparse.Namespace, data: Path, loaded: Any, peak: float | None
) -> dict[tuple[str, str], Callable[[], Contender]]:
    from model_core.analysis.training_speed import OurTrainer
    from model_core.processing.batch import InputFormat
    from model_core.training.data.source import build_source

    fmt = InputFormat.of(loaded.processor, loaded.model.model.mrope_layout)
    clock = time.process_time if args.cpu_time else time.perf_counter

    def ours(mode: str, kind: str) -> Contender:
        config = recipe(args, data, mode, packed=kind == "packed")
        source = build_source(config, fmt)
        return OurTrainer(kind, loaded.model, loaded.processor, source, config, clock, peak_flops_per_second=peak)

    def theirs(mode: str) -> Contender:
        from model_core.analysis.hf_trainer import HfTrainer
        from model_core.training.data.multi import DATASET_TYPES
        from model_core.training.freeze import resolve_freeze

        config = recipe(args, data, mode, packed=True)
        table = resolve_freeze(loaded.model, config.freeze, config.stages()[0].learning_rates)
        dataset = DATASET_TYPES["conversation"](str(data), str(data.parent))
        pad_id = loaded.processor.tokenizer.pad_token_id
        return HfTrainer(
            loaded.model, fmt, pad_id, dataset, config=config, table=table, clock=clock, folder=data.parent / "peer"
        )

    makers: dict[tuple[str, str], Callable[[], Contender]] = {}
    for mode in args.modes:
        makers[mode, "packed"] = partial(ours, mode, "packed")
        if args.unpacked:
            makers[mode, "unpacked"] = partial(ours, mode, "unpacked")
        if args.trainer:
            makers[mode, "Trainer"] = partial(theirs, mode)
    return makers


def _peak(args: argparse.Namespace, machine: dict[str, Any]) -> float | None:
    if args.peak_tflops is not None:
        return float(args.peak_tflops) * 1e12
    return peak_flops_per_second(machine["device"]) if machine["is_cuda"] else None


def _machine(name: str | None, loaded: Any) -> dict[str, Any]:
    import torch
    import transformers

    weight = loaded.model.lm_head.weight
    is_cuda = weight.device.type == "cuda"
    return {
        "model": name or "demo", "num_parameters": sum(p.numel() for p in loaded.model.parameters()),
        "device": torch.cuda.get_device_name(weight.device) if is_cuda else platform.processor() or platform.machine(),
        "is_cuda": is_cuda, "dtype": str(weight.dtype).removeprefix("torch."), "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(), "load_average": os.getloadavg()[0], "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def show(found: Found) -> None:
    """Speeds, then memory by component."""
    machine, load = found.machine, found.load
    headings = [
        "mode, trainer", "samples/s", "tokens/s", "label tokens/s", "padding, %", "data wait, %", "peak MiB", "MFU, %",
        "x Trainer", "x full",
    ]  # fmt: skip
    rows = [_row(found, one) for one in found.measured]
    title = (
        f"{machine['model']}: {machine['num_parameters'] / 1e6:.1f} M parameters, {machine['dtype']}; "
        f"{load['num_samples']} samples a round, {load['batch_size']} a step, pictures {load['image_size']} px, "
        f"answers {load['words']} words, seed {load['seed']}"
    )
    notes = [
        f"{machine['device']}, {machine['num_threads']} threads on {machine['num_cores']} cores, load "
        f"{machine['load_average']:.1f}; torch {machine['torch']}, transformers {machine['transformers']}",
        "tokens/s count no padding. x: medians of the rounds' ratios of tokens/s; peak: less what only others held.",
    ]
    if load["is_cpu_time"]:
        notes.append("by processor time of this process, not by the clock: for ratios only")
    if found.is_gpu_preset:
        notes.append(f"to aim at: MFU {_MFU_GOOD:.0%}, excellent {_MFU_EXCELLENT:.0%} (H100 and H200, packed)")
    print_table(title, headings, rows, notes)
    _show_memory(found)


def _row(found: Found, one: Measured) -> list[str]:
    if one.failure is not None:
        return [f"{one.mode}, {one.kind}", one.failure, *[""] * 8]
    mfu, peak, ratios = one.utilisation(found.peak_flops_per_second), one.peak_bytes(), found.ratios(one)
    return [
        f"{one.mode}, {one.kind}",
        f"{one.median('samples_per_second'):.2f}",
        f"{one.median('tokens_per_second'):.0f}",
        f"{one.median('label_tokens_per_second'):.0f}",
        f"{100 * one.median('padding_ratio'):.0f}",
        f"{100 * one.median('data_wait_ratio'):.1f}",
        "" if peak is None else f"{peak / _MIB:.0f}",
        "" if mfu is None else f"{100 * mfu:.1f}",
        *("" if value is None else f"{value:.2f}" for value in ratios.values()),
    ]


def _show_memory(found: Found) -> None:
    """What each component holds in each mode: weights + gradients + optimizer."""
    packed = [one for one in found.measured if one.kind == "packed" and one.memory]
    if not packed:
        return
    rows = []
    for component in packed[0].memory:
        parts = [one.memory[component] for one in packed]
        cells = [f"{p['gradients'] / _MIB:.1f} + {p['optimizer'] / _MIB:.1f}" for p in parts]
        rows.append([component, f"{parts[0]['weights'] / _MIB:.1f}", *cells])
    headings = ["MiB: gradients + optimizer", "weights", *(one.mode for one in packed)]
    print_table("memory by component, after a step", headings, rows)


def _modes(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [mode for mode in found if mode not in TRAINING_MODES]:
        raise argparse.ArgumentTypeError(f"unknown mode {', '.join(unknown)}; allowed: {', '.join(TRAINING_MODES)}")
    return list(dict.fromkeys(found))


def _span(text: str) -> list[int]:
    found = numbers(text)
    if len(found) != 2 or found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not the smallest and the largest, such as 56,224")
    return found


def _components(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


if __name__ == "__main__":
    raise SystemExit(main())
