"""Judges memory without a model: the plan's `needs_gib` against what there is, in the words of `dve fit --json`."""

import argparse
import json
import sys
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--config", type=Path, required=True)
parser.add_argument("--device", required=True, choices=["cuda"])
parser.add_argument("--memory", type=int, required=True)
parser.add_argument("--json", action="store_true", required=True)
args = parser.parse_args()
plan = json.loads(Path(json.loads(args.config.read_text())["datasets"][0]["data_path"]).read_text())
needed = plan.get("needs_gib", 1) << 30
modes = [
    {"name": "stage 0: full", "asked": True, "fits": needed <= args.memory, "fitting_max_tokens": 1024},
    {"name": "fusion_only", "asked": False, "fits": True, "fitting_max_tokens": 4096},
]
sys.stdout.write(json.dumps({"available_bytes": args.memory, "needed_bytes": needed, "training": modes}))
sys.exit(needed > args.memory)
