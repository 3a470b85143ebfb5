"""The estimate of activations against the tensors that autograd really keeps for a pack of the demo model."""

from __future__ import annotations

import pytest
import torch

from model_core.checkpoint import Loaded, LoadOptions, load_checkpoint
from model_core.demo_model import demo_folder
from model_core.training.config import TRAINING_MODES, FreezeConfig
from model_core.training.data.packs import PackedBatch, SampleRef
from model_core.training.forward import PackForward
from model_core.training.freeze import resolve_freeze
from model_core.training.preflight import MARGIN, PackLimits, training_need

NUM_IMAGES, GRID, CELLS, LENGTH = 4, (1, 16, 16), 64, 128


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_checkpoint(demo_folder(), LoadOptions("cpu", torch.float32))


def pack_of(loaded: Loaded):
    """Four samples of one picture and 64 tokens each, half of them labels."""
    ids = torch.randint(10, 200, (NUM_IMAGES, LENGTH))
    ids[:, :CELLS] = loaded.model.config.image_token_id
    labels = ids.clone()
    labels[:, : CELLS + 32] = -100
    spec = loaded.processor.patch_spec
    pixels = torch.zeros(NUM_IMAGES * 256, 3 * 2 * spec.patch_size**2, dtype=torch.uint8).numpy()
    return PackedBatch(
        ids.flatten(), labels.flatten(), torch.arange(LENGTH).repeat(NUM_IMAGES).expand(3, -1).contiguous(),
        (LENGTH,) * NUM_IMAGES, pixels, (GRID,) * NUM_IMAGES, (1,) * NUM_IMAGES,
        tuple(SampleRef(f"a:{i}", "a", i) for i in range(NUM_IMAGES)), NUM_IMAGES * 32,
    )  # fmt: skip


#: Products in 16 bits take seconds on a processor without units for them: two modes are looked at by default.
SHORT = [("fusion_only", "bfloat16", 2), ("llm_only", "bfloat16", 2)]
LONG = [(mode, "bfloat16", 2) for mode in TRAINING_MODES if (mode, "bfloat16", 2) not in SHORT]


@pytest.mark.parametrize(
    ("mode", "precision", "width"),
    [
        *((mode, "float32", 4) for mode in TRAINING_MODES),
        *SHORT,
        *(pytest.param(*case, marks=pytest.mark.heavy) for case in LONG),
    ],
)
def test_the_estimate_is_within_its_margin(loaded: Loaded, mode: str, precision: str, width: int) -> None:
    model = loaded.model
    table = resolve_freeze(model, FreezeConfig(mode=mode))
    table.apply(model)
    run = PackForward(model, loaded.processor.patch_spec, precision=precision)
    run.set_freeze(table)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(pack_of(loaded))
    measured = sum(storage.nbytes() for storage in kept.values())
    limits = PackLimits(NUM_IMAGES * LENGTH, NUM_IMAGES * CELLS, NUM_IMAGES * 32)
    parts = training_need(model.config, table, limits, weight_bytes=4, width=width).parts
    estimated = parts["activations"] + parts.get("casts", 0)
    assert (1 - MARGIN) * 0.95 < estimated / measured < 1.25
