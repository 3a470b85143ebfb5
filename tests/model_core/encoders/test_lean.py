"""The lean forwards give what the modules give, and stand back wherever a module holds more than they know."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, Dinov2Config
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from model_core.config import DualVisionConfig
from model_core.encoders import build_encoders
from model_core.encoders.base import PixelSpec, VisionEncoder
from model_core.encoders.dinov2 import IMAGENET_MEAN, IMAGENET_STD
from model_core.vision_tokens import VisionTokens
from tests.model_core import tiny

NAMES = ("qwen", "dinov2")
#: One picture; several of one shape; mixed shapes with windows that are not whole; a video among them.
GRIDS = [
    [(1, 8, 8)],
    [(1, 4, 12)] * 3,
    [(1, 4, 4), (1, 10, 6), (1, 2, 14), (1, 4, 4)],
    [(3, 6, 4), (1, 6, 4), (2, 4, 10)],
]


def built(name: str, config: DualVisionConfig | None = None) -> tuple[VisionEncoder, nn.Module]:
    encoder = build_encoders(config or tiny.dual_config())[name]
    torch.manual_seed(2)
    module = encoder.build().eval()
    for parameter in module.parameters():  # fresh norms and scales are ones, fresh biases zeros
        nn.init.normal_(parameter, std=0.3)
    return encoder, module


def patches(grids: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 14 * 14), torch.tensor(grids)


def forbid(monkeypatch: pytest.MonkeyPatch, encoder: VisionEncoder) -> None:
    """From now on the encoder has no other way than the lean one."""

    def encode(*_: object) -> None:
        raise AssertionError("the modules ran")

    monkeypatch.setattr(encoder, "encode", encode)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_the_lean_forward_is_the_modules(
    name: str, grids: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, module = built(name)
    given = patches(grids)
    expected = encoder.encode(module, *given)
    forbid(monkeypatch, encoder)
    before = given[0].clone()
    got = encoder.infer(module, *given)
    assert got.grids == expected.grids
    assert_close(got.tokens, expected.tokens)
    assert torch.equal(encoder.infer(module, *given).tokens, got.tokens), "a layout that is kept gives the same"
    assert torch.equal(given[0], before), "the pictures are not written to: the other encoder reads them too"


def trained(module: nn.Module) -> nn.Module:
    """Norms, scales and biases away from what they are born as; features stay of the size that they have."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval()


@pytest.mark.parametrize("grids", GRIDS)
@torch.inference_mode()
def test_the_lean_tower_is_transformers_own(grids: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not our module with its attention over segments: theirs, untouched."""
    theirs = trained(Qwen2_5_VisionTransformerPretrainedModel._from_config(tiny.qwen_config().vision_config))
    encoder, module = built("qwen")
    module.load_state_dict(theirs.state_dict())
    given = patches(grids)
    forbid(monkeypatch, encoder)
    got, expected = encoder.infer(module, *given).tokens, theirs(given[0], grid_thw=given[1]).pooler_output
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("grid", [(1, 4, 6), (1, 10, 4), (1, 16, 16)])
@torch.inference_mode()
def test_the_lean_dinov2_is_transformers_own(grid: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the picture itself, as ImageNet has it, which our encoder has to find in Qwen's patches."""
    (t, h, w), merge = grid, 2
    encoder, module = built("dinov2")
    theirs = trained(AutoModel.from_config(tiny.dinov2_config()))
    module.load_state_dict(theirs.state_dict())
    image = torch.rand(3, h * 14, w * 14, generator=torch.Generator().manual_seed(4))
    blocks = to_clip(image).reshape(3, h // merge, merge, 14, w // merge, merge, 14).permute(1, 4, 2, 5, 0, 3, 6)
    pixel_values = blocks.unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(t * h * w, -1)
    forbid(monkeypatch, encoder)
    got = encoder.infer(module, pixel_values, torch.tensor([grid])).tokens
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    own = theirs(((image - mean) / std)[None]).last_hidden_state[0, 1:]
    expected = own.view(h // merge, merge, w // merge, merge, -1).transpose(1, 2).reshape(h * w // merge**2, -1)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def to_clip(image: Tensor) -> Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (PixelSpec(14, 2, 2).image_mean, PixelSpec(14, 2, 2).image_std))
    return (image - mean) / std


@torch.inference_mode()
def test_dinov2_with_gated_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the largest one has them."""
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    dinov2 = Dinov2Config(use_swiglu_ffn=True, **shape)
    encoder, module = built("dinov2", DualVisionConfig.from_parts(tiny.qwen_config(), dinov2))
    given = patches(GRIDS[2])
    expected = encoder.encode(module, *given).tokens
    forbid(monkeypatch, encoder)
    assert_close(encoder.infer(module, *given).tokens, expected)


@pytest.mark.parametrize("name", NAMES)
def test_changed_weights_count_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, module = built(name)
    given = patches(GRIDS[0])
    with torch.inference_mode():
        before = encoder.infer(module, *given).tokens
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.9)
        expected = encoder.encode(module, *given).tokens
        forbid(monkeypatch, encoder)
        got = encoder.infer(module, *given).tokens
    assert_close(got, expected)
    assert not torch.allclose(got, before, atol=1e-3)


def add_hook(module: nn.Module) -> None:
    next(m for m in module.modules() if type(m) is nn.Linear).register_forward_hook(lambda *_: None)


def add_adapter(module: nn.Module) -> None:
    class Adapted(nn.Linear):
        pass

    owner, name = next((m, n) for m in module.modules() for n, child in m.named_children() if type(child) is nn.Linear)
    old = getattr(owner, name)
    setattr(owner, name, Adapted(old.in_features, old.out_features, bias=old.bias is not None))


REASONS: dict[str, Callable[[nn.Module], object]] = {
    "a hook": add_hook,
    "an adapter": add_adapter,
    "training": nn.Module.train,
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "another attention": lambda module: module.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_it_stands_back(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, module = built(name)
    with torch.inference_mode(mode=False):
        REASONS[reason](module)
    forbid(monkeypatch, encoder)
    with pytest.raises(AssertionError, match="the modules ran"):
        encoder.infer(module, *patches(GRIDS[0]))


@pytest.mark.parametrize("name", NAMES)
def test_it_stands_back_where_gradients_are_wanted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, module = built(name)
    forbid(monkeypatch, encoder)
    with pytest.raises(AssertionError, match="the modules ran"):
        encoder.infer(module, *patches(GRIDS[0]))


@pytest.mark.parametrize("config", [tiny.dual_config(registers=4), tiny.dual_config(dinov2_max_patches=16)])
@torch.inference_mode()
def test_dinov2_stands_back_for_registers_and_a_budget(
    config: DualVisionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, module = built("dinov2", config)
    forbid(monkeypatch, encoder)
    with pytest.raises(AssertionError, match="the modules ran"):
        encoder.infer(module, *patches(GRIDS[0]))


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_subclass_that_encodes_in_its_own_way_is_heard(name: str) -> None:
    encoder, module = built(name)

    class Zero(type(encoder)):
        def encode(self, module: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> VisionTokens:
            found = super().encode(module, pixel_values, grid_thw)
            return VisionTokens(torch.zeros_like(found.tokens), found.grids)

    assert not Zero(encoder.config).infer(module, *patches(GRIDS[0])).tokens.any()
