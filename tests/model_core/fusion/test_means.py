"""The carried means stay float32 in a bfloat16 model: else a running mean stops running."""

from __future__ import annotations

from pathlib import Path

import torch

from model_core.checkpoint import load_checkpoint, save_checkpoint
from model_core.fusion.base import EncoderMeans
from tests.model_core import tiny


def test_a_running_mean_goes_on_for_ever_in_a_bfloat16_model() -> None:
    means = EncoderMeans({"qwen": 4}).to(torch.bfloat16)
    assert means.qwen.dtype == torch.float32
    means.observe({"qwen": torch.zeros(10_000, 4)}, 10**9)
    for _ in range(100):
        means.observe({"qwen": torch.full((10, 4), 1.0)}, 10**9)
    assert torch.allclose(means.qwen, torch.full((4,), 1000 / 11_000), atol=1e-4)


def test_casting_loses_no_digit() -> None:
    means = EncoderMeans({"qwen": 1})
    means.qwen.fill_(1 / 3)
    assert means.to(torch.bfloat16).qwen.item() == torch.tensor(1 / 3).item()


def test_a_bfloat16_checkpoint_keeps_them(tmp_path: Path) -> None:
    model = tiny.trained_model()
    expected = model.fusion.means.dinov2.clone()
    save_checkpoint(model.to(torch.bfloat16), tiny.processor(), tmp_path / "m")
    loaded = load_checkpoint(tmp_path / "m").model
    assert loaded.dtype == torch.bfloat16
    assert loaded.fusion.means.dinov2.dtype == torch.float32
    assert torch.equal(loaded.fusion.means.dinov2, expected)


def test_a_bfloat16_model_answers_under_every_arm() -> None:
    encoder = tiny.encoder(tiny.trained_model().to(torch.bfloat16))
    from PIL import Image

    content = [{"type": "image", "image": Image.new("RGB", (60, 90), "red")}, {"type": "text", "text": "?"}]
    found = encoder.compare_encoders([{"role": "user", "content": content}], max_tokens=3)
    assert len({result.log_likelihood for result in found.arms.values()}) == 5
