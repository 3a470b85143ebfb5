"""Training against its bars, with one command: what `dve bench train` finds on random checkpoints, and whether it does.

    python -m benchmarks.training [--sizes tiny,mid] [--checkpoints FOLDER] [--cpu-time] [--json]

On two idle cores it takes about five minutes, a minute of it for the checkpoints, which stay for the next time. With
--gpu it is the 3B shape on one card: utilisation by mode beside what is aimed at.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from benchmarks.make_checkpoint import SHAPES, make_checkpoint
from model_core.checkpoint import quiet_unless_terminal
from model_core.cli import bench_train

#: A step of `mid` takes seconds: fewer modes and samples, and shorter ones. The rest is `dve bench train`'s own.
LOADS: dict[str, list[str]] = {
    "tiny": ["-n", "16", "--batch-size", "8"],
    "mid": [
        "--modes", "full,fusion_only", "--no-unpacked", "-n", "8", "--batch-size", "8", "--image-size", "56,112",
        "--words", "1,80",
    ],
    "3b": ["--gpu"],
}  # fmt: skip
PACKED_OVER_TRAINER, FUSION_OVER_FULL, DATA_WAIT = 1.5, 1.8, 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where every bar is met, 1 where one is not, 2 for a wrong call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,mid", help="of tiny, mid (default: both)")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path(gettempdir()) / "dve-bench", help="where they are made"
    )
    parser.add_argument("--gpu", action="store_true", help="the 3B shape on one card instead")
    parser.add_argument("--cpu-time", action="store_true", help="as `dve bench train --cpu-time`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    sizes = ["3b"] if args.gpu else args.sizes.split(",")
    if unknown := sorted(set(sizes) - set(LOADS)):
        parser.error(f"unknown size {', '.join(unknown)}; allowed: {', '.join(LOADS)}")
    quiet_unless_terminal()
    results: dict[str, Any] = {}
    missed: list[str] = []
    for size in sizes:
        model = _checkpoint(args.checkpoints / size, size, "cuda" if args.gpu else "cpu")
        flags = ["--model", str(model), *LOADS[size], *(["--cpu-time"] if args.cpu_time else [])]
        found = bench_train.bench(bench_train.parse(flags))
        bars = {} if args.gpu else judge(found)
        missed += [f"{size}: {name}" for name, (_, is_met) in bars.items() if not is_met]
        results[size] = found.to_json() | {"bars": {name: value for name, (value, _) in bars.items()}}
        if not args.json:
            bench_train.show(found)
            for name, (value, is_met) in bars.items():
                print(f"{size}: {name}: {value:.2f} {'' if is_met else '  NOT MET'}".rstrip())
    if args.json:
        print(json.dumps(results | {"missed": missed}, indent=2))
    return 1 if missed else 0


def judge(found: bench_train.Found) -> dict[str, tuple[float, bool]]:
    """Each bar by name: what was found, and whether that is enough."""
    full, fusion = found.of("full", "packed"), found.of("fusion_only", "packed")
    over_trainer = found.ratios(full)["over_trainer"]
    over_full = found.ratios(fusion)["over_full"]
    wait = max(one.median("data_wait_ratio") for one in found.measured if one.kind == "packed")
    return {
        f"packed over Trainer, tokens/s, full (asked: {PACKED_OVER_TRAINER})": (
            over_trainer, over_trainer >= PACKED_OVER_TRAINER
        ),
        f"fusion_only over full, tokens/s (asked: {FUSION_OVER_FULL})": (over_full, over_full >= FUSION_OVER_FULL),
        f"data wait, the largest share (asked: under {DATA_WAIT})": (wait, wait < DATA_WAIT),
    }  # fmt: skip


def _checkpoint(folder: Path, size: str, device: str) -> Path:
    """OUT/dual of `make_checkpoint`, made where it is not there yet."""
    if not (folder / "dual" / "manifest.json").exists():
        make_checkpoint(folder, SHAPES[size], ("dual",), device)
    return folder / "dual"


if __name__ == "__main__":
    sys.exit(main())
