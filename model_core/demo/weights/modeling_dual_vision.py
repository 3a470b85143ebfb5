"""Names this folder's classes for transformers' Auto classes. Needs `pip install dual-vision-encoder`."""

from model_core.config import DualVisionConfig
from model_core.model import DualVisionModel
from model_core.processing.processor import DualVisionProcessor

__all__ = ["DualVisionConfig", "DualVisionModel", "DualVisionProcessor"]
