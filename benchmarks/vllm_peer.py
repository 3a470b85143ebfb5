"""The fairest peer: a dual model that vLLM hosts, around the same Qwen and DINOv2 as `make_checkpoint`'s `dual/`.

    python benchmarks/vllm_peer.py OUT        # OUT/qwen and OUT/dinov2 -> OUT/peer, in vLLM's environment or ours

It needs torch and transformers alone, and is itself the code that OUT/peer names: vLLM's Transformers backend runs it
with `--model-impl transformers --trust-remote-code`. Both encoders see the same patches; DINOv2's are merged two by
two, projected, weighed against Qwen's by a gate for each picture and added. Less is done than in `dual/` (no norms, no
carried means, no report), so what it costs is a lower bound. Its fusion is random: its answers are not `dual/`'s.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel


class PeerConfig(Qwen2_5_VLConfig):
    """Qwen's, and DINOv2's as a dictionary."""

    model_type = "dual_peer"

    def __init__(self, dinov2_config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dinov2_config = dinov2_config or {}


class PeerModel(Qwen2_5_VLModel):
    config_class = PeerConfig

    def __init__(self, config: PeerConfig) -> None:
        super().__init__(config)
        second = Dinov2Config(**{k: v for k, v in config.dinov2_config.items() if k not in _NOT_ITS_OWN})
        self.dinov2 = Dinov2Model(second)
        width = config.text_config.hidden_size
        self.project = nn.Linear(4 * second.hidden_size, width)
        self.gate = nn.Sequential(nn.Linear(2 * width, width // 4), nn.GELU(), nn.Linear(width // 4, 2))
        self.out = nn.Linear(width, width)

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any) -> Any:
        found = super().get_image_features(pixel_values, image_grid_thw, **kwargs)
        fused, start = [], 0
        for qwen, (_, h, w) in zip(found.pooler_output, image_grid_thw.tolist(), strict=True):
            picture = as_picture(pixel_values[start : start + h * w].to(qwen.dtype), h, w)
            start += h * w
            tokens = self.dinov2(picture).last_hidden_state[0, 1:].view(h // 2, 2, w // 2, 2, -1)
            second = self.project(tokens.permute(0, 2, 1, 3, 4).reshape(h * w // 4, -1))
            weights = self.gate(torch.cat([qwen.mean(0), second.mean(0)])).softmax(-1)
            fused.append(qwen + 0.1 * self.out(weights[0] * qwen + weights[1] * second))
        found.pooler_output = tuple(fused)
        return found


class DualPeer(Qwen2_5_VLForConditionalGeneration):
    config_class = PeerConfig

    def __init__(self, config: PeerConfig) -> None:
        super().__init__(config)
        self.model = PeerModel(config)
        self.post_init()


_NOT_ITS_OWN = ("model_type", "architectures", "dtype")


def as_picture(patches: Tensor, h: int, w: int) -> Tensor:
    """Qwen's patches of one still picture, (h * w, 3 * 2 * 14 * 14) in blocks of four -> (1, 3, 14 h, 14 w)."""
    blocks = patches.view(h // 2, w // 2, 2, 2, 3, 2, 14, 14)[..., 0, :, :]
    return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, h * 14, w * 14)


def make_peer(out: Path) -> None:
    qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(out / "qwen", dtype="auto")
    config = json.loads((out / "qwen/config.json").read_text())
    own = {name: value for name, value in config.items() if name not in _NOT_ITS_OWN}
    torch.manual_seed(0)
    peer = DualPeer(PeerConfig(json.loads((out / "dinov2/config.json").read_text()), **own)).to(qwen.dtype)
    peer.load_state_dict(qwen.state_dict(), strict=False)
    second = Dinov2Model.from_pretrained(out / "dinov2", dtype="auto")
    peer.model.dinov2.load_state_dict(second.state_dict())
    peer.generation_config = qwen.generation_config
    peer.save_pretrained(out / "peer")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copy(out / "qwen" / name, out / "peer")
    shutil.copy(__file__, out / "peer/vllm_peer.py")
    classes = {"AutoConfig": PeerConfig, "AutoModel": PeerModel, "AutoModelForImageTextToText": DualPeer}
    named = {auto: f"vllm_peer.{kind.__name__}" for auto, kind in classes.items()}
    edit(out / "peer/config.json", architectures=["DualPeer"], auto_map=named)
    edit(out / "peer/tokenizer_config.json", processor_class="Qwen2_5_VLProcessor")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=1))


if __name__ == "__main__":
    make_peer(Path(sys.argv[1]))
