"""`dve fit`: does it fit the memory? Prints what serving needs and what each training mode needs, before either begins.

In: a checkpoint's configuration (no weight is read), a recipe if there is one, and the memory there is. Out: a table or
JSON, and an exit code: 0 what was asked for fits, 1 it does not, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_core.errors import ConfigError, DualVisionError
from model_core.training.config import TRAINING_MODES, FreezeConfig, LoraConfig, TrainConfig, load_config, parse_config

if TYPE_CHECKING:
    from model_core.training.preflight import MemoryNeed, PackLimits

FITS, TOO_LARGE, WRONG_CALL = 0, 1, 2
_GIB = 2**30
_STEP_TOKENS = 2048
_ENCODER_CACHE_BYTES = 256 << 20
_KV_CACHE_BYTES = 2**30


def build_parser() -> argparse.ArgumentParser:
    """A model or a recipe, the memory, the pack."""
    parser = argparse.ArgumentParser(prog="dve fit", description=__doc__)
    parser.add_argument(
        "--model", help="dual checkpoint, folder or hub id (default: the recipe's, else the demo model)"
    )
    parser.add_argument("--qwen-model-name", help="with --dinov2-model-name: a pair to combine")
    parser.add_argument("--dinov2-model-name")
    parser.add_argument("--config", type=Path, help="a recipe: its own modes are judged, and the exit code is theirs")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--memory", type=_bytes, help="bytes there are, or 80GiB (default: what the device has)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--max-tokens", type=int, help="tokens of a pack (default: the recipe's)")
    parser.add_argument("--vision-tokens", type=int, help="of them from images (default: all, the worst case)")
    parser.add_argument("--kv-cache", type=_bytes, default=_KV_CACHE_BYTES, help="the server's cache (default: 1GiB)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where the recipe (without one: serving) fits, 1 where not, 2 for what the user can put right."""
    args = build_parser().parse_args(argv)
    try:
        report = judge(args)
    except DualVisionError as error:
        print(f"dve fit: error: {error}", file=sys.stderr)
        return WRONG_CALL
    print(json.dumps(report, indent=2)) if args.json else _show(report)
    return FITS if report["fits"] else TOO_LARGE


def judge(args: argparse.Namespace) -> dict[str, Any]:
    """The report as JSON data. Raises DualVisionError for a model or recipe that can't be read."""
    from model_core.training.preflight import PackLimits, serving_need, step_bytes

    recipe = load_config(args.config, args.overrides) if args.config else _bare_recipe(args)
    config, weight_bytes = _read_model(recipe)
    device, available = _memory(args)
    is_cuda = device.startswith("cuda")
    tokens = args.max_tokens or recipe.max_tokens
    vision = tokens if args.vision_tokens is None else min(args.vision_tokens, tokens)
    limits = PackLimits(tokens, vision, max(tokens // 4, 1))
    width = 4 if recipe.precision == "float32" else 2 if is_cuda or recipe.precision == "bfloat16" else weight_bytes
    settings = {
        "weight_bytes": weight_bytes, "width": width, "recompute": recipe.gradient_checkpointing, "is_cuda": is_cuda,
    }  # fmt: skip
    modes = [
        _mode(name, freeze, recipe.lora, config, limits, available=available, settings=settings)
        for name, freeze in _wanted(recipe)
    ]
    serving = serving_need(
        _model(config, LoraConfig())[1], weight_bytes=weight_bytes, kv_cache_bytes=args.kv_cache,
        encoder_cache_bytes=_ENCODER_CACHE_BYTES, step_bytes=step_bytes(config, _STEP_TOKENS, width=weight_bytes),
        is_cuda=is_cuda,
    )  # fmt: skip
    asked = [mode for mode in modes if mode["asked"]]
    return {
        "device": device,
        "available_bytes": available,
        "pack": asdict(limits),
        "serving": _row("serving", serving, available),
        "training": modes,
        "fits": all(mode["fits"] for mode in asked) if asked else serving.total_bytes <= available,
        "needed_bytes": max((mode["total_bytes"] for mode in asked), default=serving.total_bytes),
    }


def _bare_recipe(args: argparse.Namespace) -> TrainConfig:
    named = {"model": args.model, "qwen_model_name": args.qwen_model_name, "dinov2_model_name": args.dinov2_model_name}
    return parse_config({key: value for key, value in named.items() if value is not None}, args.overrides)


def _wanted(recipe: TrainConfig) -> list[tuple[str, FreezeConfig]]:
    """The recipe's stages by description, then every mode that no stage is."""
    is_asked = bool(recipe.training_mode or recipe.curriculum_training.enabled or recipe.train_data_path)
    is_asked = is_asked or bool(recipe.datasets)
    stages = [(f"stage {s.index}: {s.training_mode or 'own flags'}", s.freeze) for s in recipe.stages() if is_asked]
    return stages + [(mode, FreezeConfig(mode=mode)) for mode in TRAINING_MODES]


def _mode(
    name: str, freeze: FreezeConfig, lora: LoraConfig, config: Any, limits: PackLimits, *, available: int,
    settings: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    from model_core.training.freeze import resolve_freeze
    from model_core.training.preflight import largest_pack, training_need

    table = resolve_freeze(_model(config, lora)[0], freeze)
    row = _row(name, training_need(config, table, limits, **settings), available)
    largest = largest_pack(config, table, limits, available, **settings)
    row |= {"asked": name.startswith("stage "), "fitting_max_tokens": largest.max_tokens if largest else None}
    return row


def _row(name: str, need: MemoryNeed, available: int) -> dict[str, Any]:
    total = need.total_bytes
    parts = dict(need.parts)
    return {
        "name": name, "parts": parts, "total_bytes": total, "fits": total <= available,
        "missing_bytes": max(total - available, 0),
    }  # fmt: skip


def _model(config: Any, lora: LoraConfig) -> tuple[Any, int]:
    """A model without memory, with its adapters, and how many parameters it has."""
    import torch

    from model_core.model import DualVisionModel
    from model_core.training.lora import apply_lora

    with torch.device("meta"):
        model = DualVisionModel(config)
        model.tie_weights()
        apply_lora(model, lora, seed=0)
    return model, sum(parameter.numel() for parameter in model.parameters())


def _read_model(recipe: TrainConfig) -> tuple[Any, int]:
    """Its configuration, and the bytes of one of its weights."""
    from model_core.checkpoint import quiet_unless_terminal, read_model_config
    from model_core.demo_model import demo_folder

    quiet_unless_terminal()
    source = recipe.model_source()
    name: Any = source.pair or source.model or demo_folder()
    # A version's config.json is whole, its weights are not: here only the former is asked for.
    config = (
        read_model_config(name, **source.settings)
        if recipe.start_from is None
        else read_model_config(recipe.start_from)
    )
    return config, 2 if str(getattr(config, "dtype", None)).rpartition(".")[2] in ("bfloat16", "float16") else 4


def _memory(args: argparse.Namespace) -> tuple[str, int]:
    """The device's name and what it has free."""
    import torch

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.memory is not None:
        return device, args.memory
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ConfigError(
                "there is no such CUDA device", value=device, allowed="auto, cpu",
                fix="To plan for a machine that is not here, say what it has: --memory 80GiB", param="device",
            )  # fmt: skip
        return device, torch.cuda.mem_get_info(torch.device(device))[0]
    return device, _free_ram()


def _free_ram() -> int:
    """What the system can give without swapping; all of it where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bytes(text: str) -> int:
    units = {"GiB": _GIB, "MiB": 2**20, "GB": 10**9, "MB": 10**6, "": 1}
    number = text.rstrip("GiMB")
    unit = text[len(number) :]
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write 80GiB, 24GB or bytes") from None


def _show(report: dict[str, Any]) -> None:
    from model_core.cli.table import print_table

    columns = ("weights", "gradients", "moments", "masters", "activations", "casts", "kv cache", "context")
    rows = []
    for row in (report["serving"], *report["training"]):
        cells = [_gib(row["parts"][name]) if name in row["parts"] else "" for name in columns]
        rows.append([row["name"], *cells, _gib(row["total_bytes"]), _advice(row)])
    pack = report["pack"]
    title = f"{report['device']}: {_gib(report['available_bytes'])} GiB; packs of {pack['max_tokens']} tokens"
    notes = [
        "in GiB; the total holds 15 % more than its parts. Weights and optimizer are exact, activations estimated.",
        "Where something does not fit: gradient_checkpointing, lora and a smaller max_tokens need less.",
    ]
    print_table(title, ["", *columns, "total", "fits"], rows, notes)


def _advice(row: dict[str, Any]) -> str:
    if row["fits"]:
        return "yes"
    smaller = row.get("fitting_max_tokens")
    return f"{_gib(row['missing_bytes'])} missing" + (f"; max_tokens={smaller} fits" if smaller else "")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
