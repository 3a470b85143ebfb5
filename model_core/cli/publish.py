"""`dve publish`: a training run's model folder becomes a version of a published model, once it passed its load test.

In: the base (a folder, a hub id, or the pair that it was combined of), the run's folder (`final/`, or a `step-N/`), the
published model's folder. Out: one JSON object on stdout,
and an exit code: 0, 78 for a result that can't be served or a wrong call (a retry won't help), 1 for a full disk. It
runs in a process of its own, so that a model that breaks takes nobody with it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from model_core.errors import CheckpointError, ConfigError, DualVisionError
from model_core.published import folder_name, is_disk_full, model_id_of, promote

BAD_RESULT = 78
RETRY = 1


def build_parser() -> argparse.ArgumentParser:
    """--base or a pair of names, --run, --out and --hold."""
    parser = argparse.ArgumentParser(prog="dve publish", description=__doc__)
    parser.add_argument("--base", help="the model that was trained on: a folder, a hub id, or dve-demo")
    for name in ("qwen", "dinov2"):
        flags = dict.fromkeys((f"--{name}_model_name", f"--{name}-model-name"))
        parser.add_argument(*flags, help="instead of --base, both: the pair that was trained on")
    parser.add_argument("--run", required=True, type=Path, help="the trained model's folder")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="the published model's folder, <data_dir>/models/<id>; / is written %%2F",
    )
    parser.add_argument("--hold", action="store_true", help="publish only: whoever commits the result promotes it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; an error is `{"error": {"code", "message"}}` on stdout, one line on stderr, and 78 or 1."""
    args = build_parser().parse_args(argv)
    begin = time.perf_counter()
    try:
        told = _publish(args)
    except DualVisionError as error:
        return _refuse(error.code, str(error), BAD_RESULT)
    except (OSError, SafetensorError) as error:
        code = "storage_full" if is_disk_full(error) else "internal_error"
        return _refuse(code, f"the version can't be written ({error})", RETRY)
    print(json.dumps({**told, "seconds": round(time.perf_counter() - begin, 3)}))
    return 0


def _publish(args: argparse.Namespace) -> dict[str, Any]:
    # torch and transformers take seconds to import; --help should not.
    from model_core.checkpoint import quiet_unless_terminal
    from model_core.training.saving import whole_model
    from model_core.variant import publish_variant

    quiet_unless_terminal()
    model_id = model_id_of(args.out)
    folder_name(model_id)
    if not args.run.is_dir():
        raise CheckpointError(
            "there is no such run", value=str(args.run), allowed="a model's folder", fix="Check --run"
        )
    base, base_name = _load_base(args)
    with whole_model(args.run, args.out.parent) as run:
        record, version = publish_variant(base, run, args.out, base_name=base_name, created_unix=int(time.time()))
    if not args.hold:
        promote(args.out, record.fingerprint)
    return {
        "id": model_id,
        "version": record.fingerprint,
        "folder": str(version),
        "state": "publishing" if args.hold else "ready",
        "num_tensors": record.num_tensors,
        "num_bytes": record.num_bytes,
        "components": list(record.components),
    }


def _load_base(args: argparse.Namespace) -> tuple[Any, str]:
    """The base and its id. Raises ConfigError, CheckpointError."""
    from model_core.checkpoint import LoadOptions, combine_checkpoints, load_checkpoint
    from model_core.demo_model import demo_folder

    pair, options = (args.qwen_model_name, args.dinov2_model_name), LoadOptions("cpu")
    if any(pair) == bool(args.base) or any(pair) != all(pair):
        given = [f"{key}={value}" for key, value in zip(("base", "qwen", "dinov2"), (args.base, *pair), strict=True)]
        raise ConfigError(
            "which model was trained on is not clear", value=", ".join(given),
            allowed="--base, or --qwen_model_name and --dinov2_model_name together", fix="Name it in one of these ways",
        )  # fmt: skip
    if all(pair):
        return combine_checkpoints(*pair, options), f"dual-{Path(pair[0]).name}"
    folder = demo_folder() if args.base == "dve-demo" else args.base
    return load_checkpoint(folder, options), Path(args.base).name


def _refuse(code: str, message: str, status: int) -> int:
    print(json.dumps({"error": {"code": code, "message": message}}))
    print(f"dve publish: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
