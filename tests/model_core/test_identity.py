"""A fresh dual model IS Qwen: logits to the bit, for text, images, video; and so is its @qwen-only."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from model_core.fusion import STRATEGIES
from model_core.model import DualVisionModel
from tests.model_core import tiny

IDENTITY = [name for name, cls in STRATEGIES.items() if cls.is_identity_at_birth]
IMAGE, VIDEO = tiny.token_id("<|image_pad|>"), tiny.token_id("<|video_pad|>")
START, END = tiny.token_id("<|vision_start|>"), tiny.token_id("<|vision_end|>")


def conversation(*media: tuple[str, tuple[int, int, int]]) -> dict[str, Tensor]:
    """Text around the given images and videos, as a model takes it."""
    ids, types, inputs = [30, 31, 32], [0, 0, 0], {}
    for kind, (t, h, w) in media:
        n = t * h * w // 4
        token, number = (IMAGE, 1) if kind == "image" else (VIDEO, 2)
        ids += [START, *[token] * n, END, 40]
        types += [0, *[number] * n, 0, 0]
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        grids = [g for k, g in media if k == kind]
        if grids:
            inputs[pixels], inputs[grid] = tiny.pixels(*grids)
    if any(kind == "video" for kind, _ in media):
        inputs["second_per_grid_ts"] = torch.tensor([1.0])
    return {"input_ids": torch.tensor([[*ids, 50, 51]]), "mm_token_type_ids": torch.tensor([[*types, 0, 0]]), **inputs}


CASES = {
    "text": conversation(),
    "one image": conversation(("image", (1, 8, 8))),
    "two images of different shapes": conversation(("image", (1, 4, 10)), ("image", (1, 6, 6))),
    "video": conversation(("video", (3, 4, 6))),
    "image and video": conversation(("image", (1, 4, 4)), ("video", (2, 4, 4))),
}


def logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    if "pixel_values" not in inputs and "pixel_values_videos" not in inputs:
        inputs = {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fusion", IDENTITY)
def test_fresh_model_equals_qwen(fusion: str, case: str) -> None:
    expected = logits(tiny.qwen_model(), CASES[case])
    assert torch.equal(logits(tiny.dual_model(fusion), CASES[case]), expected)


def test_interleave_says_that_it_is_no_identity() -> None:
    assert "interleave" not in IDENTITY


@pytest.mark.parametrize("common_dim", [64, 100])
def test_wider_common_dim_is_still_an_identity(common_dim: int) -> None:
    expected = logits(tiny.qwen_model(), CASES["one image"])
    assert torch.equal(logits(tiny.dual_model(common_dim=common_dim), CASES["one image"]), expected)


GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_equals_qwen(case: str) -> None:
    expected = tiny.qwen_model().generate(**CASES[case], **GREEDY)
    assert torch.equal(tiny.dual_model().generate(**CASES[case], **GREEDY), expected)


def fused(model: DualVisionModel, arm: str) -> Tensor:
    with torch.no_grad():
        return model.embed_images(*tiny.pixels((1, 8, 8), (1, 4, 6)), [arm, arm]).tokens


@pytest.mark.parametrize("fusion", IDENTITY)
def test_fresh_qwen_only_is_qwen_and_trained_is_not(fusion: str) -> None:
    fresh, trained = tiny.dual_model(fusion), tiny.trained_model(fusion)
    assert torch.equal(fused(fresh, "qwen-only"), fused(fresh, "unfused"))
    assert not torch.allclose(fused(trained, "qwen-only"), fused(trained, "unfused"), atol=1e-3)


@pytest.mark.parametrize("fusion", IDENTITY)
def test_a_fresh_qwen_only_has_qwens_logits_to_the_bit(fusion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, trained = tiny.dual_model(fusion), tiny.trained_model(fusion)
    for model in (fresh, trained):
        embed = partial(model.model.embed_images, arms=["qwen-only"])
        monkeypatch.setattr(model.model, "embed_images", embed)
    expected = logits(tiny.qwen_model(), CASES["one image"])
    assert torch.equal(logits(fresh, CASES["one image"]), expected)
    assert not torch.allclose(logits(trained, CASES["one image"]), expected, atol=1e-3), "the arm is taken"


@pytest.mark.parametrize("fusion", list(STRATEGIES))
def test_unfused_is_qwens_own_tokens_whatever_was_trained(fusion: str) -> None:
    model, per_cell = tiny.trained_model(fusion), STRATEGIES[fusion].tokens_per_cell
    pixel_values, grid = tiny.pixels((1, 8, 8), (1, 4, 6))
    with torch.no_grad():
        own = model.model.visual(pixel_values, grid_thw=grid).pooler_output
    assert torch.equal(fused(model, "unfused"), own.repeat_interleave(per_cell, dim=0))


@pytest.mark.parametrize("fusion", list(STRATEGIES))
def test_a_trained_model_differs_under_every_arm(fusion: str) -> None:
    model = tiny.trained_model(fusion)
    arms = ("fused", "qwen-only", "dinov2-only", "blind", "unfused")
    tokens = [fused(model, arm) for arm in arms]
    for i, first in enumerate(tokens):
        for second in tokens[i + 1 :]:
            assert not torch.allclose(first, second, atol=1e-4)


def test_blind_does_not_depend_on_the_picture() -> None:
    model = tiny.trained_model()
    with torch.no_grad():
        one, two = (model.embed_images(*tiny.pixels((1, 4, 6), seed=s), ["blind"]).tokens for s in (1, 2))
    assert torch.equal(one, two)


def test_a_silent_second_encoder_is_not_run() -> None:
    """Fault of earlier attempts: weights that describe a disconnected branch."""
    model, calls = tiny.dual_model(), []
    model.model.dinov2.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.embed_images(*tiny.pixels((1, 4, 4)))
    assert calls == []
    model.embed_images(*tiny.pixels((1, 4, 4)))
    assert calls == [1], "in training it must run, or its projector never gets a gradient"


@pytest.mark.parametrize("case", ["one image", "two images of different shapes", "video", "image and video"])
def test_generate_reads_the_fused_tokens(case: str) -> None:
    """Fault of earlier attempts: fused tokens computed and then thrown away by `generate`."""
    model = tiny.trained_model()
    before = model.generate(**CASES[case], **GREEDY)
    with torch.no_grad():
        model.fusion.output_projector.weight.neg_()
    assert not torch.equal(model.generate(**CASES[case], **GREEDY), before)


def test_the_gate_changes_the_logits() -> None:
    model, inputs = tiny.trained_model(), CASES["one image"]
    before = logits(model, inputs)
    with torch.no_grad():
        model.fusion.gate[-1].bias[1] += 2.0
    assert not torch.allclose(logits(model, inputs), before, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_it_stays_qwen_to_the_bit_behind_an_engine(case: str) -> None:
    """Serving once swapped the patch embedding for a product, and the loaded model was Qwen but for rounding."""
    encoder = tiny.encoder(tiny.dual_model())
    assert torch.equal(logits(encoder.model, CASES[case]), logits(tiny.qwen_model(), CASES[case]))
