"""The formats that are read, the README's first, and what each becomes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_core import CaptioningDataset, DualVisionDataset, MedicalVQADataset, VQADataset
from model_core.errors import DataError, DataFormatError, RecordError
from model_core.processing.images import ImageLimits
from model_core.training.data.scan import Checks, scan
from model_core.training.data.stores import StoredImage
from model_core.types import ChatMessage, ImagePart, TextPart
from tests.model_core.training.data.corpus import jpeg, row, write_rows

URL = "data:image/jpeg;base64," + base64.b64encode(jpeg()).decode()


def told(messages: list[ChatMessage]) -> list[tuple[str, list[str]]]:
    """Roles with their parts: texts as they are, pictures in brackets."""
    return [
        (one.role, [part.text if isinstance(part, TextPart) else f"[{_name(part)}]" for part in one.parts])
        for one in messages
    ]


def _name(part: ImagePart) -> str:
    if isinstance(part.image, StoredImage):
        return Path(part.image.name).name
    return "url" if isinstance(part.image, str) else "bytes"


def read(tmp_path: Path, record: Any, cls: type[DualVisionDataset] = DualVisionDataset) -> list[tuple[str, list[str]]]:
    return told(cls(write_rows(tmp_path / "data.json", [record])).conversation(0))


ASKED = [("user", ["[1.jpg]", "What is it?"]), ("assistant", ["A car."])]
LLAVA = {
    "id": "000000033471",
    "image": "train2017/1.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A car."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Red."},
    ],
}
FORMATS = {
    "vqa": (row("1.jpg"), ASKED),
    "captioning": (row("1.jpg", None), [("user", ["[1.jpg]", "Describe this image."]), ("assistant", ["A car."])]),
    "llava": (LLAVA, [*ASKED, ("user", ["Which colour?"]), ("assistant", ["Red."])]),
    "llava, image behind": (
        {"image": "1.jpg", "conversations": [{"from": "human", "value": "Is\n<image> it?"},
                                             {"from": "gpt", "value": "Yes."}]},
        [("user", ["Is", "[1.jpg]", " it?"]), ("assistant", ["Yes."])],
    ),
    "sharegpt, text alone": (
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"},
                           {"from": "gpt", "value": "Hello"}]},
        [("system", ["Be brief."]), ("user", ["Hi"]), ("assistant", ["Hello"])],
    ),
    "openai": (
        {"messages": [{"role": "developer", "content": "Be brief."},
                      {"role": "user", "content": [{"type": "text", "text": "What is it?"},
                                                   {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}]},
                      {"role": "assistant", "content": "A car."}]},
        [("system", ["Be brief."]), ("user", ["What is it?", "[url]"]), ("assistant", ["A car."])],
    ),
    "messages with images beside": (
        {"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A car."}],
         "images": ["a/1.jpg"]},
        ASKED,
    ),
    "empty image parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"},
                                                   {"type": "text", "text": "Same?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "No."}]}],
         "images": ["1.jpg", "2.jpg"]},
        [("user", ["[1.jpg]", "[2.jpg]", "Same?"]), ("assistant", ["No."])],
    ),
    "question and answer": ({"image": "1.jpg", "question": "What is it?", "answer": "A car."}, ASKED),
    "caption": ({"image": "1.jpg", "caption": "A car."},
                [("user", ["[1.jpg]", "Describe this image."]), ("assistant", ["A car."])]),
    "the cauldron": ({"images": ["1.jpg"], "texts": [{"user": "What is it?", "assistant": "A car.", "source": "x"}]},
                     ASKED),
    "the word <image> without images": (
        row(None, "What does <image> do?", "It shows a picture."),
        [("user", ["What does <image> do?"]), ("assistant", ["It shows a picture."])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_becomes_these_messages(name: str, tmp_path: Path) -> None:
    record, expected = FORMATS[name]
    assert read(tmp_path, record) == expected


BAD = {
    "a list": ([1], "invalid_record"),
    "no turns": ({"image_path": "1.jpg"}, "invalid_record"),
    "turns that are a text": ({"conversations": "hello"}, "invalid_record"),
    "an unknown role": ({"conversations": [{"role": "robot", "content": "x"}]}, "invalid_role"),
    "a role that is a list": ({"conversations": [{"role": [], "content": "x"}]}, "invalid_role"),
    "a late system turn": (
        {"messages": [{"role": r, "content": "x"} for r in ("user", "system", "assistant")]}, "invalid_role"),
    "the assistant first": (row(None, None), "invalid_role"),
    "the user last": ({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]}, "no_answer"),
    "no weight left": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]},
        "no_answer"),
    "half a weight": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0.5}]},
        "invalid_record"),
    "an empty answer": (row("1.jpg", answer=" \n"), "empty_answer"),
    "no content": ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "y"}]},
                   "invalid_record"),
    "a part of another type": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, {"role": "assistant", "content": "y"}]},
        "invalid_record"),
    "fewer places than images": (
        {"image": ["1.jpg", "2.jpg"], "conversations": [{"from": "human", "value": "<image>?"},
                                                         {"from": "gpt", "value": "x"}]}, "image_count"),
    "a place without its image": ({"conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                     {"from": "gpt", "value": "x"}]}, "image_count"),
    "an address": (row("https://example.com/1.jpg"), "remote_image"),
    "a file address": (row("file:///etc/passwd"), "remote_image"),
    "an image that is a number": (row(None) | {"image": 7}, "invalid_record"),
    "tools": (row("1.jpg") | {"tools": [{"type": "function"}]}, "tools"),
    "a call": ({"messages": [{"role": "user", "content": "x"},
                             {"role": "assistant", "content": "y", "tool_calls": [{"id": "1"}]}]}, "tools"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_can_not_be_trained_on_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    record, reason = BAD[name]
    with pytest.raises(RecordError) as caught:
        read(tmp_path, record)
    assert caught.value.reason == reason


def test_a_weight_of_0_leaves_an_answer_untrained(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
             {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}]  # fmt: skip
    data = DualVisionDataset(write_rows(tmp_path / "data.jsonl", [{"messages": turns}]))
    assert data.sample(0).trained == (False, False, False, True)


@pytest.mark.parametrize("cls", [VQADataset, MedicalVQADataset, CaptioningDataset])
def test_a_type_about_pictures_refuses_rows_without_one(cls: type[DualVisionDataset], tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no image"):
        read(tmp_path, row(None), cls)


@pytest.mark.parametrize("cls", [VQADataset, MedicalVQADataset])
def test_a_question_is_not_made_up_for_vqa(cls: type[DualVisionDataset], tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="not the user's"):
        read(tmp_path, row("1.jpg", None), cls)


def test_the_caption_prompt_is_a_setting(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.json", [row("1.jpg", None)])
    data = CaptioningDataset(path, caption_prompt="Say it.")
    assert told(data.conversation(0))[0] == ("user", ["[1.jpg]", "Say it."])


def test_format_conversations_can_be_overridden_as_in_the_readme(tmp_path: Path) -> None:
    class CustomDataset(DualVisionDataset):
        def format_conversations(self, conversations, image_path):
            question, answer = (turn["content"] for turn in conversations)
            return [
                {"role": "user", "content": [{"type": "text", "text": f"Q: {question}"},
                                             {"type": "image", "image": image_path}]},
                {"role": "assistant", "content": answer},
            ]  # fmt: skip

    (tmp_path / "1.jpg").write_bytes(jpeg())
    data = CustomDataset(write_rows(tmp_path / "data.json", [row("1.jpg")]))
    messages = data.conversation(0)
    assert told(messages) == [("user", ["Q: What is it?", "[1.jpg]"]), ("assistant", ["A car."])]
    assert messages[0].parts[1].image.read(10**6) == jpeg()


def test_a_fault_in_a_format_of_ones_own_is_a_bad_row(tmp_path: Path) -> None:
    class Broken(DualVisionDataset):
        def format_conversations(self, conversations, image_path):
            return conversations[len(conversations) - 1 :] if len(conversations) > 2 else conversations[7]

    with pytest.raises(RecordError) as caught:
        read(tmp_path, row("1.jpg"), Broken)
    assert caught.value.reason == "format_failed"
    assert isinstance(caught.value.__cause__, IndexError)
    said = str(caught.value)
    assert "Broken.format_conversations raised IndexError for data.json row 1" in said
    assert "list index out of range (test_formats.py line " in said
    assert "a list of at least one message" in said
    assert "leave the row out" in said
    assert [one.code for one in scan(Broken(tmp_path / "data.json"), Checks(ImageLimits())).errors] == ["format_failed"]


@pytest.mark.parametrize("returned", [None, 7, "words", {"role": "user", "content": "x"}, []])
def test_a_format_of_ones_own_that_returns_no_messages_is_a_bad_row(returned: Any, tmp_path: Path) -> None:
    class Broken(DualVisionDataset):
        def format_conversations(self, conversations, image_path):
            return returned

    with pytest.raises(RecordError, match=r"Broken.format_conversations returned no messages for data.json row 1") as e:
        read(tmp_path, row("1.jpg"), Broken)
    assert f"Got: {type(returned).__name__} {returned!r}. Allowed: a list" in str(e.value)


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), MemoryError(), RecordError("mine", "not this one")])
def test_what_is_not_a_fault_of_the_format_goes_through(raised: BaseException, tmp_path: Path) -> None:
    class Stopped(DualVisionDataset):
        def format_conversations(self, conversations, image_path):
            raise raised

    with pytest.raises(type(raised)) as caught:
        read(tmp_path, row("1.jpg"), Stopped)
    assert caught.value is raised


WORDS = [
    "conversations",
    "messages",
    "texts",
    "image",
    "images",
    "image_path",
    "question",
    "answer",
    "caption",
    "role",
    "from",
    "content",
    "value",
    "type",
    "text",
    "image_url",
    "url",
    "bytes",
    "path",
    "weight",
    "user",
    "assistant",
    "tools",
]
VALUES = [
    "",
    "x",
    "<image>",
    "user",
    "gpt",
    "assistant",
    "system",
    "text",
    "image",
    "image_url",
    "data:",
    "a://b",
    "\0",
]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(VALUES)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=25,
)
ROLES = st.sampled_from(["user", "assistant", "human", "gpt", "system"])
TURNS = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": st.sampled_from(VALUES) | JSON}), min_size=1, max_size=4
)
RECORDS = JSON | st.fixed_dictionaries({"messages": TURNS}, optional={"image": JSON, "tools": LEAVES})


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=RECORDS)
def test_no_record_is_worse_than_a_bad_row(record: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.json", [record])
    assert all(DualVisionDataset(path).near_keys(0))
    try:
        sample = DualVisionDataset(path).sample(0)
    except RecordError as error:
        assert error.reason
    else:
        assert any(sample.trained)


def test_lines_and_arrays_are_told_apart_by_content_and_counted_as_an_editor_does(tmp_path: Path) -> None:
    lines = "\ufeff" + json.dumps(row(None)) + "\n\n  \n" + json.dumps(row(None)) + "\r\n{broken\n"
    (tmp_path / "data.json").write_text(lines, encoding="utf-8")
    data = DualVisionDataset(tmp_path / "data.json")
    assert [data.place(i).row for i in range(len(data))] == [1, 4, 5]
    assert len(data.conversation(1)) == 2
    with pytest.raises(RecordError, match="not JSON"):
        data.conversation(2)
    write_rows(tmp_path / "x.jsonl", [row(None)]).write_text(json.dumps([row(None), row(None)], indent=2))
    assert [DualVisionDataset(tmp_path / "x.jsonl").place(i).row for i in (0, 1)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [("[{}, {]", "row 2"), ("[{} {}]", "comma"), ("[{}] x", "behind the array"), ("[" * 100_000, "row 1"),
     ("hello", "neither"), ("[]", "no row"), ("", "no row"), ('[{"a": "\udcff"}]', "row 1")],
)  # fmt: skip
def test_a_file_that_is_no_data_is_refused_in_words(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=said):
        DualVisionDataset(tmp_path / "data.json")


def test_a_line_nested_too_deeply_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"a": ' + "[" * 50_000 + "\n")
    with pytest.raises(RecordError, match="not JSON"):
        DualVisionDataset(tmp_path / "data.jsonl").conversation(0)


def test_a_line_of_100_mb_is_refused_before_it_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row(None)) + '\n{"a": "')
    with path.open("r+b") as file:
        file.truncate(100 << 20)  # a hole, which costs no disk
    with pytest.raises(DataFormatError, match="row 2 is too long"):
        DualVisionDataset(path)
