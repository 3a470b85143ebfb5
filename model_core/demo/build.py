"""Trains `dve-demo` by its recipe: seeded, resumable, on two cores in about an hour or on a GPU in minutes.

In: the recipe, the artwork, a work folder; out: a checkpoint folder. An interim trainer: it goes when
the project's own can run this curriculum. Optimizer state is kept by parameter name in safetensors.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from model_core.demo.alignment import WordAlignment, attend_by_likeness
from model_core.demo.artwork import Artwork
from model_core.demo.batches import Batch, SceneBatches
from model_core.demo.labels import MAX_COUNT, MAX_SPOT
from model_core.demo.lookup import Lookup
from model_core.demo.precision import Muon, working_dtype
from model_core.demo.recipe import Recipe, Stage, build_config
from model_core.demo.scenes import CLASS_NAMES, COLOUR_NAMES
from model_core.demo.tokenizer import build_tokenizer
from model_core.errors import ConfigError
from model_core.model import DualVisionModel
from model_core.vision_tokens import cell_grids

NUM_LETTERS = 27
SAVE_EVERY_STEPS = 50
#: The gate reads pooled features of large norm: at the others' rate it is at 1 and 0 before the second encoder has
#: learnt to say anything, and there it stays.
GATE_LEARNING_RATE_SHARE = 0.05
GATE_LOSS_WEIGHT = 1.0
ALIGNMENT_WEIGHT = 0.5
LOOKUP_WEIGHT = 0.5
Report = Callable[[str, int, int, dict[str, float]], None]


class DenseHeads(nn.Module):
    """Linear read-outs of each encoder's cells, for the first stage; never part of the checkpoint.

    Both learn what is in a cell, its colour and where the object's middle is. Letters are asked of Qwen's tower
    only and how many there are of DINOv2 only: one was taught to read and the other knows one object from the
    next, in life as here, so that there is something to learn from which of them an answer relied on.
    """

    def __init__(self, dims: dict[str, int]) -> None:
        super().__init__()
        self.classes = nn.ModuleDict({n: nn.Linear(d, len(CLASS_NAMES)) for n, d in dims.items()})
        self.colours = nn.ModuleDict({n: nn.Linear(d, len(COLOUR_NAMES) + 1) for n, d in dims.items()})
        self.places = nn.ModuleDict({n: nn.Linear(d, 2) for n, d in dims.items()})
        self.letters = nn.Linear(dims["qwen"], 2 * NUM_LETTERS)
        self.spots = nn.Linear(dims["qwen"], 2 * (MAX_SPOT + 1))
        self.counts = nn.Linear(dims["dinov2"], 2 * (MAX_COUNT + 1))
        self.middles = nn.Linear(dims["dinov2"], 3)

    def forward(self, features: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """features: (S, C_e) by encoder -> the summed loss and the shares of labelled cells that are right."""
        device = features["qwen"].device
        cells = {name: grid.to(device) for name, grid in batch.cells.items()}
        losses, scores = [], {}

        def read(head: nn.Linear, x: Tensor, name: str, weight: float, score: str | None = None) -> None:
            target = cells[name].flatten()
            logits = head(x).view(len(target), -1)
            losses.append(weight * _weighted(logits, target))
            if score and bool((target > 0).any()):
                scores[score] = float((logits.argmax(-1) == target)[target > 0].float().mean())

        for name, x in features.items():
            read(self.classes[name], x.float(), "class", 1.0, f"cells_{name}")
            read(self.colours[name], x.float(), "colour", 0.5)
            places = self.places[name](x.float())
            losses.append(F.mse_loss(places, cells["places"].view(-1, 2)))
        read(self.letters, features["qwen"].float(), "letters", 1.5, "letters")
        read(self.spots, features["qwen"].float(), "spots", 0.5, "spots")
        if "dinov2" in features:
            read(self.counts, features["dinov2"].float(), "counts", 0.5, "counts")
            read(self.middles, features["dinov2"].float(), "middles", 1.0, "middles")
        return torch.stack(losses).sum(), scores


def _weighted(logits: Tensor, target: Tensor, background: float = 0.1) -> Tensor:
    """Cross entropy in which class 0, the background, which is most of every picture, counts a tenth."""
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = background
    return F.cross_entropy(logits, target, weight=weight)


class Optimizers:
    """Muon for the matrices inside blocks, AdamW for everything else; both at one learning rate."""

    def __init__(self, named: dict[str, nn.Parameter], learning_rate: float, dtype: torch.dtype) -> None:
        def is_matrix(name: str, p: nn.Parameter) -> bool:
            inside = any(key in name for key in (".blocks.", ".layers.", ".layer.", ".merger.mlp."))
            return p.ndim == 2 and inside

        self.named, self.base = named, learning_rate
        matrices = [p for n, p in named.items() if is_matrix(n, p)]
        gate = [p for n, p in named.items() if ".fusion.gate." in n]
        rest = [p for n, p in named.items() if not is_matrix(n, p) and ".fusion.gate." not in n]
        groups = [{"params": rest, "share": 1.0}, {"params": gate, "share": GATE_LEARNING_RATE_SHARE}]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        ]
        if matrices:
            self.parts.append(Muon(matrices, learning_rate, weight_decay=0.05, dtype=dtype))

    def step(self, scale: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.base * scale * group.get("share", 1.0)
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """{parameter name / slot: tensor}, whichever optimizer holds it."""
        names = {p: n for n, p in self.named.items()}
        out = {}
        for part in self.parts:
            for parameter, slots in part.state.items():
                for slot, value in slots.items():
                    tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
                    out[f"{names[parameter]}/{slot}"] = tensor.contiguous()
        return out

    def load_state(self, saved: dict[str, Tensor]) -> None:
        owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for key, value in saved.items():
            name, slot = key.rsplit("/", 1)
            parameter = self.named[name]
            owner[parameter].state.setdefault(parameter, {})[slot] = value.to(parameter.device).clone()


def component_of(name: str) -> str:
    """The part of the curriculum that a parameter belongs to. Fusion first: it has a projector called dinov2."""
    if ".fusion." in name:
        return "fusion"
    return "encoders" if ".visual." in name or ".dinov2." in name or name.startswith("heads.") else "llm"


def is_trained(name: str, stage: Stage) -> bool:
    """Does the stage change this parameter? Stage "qwen" is the encoders without DINOv2."""
    component = component_of(name)
    return component in stage.trains or (
        "qwen" in stage.trains and component == "encoders" and not name.startswith("model.model.dinov2.")
    )


class DemoBuilder:
    """One build in one work folder. `run` continues where the folder says the last one stopped."""

    def __init__(self, recipe: Recipe, artwork: Artwork, work: Path, device: str = "cpu") -> None:
        self.recipe, self.artwork, self.work = recipe, artwork, work
        self.device = torch.device(device)
        self.dtype = working_dtype(self.device)
        self.tokenizer = build_tokenizer()
        torch.manual_seed(recipe.seed)
        self.model = DualVisionModel(build_config(recipe, self.tokenizer)).to(self.device)
        backbone = self.model.model
        attend_by_likeness(backbone.language_model)
        self.alignment = WordAlignment(self.tokenizer, self.device)
        self.lookup = Lookup(self.tokenizer, backbone.language_model, self.device)
        self.heads = DenseHeads({n: e.output_dim for n, e in backbone.encoders.items()}).to(self.device)
        self.stage_index, self.step = 0, 0
        self.seconds = 0.0  # of training, over all sessions of this build
        self.optimizers: Optimizers | None = None
        self.resume_folder: Path | None = None
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, report: Report, *, deadline_seconds: float = math.inf) -> bool:
        """Train to the end. Returns False if the deadline came first; the folder can be resumed."""
        start = last = time.monotonic()
        self._resume()
        while self.stage_index < len(self.recipe.stages):
            stage = self.recipe.stages[self.stage_index]
            optimizers = self._begin(stage)
            for batch in self._batches():
                scores = self._train_step(stage, batch, optimizers)
                self.step += 1
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                report(stage.name, self.step, stage.steps, scores)
                if self.step % SAVE_EVERY_STEPS == 0:
                    self.save()
                if time.monotonic() - start > deadline_seconds:
                    self.save()
                    return False
            self.stage_index, self.step, self.optimizers = self.stage_index + 1, 0, None
            self.save()
        return True

    def _begin(self, stage: Stage) -> Optimizers:
        named = {f"model.{n}": p for n, p in self.model.named_parameters()}
        named |= {f"heads.{n}": p for n, p in self.heads.named_parameters()}
        for name, parameter in named.items():
            parameter.requires_grad_(is_trained(name, stage))
        if self.optimizers is None:
            trained = {n: p for n, p in named.items() if p.requires_grad}
            self.optimizers = Optimizers(trained, stage.learning_rate, self.dtype)
            if self.step and self.resume_folder is not None:
                self.optimizers.load_state(load_file(self.resume_folder / "optimizer.safetensors"))
        self.model.train()
        return self.optimizers

    def _batches(self) -> Iterator[Batch]:
        layout = self.model.model.mrope_layout
        data = SceneBatches(self.recipe, self.stage_index, self.artwork, self.tokenizer, layout)
        workers = 1 if (os.cpu_count() or 1) > 1 and len(data) - self.step > 4 else 0
        return iter(
            DataLoader(data, batch_size=None, sampler=range(self.step, len(data)), num_workers=workers,
                       prefetch_factor=4 if workers else None)
        )  # fmt: skip

    def _train_step(self, stage: Stage, batch: Batch, optimizers: Optimizers) -> dict[str, float]:
        pixel_values, grid = batch.pixel_values(self.device)
        backbone, scores = self.model.model, {}
        total = torch.zeros((), device=self.device)
        names = [n for n in backbone.encoders if stage.answer_weight or "encoders" in stage.trains or n in stage.trains]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            with torch.set_grad_enabled(bool({"encoders", "qwen"} & set(stage.trains))):
                features = backbone.encode_images(pixel_values, grid, names)
            if stage.dense_weight:
                with torch.autocast(self.device.type, enabled=False):
                    dense, scores = self.heads(features, batch)
                total = total + stage.dense_weight * dense
                scores["dense"] = float(dense.detach())
            if stage.answer_weight:
                answer, found = self._answer_loss(stage, batch, features, grid)
                total = total + stage.answer_weight * answer
                scores |= found
        total.backward()
        trained = [p for p in optimizers.named.values() if p.grad is not None]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizers.step(schedule(self.step, stage.decay_steps or stage.steps))
        return scores

    def _answer_loss(
        self, stage: Stage, batch: Batch, features: dict[str, Tensor], grid: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        backbone = self.model.model
        removed = self._encoder_dropout(len(grid), stage.encoder_dropout, len(features))
        fused = backbone.fuse(features, cell_grids(grid, backbone.config.merge_size), removed=removed)
        ids = batch.input_ids.to(self.device)
        embeds = backbone.get_input_embeddings()(ids)
        mask = (ids == backbone.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(mask, fused.tokens.to(embeds.dtype))
        seen = batch.may_attend(self.device)
        with self.lookup.watching():
            hidden = backbone.language_model(
                inputs_embeds=embeds,
                position_ids=batch.position_ids.to(self.device),
                attention_mask={"full_attention": seen},
                use_cache=False,
            ).last_hidden_state
        labels, weights = batch.labels.to(self.device)[:, 1:], batch.weights.to(self.device)[:, 1:]
        is_label = labels != -100
        logits = self.model.lm_head(hidden[:, :-1][is_label]).float()  # the rows that carry a label, nothing else
        each = F.cross_entropy(logits, labels[is_label], reduction="none")
        loss = (each * weights[is_label]).sum() / weights[is_label].sum()
        with torch.autocast(self.device.type, enabled=False):
            words = backbone.get_input_embeddings().weight
            align = self.alignment.loss(fused.tokens, batch.cells, words)
        look, tally = self.lookup.loss(ids, mask[..., 0], batch.cells, seen)
        scores = {
            "answer": float(loss.detach()),
            "align": float(align.detach()),
            "look": float(look.detach()),
            "tally": float(tally.detach()),
            "tokens_right": float((logits.argmax(-1) == labels[is_label]).float().mean()),
        }
        loss = loss + ALIGNMENT_WEIGHT * align + LOOKUP_WEIGHT * (look + tally)
        if fused.weights is not None:
            # marginal_kl: over many pictures both eyes are used, in one picture either may win
            mean = fused.weights.mean(0)
            loss = loss + GATE_LOSS_WEIGHT * (mean * (mean * len(mean)).log()).sum()
        return loss, scores

    def _encoder_dropout(self, num_images: int, chance: float, num_encoders: int) -> Tensor:
        """(I, E): at most one encoder an image; a function of the seed, the stage and the step alone."""
        generator = torch.Generator().manual_seed(self.recipe.seed + 1_000_003 * self.stage_index + self.step)
        drop = torch.rand(num_images, generator=generator) < chance
        which = torch.randint(num_encoders, (num_images,), generator=generator)
        return F.one_hot(which, num_encoders).bool() & drop[:, None]

    def save(self) -> None:
        """Whole state into a new folder, then the small index that names it, then the old folder goes.

        `run` calls it; so may you. A kill at any moment leaves an index whose folder is whole.
        """
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        tensors |= {f"heads.{k}": v for k, v in self.heads.state_dict().items()}
        optimizer: dict[str, Tensor] = self.optimizers.state() if self.optimizers else {}
        folder = self.work / f"state-{self.stage_index}-{self.step}"
        folder.mkdir(exist_ok=True)
        for name, part in (("optimizer", optimizer), ("state", tensors)):
            save_file({k: v.contiguous() for k, v in part.items()}, folder / f"{name}.safetensors")
        index = {"folder": folder.name, "stage": self.stage_index, "step": self.step, "seconds": self.seconds}
        (self.work / "progress.tmp").write_text(json.dumps(index | {"recipe": self.recipe.fingerprint}))
        (self.work / "progress.tmp").replace(self.work / "progress.json")
        for old in self.work.glob("state-*"):
            if old != folder:
                shutil.rmtree(old)

    def _resume(self) -> None:
        index_path = self.work / "progress.json"
        if not index_path.exists():
            return
        index = json.loads(index_path.read_text())
        if index["recipe"] != self.recipe.fingerprint:
            raise ConfigError(
                "the work folder holds a build of another recipe", value=index["recipe"],
                allowed=self.recipe.fingerprint, fix=f"Name another --work folder, or remove {self.work}",
            )  # fmt: skip
        self.stage_index, self.step, self.seconds = index["stage"], index["step"], index["seconds"]
        self.resume_folder = self.work / index["folder"]
        saved = load_file(self.resume_folder / "state.safetensors", device=str(self.device))
        own = {k[6:]: v for k, v in saved.items() if k.startswith("model.")}
        self.model.load_state_dict(own, strict=False)
        self.heads.load_state_dict({k[6:]: v for k, v in saved.items() if k.startswith("heads.")})


def schedule(step: int, steps: int, warmup: float = 0.04) -> float:
    """Linear warm-up, then a cosine down to 5 % of the peak."""
    if step < steps * warmup:
        return (step + 1) / (steps * warmup + 1)
    done = (step - steps * warmup) / max(1.0, steps * (1 - warmup))
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
