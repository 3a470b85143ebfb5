"""One optimizer for a whole curriculum, AdamW or Muon with it, its state kept by parameter name.

In: a model, a recipe and a freeze table; out: steps. What is frozen keeps its moments, on the CPU, and has them again
when it trains again. Weights in 16 bits train through a float32 master. It decides neither what trains nor when a step
is taken, and writes no file: `state_tensors` and `scalars` are what a checkpoint needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model_core.errors import CheckpointMismatchError
from model_core.training.auxiliary import AuxiliaryLoss
from model_core.training.config import TrainConfig
from model_core.training.freeze import FreezeTable
from model_core.training.muon import MuonAdamW, is_block_matrix

#: Of AdamW's state and of Muon's, and the master weight beside it.
SLOTS = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer", "master")


def build_optimizer(
    model: nn.Module, config: TrainConfig, table: FreezeTable, auxiliary: AuxiliaryLoss | None = None
) -> NamedOptimizer:
    """The optimizer of a run, with the groups of `table`; call `table.apply(model)` beside it."""
    return NamedOptimizer(model, config, table, auxiliary)


class NamedOptimizer:
    """AdamW (1711.05101) over named parameters, Muon for some where the recipe says so; an auxiliary loss's own always
    train. num_steps: taken so far, over all stages."""

    def __init__(
        self, model: nn.Module, config: TrainConfig, table: FreezeTable, auxiliary: AuxiliaryLoss | None = None
    ) -> None:
        self.config = config
        self.num_steps = 0
        self._others: dict[str, nn.Parameter] = {} if auxiliary is None else auxiliary.named()
        self._others_rate = 0.0 if auxiliary is None else auxiliary.learning_rate
        self._parameters = dict(model.named_parameters()) | self._others
        self._masters: dict[str, Tensor] = {}
        self._parked: dict[str, dict[str, Tensor]] = {}
        self._unfrozen_at: dict[str, int] = {}
        self._scale = 1.0
        self._adam: torch.optim.AdamW | None = None
        self.table = table
        self.set_freeze(table)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The model's parameters that train now, by name, in the model's order."""
        return {name: self._parameters[name] for name in self.table.trained_names}

    @property
    def _stepped(self) -> tuple[str, ...]:
        return (*self.table.trained_names, *self._others)

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by name; the float32 master of what trains in 16 bits."""
        return {name: self._masters.get(name, parameter) for name, parameter in self._parameters.items()}

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rate now, by component; the highest where a component has several groups."""
        found: dict[str, float] = {}
        for group in self._adam.param_groups:
            name = group["component"]
            found[name] = max(found.get(name, 0.0), float(group["lr"]))
        return found

    def set_freeze(self, table: FreezeTable) -> None:
        """Train what `table` says from the next step on. Moments of what stops are kept; what starts warms up."""
        self.table = table
        trained = set(self._stepped)
        state = {} if self._adam is None else dict(self._adam.state)
        for name in [n for n in self._masters if n not in trained]:
            self._park(name, state)
        for name in self._stepped:
            if name not in self._masters:
                self._unfrozen_at[name] = self.num_steps
                self._masters[name] = self._master_of(name)
        self._adam = self._build_adam(state)
        for name in self._stepped:
            if name in self._parked:
                self._restore(name, self._parked.pop(name))
        self.set_learning_rate(self._scale)

    def reset(self) -> None:
        """Forget all moments, those of frozen parameters too (`reset_optimizer`); weights stay."""
        self._parked.clear()
        self._adam = self._build_adam({})
        self._unfrozen_at = dict.fromkeys(self._unfrozen_at, 0)
        self.set_learning_rate(self._scale)

    def set_learning_rate(self, scale: float) -> None:
        """Every group's own rate times `scale`, the schedule's; what was unfrozen late is still warming up."""
        self._scale = scale
        rewarm = self.config.rewarm_steps
        for group in self._adam.param_groups:
            since, warm = group["unfrozen_at"], 1.0
            if since and rewarm:
                warm = min(1.0, (self.num_steps - since + 1) / (rewarm + 1))
            group["lr"] = group["base_lr"] * scale * warm

    def zero_grad(self) -> None:
        """Gradients to None, never to zeros: an optimizer would move and decay on a zero."""
        for parameter in self._parameters.values():
            parameter.grad = None
        for master in self._masters.values():
            master.grad = None

    @torch.no_grad()
    def accumulate(self) -> None:
        """Move 16-bit gradients into the float32 masters'. Call it after each backward pass of a step: sums of
        gradients in 16 bits lose what is small. With float32 weights there is nothing to do."""
        for name in self._stepped:
            parameter, master = self._parameters[name], self._masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The model's gradients of the step so far, float32, by name; those without are left out."""
        self.accumulate()
        return self._gradients(self.table.trained_names)

    def names_with_gradient(self) -> list[str]:
        """Every parameter that holds a gradient of the step so far, by rights or not."""
        masters = self._masters
        return [
            name
            for name, parameter in self._parameters.items()
            if parameter.grad is not None or (name in masters and masters[name].grad is not None)
        ]

    def _gradients(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = {name: self._masters[name].grad for name in names}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    @torch.no_grad()
    def step(self) -> float:
        """Clip and step.

        Returns:
            the norm of the gradients before clipping. Where it is not finite NOTHING was changed.
        """
        self.accumulate()
        gradients = list(self._gradients(self._stepped).values())
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not math.isfinite(norm):
            return norm
        limit = self.config.max_grad_norm
        if limit is not None and norm > limit:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        self.set_learning_rate(self._scale)
        self._adam.step()
        pairs = [(self._parameters[name], self._masters[name]) for name in self._stepped]
        copies = [(p, m) for p, m in pairs if m is not p]
        if copies:
            torch._foreach_copy_([p for p, _ in copies], [m for _, m in copies])
        self.num_steps += 1
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """`name/slot` -> tensor, for every parameter that has ever trained, frozen or not."""
        found = {}
        for name in self._parameters:
            slots = self._parked.get(name) if name not in self._masters else self._slots(name)
            for slot, tensor in (slots or {}).items():
                found[f"{name}/{slot}"] = tensor.detach().contiguous()
        return found

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave, after the weights and the freeze table were restored.

        Raises:
            CheckpointMismatchError: a name that the model does not have, or another shape.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, slot = key.rpartition("/")
            parameter = self._parameters.get(name)
            shape = () if slot == "step" else getattr(parameter, "shape", None)
            if parameter is None or slot not in SLOTS or tuple(tensor.shape) != tuple(shape):
                raise CheckpointMismatchError(
                    "the optimizer's state does not fit this model",
                    value=f"{key} {tuple(tensor.shape)}",
                    allowed=f"{len(self._parameters)} parameters, each in its shape, with {', '.join(SLOTS)}",
                    fix="Resume with the model and the adapters that the run began with",
                )
            found.setdefault(name, {})[slot] = tensor
        self._parked.clear()
        self._adam.state.clear()
        for name, slots in found.items():
            if name in self._masters:
                self._restore(name, slots)
            else:
                self._parked[name] = {slot: tensor.to("cpu", copy=True) for slot, tensor in slots.items()}

    def scalars(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the tensors; JSON."""
        late: dict[str, list[str]] = {}
        for name, step in self._unfrozen_at.items():
            if step and name in self._masters:
                late.setdefault(str(step), []).append(name)
        return {"num_steps": self.num_steps, "scale": self._scale, "unfrozen_at": late}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take over what `scalars` gave."""
        self.num_steps, self._scale = int(scalars["num_steps"]), float(scalars["scale"])
        self._unfrozen_at = dict.fromkeys(self._masters, 0)
        for step, names in scalars["unfrozen_at"].items():
            self._unfrozen_at.update(dict.fromkeys(names, int(step)))
        self._adam = self._build_adam(dict(self._adam.state))
        self.set_learning_rate(self._scale)

    def _master_of(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if parameter.dtype == torch.float32:
            return parameter
        return parameter.detach().to(torch.float32, copy=True).requires_grad_()

    def _build_adam(self, state: Mapping[Tensor, Any]) -> torch.optim.AdamW:
        """Groups of one component, rate, decay, age and kind each; `state` of what trains is taken along."""
        groups: dict[tuple[Any, ...], list[Tensor]] = {}
        uses_muon = self.config.optimizer == "muon"
        for name in self._stepped:
            choice, master = self.table.parameters.get(name), self._masters[name]
            decay = self.config.weight_decay if master.ndim > 1 else 0.0
            component, rate, is_matrix = "auxiliary", self._others_rate, False
            if choice is not None:
                component, rate = choice.component, choice.learning_rate
                is_matrix = uses_muon and is_block_matrix(name, master)
            groups.setdefault((component, rate, decay, self._unfrozen_at[name], is_matrix), []).append(master)
        # One pass over memory instead of ten; on a CPU too, where Trainer has it as well.
        fused = {m.device.type for m in self._masters.values()} in ({"cuda"}, {"cpu"})
        adam = (MuonAdamW if uses_muon else torch.optim.AdamW)(
            [
                {
                    "params": members, "component": component, "lr": rate, "base_lr": rate, "weight_decay": decay,
                    "unfrozen_at": since, "is_matrix": is_matrix,
                }
                for (component, rate, decay, since, is_matrix), members in groups.items()
            ],
            betas=self.config.betas, eps=self.config.epsilon, fused=fused,
        )  # fmt: skip
        adam.state.update({m: state[m] for m in self._masters.values() if m in state})
        return adam

    def _slots(self, name: str) -> dict[str, Tensor]:
        master = self._masters[name]
        slots = dict(self._adam.state.get(master, {}))
        if master is not self._parameters[name]:
            slots["master"] = master
        return slots

    def _park(self, name: str, state: dict[Tensor, Any]) -> None:
        slots = self._slots(name)
        state.pop(self._masters.pop(name), None)
        self._parked[name] = {slot: tensor.detach().to("cpu", copy=True) for slot, tensor in slots.items()}

    def _restore(self, name: str, slots: Mapping[str, Tensor]) -> None:
        """Put state back beside a master; a master that no longer rounds to its weight gives way to the weight."""
        master, parameter = self._masters[name], self._parameters[name]
        saved = slots.get("master")
        if saved is not None and master is not parameter:
            saved = saved.to(master.device)
            if torch.equal(saved.to(parameter.dtype), parameter.detach()):
                master.data.copy_(saved)
        moments = {slot: tensor for slot, tensor in slots.items() if slot != "master"}
        if moments:
            on_device = bool(self._adam.param_groups[0]["fused"])
            self._adam.state[master] = {
                slot: tensor.to(master.device if slot != "step" or on_device else "cpu", copy=True)
                for slot, tensor in moments.items()
            }
