"""Pictures and questions made from numbers: the same again from the same, others from others."""

from __future__ import annotations

from io import BytesIO

import pytest
from PIL import Image

from model_core.analysis.workload import GREEDY, SamplingLoad, Workload, draw_picture


def test_every_request_has_a_picture_of_its_own() -> None:
    items = Workload(image_size=56).items(3, 4)
    assert [question.split(":")[0] for question, _ in items] == ["Question 3", "Question 4", "Question 5", "Question 6"]
    assert len({jpeg for _, jpeg in items}) == 4
    assert items == Workload(image_size=56).items(3, 4)


def test_another_seed_shares_no_picture() -> None:
    one, other = (Workload(image_size=56, seed=seed).items(0, 3) for seed in (1, 2))
    assert not {jpeg for _, jpeg in one} & {jpeg for _, jpeg in other}


def test_same_and_text() -> None:
    assert len({jpeg for _, jpeg in Workload(kind="same", image_size=56).items(0, 3)}) == 1
    assert {jpeg for _, jpeg in Workload(kind="text").items(0, 3)} == {None}


def test_each_request_is_sampled_with_a_seed_of_its_own() -> None:
    assert GREEDY.fields(3) == SamplingLoad(seed=9).fields(3) == {"temperature": 0}
    assert SamplingLoad(0.7, top_p=0.9).fields(3) == {"temperature": 0.7, "top_p": 0.9, "top_k": 0}
    found = SamplingLoad(1.0, top_k=50, seed=9).fields(3)
    assert found == {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "seed": 12}


@pytest.mark.parametrize("size", [1, 8, 57, 224])
def test_a_picture_is_a_jpeg_of_its_size(size: int) -> None:
    image = Image.open(BytesIO(draw_picture(7, size)))
    assert (image.format, image.size) == ("JPEG", (size, size))
