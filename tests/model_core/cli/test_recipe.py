"""The recipe for real data, run to its verdict on a few rows of that form, with a tiny model in the 7B's place."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from model_core.checkpoint import load_checkpoint, save_checkpoint
from model_core.cli import train
from model_core.cli.configs import SCENARIOS
from model_core.training.config import load_config
from model_core.training.events import read_events
from tests.model_core import tiny

RECIPE = SCENARIOS / "config_dinov2_large_7b.json"


def write_rows(folder: Path, first: int) -> None:
    """As the_cauldron has them: pictures as bytes, several questions to each."""
    rows = []
    for number in range(first, first + 2):
        file = io.BytesIO()
        Image.new("RGB", (64, 84), (40 * number % 256, 90, 200)).save(file, "JPEG")
        turns = [{"user": f"how many? {i}", "assistant": str(number), "source": "s"} for i in range(2)]
        rows.append({"images": [{"bytes": file.getvalue(), "path": None}], "texts": turns})
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")


@pytest.mark.heavy
def test_it_runs_to_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.dual_model()
    model.generation_config.eos_token_id = tiny.token_id("<|im_end|>")
    save_checkpoint(model, tiny.processor(), tmp_path / "model")
    smaller = {
        "model": tmp_path / "model", "qwen_model_name": "null", "dinov2_model_name": "null", "fusion": "null",
        "precision": "float32", "batch_size": 2, "gradient_accumulation_steps": 1, "num_workers": 0, "max_tokens": 2048,
        "evaluation.num_answers": 2, "evaluation.max_tokens": 3, "loggers": '["jsonl"]', "lora.llm.rank": 4,
        "output_dir": tmp_path / "run", "val_data_path": tmp_path / "val",
    }  # fmt: skip
    for number, one in enumerate(load_config(RECIPE).datasets):
        write_rows(tmp_path / one.data_path, 3 * number)
        smaller[f"datasets.{number}.data_path"] = tmp_path / one.data_path
    write_rows(tmp_path / "val", 40)
    flags = [word for key, value in smaller.items() for word in ("--set", f"{key}={value}")]
    assert train.main(["--config", str(RECIPE), "--verdict", *flags]) == 0
    said = capsys.readouterr().out
    for text in ("verdict: ", "loss per label token", "answers: ", "a sample's forward pass", "an answer"):
        assert text in said
    found = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert found["num_samples"] == 2 and found["loss"]["low"] <= found["loss"]["value"] <= found["loss"]["high"]
    modes = [e.data["freeze"]["mode"] for e in read_events(tmp_path / "run") if e.kind == "freeze"]
    assert modes == ["fusion_only", "full"]
    assert load_checkpoint(tmp_path / "run" / "final").model.fusion.is_trained
