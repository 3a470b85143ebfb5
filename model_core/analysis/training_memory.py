"""Where a training process's memory is: bytes by component, and the most that was held at once.

In: a trainer after a step; out: bytes. What is frozen and never trained must show zeros; nothing here assumes it.
"""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from model_core.training.cpu_kernels import give_back_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(slots=True)
class ComponentBytes:
    """weights: as the model holds them. gradients: that exist now. optimizer: moments, step counts and masters."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def component_bytes(trainer: Any) -> dict[str, ComponentBytes]:
    """Of a DualVisionTrainer, by component, counted from the tensors that are there."""
    table, optimizer = trainer.table, trainer.optimizer
    found: dict[str, ComponentBytes] = {row.component: ComponentBytes() for row in table.rows}
    for name, parameter in trainer.model.named_parameters():
        mine = found[table.parameters[name].component]
        mine.weights += parameter.nbytes
        if parameter.grad is not None:
            mine.gradients += parameter.grad.nbytes
    for name, gradient in optimizer.gradients().items():
        if trainer.model.get_parameter(name).grad is not gradient:  # a float32 master's
            found[table.parameters[name].component].gradients += gradient.nbytes
    for key, tensor in optimizer.state_tensors().items():
        found[table.parameters[key.rpartition("/")[0]].component].optimizer += tensor.nbytes
    return found


def optimizer_bytes(state: Any) -> int:
    """Of all tensors in the state of a torch optimizer."""
    return sum(t.nbytes for slots in state.values() for t in slots.values() if torch.is_tensor(t))


def reset_peak(device: torch.device) -> None:
    """From now on `peak_bytes` counts anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        give_back_memory()  # else what an earlier round freed would count
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int | None:
    """The most since `reset_peak`: of the device's allocator, or of the whole process; None where nobody counts."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
