"""A pack is its samples and nothing else: losses, gradients, isolation, and the path that serving takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from model_core.errors import ConfigError, InvalidRequestError
from model_core.model import DualVisionModel
from model_core.processing.batch import normalise_pixels
from model_core.training import forward as forward_module
from model_core.training.data.packs import PackedBatch
from model_core.training.forward import PackForward, resolve_precision
from model_core.training.freeze import resolve_freeze
from tests.model_core import tiny
from tests.model_core.training.toy import pack_of

SPEC = tiny.processor().patch_spec
SAMPLES = (0, 1, 2, 3, 6)


def forward(
    model: DualVisionModel, mode: str = "full", recompute: tuple[str, ...] = (), precision: str = "float32"
) -> PackForward:
    table = resolve_freeze(model, mode)  # type: ignore[arg-type]
    table.apply(model)
    made = PackForward(model, SPEC, precision=precision, recompute=recompute)
    made.set_freeze(table)
    return made


def each_samples(run: PackForward, packs: list[PackedBatch]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Of every sample of the packs: its loss, and the gradient of that loss alone."""
    found = []
    for pack in packs:
        for loss in run(pack).losses:
            run.model.zero_grad()
            loss.backward(retain_graph=True)
            grads = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
            found.append((float(loss.detach()), grads))
    return found


def gradients(run: PackForward, packs: list[PackedBatch]) -> tuple[list[float], dict[str, torch.Tensor]]:
    run.model.zero_grad()
    losses: list[float] = []
    for pack in packs:
        output = run(pack)
        losses += output.losses.tolist()
        output.losses.sum().backward()
    found = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    return losses, found


@pytest.mark.parametrize("fusion", ["gated", "cross_attention", "concat"])
def test_a_pack_equals_its_samples(fusion: str) -> None:
    """Each sample's loss, and its gradients of every part: language model, both encoders, fusion. Pictures have three
    shapes.

    To 1e-5 of a tensor's largest gradient; where rounding alone makes one, as a key bias's, to 1e-7 of the sample's.
    """
    run = forward(tiny.trained_model(fusion))
    packed = each_samples(run, [pack_of(SAMPLES)])
    alone = each_samples(run, [pack_of([i]) for i in SAMPLES])
    assert len(packed) == len(alone) == len(SAMPLES)
    for (loss, grads), (loss_alone, grads_alone) in zip(packed, alone, strict=True):
        assert loss == pytest.approx(loss_alone, rel=1e-5)
        assert grads.keys() == grads_alone.keys()
        for part in ("visual.blocks", "dinov2", "language_model", "fusion"):
            assert any(part in name and bool(gradient.any()) for name, gradient in grads.items())
        largest = max(float(gradient.abs().max()) for gradient in grads_alone.values())
        for name, gradient in grads_alone.items():
            off, own = float((grads[name] - gradient).abs().max()), float(gradient.abs().max())
            assert off <= 1e-5 * own or off <= 1e-7 * largest, (name, off, own, largest)


@pytest.mark.parametrize("recompute", [(), ("qwen_vision", "dinov2")])
def test_in_bfloat16_the_towers_hold_16_bits_for_a_pass_and_the_weights_get_the_gradients(
    recompute: tuple[str, ...],
) -> None:
    model = tiny.trained_model()
    wide = gradients(forward(model), [pack_of(SAMPLES)])[1]
    run, seen = forward(model, precision="bfloat16", recompute=recompute), []
    towers = (model.model.visual, model.model.second)
    norm, stood_in = model.model.language_model.norm, []
    hooks = [norm.register_forward_hook(lambda module, *_: stood_in.append("forward" in vars(module)))]
    hooks += [tower.register_forward_hook(lambda module, *_: seen.append(module.dtype)) for tower in towers]
    narrow = gradients(run, [pack_of(SAMPLES)])[1]
    assert len(seen) >= 2 and set(seen) == {torch.bfloat16} and all(tower.dtype == torch.float32 for tower in towers)
    assert stood_in == [True] and "forward" not in vars(norm), "norms run in fewer passes, and only within a pass"
    assert narrow.keys() == wide.keys()
    for name in (n for n in wide if "visual.blocks" in n or "dinov2" in n):
        assert narrow[name].dtype == torch.float32
    flat = [torch.cat([grads[name].flatten() for name in sorted(wide)]) for grads in (wide, narrow)]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.99
    for hook in hooks:
        hook.remove()


def test_the_last_layer_ends_for_places_with_a_label_and_no_gradient_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the last layer makes of a prompt nobody looks at: its output projection and MLP are left out there."""
    run, pack = forward(tiny.trained_model("gated")), pack_of(SAMPLES)
    seen: list[int] = []
    layers = run.model.model.language_model.layers
    hooks = [layer.mlp.register_forward_hook(lambda _, args, __: seen.append(len(args[0]))) for layer in layers]
    losses, grads = gradients(run, [pack])
    assert seen == [*[len(pack.input_ids)] * (len(layers) - 1), pack.num_label_tokens]
    packed_hidden = forward_module.packed_hidden

    def of_all(*args: Any, keep: torch.Tensor, **more: Any) -> torch.Tensor:
        return packed_hidden(*args, **more)[keep]

    monkeypatch.setattr(forward_module, "packed_hidden", of_all)
    losses_of_all, grads_of_all = gradients(run, [pack])
    assert seen[len(layers) :] == [len(pack.input_ids)] * len(layers)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(losses_of_all), rtol=1e-5, atol=0)
    assert grads.keys() == grads_of_all.keys()
    largest = max(float(gradient.abs().max()) for gradient in grads_of_all.values())
    for name, gradient in grads_of_all.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_a_pack_without_a_label_has_no_loss_and_gradients_of_nothing() -> None:
    run, pack = forward(tiny.trained_model("gated")), pack_of(SAMPLES)
    pack = dataclasses.replace(pack, labels=torch.full_like(pack.labels, -100), num_label_tokens=0)
    losses, grads = gradients(run, [pack])
    assert losses == [0.0] * len(SAMPLES)
    assert not any(bool(gradient.any()) for gradient in grads.values())


def test_a_sample_never_sees_its_neighbour() -> None:
    """Another picture and another text beside it change nothing, to the bit, in a sample's loss."""
    run = forward(tiny.trained_model())
    pack = pack_of([0, 1, 2])
    before = run(pack).losses
    ids, pixels = pack.input_ids.clone(), pack.pixels.copy()
    first = pack.sample_lengths[0]
    ids[first + pack.sample_lengths[1] - 4] = tiny.token_id("z")
    patches = [h * w for _, h, w in pack.grids]
    pixels[patches[0] : patches[0] + patches[1]] = np.random.default_rng(9).integers(0, 255, (patches[1], 1176))
    after = run(dataclasses.replace(pack, input_ids=ids, pixels=pixels)).losses
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])


def test_it_is_the_path_that_the_whole_model_takes() -> None:
    """The model's own forward over one sample, transformers' loss: the path of generate and of serving."""
    model = tiny.trained_model()
    run = forward(model)
    model.eval()
    for index in (0, 1, 5):
        pack = pack_of([index])
        pixels = normalise_pixels(pack.pixels, SPEC, torch.device("cpu"))
        types = (pack.input_ids == model.config.image_token_id).int()
        output = model(
            input_ids=pack.input_ids[None], pixel_values=pixels, image_grid_thw=torch.tensor(pack.grids),
            labels=pack.labels[None], mm_token_type_ids=types[None], position_ids=pack.position_ids[:, None],
        )  # fmt: skip
        assert float(run(pack).losses.sum().detach()) == pytest.approx(
            float(output.loss.detach()) * pack.num_label_tokens, rel=1e-5
        )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputed_activations_change_no_gradient(precision: str) -> None:
    model = tiny.trained_model()
    kept = gradients(forward(model, precision=precision), [pack_of(SAMPLES)])
    parts = ("llm", "qwen_vision", "dinov2")
    again = gradients(forward(model, recompute=parts, precision=precision), [pack_of(SAMPLES)])
    assert model.model.visual.is_activation_checkpointing and model.model.second.is_activation_checkpointing
    assert kept[0] == again[0]
    for name, gradient in kept[1].items():
        torch.testing.assert_close(again[1][name], gradient, rtol=0, atol=1e-7, msg=name)


def test_a_frozen_encoder_is_never_recomputed() -> None:
    model = tiny.trained_model()
    forward(model, "fusion_only", recompute=("llm", "qwen_vision", "dinov2"))
    assert not model.model.visual.is_activation_checkpointing and not model.model.second.is_activation_checkpointing


def test_where_only_the_language_model_trains_no_graph_reaches_the_pixels() -> None:
    model = tiny.dual_model()
    run = forward(model, "llm_only")
    _, found = gradients(run, [pack_of([0, 1])])
    assert found and all("language_model" in name or "lm_head" in name for name in found)
    assert model.fusion.means.count == 0, "the means follow the features only while something before the gate moves"


def test_placeholders_without_a_picture_are_refused() -> None:
    pack = pack_of([0, 1])
    short = dataclasses.replace(pack, input_ids=pack.input_ids[:-1], labels=pack.labels[:-1])
    ids = short.input_ids.clone()
    ids[ids == tiny.token_id("<|image_pad|>")] = tiny.token_id("a")
    with pytest.raises(InvalidRequestError, match="placeholders and fused tokens"):
        forward(tiny.trained_model())(dataclasses.replace(pack, input_ids=torch.cat([ids, pack.input_ids[-1:]])))


def test_precision_is_what_was_asked_or_an_error() -> None:
    model = tiny.dual_model()
    assert resolve_precision("auto", model) == "float32"
    assert resolve_precision("bfloat16", model) == "bfloat16"
    short = tiny.dual_model().to(torch.bfloat16)
    assert resolve_precision("auto", short) == "bfloat16"
    with pytest.raises(ConfigError, match="loaded in 16 bits"):
        resolve_precision("float32", short)


def test_bfloat16_products_give_nearly_the_same_loss() -> None:
    model = tiny.trained_model()
    exact = forward(model)(pack_of(SAMPLES)).losses
    run = PackForward(model, SPEC, precision="bfloat16")
    rough = run(pack_of(SAMPLES)).losses
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)
