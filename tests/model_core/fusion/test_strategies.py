"""Every strategy learns in every part, fuses each image by itself, and tells the truth about its weights and arms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model_core.errors import ConfigError, InvalidRequestError
from model_core.fusion import STRATEGIES, FusionOutput, FusionStrategy, build_fusion
from model_core.fusion.base import FusionInputs, expand_rows
from model_core.model import DualVisionModel
from tests.model_core import tiny

ALL = list(STRATEGIES)
WEIGHTED = ["gated", "gated_residual", "token_gated", "static"]
LEARNED_GATE = ["gated", "gated_residual", "token_gated"]
DIMS = {"qwen": 64, "dinov2": 96}
GRIDS = ((1, 2, 3), (2, 2, 2), (1, 3, 1))  # cells; the second is a video
LENGTHS = [6, 8, 3]
IMAGE = tiny.token_id("<|image_pad|>")


def prompt(*grids: tuple[int, int, int], per_cell: int = 1) -> dict[str, Tensor]:
    """One sequence of text around images of these patch grids, with the picture's pixels."""
    ids, types = [30, 31], [0, 0]
    for t, h, w in grids:
        n = t * h * w // 4 * per_cell
        ids, types = [*ids, *[IMAGE] * n, 40], [*types, *[1] * n, 0]
    ids, types = [*ids, 50, 51, 52, 53], [*types, 0, 0, 0, 0]
    pixel_values, grid = tiny.pixels(*grids)
    return {
        "input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor([types]), "pixel_values": pixel_values,
        "image_grid_thw": grid,
    }  # fmt: skip


def strategy(name: str, **settings: object) -> FusionStrategy:
    """A trained strategy in evaluation mode."""
    return tiny.trained_model(name, **settings).fusion.eval()


def features(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(sum(LENGTHS), dim, generator=generator) for name, dim in DIMS.items()}


def alone(feats: dict[str, Tensor], image: int) -> dict[str, Tensor]:
    return {name: x.split(LENGTHS)[image] for name, x in feats.items()}


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_part_gets_a_gradient_within_three_steps_of_birth(name: str) -> None:
    """Fault of earlier attempts: DINOv2 always under no_grad. Also two zero factors, which never move."""
    model = tiny.dual_model(name).train()
    inputs = prompt((1, 4, 4), (1, 4, 6), per_cell=STRATEGIES[name].tokens_per_cell)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reached: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        reached |= {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.count_nonzero())}
        optimizer.step()
    # DINOv2's mask token is used only in its own pre-training; a softmax does not see its keys' bias.
    exempt = ("mask_token", "key.bias", "k_proj.bias")
    parts = ("model.fusion.", "model.dinov2.", "model.visual.")
    wanted = {n for n, _ in model.named_parameters() if n.startswith(parts) and not n.endswith(exempt)}
    assert {n.split(".")[1] for n in wanted} == {"fusion", "dinov2", "visual"}
    assert sorted(wanted - reached) == []


@pytest.mark.parametrize("name", ALL)
def test_dropout_is_drawn_in_training_only(name: str) -> None:
    model, (pixel_values, grid) = tiny.trained_model(name, dropout=0.5), tiny.pixels((1, 4, 6))
    with torch.no_grad():
        plain = [model.embed_images(pixel_values, grid).tokens for _ in range(2)]
        model.train()
        torch.manual_seed(0)
        drawn = [model.embed_images(pixel_values, grid).tokens for _ in range(2)]
    assert torch.equal(*plain)
    assert not torch.equal(*drawn)
    assert not torch.equal(drawn[0], plain[0])


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_are_float32_sum_to_one_and_know_no_neighbour(name: str) -> None:
    """Fault of earlier attempts: pooling across the packed axis."""
    fusion, feats = strategy(name), features()
    with torch.no_grad():
        packed = fusion(feats, GRIDS).weights
        for image, grid in enumerate(GRIDS):
            assert torch.allclose(packed[image], fusion(alone(feats, image), (grid,)).weights[0], atol=1e-6)
    assert packed.shape == (3, 2)
    assert packed.dtype == torch.float32
    assert torch.allclose(packed.sum(dim=1), torch.ones(3), atol=1e-6)
    if name != "static":
        assert not torch.allclose(packed[0], packed[1], atol=1e-5), "images are told apart"


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_stay_float32_in_bfloat16(name: str) -> None:
    fusion = strategy(name).to(torch.bfloat16)
    with torch.no_grad():
        output = fusion({n: x.to(torch.bfloat16) for n, x in features().items()}, GRIDS)
    assert output.tokens.dtype == torch.bfloat16
    assert output.weights.dtype == torch.float32
    assert torch.allclose(output.weights.sum(dim=1), torch.ones(3), atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ALL) - set(WEIGHTED)))
def test_without_a_gate_there_are_no_weights(name: str) -> None:
    assert not STRATEGIES[name].has_gate
    assert strategy(name)(features(), GRIDS).weights is None


@pytest.mark.parametrize("name", ALL)
def test_fusion_of_an_image_depends_on_that_image_alone(name: str) -> None:
    fusion, feats, other = strategy(name), features(), features(seed=1)
    n = fusion.tokens_per_cell
    mixed = {k: torch.cat([x[:6], other[k][6:14], x[14:]]) for k, x in feats.items()}  # another middle picture
    with torch.no_grad():
        before, after = (fusion(f, GRIDS).tokens.split([k * n for k in LENGTHS]) for f in (feats, mixed))
        for image, grid in enumerate(GRIDS):
            assert torch.allclose(before[image], fusion(alone(feats, image), (grid,)).tokens, atol=1e-5)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1], atol=1e-3)


@pytest.mark.parametrize("name", LEARNED_GATE)
def test_a_changed_weight_changes_the_logits(name: str) -> None:
    """Fault of earlier attempts: weights that describe a disconnected branch."""
    model, inputs = tiny.trained_model(name), prompt((1, 4, 6))
    with torch.no_grad():
        before, seen = model(**inputs).logits, model.embed_images(*tiny.pixels((1, 4, 6))).weights
        model.fusion.gate[-1].bias[1] += 3.0
        after, moved = model(**inputs).logits, model.embed_images(*tiny.pixels((1, 4, 6))).weights
    assert float(moved[0, 1] - seen[0, 1]) > 0.05
    assert not torch.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize("name", WEIGHTED)
def test_contributions_sum_to_the_tokens_less_the_bias(name: str) -> None:
    fusion = strategy(name)
    with torch.no_grad():
        output = fusion(features(), GRIDS, want_contributions=True)
    bias = fusion.output_projector.bias
    total = sum(output.contributions.values()) + (0 if bias is None else bias)
    assert list(output.contributions) == ["qwen", "dinov2"]
    assert torch.allclose(total, output.tokens, atol=1e-5)
    assert fusion(features(), GRIDS).contributions is None, "only on request"


# --- configuration ----------------------------------------------------------------------------------------------------


def test_static_weights_are_the_configured_ones() -> None:
    fresh = tiny.dual_model("static", static_weights=[0.75, 0.25])
    with torch.no_grad():
        output = fresh.fusion.eval()(feats := features(), GRIDS)
    assert output.weights.tolist() == [[0.75, 0.25]] * 3
    assert torch.allclose(output.tokens, 1.5 * feats["qwen"]), "E a_qwen scales Qwen's tokens"


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5], [1.0], [0.2, 0.3, 0.5], []])
def test_static_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"static_weights don't fit.*2 numbers from 0 to 1 that sum to 1"):
        build_fusion(tiny.dual_config("static", static_weights=weights), DIMS)


def test_static_weights_belong_to_static() -> None:
    with pytest.raises(ConfigError, match=r"static_weights need fusion='static'.*gated"):
        build_fusion(tiny.dual_config("gated", static_weights=[0.5, 0.5]), DIMS)


@pytest.mark.parametrize("name", ALL)
def test_a_bottleneck_is_refused_with_both_numbers_unless_there_is_a_residual(name: str) -> None:
    config = tiny.dual_config(name, common_dim=48)
    if STRATEGIES[name].has_residual:
        assert build_fusion(config, DIMS)(features(), GRIDS).tokens.shape[1] == 64
        return
    with pytest.raises(ConfigError, match=r"48.*64.*gated_residual, concat, cross_attention"):
        build_fusion(config, DIMS)


def test_unknown_strategy_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=rf"unknown fusion strategy.*mixed.*{', '.join(ALL)}.*package\.module:Class"):
        build_fusion(tiny.dual_config("mixed"), DIMS)


class AverageFusion(FusionStrategy):
    """A strategy of a user's own: Qwen's tokens plus a learned picture of DINOv2's mean."""

    has_residual = True

    def __init__(self, dims: dict[str, int], common_dim: int, dropout: float = 0.0) -> None:
        super().__init__(dims, common_dim, dropout)
        self.output_projector = nn.Linear(dims["dinov2"], self.llm_dim, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.output_projector.weight)

    def silent_parameters(self) -> list[Tensor]:
        return [self.output_projector.weight]

    def fuse(self, inputs: FusionInputs) -> FusionOutput:
        means = torch.stack([x.mean(0) for x in inputs.z["dinov2"].split(inputs.lengths)])
        rows = torch.arange(len(means)).float()
        index = expand_rows(rows, inputs.lengths)[:, 0].long()
        q = inputs.z["qwen"]
        return FusionOutput(q + self.output_projector(means)[index], None, q)


class NoStrategy(nn.Module):
    """A module that is not a FusionStrategy."""


def test_a_users_own_strategy_comes_in_by_name_and_is_an_identity() -> None:
    model, inputs = tiny.dual_model(f"{__name__}:AverageFusion"), prompt((1, 4, 6))
    with torch.no_grad():
        assert isinstance(model.fusion, AverageFusion)
        assert torch.equal(model(**inputs).logits, tiny.qwen_model()(**inputs).logits)
        model.fusion.output_projector.weight.normal_()
        assert not torch.allclose(model(**inputs).logits, tiny.qwen_model()(**inputs).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}:NoStrategy", r"this is no fusion strategy.*subclass of model_core\.fusion\.base\.FusionStrategy"),
        (f"{__name__}:IMAGE", "this is no fusion strategy"),
        (f"{__name__}:Missing", r"can't be imported.*Missing"),
        ("no_such_package.there:Class", r"can't be imported.*no_such_package.*Is its package installed"),
    ],
)
def test_a_name_that_leads_to_no_strategy_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_fusion(tiny.dual_config(name), DIMS)


# --- arms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", ALL)
def test_an_arm_is_z_replaced_by_its_mean_before_the_gate(name: str, removed: tuple[bool, bool]) -> None:
    fusion, feats = strategy(name), features()
    z = fusion.project(feats, sum(LENGTHS))
    by_hand = {
        n: getattr(fusion.means, n).expand_as(z[n]) if is_removed else z[n]
        for n, is_removed in zip(z, removed, strict=True)
    }
    with torch.no_grad():
        expected = fusion.fuse(FusionInputs(by_hand, GRIDS, lengths=LENGTHS))
        got = fusion(feats, GRIDS, torch.tensor([removed] * 3))
        missing = {n: None if gone else feats[n] for n, gone in zip(feats, removed, strict=True)}
        skipped = fusion(missing, GRIDS)
    for output in (got, skipped):
        assert torch.allclose(output.tokens, expected.tokens, atol=1e-6)
        assert expected.weights is None or torch.allclose(output.weights, expected.weights, atol=1e-6)


@pytest.mark.parametrize("name", ["gated", "static"])
def test_one_hot_weights_are_not_the_arm(name: str) -> None:
    """P_q and W_o have moved, and the factor E doubles the survivor (model.md, section 4)."""
    model, (pixel_values, grid) = tiny.trained_model(name), tiny.pixels((1, 4, 6))
    with torch.no_grad():
        arm = model.embed_images(pixel_values, grid, ["qwen-only"]).tokens
        if name == "static":
            model.fusion.static_weights = (1.0, 0.0)
        else:
            model.fusion.gate[-1].bias.copy_(torch.tensor([1e4, -1e4]))
        output = model.embed_images(pixel_values, grid)
    assert output.weights.tolist() == [[1.0, 0.0]]
    doubled = 2 * nn.functional.linear(model.fusion.projectors["qwen"](output.q), model.fusion.output_projector.weight)
    assert torch.allclose(output.tokens, doubled + model.fusion.output_projector.bias, atol=1e-5)
    assert float((output.tokens - arm).norm() / arm.norm()) > 0.3


@pytest.mark.parametrize("name", ALL)
def test_arms_mixed_in_one_pack_equal_each_alone(name: str) -> None:
    model, grids = tiny.trained_model(name), ((1, 4, 4), (1, 4, 6), (1, 6, 4), (1, 2, 6), (1, 4, 2))
    arms = ["qwen-only", "fused", "dinov2-only", "blind", "unfused"]
    pixel_values, grid = tiny.pixels(*grids)
    sizes = [h * w for _, h, w in grids]
    with torch.no_grad():
        packed = model.embed_images(pixel_values, grid, arms)
        parts = packed.tokens.split([n // 4 * model.fusion.tokens_per_cell for n in sizes])
        for i, pixels in enumerate(pixel_values.split(sizes)):
            own = model.embed_images(pixels, grid[i : i + 1], [arms[i]])
            assert torch.allclose(parts[i], own.tokens, atol=2e-5), arms[i]
            if packed.weights is not None:
                assert torch.allclose(packed.weights[i], own.weights[0], atol=1e-5), arms[i]


def test_no_arm_but_fused_and_dinov2_only_runs_dinov2() -> None:
    model = tiny.trained_model()
    with torch.no_grad():
        needed = {arm: model.model.needed_encoders([arm]) for arm in ("fused", "qwen-only", "dinov2-only", "blind")}
    assert needed == {"fused": ["qwen", "dinov2"], "qwen-only": ["qwen"], "dinov2-only": ["dinov2"], "blind": []}


# --- cross_attention and interleave -----------------------------------------------------------------------------------


def test_cross_attention_sees_its_own_patches_and_the_halo_and_nothing_else() -> None:
    """Patch (r, c) may move cell (i, j) exactly if it lies in rows 2i-1..2i+2 and columns 2j-1..2j+2 of the frame."""
    fusion, grid = strategy("cross_attention"), (2, 3, 4)
    torch.manual_seed(0)
    z = {"qwen": torch.randn(24, 64), "dinov2": torch.randn(24, 96)}
    with torch.no_grad():
        base = fusion.fuse(FusionInputs(z, (grid,), lengths=[24])).tokens.view(*grid, -1)
        for t, row, column in [(0, 0, 0), (0, 3, 4), (1, 5, 7), (1, 2, 3), (0, 1, 6)]:
            changed = z["dinov2"].clone()
            changed.view(*grid, 2, 2, 24)[t, row // 2, column // 2, row % 2, column % 2] += 3.0
            tokens = fusion.fuse(FusionInputs(z | {"dinov2": changed}, (grid,), lengths=[24])).tokens.view(*grid, -1)
            moved = {tuple(cell) for cell in ((tokens - base).abs().amax(-1) > 0).nonzero().tolist()}
            rows = [i for i in range(3) if 2 * i - 1 <= row <= 2 * i + 2]
            columns = [j for j in range(4) if 2 * j - 1 <= column <= 2 * j + 2]
            assert moved == {(t, i, j) for i in rows for j in columns}


def test_interleave_doubles_tokens_and_repeats_positions() -> None:
    model, inputs = tiny.trained_model("interleave"), prompt((1, 4, 6), (1, 4, 4), per_cell=2)
    with torch.no_grad():
        output = model.embed_images(inputs["pixel_values"], inputs["image_grid_thw"])
        assert output.tokens.shape == (20, 64)
        assert torch.equal(output.tokens[::2], output.q), "q_0, d_0, q_1, d_1, ..."
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        assert [len(f) for f in features] == [12, 8]
        assert torch.isfinite(model(**inputs).logits).all()
    doubled, delta = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    plain = prompt((1, 4, 6), (1, 4, 4))
    single, _ = tiny.dual_model().model.get_rope_index(
        plain["input_ids"], plain["mm_token_type_ids"], plain["image_grid_thw"]
    )
    repeats = torch.where(plain["mm_token_type_ids"][0] == 1, 2, 1)
    assert torch.equal(doubled, single.repeat_interleave(repeats, dim=2))
    assert int(delta) == int(single.max()) + 1 - doubled.shape[2]


def test_interleave_runs_on_what_the_processor_counts() -> None:
    from PIL import Image

    model, processor = tiny.trained_model("interleave"), tiny.encoder(tiny.trained_model("interleave")).processor
    inputs = processor(images=Image.effect_noise((80, 60), 90).convert("RGB"), text="<|image_pad|>what?")
    cells = int(inputs["image_grid_thw"].prod()) // 4
    assert int(inputs["mm_token_type_ids"].sum()) == 2 * cells
    assert processor._get_num_multimodal_tokens([(60, 80)])["num_image_tokens"] == [2 * cells]
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


# --- carried means ----------------------------------------------------------------------------------------------------


def z_of(model: DualVisionModel, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What enters the projectors over all batches, taken by hand."""
    rows = [int(grid.prod(1).sum()) // 4 for _, grid in batches]
    found = [model.fusion.project(model.model.encode_images(*b, DIMS), n) for b, n in zip(batches, rows, strict=True)]
    return {name: torch.cat([z[name] for z in found]) for name in DIMS}


def test_calibrate_gathers_the_exact_means_over_batches() -> None:
    model = tiny.trained_model()
    batches = [tiny.pixels((1, 4, 4)), tiny.pixels((1, 8, 6), (1, 2, 2), seed=1), tiny.pixels((2, 4, 4), seed=2)]
    assert model.calibrate(iter(batches)) == 4 + 13 + 8 == int(model.fusion.means.count)
    with torch.no_grad():
        for name, z in z_of(model, batches).items():
            assert torch.allclose(getattr(model.fusion.means, name), z.double().mean(0).float(), atol=1e-6)
    kept = model.fusion.means.qwen.clone()
    with pytest.raises(InvalidRequestError, match="no images"):
        model.calibrate([])
    assert torch.equal(model.fusion.means.qwen, kept)


def test_training_gathers_the_means_and_a_checkpoint_carries_them(tmp_path: object) -> None:
    model, batches = tiny.dual_model(), [tiny.pixels((1, 4, 4)), tiny.pixels((1, 6, 4), seed=1)]
    with torch.no_grad():
        model.train().embed_images(*batches[0])
    assert int(model.fusion.means.count) == 0, "an evaluation is no training"
    for batch in batches:
        model.embed_images(*batch)
    assert int(model.fusion.means.count) == 10
    for name, z in z_of(model, batches).items():
        assert torch.allclose(getattr(model.fusion.means, name), z.mean(0), atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = DualVisionModel.from_pretrained(tmp_path).fusion.means
    assert {n: b.tolist() for n, b in loaded.named_buffers()} == {
        n: b.tolist() for n, b in model.fusion.means.named_buffers()
    }
