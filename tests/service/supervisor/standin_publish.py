"""Publishes without a model: a version is a copy of the trainer's state, named by its first characters."""

import argparse
import json
import sys
from pathlib import Path

from model_core.published import VariantRecord

parser = argparse.ArgumentParser()
parser.add_argument("--base", required=True)
parser.add_argument("--run", type=Path, required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--hold", action="store_true", required=True)
args = parser.parse_args()
state = (args.run / "state").read_text()
version = args.out / state[:16]
version.mkdir(parents=True, exist_ok=True)
(version / "state").write_text(state)
record = VariantRecord(
    args.base, "0", version.name, 0, 1, 64, ("fusion",), "gated", True, ("qwen", "dinov2"), 1, 1024, "float32"
)
(version / "variant.json").write_text(record.to_json())
sys.stdout.write(json.dumps({"id": args.out.name, "version": version.name, "folder": str(version), "num_bytes": 64}))
