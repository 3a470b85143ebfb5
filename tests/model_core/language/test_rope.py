"""Positions are the installed transformers' own, and no sequence can spoil another's."""

from __future__ import annotations

import copy
import functools
import random

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from model_core.errors import InvalidRequestError
from model_core.language.rope import IMAGE, TEXT, VIDEO, MropeLayout, mrope_positions
from tests.model_core import tiny

Grid = tuple[int, int, int]
Item = int | tuple[str, Grid] | tuple[str, Grid, float]  # tokens of text, an image, or a video with its seconds
LAYOUT = MropeLayout(merge_size=2, tokens_per_second=2)

CASES: dict[str, list[Item]] = {
    "text": [7],
    "one image": [3, ("image", (1, 8, 12)), 5],
    "image first and last": [("image", (1, 4, 4)), 2, ("image", (1, 4, 10))],
    "several images": [1, ("image", (1, 4, 6)), 2, ("image", (1, 10, 4)), 1, ("image", (1, 2, 2)), 4],
    "video": [4, ("video", (5, 4, 6), 1.0), 3],
    "slow and fast video": [
        2,
        ("video", (4, 4, 4), 0.25),
        1,
        ("video", (3, 6, 4), 2.5),
        2,
        ("video", (3, 2, 2), 1 / 3),
    ],
    "image and video": [2, ("video", (2, 4, 8), 0.5), 1, ("image", (1, 6, 6)), 3, ("video", (3, 4, 4), 1.0), 1],
    "image beside a video": [2, ("image", (1, 4, 4)), ("video", (2, 4, 4), 1.0), 1],
}


def parts(items: list[Item]) -> tuple[list[int], list[Grid], list[Grid], list[float]]:
    """Token types, image grids, video grids, seconds."""
    types: list[int] = []
    images, videos, seconds = [], [], []
    for item in items:
        if isinstance(item, int):
            types += [TEXT] * item
            continue
        t, h, w = item[1]
        types += [IMAGE if item[0] == "image" else VIDEO] * (t * h * w // 4)
        if item[0] == "image":
            images.append(item[1])
        else:
            videos.append(item[1])
            seconds.append(item[2])
    return types, images, videos, seconds


@functools.cache
def reference() -> Qwen2_5_VLModel:
    return tiny.qwen_model().model


def transformers_own(rows: list[list[Item]], mask: Tensor | None = None, pad: int = 0) -> tuple[Tensor, Tensor]:
    """The installed `get_rope_index` over rows that are left-padded to one length."""
    found = [parts(items) for items in rows]
    length = max(len(types) for types, *_ in found) + pad
    types = torch.tensor([[0] * (length - len(t)) + t for t, *_ in found])
    images, videos = (torch.tensor([g for row in found for g in row[k]]) for k in (1, 2))
    seconds = torch.tensor([s for row in found for s in row[3]])
    return reference().get_rope_index(
        torch.zeros_like(types),
        types,
        images if len(images) else None,
        videos if len(videos) else None,
        second_per_grid_ts=seconds if len(seconds) else None,
        attention_mask=mask,
    )


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str) -> None:
    expected, delta = transformers_own([CASES[case]])
    positions, own_delta = mrope_positions(*parts(CASES[case]), LAYOUT)
    assert torch.equal(positions, expected[:, 0])
    assert own_delta == int(delta)


def test_equals_transformers_for_random_sequences() -> None:
    rng = random.Random(0)
    for _ in range(60):
        items: list[Item] = []
        for _ in range(rng.randint(1, 5)):
            grid = (rng.randint(1, 4), 2 * rng.randint(1, 5), 2 * rng.randint(1, 5))
            video = ("video", grid, rng.choice([0.1, 0.5, 0.75, 1.0, 1.7]))
            items += [rng.randint(1, 6), rng.choice([("image", (1, *grid[1:])), video])]
        expected, delta = transformers_own([[*items, 2]])
        positions, own_delta = mrope_positions(*parts([*items, 2]), LAYOUT)
        assert torch.equal(positions, expected[:, 0]), items
        assert own_delta == int(delta)


@pytest.mark.parametrize("pad", [0, 3])
def test_a_left_padded_batch_equals_transformers_row_by_row(pad: int) -> None:
    rows = list(CASES.values())
    lengths = [len(parts(items)[0]) for items in rows]
    length = max(lengths) + pad
    mask = torch.tensor([[0] * (length - n) + [1] * n for n in lengths])
    expected, deltas = transformers_own(rows, mask, pad)
    model = tiny.dual_model().model
    types = torch.tensor([[0] * (length - len(t)) + t for t in (parts(items)[0] for items in rows)])
    images, videos, seconds = ([x for items in rows for x in parts(items)[k]] for k in (1, 2, 3))
    got, own_deltas = model.get_rope_index(
        torch.zeros_like(types), types, torch.tensor(images), torch.tensor(videos), torch.tensor(seconds), mask
    )
    assert torch.equal(got, expected)
    assert torch.equal(own_deltas, deltas)
    for row, items in enumerate(rows):
        alone, delta = mrope_positions(*parts(items), LAYOUT)
        assert torch.equal(got[:, row, length - lengths[row] :], alone)
        assert int(own_deltas[row]) == delta


def test_two_images_without_a_separator_follow_each_other() -> None:
    """transformers' own function takes the run for one image there; Qwen's format never has such a run."""
    positions, delta = mrope_positions(*parts([1, ("image", (1, 4, 6)), ("image", (1, 4, 4)), 1]), LAYOUT)
    assert positions[:, 1:7].tolist() == [[1] * 6, [1, 1, 1, 2, 2, 2], [1, 2, 3, 1, 2, 3]]
    assert positions[:, 7:11].tolist() == [[4] * 4, [4, 4, 5, 5], [4, 5, 4, 5]], "after max(h, w) of the first"
    assert positions[:, 11].tolist() == [6] * 3
    assert delta == 7 - 12


def test_two_videos_without_a_separator_keep_their_own_seconds() -> None:
    video = [("video", (2, 2, 2), 0.5), ("video", (2, 2, 2), 3.0)]
    positions, _ = mrope_positions(*parts([*video]), LAYOUT)
    assert positions[0].tolist() == [0, 1, 1, 7]


@pytest.mark.parametrize(
    ("types", "images", "videos", "message"),
    [
        ([0, 1, 1, 1, 1], [], [], "more image placeholders than images"),
        ([0, 2, 2], [(1, 4, 4)], [], "more image placeholders than images"),
        ([0, 1, 1, 1, 0], [(1, 4, 4)], [], r"don't match the image grids.*3 placeholders at token 1"),
        ([1] * 5, [(1, 4, 4)], [], "more image placeholders than images"),
        ([0, 1, 1, 1, 1], [(1, 4, 4), (1, 2, 2)], [], "more images than placeholders"),
        ([0, 0], [], [(1, 2, 2)], "more images than placeholders"),
    ],
)
def test_placeholders_that_do_not_fit_are_refused(
    types: list[int], images: list[Grid], videos: list[Grid], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        mrope_positions(types, images, videos, [1.0] * len(videos), LAYOUT)


def picture_prompt(grid: Grid) -> dict[str, Tensor]:
    types = [0, 0, *[1] * (grid[1] * grid[2] // 4), 0, 0]
    pixel_values, grids = tiny.pixels(grid)
    ids = torch.tensor([[tiny.token_id("<|image_pad|>") if kind else 40 + i for i, kind in enumerate(types)]])
    return {
        "input_ids": ids, "mm_token_type_ids": torch.tensor([types]), "pixel_values": pixel_values,
        "image_grid_thw": grids,
    }  # fmt: skip


def test_a_second_prefill_does_not_spoil_the_firsts_decode() -> None:
    """rope_deltas is mutable state in transformers: after B's prefill, A decodes at B's positions unless told."""
    model, first, second = tiny.trained_model(), picture_prompt((1, 8, 8)), picture_prompt((1, 2, 20))
    length = first["input_ids"].shape[1]
    _, delta = mrope_positions(first["mm_token_type_ids"][0].tolist(), [(1, 8, 8)], [], [], LAYOUT)
    token = torch.tensor([[60]])
    longer = first | {
        "input_ids": torch.cat([first["input_ids"], token], 1),
        "mm_token_type_ids": torch.cat([first["mm_token_type_ids"], torch.tensor([[0]])], 1),
    }
    with torch.no_grad():
        expected = model(**longer).logits[:, -1]
        cache = model(**first, use_cache=True).past_key_values
        model(**second, use_cache=True)
        spoilt = model(input_ids=token, past_key_values=copy.deepcopy(cache)).logits[:, -1]
        position = torch.full((3, 1, 1), length + delta)
        got = model(input_ids=token, past_key_values=cache, position_ids=position).logits[:, -1]
    assert torch.allclose(got, expected, atol=1e-4)
    assert not torch.allclose(spoilt, expected, atol=1e-2), "the fault that this guards against is gone"


def test_asking_for_positions_changes_no_state() -> None:
    model, first, second = tiny.dual_model().model, picture_prompt((1, 8, 8)), picture_prompt((1, 2, 20))
    asked = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    answers = [model.get_rope_index(**{k: one[k] for k in asked}) for one in (first, second, first)]
    assert torch.equal(answers[0][0], answers[2][0])
    assert torch.equal(answers[0][1], answers[2][1])
    assert not torch.equal(answers[0][1], answers[1][1])
    assert model.rope_deltas is None
