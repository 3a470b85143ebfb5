"""Labels cover exactly the assistant's words and the end of its turns, on six conversations worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model_core import CaptioningDataset, DualVisionDataset
from model_core.processing.batch import prepare_inputs
from model_core.training.data.collate import encode_sample, pack
from model_core.training.data.packs import PackedBatch, SampleRef
from tests.model_core import tiny
from tests.model_core.training.data.corpus import jpeg, row, tiny_format, write_rows

FORMAT = tiny_format()
END = "<|im_end|>"
#: A 56 x 56 picture: 4 x 4 patches, 2 x 2 tokens.
PICTURE = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
KIND = "<|im_start|>system\nBe kind.<|im_end|>\n"


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def talk(*turns: dict[str, Any], image: str | None = None) -> dict[str, Any]:
    return {"conversations": list(turns)} | ({"image": image} if image else {})


# Every text of a sample in order, trained or not: what is in a pair's second place must be labels, and nothing else.
BY_HAND: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "one turn": (
        talk(turn("user", "Hi?"), turn("assistant", "Hello.")),
        [(f"{KIND}<|im_start|>user\nHi?{END}\n<|im_start|>assistant\n", f"Hello.{END}"), ("\n", "")],
    ),
    "with a picture": (
        row("1.jpg", "What?", "A car."),
        [(f"{KIND}<|im_start|>user\n{PICTURE}What?{END}\n<|im_start|>assistant\n", f"A car.{END}"), ("\n", "")],
    ),
    "three turns, the middle one silent": (
        talk(turn("user", "a"), turn("assistant", "bb"), turn("user", "c"), turn("assistant", "dd") | {"weight": 0},
             turn("user", "e"), turn("assistant", "ff")),
        [(f"{KIND}<|im_start|>user\na{END}\n<|im_start|>assistant\n", f"bb{END}"),
         (f"\n<|im_start|>user\nc{END}\n<|im_start|>assistant\ndd{END}\n<|im_start|>user\ne{END}\n<|im_start|>assistant\n",
          f"ff{END}"), ("\n", "")],
    ),
    "a system prompt of its own": (
        talk(turn("system", "Be brief."), turn("user", "assistant\nno"), turn("assistant", "user\nyes")),
        [(f"<|im_start|>system\nBe brief.{END}\n<|im_start|>user\nassistant\nno{END}\n<|im_start|>assistant\n",
          f"user\nyes{END}"), ("\n", "")],
    ),
    "a caption": (
        row("1.jpg", None, "A red car."),
        [(f"{KIND}<|im_start|>user\n{PICTURE}Describe this image.{END}\n<|im_start|>assistant\n", f"A red car.{END}"),
         ("\n", "")],
    ),
    "two pictures, the second later": (
        talk(turn("user", "<image>\nWhat?"), turn("assistant", "Car."), turn("user", "And <image>\nthis?"),
             turn("assistant", "Bus.")) | {"images": ["1.jpg", "1.jpg"]},
        [(f"{KIND}<|im_start|>user\n{PICTURE}What?{END}\n<|im_start|>assistant\n", f"Car.{END}"),
         (f"\n<|im_start|>user\nAnd{PICTURE}this?{END}\n<|im_start|>assistant\n", f"Bus.{END}"), ("\n", "")],
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "1.jpg").write_bytes(jpeg(size=(56, 56)))
    return tmp_path


def one(folder: Path, record: dict[str, Any]) -> PackedBatch:
    kind = CaptioningDataset if "image_path" in record and len(record["conversations"]) == 1 else DualVisionDataset
    sample = kind(write_rows(folder / "data.json", [record])).sample(0)
    return pack([SampleRef("data:0", "data", 0)], [encode_sample(sample, FORMAT, 10**6)])


def ids(text: str) -> list[int]:
    return tiny.byte_tokenizer().encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", BY_HAND)
def test_labels_are_the_assistants_words_and_ends_alone(name: str, folder: Path) -> None:
    record, spans = BY_HAND[name]
    made = one(folder, record)
    expected_ids = [token for silent, trained in spans for token in ids(silent) + ids(trained)]
    expected = [label for silent, trained in spans for label in [-100] * len(ids(silent)) + ids(trained)]
    assert made.input_ids.tolist() == expected_ids
    assert made.labels.tolist() == expected
    assert made.num_label_tokens == sum(len(ids(trained)) for _, trained in spans)


def test_a_sample_is_what_serving_makes_of_the_same_messages(folder: Path) -> None:
    """Training and prefill must not differ by a token, a position or a pixel."""
    record = BY_HAND["two pictures, the second later"][0]
    made = one(folder, record)
    messages = DualVisionDataset(write_rows(folder / "x.json", [record])).conversation(0)
    served = prepare_inputs(messages, FORMAT)
    prompt = ids("<|im_start|>assistant\n")
    assert served.input_ids == made.input_ids.tolist() + prompt
    assert torch.equal(served.positions[:, : -len(prompt)], made.position_ids)
    assert (served.pixels == made.pixels).all()
    assert served.grids == made.grids == ((1, 4, 4), (1, 4, 4))


def test_a_pack_keeps_samples_apart(folder: Path) -> None:
    records = [BY_HAND["with a picture"][0], BY_HAND["one turn"][0], BY_HAND["two pictures, the second later"][0]]
    alone = [one(folder, record) for record in records]
    data = DualVisionDataset(write_rows(folder / "data.json", records))
    samples = [encode_sample(data.sample(i), FORMAT, 10**6) for i in range(3)]
    made = pack([SampleRef(f"data:{i}", "data", i) for i in range(3)], samples)
    assert made.sample_lengths == tuple(len(one.input_ids) for one in alone)
    assert made.images_per_sample == (1, 0, 2)
    assert made.grids == alone[0].grids + alone[2].grids
    assert made.position_ids.shape == (3, len(made.input_ids))
    assert torch.equal(made.input_ids, torch.cat([one.input_ids for one in alone]))
    assert torch.equal(made.labels, torch.cat([one.labels for one in alone]))
    assert torch.equal(made.position_ids, torch.cat([one.position_ids for one in alone], dim=1))
    assert made.num_label_tokens == sum(one.num_label_tokens for one in alone)
    assert made.pixels.dtype.name == "uint8"
