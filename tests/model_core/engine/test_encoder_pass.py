"""Every encoder computes what it lacks, once, and what comes out lies in the pictures' order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from model_core.engine.encoder_cache import EncoderCache
from model_core.engine.encoder_pass import CudaLanes, EncoderInput, EncoderPass, Forward, OneLane
from model_core.types import Arm
from tests.model_core import tiny

GRID = (1, 4, 4)


def picture(number: int) -> EncoderInput:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 3 * 2 * 14 * 14), dtype=np.uint8)
    return EncoderInput(b"%d" % number, GRID, pixels)


class Watched:
    """One lane that remembers which encoders ran over how many patches; it can break the result of one."""

    def __init__(self, broken: str = "") -> None:
        self.ran: list[str] = []
        self.broken = broken

    def run(self, forwards: Mapping[str, Forward]) -> tuple[dict[str, Tensor], Callable[[], dict[str, float]]]:
        self.ran += forwards
        ticks = itertools.count()
        out, seconds = OneLane(lambda: float(next(ticks))).run(forwards)
        if self.broken in out:
            out[self.broken][0] = float("nan")
        return out, seconds


def build(lanes: Watched | CudaLanes | None = None) -> EncoderPass:
    encoder = tiny.encoder()
    return EncoderPass(encoder.model, encoder.format.patches, EncoderCache(2**20), lambda: 0.0, lanes)


def run(one: EncoderPass, numbers: list[int], arms: list[Arm]) -> tuple[dict[str, Tensor], dict[str, float]]:
    with torch.inference_mode():
        return one.run([picture(n) for n in numbers], arms)


def test_a_picture_that_comes_twice_is_computed_once_and_kept() -> None:
    lanes = Watched()
    one = build(lanes)
    features, spent = run(one, [1, 2, 1], ["fused"] * 3)
    assert lanes.ran == ["qwen", "dinov2"]
    assert one.num_images == 2 * 2
    assert spent == {"qwen": 1.0, "dinov2": 1.0} == one.seconds
    for tokens in features.values():
        first, second, third = tokens.split(4)
        assert torch.equal(first, third)
        assert not torch.equal(first, second)
    again, spent = run(one, [2], ["fused"])
    assert lanes.ran == ["qwen", "dinov2"], "all of it was kept"
    assert spent == {"qwen": 0.0, "dinov2": 0.0}
    assert all(torch.equal(again[name], tokens.split(4)[1]) for name, tokens in features.items())


def test_an_arm_leaves_its_encoder_out_and_zeros_in_its_place() -> None:
    lanes = Watched()
    features, _ = run(build(lanes), [1, 2], ["qwen-only", "fused"])
    assert not features["dinov2"][:4].any()
    assert features["dinov2"][4:].any()
    assert features["qwen"][:4].any()
    lanes = Watched()
    features, _ = run(build(lanes), [1], ["qwen-only"])
    assert lanes.ran == ["qwen"] == list(features)


def test_what_is_not_finite_is_given_out_but_not_kept() -> None:
    one = build(Watched(broken="dinov2"))
    features, _ = run(one, [1, 2], ["fused"] * 2)
    assert not torch.isfinite(features["dinov2"][0]).all()
    assert one.features.get("dinov2", b"1") is None
    assert one.features.get("dinov2", b"2") is not None
    assert one.features.get("qwen", b"1") is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_lanes_of_a_gpu_give_what_one_lane_gives() -> None:
    encoder = tiny.encoder()
    model = encoder.model.to("cuda")
    plain, lanes = (
        EncoderPass(model, encoder.format.patches, EncoderCache(0), lambda: 0.0, found)
        for found in (OneLane(lambda: 0.0), CudaLanes(torch.device("cuda")))
    )
    expected, _ = run(plain, [1, 2, 3], ["fused"] * 3)
    for _ in range(5):
        features, spent = run(lanes, [1, 2, 3], ["fused"] * 3)
        assert all(torch.allclose(features[name], tokens, atol=1e-4) for name, tokens in expected.items())
        assert set(spent) == {"qwen", "dinov2"}
