"""One pack through the model, with gradients: pixels, fusion, the splice, the decoder, losses by sample.

In: a `PackedBatch` and the images to hide; out: summed losses, gate weights, and what an auxiliary loss sees. It takes
the same encode path (what `embed_images` is made of) and the same decoder layer as serving. It divides by nothing and
steps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from model_core.errors import ConfigError, InvalidRequestError
from model_core.fusion.base import FusionOutput
from model_core.language.decoder import rotate
from model_core.language.packed import packed_hidden
from model_core.processing.batch import normalise_pixels
from model_core.processing.images import PatchSpec
from model_core.training.auxiliary import PackView
from model_core.training.cpu_kernels import cpu_kernels
from model_core.training.cpu_passes import fewer_passes, rotate_tokens
from model_core.training.data.packs import PackedBatch
from model_core.training.freeze import FreezeTable
from model_core.training.losses import LabelRows, sample_losses
from model_core.types import Arm
from model_core.vision_tokens import cell_grids

#: Components whose outputs a frozen rest of the model still needs a gradient for.
_BEFORE_THE_SPLICE = frozenset({"qwen_vision", "merger", "dinov2", "projections", "gate", "output_projector"})


@dataclass(frozen=True, slots=True)
class PackOutput:
    """losses: (num_samples,) float32, each summed over its sample's labels; weights: (I, E) or None.

    view: for an auxiliary loss, where `watch_layers` was told of one.
    """

    losses: Tensor
    weights: Tensor | None
    view: PackView | None = None


class PackForward:
    """How a model runs a pack under one freeze table.

    Args:
        precision: float32, or bfloat16 (autocast where the weights are float32).
        recompute: components whose activations are computed twice; those that train nothing never are.
    """

    def __init__(self, model: nn.Module, spec: PatchSpec, *, precision: str, recompute: Sequence[str] = ()) -> None:
        self.model, self.spec = model, spec
        self._autocasts = precision == "bfloat16" and next(model.parameters()).dtype == torch.float32
        self._wanted = frozenset(recompute)
        self._watched: frozenset[int] | None = None
        self._trained_towers: tuple[str, ...] = ()
        self._recompute_llm = False
        self._has_gradients_before = True
        self._narrow: list[tuple[nn.Module, dict[str, Tensor]]] = []
        self._flash = model.config._attn_implementation == "flash_attention_2"

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def watch_layers(self, layers: Sequence[int]) -> None:
        """Give a view of every pass from now on, with the attention of these layers.

        Raises:
            ConfigError: the language model has no such layer.
        """
        count = len(self.model.model.language_model.layers)
        beyond = [layer for layer in layers if not 0 <= layer < count]
        if beyond:
            raise ConfigError(
                "there is no such layer to watch", value=beyond, allowed=f"0 to {count - 1}",
                fix="Let the auxiliary loss watch layers that the language model has", param="auxiliary_loss",
            )  # fmt: skip
        self._watched = frozenset(layers)

    def set_freeze(self, table: FreezeTable) -> None:
        """Which parts need gradients from now on."""
        trained = table.trainable_components
        self._has_gradients_before = bool(trained & _BEFORE_THE_SPLICE)
        backbone = self.model.model
        heard = {"qwen": {"qwen_vision", "merger"}, backbone.second_name: {"dinov2"}}
        self._trained_towers = tuple(name for name in backbone.encoders if trained & heard[name])
        # The language model's activations are kept whenever a gradient goes through it, so also while it is frozen.
        self._recompute_llm = "llm" in self._wanted and bool(trained)
        towers = {"qwen_vision": (backbone.visual, {"qwen_vision", "merger"}), "dinov2": (backbone.second, {"dinov2"})}
        for name, (module, parts) in towers.items():
            if name in self._wanted and trained & parts:
                options = {"use_reentrant": False, "context_fn": self._recompute_contexts}
                module.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
            elif name in self._wanted:
                module.activation_checkpointing_disable()

    def __call__(self, pack: PackedBatch, *, removed: Tensor | None = None, arm: Arm | None = None) -> PackOutput:
        """removed: (I, E) bool, encoders to hide image by image; or one arm for all images, as an evaluation asks."""
        attention: dict[int, tuple[Tensor, Tensor]] = {}

        def watch(layer: int, query: Tensor, key: Tensor) -> None:
            if layer in self._watched:
                attention[layer] = (query, key)

        with self._precision():
            ids = pack.input_ids.to(self.device)
            embeds = self.model.get_input_embeddings()(ids)
            features: Mapping[str, Tensor] = {}
            fused = None
            if pack.grids:
                features, fused = self._embed_images(pack, removed, arm)
                embeds = self._splice(ids, embeds, fused.tokens)
            recompute = self._recompute_contexts if self._recompute_llm else None
            rows = LabelRows.of(pack.labels, pack.sample_lengths).to(self.device)
            hidden = packed_hidden(
                self.model.model.language_model, embeds, pack.position_ids.to(self.device), pack.sample_lengths,
                blocks=pack.blocks, watch=watch if self._watched else None, recompute=recompute,
                use_flash_attention=self._flash, rotate=rotate_tokens if self.device.type == "cpu" else rotate,
                keep=rows.places,
            )  # fmt: skip
            if self._autocasts:
                hidden = hidden.to(torch.bfloat16)  # the head is the largest product of all
            head = self.model.lm_head.weight
            weights = pack.label_weights if arm is None else None  # an evaluation counts every label once
            losses = sample_losses(hidden, head, rows, weights)
        view = None if self._watched is None else PackView(pack, features, fused, attention)
        return PackOutput(losses, None if fused is None else fused.weights, view)

    def encode_only(self, pack: PackedBatch) -> PackView:
        """The encoders that train, and nothing behind them: for a stage without the language loss."""
        features: Mapping[str, Tensor] = {}
        with self._precision():
            if pack.grids and self._trained_towers:
                pixels = normalise_pixels(pack.pixels, self.spec, self.device)
                features = self.model.model.encode_images(pixels, torch.tensor(pack.grids), self._trained_towers)
        return PackView(pack, features)

    def _embed_images(
        self, pack: PackedBatch, removed: Tensor | None, arm: Arm | None
    ) -> tuple[Mapping[str, Tensor], FusionOutput]:
        """`embed_images` in its two steps, since an auxiliary loss sees what stands between them."""
        backbone = self.model.model
        pixels = normalise_pixels(pack.pixels, self.spec, self.device)
        grid = torch.tensor(pack.grids)
        arms = None if arm is None else [arm] * len(pack.grids)
        # Where nothing before the splice trains, no graph is made, and an encoder that is never heard is not run.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._has_gradients_before):
            features = backbone.encode_images(pixels, grid, backbone.needed_encoders(arms, removed))
            grids = cell_grids(grid, backbone.config.merge_size)
            return features, backbone.fuse(features, grids, arms, removed=removed)

    def _splice(self, ids: Tensor, embeds: Tensor, tokens: Tensor) -> Tensor:
        config = self.model.config
        places = ((ids == config.image_token_id) | (ids == config.video_token_id)).nonzero()[:, 0]
        if len(places) != len(tokens):
            raise InvalidRequestError(
                "placeholders and fused tokens do not match", value=f"{len(places)} places", allowed=f"{len(tokens)}",
                fix="Let the batch source's input_ids have a placeholder for every vision token of its grids",
            )  # fmt: skip
        return embeds.index_copy(0, places, tokens.to(embeds.dtype))

    @contextmanager
    def _precision(self) -> Iterator[None]:
        device: Any = self.device.type
        self._narrow = self._narrowed() if self._autocasts and device == "cpu" else []
        autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=self._autocasts, cache_enabled=False)
        try:
            with self._kernels(self._narrow), autocast:
                yield
        finally:
            self._narrow = []

    def _narrowed(self) -> list[tuple[nn.Module, dict[str, Tensor]]]:
        """The towers with bfloat16 copies of their weights, so that what lies between products has 16 bits as well.

        On a CPU that is most of the time, and autocast alone widens it again at every norm and sum. Gradients come to
        the weights themselves."""
        backbone = self.model.model
        return [
            (module, {name: p.to(torch.bfloat16) for name, p in module.named_parameters()})
            for module in (backbone.visual, backbone.second)
        ]

    @contextmanager
    def _kernels(self, narrow: Sequence[tuple[nn.Module, dict[str, Tensor]]]) -> Iterator[None]:
        if self.device.type != "cpu":
            yield
            return
        with cpu_kernels(), fewer_passes(self.model), ExitStack() as stack:
            for module, copies in narrow:
                stack.enter_context(_reparametrize_module(module, copies))
            yield

    def _recompute_contexts(self) -> tuple[Any, Any]:
        """For torch's checkpoint: what runs a second time, in the backward pass, runs as it did the first."""
        return nullcontext(), self._kernels(self._narrow)


def resolve_precision(asked: str, model: nn.Module) -> str:
    """What products are computed in: `auto` is bfloat16 on CUDA and where the weights have 16 bits, else float32.

    Raises:
        ConfigError: float32 for a model that was loaded in 16 bits.
    """
    weight = model.lm_head.weight
    if asked == "auto":
        return "bfloat16" if weight.is_cuda or weight.dtype != torch.float32 else "float32"
    if asked == "float32" and weight.dtype != torch.float32:
        raise ConfigError(
            "the model was loaded in 16 bits and can't compute in float32", value=str(weight.dtype),
            allowed="precision auto or bfloat16", fix="Load it with dtype float32", param="precision",
        )  # fmt: skip
    return asked
