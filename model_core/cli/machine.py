"""What this machine and a model are, for `dve doctor`: device, kernels, the checkpoint, the memory.

A process of its own, so that a torch that crashes takes nobody along.

In: a device, a model. Out: one JSON object on standard output, every part with either its facts or its `error`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from model_core.errors import DualVisionError

#: Names of public checkpoints whose licence forbids what a server is mostly for; of the README alone one can't tell.
RESTRICTED: Mapping[str, str] = {"qwen2.5-vl-3b": "Qwen Research License, non-commercial"}


def build_parser() -> argparse.ArgumentParser:
    """Device and model, as the server's settings name them."""
    parser = argparse.ArgumentParser(prog="python -m model_core.cli.machine", description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", help="dual checkpoint, folder or hub id (default: the demo model)")
    parser.add_argument("--qwen-model-name")
    parser.add_argument("--dinov2-model-name")
    parser.add_argument("--kv-cache", type=int, help="bytes of the server's cache (default: as `dve fit`)")
    parser.add_argument("--deep", action="store_true", help="hash every byte of the model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Always 0: what is wrong is in the report."""
    args = build_parser().parse_args(argv)
    names = [args.qwen_model_name, args.dinov2_model_name] if args.qwen_model_name else [args.model or _demo()]
    report = {
        "versions": _told(lambda: versions("torch", "transformers", "flash-attn")),
        "device": _told(lambda: device_facts(args.device)),
        "flash_attention": _told(flash_attention_facts),
        "models": [_told(partial(model_facts, name, deep=args.deep)) for name in names],
        "config": _told(lambda: config_facts(names)),
        "memory": _told(lambda: memory_facts(args, names)),
    }
    print(json.dumps(report))
    return 0


def _told(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except DualVisionError as error:
        return {"error": str(error), "code": error.code}
    except (OSError, RuntimeError, ImportError, ValueError, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"[:500], "code": "internal_error"}


def versions(*names: str) -> dict[str, str | None]:
    """Installed, by name; and CUDA's, as torch was built for it."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_facts(asked: str) -> dict[str, Any]:
    """Raises ConfigError for a device that is not there."""
    import torch

    from model_core.checkpoint import LoadOptions

    device = LoadOptions(asked).resolve_device()
    facts: dict[str, Any] = {"asked": asked, "device": str(device), "name": platform.processor() or "processor"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        torch.ones(8, device=device).sum().item()  # a driver that is there and does not compute raises here
        facts |= {
            "name": properties.name, "capability": f"{properties.major}.{properties.minor}", "free_bytes": free,
            "total_bytes": total,
        }  # fmt: skip
    else:
        facts["num_threads"] = torch.get_num_threads()
    return facts


def flash_attention_facts() -> dict[str, Any]:
    """Usable: it imports, and this torch can call it."""
    import torch

    on_cuda = torch.cuda.is_available()
    try:
        importlib.import_module("flash_attn").flash_attn_varlen_func  # noqa: B018  an ABI that does not fit raises
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return {"is_needed": on_cuda, "is_usable": False, "why": f"{type(error).__name__}: {error}"[:200]}
    return {"is_needed": on_cuda, "is_usable": on_cuda, "why": "" if on_cuda else "no CUDA device"}


def model_facts(name: str, *, deep: bool) -> dict[str, Any]:
    """Of a folder: its manifest, whether every file is whole, its licence. A hub id is looked up by config_facts."""
    from model_core.manifest import verify_folder

    folder = Path(name)
    if not folder.is_dir():
        return {"name": name, "is_folder": False, "has_manifest": False, "licence": restricted_licence(name)}
    manifest = verify_folder(folder, deep=deep)
    return {
        "name": name, "is_folder": True, "has_manifest": manifest is not None,
        "num_files": 0 if manifest is None else len(manifest.files), "is_hashed": deep and manifest is not None,
        "licence": restricted_licence(name) or licence_of(folder),
    }  # fmt: skip


def restricted_licence(name: str) -> str | None:
    return next((text for part, text in RESTRICTED.items() if part in name.lower()), None)


def licence_of(folder: Path) -> str | None:
    """What the model card's front matter says."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines[1:40] if lines[:1] == ["---"] else []:
        if line.strip() == "---":
            break
        key, _, value = line.partition(":")
        if key.strip() == "license":
            return value.strip()[:100] or None
    return None


def config_facts(names: Sequence[str]) -> dict[str, Any]:
    """Its configuration and processor, as loading would read them. Raises CheckpointError, HubUnreachableError."""
    from model_core.checkpoint import load_processor, quiet_unless_terminal, read_model_config

    quiet_unless_terminal()
    config = read_model_config(names[0] if len(names) == 1 else (names[0], names[1]))
    if len(names) == 1:
        load_processor(names[0])
    return {"fusion": str(config.fusion), "dtype": str(getattr(config, "dtype", None))}


def memory_facts(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Serving, as `dve fit` computes it."""
    from model_core.cli import fit

    named = ["--model", names[0]] if len(names) == 1 else _pair(names)
    cache = [] if args.kv_cache is None else ["--kv-cache", str(args.kv_cache)]
    report = fit.judge(fit.build_parser().parse_args(["--device", args.device, *named, *cache]))
    serving = report["serving"]
    return {
        "device": report["device"],
        "needed_bytes": serving["total_bytes"],
        "available_bytes": report["available_bytes"],
        "fits": serving["fits"],
        "training": [row["name"] for row in report["training"] if row["fits"]],
    }


def _pair(names: Sequence[str]) -> list[str]:
    return ["--qwen-model-name", names[0], "--dinov2-model-name", names[1]]


def _demo() -> str:
    from model_core.demo_model import demo_folder

    try:
        return str(demo_folder())
    except DualVisionError as error:
        return str(error.value)


if __name__ == "__main__":
    sys.exit(main())
