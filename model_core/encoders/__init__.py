"""The encoders that come with the project, by name. One file and one line add another."""

from __future__ import annotations

from model_core.config import DualVisionConfig
from model_core.encoders.base import VisionEncoder
from model_core.encoders.dinov2 import DinoV2Encoder
from model_core.encoders.qwen import QwenEncoder
from model_core.plugins import load_class

ENCODERS: dict[str, type[VisionEncoder]] = {"qwen": QwenEncoder, "dinov2": DinoV2Encoder}


def build_encoders(config: DualVisionConfig) -> dict[str, VisionEncoder]:
    """Qwen's encoder and the configured second one, in the order of the gate's columns."""
    second = load_class(config.encoder, ENCODERS, VisionEncoder, "encoder")
    return {"qwen": QwenEncoder(config), second.name: second(config)}
