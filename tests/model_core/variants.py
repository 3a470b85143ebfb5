"""Trained models for tests of publishing: the tiny model as a base, and runs whose tensors were moved a little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from model_core.checkpoint import Loaded, load_checkpoint, save_checkpoint
from tests.model_core import tiny

Move = Callable[[str], bool]


def in_fusion(name: str) -> bool:
    return ".fusion." in name


def everywhere(name: str) -> bool:
    return True


def save_base(folder: Path) -> Loaded:
    """The tiny model, with a fusion that does something."""
    save_checkpoint(tiny.trained_model(), tiny.processor(), folder)
    return load_checkpoint(folder)


def train(loaded: Loaded, folder: Path, *, moves: Move = in_fusion, seed: int = 1, scale: float = 0.2) -> Path:
    """A run's model folder: the loaded model with some of its floating tensors moved by noise. It is left as it was."""
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    move(loaded.model, moves, seed, scale)
    save_checkpoint(loaded.model, loaded.processor, folder)
    loaded.model.load_state_dict(before)
    return folder


@torch.no_grad()
def move(model: nn.Module, moves: Move, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if moves(name):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)
