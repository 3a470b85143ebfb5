"""Is what the freeze table says what happens? Gradients and weight hashes by component, after the steps that tell.

In: a model, its optimizer and the table; out: a report, or an error that names what moved. A frozen weight that moved
or has a gradient is an error; a trained one that did not move after the last look is a warning: a run without pictures
trains no encoder. It trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model_core.errors import FreezeViolationError
from model_core.training.freeze import FreezeTable
from model_core.training.optim import NamedOptimizer

#: A fresh `gated` model wakes its projector in step 1 and DINOv2 only after it (model.md, section 4).
STEPS_LOOKED_AT = (1, 3)
_CHUNK = 1 << 22
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that no bit of a weight is lost


@dataclass(slots=True)
class FreezeCheck:
    """Begun where a table takes effect; asked after each step of that table."""

    table: FreezeTable
    before: dict[str, str]
    steps: int = 0
    with_gradient: set[str] = field(default_factory=set)

    @classmethod
    def begin(cls, model: nn.Module, optimizer: NamedOptimizer, table: FreezeTable) -> FreezeCheck:
        """Hashes as they are, and at once: does requires_grad, the table and the optimizer's groups agree?"""
        trained, groups = set(table.trained_names), set(optimizer.trained)
        needs = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        odd = sorted((trained ^ needs) | (trained ^ groups))
        if odd:
            raise FreezeViolationError(
                "requires_grad, the optimizer and the freeze table do not agree", value=", ".join(odd[:5]),
                allowed="the table's word in all three",
                fix="Report this with the recipe: it is a fault of the trainer or of a custom module",
            )  # fmt: skip
        return cls(table, component_hashes(optimizer, table))

    @property
    def is_open(self) -> bool:
        return self.steps < STEPS_LOOKED_AT[-1]

    def after_backward(self, optimizer: NamedOptimizer) -> None:
        """Before the step, while gradients are there.

        Raises:
            FreezeViolationError: something frozen has one. The step would not use it, but something computes it.
        """
        choices = self.table.parameters
        held = [name for name in optimizer.names_with_gradient() if name in choices]
        stray = [name for name in held if not choices[name].train]
        if stray:
            raise FreezeViolationError(
                "a frozen component has a gradient", value=", ".join(stray[:5]), allowed="none",
                fix="Look for what sets requires_grad or a gradient behind the trainer's back: a hook, a custom module",
            )  # fmt: skip
        self.with_gradient |= {choices[name].component for name in held}

    def after_step(self, optimizer: NamedOptimizer) -> dict[str, Any] | None:
        """A report after the steps that tell, else None.

        Raises:
            FreezeViolationError: a component that nothing of should train has another hash.
        """
        self.steps += 1
        if self.steps not in STEPS_LOOKED_AT:
            return None
        now = component_hashes(optimizer, self.table)
        rows, trained = [], self.table.trainable_components
        for row in self.table.rows:
            name = row.component
            rows.append(
                {
                    "component": name, "state": row.state, "trainable": row.trainable,
                    "has_gradient": name in self.with_gradient, "is_changed": now[name] != self.before[name],
                }
            )  # fmt: skip
        moved = [str(row["component"]) for row in rows if row["is_changed"] and row["component"] not in trained]
        moved += [name for name in now if name.endswith("/frozen") and now[name] != self.before[name]]
        if moved:
            raise FreezeViolationError(
                "a frozen component was changed by the step", value=", ".join(moved), allowed="none",
                fix="Report this with the recipe: it is a fault of the trainer or of a custom module",
            )  # fmt: skip
        still = [row["component"] for row in rows if row["component"] in trained and not row["is_changed"]]
        return {"steps": self.steps, "rows": rows, "unmoved": still}

    def to_json(self) -> dict[str, Any]:
        return {"before": self.before, "steps": self.steps, "with_gradient": sorted(self.with_gradient)}

    @classmethod
    def from_json(cls, table: FreezeTable, state: Mapping[str, Any]) -> FreezeCheck:
        return cls(table, dict(state["before"]), int(state["steps"]), set(state["with_gradient"]))


def tell_check(
    check: FreezeCheck, optimizer: NamedOptimizer, tell: Callable[[str, str, Mapping[str, Any]], None]
) -> None:
    """After a step: what the check has found, as events. Raises FreezeViolationError."""
    report = check.after_step(optimizer)
    if report is None:
        return
    tell("verified", "what is frozen did not move", report)
    if report["unmoved"] and not check.is_open:
        names = ", ".join(report["unmoved"])
        tell("warning:unmoved", f"{names} should train and did not move in {check.steps} steps", report)


def component_hashes(optimizer: NamedOptimizer, table: FreezeTable) -> dict[str, str]:
    """Of each component's weights; frozen parameters of a component that trains in part count apart, as `name/frozen`.

    A weight in 16 bits is hashed by its float32 master, since a small step may not show in 16.
    """
    sums: dict[str, int] = {}
    weights = optimizer.weights()
    for number, (name, choice) in enumerate(table.parameters.items()):
        key: str = choice.component
        is_partly = choice.component in table.trainable_components and not choice.train
        for part in [key, *([f"{key}/frozen"] if is_partly else [])]:
            sums[part] = (sums.get(part, 0) * 31 + fingerprint(weights[name]) + number) % (1 << 64)
    return {name: f"{value:016x}" for name, value in sums.items()}


@torch.no_grad()
def fingerprint(tensor: Tensor) -> int:
    """64 bits of a tensor's bytes, made where the tensor is: it must not cross a bus to be compared."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = 0
    for at in range(0, len(bits), _CHUNK):
        chunk = bits[at : at + _CHUNK].to(torch.int64)
        places = torch.arange(at + 1, at + 1 + len(chunk), device=chunk.device) * _MULTIPLIER
        # (x + place) * (x ^ place): neither swapped nor opposite changes cancel each other out.
        total += int(((chunk + places) * (chunk ^ (places >> 17))).sum())
    return total % (1 << 64)
