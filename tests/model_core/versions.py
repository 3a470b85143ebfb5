"""Versions of published models without weights, for tests of what only counts and names them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from model_core.published import VariantRecord

RECORD = VariantRecord(
    base="tiny",
    base_fingerprint="ba5e",
    fingerprint="",
    created_unix=1_700_000_000,
    num_tensors=1,
    num_bytes=4,
    components=("fusion",),
    fusion="gated",
    fusion_trained=True,
    encoders=("qwen", "dinov2"),
    num_parameters=42,
    max_context_tokens=100,
    dtype="float32",
)


def add_version(out: Path, version: str, **record: Any) -> str:
    """`out` is the model's folder; `record`: other fields than RECORD's."""
    (out / version).mkdir(parents=True)
    (out / version / "variant.json").write_text(replace(RECORD, fingerprint=version, **record).to_json())
    return version
