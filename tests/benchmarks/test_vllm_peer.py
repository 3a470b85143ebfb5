"""The peer is Qwen and DINOv2 on the same pixels, and both of them count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.make_checkpoint import main
from benchmarks.vllm_peer import DualPeer, as_picture, make_peer


def test_dinov2_sees_the_picture_and_changes_the_tokens(tmp_path: Path) -> None:
    assert main([str(tmp_path), "tiny", "--parts", "qwen,dinov2"]) == 0
    make_peer(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=10**6, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    patches = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
    picture = as_picture(patches["pixel_values"], 4, 6)
    torch.testing.assert_close(picture[0].permute(1, 2, 0), torch.from_numpy(pixels / 255).float(), atol=1e-5, rtol=0)
    peer = DualPeer.from_pretrained(tmp_path / "peer").eval()
    with torch.no_grad():
        (before,) = peer.model.get_image_features(patches["pixel_values"], patches["image_grid_thw"]).pooler_output
        peer.model.dinov2.embeddings.patch_embeddings.projection.weight.zero_()
        (after,) = peer.model.get_image_features(patches["pixel_values"], patches["image_grid_thw"]).pooler_output
    assert before.shape == (6, 256) and (before - after).abs().max() > 1e-4
