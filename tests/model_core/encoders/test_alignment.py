"""Both encoders see the same pixels and give the same cells in the same order, for any aspect ratio."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AutoModel, Dinov2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model_core.config import DualVisionConfig
from model_core.encoders import build_encoders
from model_core.encoders.base import PixelSpec, VisionEncoder
from model_core.encoders.dinov2 import IMAGENET_MEAN, IMAGENET_STD, budgeted_grid, recover_pixels, to_imagenet
from model_core.encoders.segments import SegmentVisionAttention, install_segment_attention
from model_core.errors import ConfigError
from model_core.vision_tokens import VisionTokens
from tests.model_core import tiny

SPEC = PixelSpec(14, 2, 2)
GRIDS = [(1, 4, 4), (1, 4, 12), (1, 10, 4), (1, 6, 10), (1, 2, 14)]


def patches_of(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, H, W) in 0..1 -> Qwen's patches and grid, by the processor that transformers ships."""
    from PIL import Image

    array = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    processor = tiny.processor(max_pixels=10**7)
    found = processor(images=[Image.fromarray(array)])
    return found["pixel_values"], found["image_grid_thw"]


@pytest.mark.parametrize("grid", GRIDS)
def test_recovered_pixels_are_the_picture(grid: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    image = torch.rand(3, grid[1] * 14, grid[2] * 14)
    pixel_values, found = patches_of(image)
    assert found.tolist() == [list(grid)]
    frames = to_imagenet(recover_pixels(pixel_values, grid, SPEC), SPEC)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    expected = ((image * 255).round() / 255 - mean) / std
    assert torch.allclose(frames[0, 0], expected, atol=5e-6)
    assert torch.equal(frames[0, 0], frames[0, 1]), "a still image's two frames are one"


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_dinov2_features_equal_dinov2s_own(grid: tuple[int, int, int], registers: int) -> None:
    config = tiny.dual_config(registers=registers)
    encoder = build_encoders(config)["dinov2"]
    torch.manual_seed(1)
    module = encoder.build().eval()
    image = torch.rand(3, grid[1] * 14, grid[2] * 14)
    pixel_values, grid_thw = patches_of(image)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        got = encoder.encode(module, pixel_values, grid_thw).tokens
        own = module(((image * 255).round() / 255 - mean)[None] / std).last_hidden_state[0, 1 + registers :]
    h, w = grid[1], grid[2]
    expected = own.view(h // 2, 2, w // 2, 2, -1).transpose(1, 2).reshape(h * w // 4, -1)
    assert torch.allclose(got, expected, atol=1e-5)


CELLS = [
    *((name, grid, 1369) for name in ("qwen", "dinov2") for grid in GRIDS),
    *(("dinov2", grid, budget) for grid in ((1, 16, 16), (1, 12, 20), (1, 8, 24)) for budget in (64, 100)),
]


@pytest.mark.parametrize(("name", "grid", "budget"), CELLS)
def test_token_ij_moves_when_cell_ij_does(name: str, grid: tuple[int, int, int], budget: int) -> None:
    """The token that moves most is the changed cell's own, under a budget of patches too; attention is cut so that only
    embedding remains."""
    config = tiny.dual_config(dinov2_max_patches=budget)
    encoder = build_encoders(config)[name]
    torch.manual_seed(2)
    module = encoder.build().eval()
    for layer in module.blocks if name == "qwen" else module.encoder.layer:
        out = (
            layer.attn.proj
            if name == "qwen"
            else layer.attention.o_proj
            if hasattr(layer.attention, "o_proj")
            else None
        )
        if out is not None:
            torch.nn.init.zeros_(out.weight)
    image = torch.rand(3, grid[1] * 14, grid[2] * 14)
    rows, columns = grid[1] // 2, grid[2] // 2
    with torch.no_grad():
        base = encoder.encode(module, *patches_of(image)).tokens
        for i, j in {(0, 0), (rows - 1, 0), (0, columns - 1), (rows // 2, columns // 2)}:
            changed = image.clone()
            cell = changed[:, i * 28 : i * 28 + 28, j * 28 : j * 28 + 28]
            cell.copy_(1 - cell)
            moved = (encoder.encode(module, *patches_of(changed)).tokens - base).norm(dim=-1)
            assert int(moved.argmax()) == i * columns + j


@pytest.mark.parametrize("name", ["qwen", "dinov2"])
def test_the_same_patches_in_another_shape_are_another_picture(name: str) -> None:
    """Fault of earlier attempts: `visual()` called without its grid, so that a picture's shape was lost."""
    encoder = build_encoders(tiny.dual_config())[name]
    torch.manual_seed(5)
    module = encoder.build().eval()
    pixel_values, wide = tiny.pixels((1, 4, 8))
    with torch.no_grad():
        found = [encoder.encode(module, pixel_values, grid).tokens for grid in (wide, torch.tensor([[1, 8, 4]]))]
    assert (found[0] - found[1]).norm(dim=-1).min() > 1e-3


@pytest.mark.parametrize("budget", [16, 1369])
def test_no_token_is_padding(budget: int) -> None:
    """Fault of earlier attempts: the shorter of the two encoders' tokens filled up with zeros."""
    encoders = build_encoders(tiny.dual_config(dinov2_max_patches=budget))
    first, grid = tiny.pixels((1, 4, 4), (1, 6, 10), (2, 4, 6))
    lengths = []
    for encoder in encoders.values():
        torch.manual_seed(6)
        module = encoder.build().eval()
        with torch.no_grad():
            found, other = (encoder.encode(module, pixels, grid) for pixels in (first, -first))
        assert (found.tokens - other.tokens).norm(dim=-1).min() > 1e-3, "every token comes of the picture"
        lengths.append(found.lengths)
    assert lengths == [[4, 15, 12]] * 2


def test_video_cells_see_the_first_frame_of_each_pair() -> None:
    encoder = build_encoders(tiny.dual_config())["dinov2"]
    module = encoder.build().eval()
    pixel_values, grid = tiny.pixels((3, 4, 6))
    frames = recover_pixels(pixel_values, (3, 4, 6), SPEC)
    stills = frames[:, :1].expand(-1, 2, -1, -1, -1)
    blocks = stills.reshape(3, 2, 3, 2, 2, 14, 3, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(72, -1)
    with torch.no_grad():
        got = encoder.encode(module, pixel_values, grid).tokens
        expected = encoder.encode(module, blocks, grid).tokens
    assert torch.allclose(got, expected, atol=1e-6)
    assert got.shape == (3 * 2 * 3, 4 * 24)


@pytest.mark.parametrize("name", ["qwen", "dinov2"])
def test_packed_batch_of_mixed_shapes_equals_one_by_one(name: str) -> None:
    config = tiny.dual_config()
    encoder = build_encoders(config)[name]
    torch.manual_seed(3)
    module = encoder.build().eval()
    grids = [(1, 4, 4), (1, 6, 10), (2, 4, 6), (1, 4, 4), (1, 10, 2)]
    pixel_values, grid_thw = tiny.pixels(*grids)
    parts = pixel_values.split([t * h * w for t, h, w in grids])
    with torch.no_grad():
        packed = encoder.encode(module, pixel_values, grid_thw)
        alone = [encoder.encode(module, p, torch.tensor([g])).tokens for p, g in zip(parts, grids, strict=True)]
    assert packed.lengths == [4, 15, 12, 4, 5]
    assert torch.allclose(packed.tokens, torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize("grids", [[(1, 4, 4)], [(1, 10, 6), (1, 4, 4)], [(3, 6, 6)], [(1, 14, 10), (2, 4, 8)]])
def test_segment_attention_equals_transformers(grids: list[tuple[int, int, int]]) -> None:
    """Fault of earlier attempts: a Python loop over every window and image; ours must change nothing else."""
    reference = tiny.qwen_model().model.visual
    ours = build_encoders(tiny.dual_config())["qwen"].build().eval()
    ours.load_state_dict(reference.state_dict())
    assert all(isinstance(block.attn, SegmentVisionAttention) for block in ours.blocks)
    pixel_values, grid = tiny.pixels(*grids)
    with torch.no_grad():
        expected = reference(pixel_values, grid_thw=grid).pooler_output
        assert torch.allclose(ours(pixel_values, grid_thw=grid).pooler_output, expected, atol=1e-5)
        encoder = build_encoders(tiny.dual_config())["qwen"]
        assert torch.allclose(encoder.encode(ours, pixel_values, grid).tokens, expected, atol=1e-5)


@pytest.mark.parametrize("grids", [[(1, 10, 6), (1, 4, 4)], [(1, 14, 10), (2, 4, 8)]])
def test_flash_attention_is_told_the_segments(
    grids: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable-length kernel itself needs a GPU; what stands for it here obeys the bounds that it is given."""
    calls = []

    def varlen(module, query, key, value, attention_mask, *, cu_seq_lens_q, max_length_q, scaling, is_causal, **more):
        calls.append((cu_seq_lens_q.tolist(), int(max_length_q)))
        assert torch.equal(cu_seq_lens_q, more["cu_seq_lens_k"]) and more["max_length_k"] == max_length_q
        assert attention_mask is None and not is_causal
        lengths = cu_seq_lens_q.diff().tolist()
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        done = [torch.nn.functional.scaled_dot_product_attention(*part, scale=scaling) for part in parts]
        return torch.cat(done, dim=2).transpose(1, 2), None

    config = tiny.dual_config()
    encoder = build_encoders(config)["qwen"]
    torch.manual_seed(4)
    module = encoder.build().eval()
    pixel_values, grid = tiny.pixels(*grids)
    with torch.no_grad():
        expected = encoder.encode(module, pixel_values, grid).tokens
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen)
        for layer in (module, *(block.attn for block in module.blocks)):
            layer.config._attn_implementation = "flash_attention_2"
        assert torch.allclose(encoder.encode(module, pixel_values, grid).tokens, expected, atol=1e-5)
    full = [0]
    for t, h, w in grids:
        full += [full[-1] + h * w * (frame + 1) for frame in range(t)]
    assert len(calls) == len(module.blocks) == 4
    for number, (bounds, longest) in enumerate(calls):
        assert longest == max(end - start for start, end in pairwise(bounds))
        if number in config.vision_config.fullatt_block_indexes:
            assert bounds == full
        else:  # windows of 56 px: 4 x 4 patches, cut at the borders
            assert longest == 16 and set(full) < set(bounds)


def test_installing_twice_changes_nothing() -> None:
    visual = tiny.qwen_model().model.visual
    install_segment_attention(visual)
    first = [block.attn for block in visual.blocks]
    install_segment_attention(visual)
    assert [block.attn for block in visual.blocks] == first


@pytest.mark.parametrize(("h", "w"), [(100, 100), (40, 50), (2, 2000), (74, 37), (4, 4)])
def test_budget_is_kept_and_shape_roughly(h: int, w: int) -> None:
    small_h, small_w = budgeted_grid(h, w, 1369)
    assert 1 <= small_h * small_w <= 1369
    if h * w <= 1369:
        assert (small_h, small_w) == (h, w)


def test_budgeted_mode_keeps_the_cell_count() -> None:
    config = tiny.dual_config(dinov2_max_patches=16)
    encoder = build_encoders(config)["dinov2"]
    module, seen = encoder.build().eval(), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.no_grad():
        tokens = encoder.encode(module, *tiny.pixels((1, 8, 12))).tokens
    assert tokens.shape == (24, 96)
    assert seen[0][2] // 14 * (seen[0][3] // 14) <= 16


def test_another_patch_size_is_refused_with_both_numbers() -> None:
    second = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=16)
    config = DualVisionConfig.from_parts(tiny.qwen_config(), second)
    with pytest.raises(ConfigError, match=r"patch size.*16.*14"):
        build_encoders(config)


class MeanColourEncoder(VisionEncoder):
    """An encoder of a user's own: each cell's mean colour, through one linear layer."""

    name = "colour"

    @property
    def output_dim(self) -> int:
        return 8

    def build(self) -> torch.nn.Module:
        return torch.nn.Linear(3, 8)

    def encode(self, module: torch.nn.Module, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> VisionTokens:
        cells = pixel_values.view(-1, 4, 3, 2 * 14 * 14).mean(dim=(1, 3))
        return VisionTokens(module(cells), tuple((t, h // 2, w // 2) for t, h, w in grid_thw.tolist()))


def test_a_users_own_encoder_comes_in_by_name() -> None:
    from model_core.model import DualVisionModel

    model = DualVisionModel(tiny.dual_config(encoder=f"{__name__}:MeanColourEncoder")).train()
    assert isinstance(model.model.second, torch.nn.Linear)
    output = model.embed_images(*tiny.pixels((1, 4, 4), (1, 2, 6)))
    assert output.weights.shape == (2, 2)
    assert any(name.startswith("model.colour.") for name in model.state_dict())


def test_unknown_encoder_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"unknown encoder.*siglip.*qwen, dinov2"):
        build_encoders(tiny.dual_config(encoder="siglip"))


def test_modules_are_transformers_own_classes() -> None:
    encoders = build_encoders(tiny.dual_config())
    assert type(encoders["dinov2"].build()) is type(AutoModel.from_config(tiny.dinov2_config()))


def test_the_tower_gets_every_index_ready_made_beside_its_pixels() -> None:
    """transformers computes positions on the grid's device: a grid on the CPU broke every image on CUDA."""
    encoder = build_encoders(tiny.dual_config())["qwen"]
    module, seen = encoder.build().eval(), []
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    pixel_values, grid = tiny.pixels((1, 4, 6))
    with torch.no_grad():
        encoder.encode(module, pixel_values, grid)
    ((args, kwargs),) = seen
    assert {"position_ids", "cu_seqlens", "cu_window_seqlens", "window_index"} <= kwargs.keys()
    used = [args[0], *(v for k, v in kwargs.items() if k != "grid_thw")]
    assert {tensor.device for tensor in used} == {pixel_values.device}
