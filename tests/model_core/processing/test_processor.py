"""The processor gives the model what transformers' own would, in batches, with videos, and after a round trip."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model_core.errors import ImageError, InvalidRequestError
from model_core.model import DualVisionModel
from model_core.processing.batch import InputFormat, normalise_pixels, prepare_inputs
from model_core.processing.processor import DualVisionProcessor
from model_core.types import ChatMessage, ImagePart, TextPart, VideoPart
from tests.model_core import tiny

IMAGE, VIDEO, PAD = (tiny.token_id(t) for t in ("<|image_pad|>", "<|video_pad|>", "<|endoftext|>"))


def picture(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def greedy(model: DualVisionModel, inputs: dict[str, Tensor]) -> list[list[int]]:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def test_a_left_padded_batch_generates_what_each_text_does_alone() -> None:
    model, processor = tiny.trained_model(), tiny.processor()
    pictures = [picture(0), picture(1, 40, 120), picture(2, 150, 50)]
    texts = ["<|image_pad|>what is this?", "hi", "a<|image_pad|> or <|image_pad|>, which of the two?"]
    inputs = processor(images=pictures, text=texts)
    mask = inputs["attention_mask"]
    assert mask.sum(1).unique().numel() == 3, "three lengths"
    assert all(row.tolist() == sorted(row.tolist()) for row in mask), "padding is on the left"
    assert (inputs["input_ids"][mask == 0] == PAD).all()
    assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == IMAGE).long())
    together = greedy(model, inputs)
    for row, (text, own) in enumerate(zip(texts, ([pictures[0]], None, pictures[1:]), strict=True)):
        assert greedy(model, processor(images=own, text=text))[0] == together[row], text


def test_right_padding_and_one_text_without_images() -> None:
    inputs = tiny.processor()(text=["ab", "c"], padding_side="right")
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert int(inputs["input_ids"][1, 1]) == PAD
    assert set(tiny.processor()(text="c")) == {"input_ids", "attention_mask", "mm_token_type_ids"}


@pytest.mark.parametrize("size", [(90, 60), (28, 200), (500, 333), (2, 3)])
def test_pixel_values_equal_transformers_to_the_bit(size: tuple[int, int]) -> None:
    own, image = tiny.processor(), picture(3, *size)
    reference = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)([image], return_tensors="pt")
    got = own(images=[image])
    assert torch.equal(got["pixel_values"], reference["pixel_values"])
    assert torch.equal(got["image_grid_thw"], reference["image_grid_thw"])
    assert own._get_num_multimodal_tokens([size[::-1]]) == {
        "num_image_tokens": [len(got["pixel_values"]) // 4],
        "num_image_patches": [len(got["pixel_values"])],
    }
    assert own._get_num_multimodal_tokens() == {"num_image_tokens": [], "num_image_patches": []}


def test_videos_are_lists_of_frames_with_their_own_rate() -> None:
    frames = [picture(i, 64, 64) for i in range(5)]
    processor = tiny.processor()
    inputs = processor(text="<|video_pad|> or <|video_pad|>", videos=[frames[:3], frames], fps=[1.0, 4.0])
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 4], [3, 4, 4]], "three frames are two pairs"
    assert inputs["second_per_grid_ts"].tolist() == [2.0, 0.5]
    assert int((inputs["input_ids"] == VIDEO).sum()) == 8 + 12
    assert set(inputs["mm_token_type_ids"].flatten().tolist()) == {0, 2}
    pairs = inputs["pixel_values_videos"][:32].view(2, 16, 3, 2, 14 * 14)
    still = processor(images=[frames[2]])["pixel_values"].view(16, 3, 2, 14 * 14)
    assert torch.equal(pairs[1], still), "the last frame is repeated to fill its pair"
    assert not torch.equal(pairs[0, :, :, 0], pairs[0, :, :, 1])
    assert len(greedy(tiny.trained_model(), inputs)[0]) == 8


@pytest.mark.parametrize("media", ["image", "video"])
def test_generate_on_the_processor_equals_the_engines_inputs(media: str) -> None:
    """Two ways from a conversation to a model's inputs, one result."""
    processor, model = tiny.processor(), tiny.trained_model()
    fmt = InputFormat(processor.tokenizer, processor.special, processor.patch_spec, model.model.mrope_layout)
    frames = tuple(picture(i, 64, 64) for i in range(3))
    part = ImagePart(frames[0]) if media == "image" else VideoPart(frames, 4.0)
    ours = prepare_inputs([ChatMessage("user", (part, TextPart("what?")))], fmt)
    content = [
        {"type": media, media: frames[0] if media == "image" else list(frames)},
        {"type": "text", "text": "what?"},
    ]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    given = {"images": frames[0]} if media == "image" else {"videos": [frames], "fps": 4.0}
    theirs = processor(text=prompt, **given)
    assert theirs["input_ids"][0].tolist() == ours.input_ids
    assert theirs["mm_token_type_ids"][0].tolist() == ours.token_types
    key = "pixel_values" if media == "image" else "pixel_values_videos"
    assert torch.equal(theirs[key], normalise_pixels(ours.pixels, fmt.patches, torch.device("cpu")))
    asked = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions, delta = model.model.get_rope_index(**{k: theirs[k] for k in asked if k in theirs})
    assert torch.equal(positions[:, 0], ours.positions)
    assert int(delta) == ours.delta


def conversation(*parts: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}]


def test_apply_chat_template_tokenises_pictures_and_videos() -> None:
    processor = tiny.processor()
    image, video = {"type": "image", "image": picture(0)}, {"type": "video", "video": [picture(1), picture(2)]}
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    one = processor.apply_chat_template(conversation(image, "what?"), **options)
    text = processor.apply_chat_template(conversation(image, "what?"), add_generation_prompt=True)
    expected = processor(images=[picture(0)], text=text)
    assert one.keys() == expected.keys()
    assert all(torch.equal(one[key], expected[key]) for key in expected)
    many = processor.apply_chat_template([conversation("hi"), conversation(video, image, "?")], **options)
    assert many["input_ids"].shape[0] == 2
    assert many["video_grid_thw"].tolist() == [[1, 4, 6]]
    assert many["image_grid_thw"].tolist() == [[1, 4, 6]]
    only = processor.apply_chat_template([conversation(video), conversation(video, video)], **options)
    assert len(only["video_grid_thw"]) == 3


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"text": "<|image_pad|>"}, InvalidRequestError, "more image placeholders than images"),
        ({"text": "none", "images": [picture(0)]}, InvalidRequestError, "more images than placeholders"),
        ({"text": "<|image_pad|>", "videos": [[picture(0)]]}, InvalidRequestError, "more image placeholders"),
        ({"text": "<|video_pad|>", "videos": [[]]}, InvalidRequestError, "no frames"),
        ({"text": "<|image_pad|>", "images": ["/etc/passwd"]}, ImageError, "not opened here"),
        ({"text": "<|image_pad|>", "images": [b"GIF89a"]}, ImageError, "GIF"),
        ({"text": "<|image_pad|>", "images": [np.zeros((4, 4, 3))]}, ImageError, r"Image\.fromarray"),
        ({"text": "a", "return_tensors": "np"}, InvalidRequestError, r"only PyTorch.*np.*pt"),
    ],
)
def test_what_does_not_fit_is_a_clear_error(given: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny.processor()(**given)


@pytest.mark.parametrize("fusion", ["gated", "interleave"])
def test_round_trip_through_a_folder(fusion: str, tmp_path: Path) -> None:
    first, config = tiny.processor(max_pixels=84 * 84), tiny.dual_config(fusion)
    first.tokens_per_cell = 2 if fusion == "interleave" else 1
    config.save_pretrained(tmp_path)
    first.save_pretrained(tmp_path)
    second = DualVisionProcessor.from_pretrained(tmp_path)
    assert second.patch_spec == first.patch_spec
    assert second.tokens_per_cell == first.tokens_per_cell
    assert second.special == first.special
    assert second.chat_template == first.chat_template
    options = {"tokenize": True, "return_dict": True}
    both = [p.apply_chat_template(conversation({"type": "image", "image": picture(4)}, "x"), **options)
            for p in (first, second)]  # fmt: skip
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])
