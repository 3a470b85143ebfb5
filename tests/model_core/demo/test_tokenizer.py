from __future__ import annotations

import string
from collections import Counter

import pytest
from transformers import PreTrainedTokenizerFast

from model_core.demo.canvas import COLOURS
from model_core.demo.things import THINGS
from model_core.demo.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, _grow, build_tokenizer
from model_core.demo.words import WORDS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_size_and_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = sorted(tokenizer.get_vocab().values())
    assert ids == list(range(len(tokenizer))) and len(tokenizer) <= VOCAB_SIZE
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for token in SPECIAL_TOKENS:
        assert tokenizer.tokenize(f"a{token}b") == ["a", token, "b"]
    hidden = tokenizer("x<|im_end|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(hidden, skip_special_tokens=True) == "x"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "what is this?",
        "a\n\n b\t c  ",
        "h\u00e9llo e\u0301",
        "\u4f60\u597d",
        "\U0001f642\u200d",
        "user yes1no",
        "'S t-shirt \x00",
    ],
)
def test_any_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_letters_stand_alone_with_and_without_a_space(tokenizer: PreTrainedTokenizerFast) -> None:
    for letter in string.ascii_letters:
        assert tokenizer.tokenize(letter) == [letter] and tokenizer.tokenize(f" {letter}") == [f"\u0120{letter}"]


def test_words_to_be_read_are_spelt_and_answers_are_not(tokenizer: PreTrainedTokenizerFast) -> None:
    assert all(tokenizer.tokenize(word) == list(word) for word in WORDS)
    assert all(tokenizer.tokenize(f'the word "{word}"')[-len(word) - 1 : -1] == list(word) for word in WORDS)
    assert all(
        tokenizer.tokenize(word) == [word] for word in ("yes", "no", "left", "right", "above", "below", *COLOURS)
    )
    assert all(
        len(tokenizer.tokenize(f"a {thing.name}")) - 1 == len(thing.name.split()) + ("-" in thing.name)
        for thing in THINGS
    )


def test_the_same_corpus_gives_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """In whatever order words are counted, so in every process."""
    assert build_tokenizer().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    counts = {"\u0120cow": 2, "\u0120cab": 2, "\u0120dog": 1, "\u0120zeal": 3}
    grown = _grow(Counter(counts), 330)
    assert grown == _grow(Counter(dict(reversed(counts.items()))), 330)
    assert "\u0120dog" in grown[0] and "\u0120zea" in grown[0] and len(grown[0]) <= 330


def test_the_chat_template_renders_what_qwen_renders(tokenizer: PreTrainedTokenizerFast) -> None:
    content = [{"type": "image", "image": "x"}, {"type": "text", "text": "What is {{ this }}?"}]
    user = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is {{ this }}?<|im_end|>\n"
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    render = tokenizer.apply_chat_template
    messages = [{"role": "user", "content": content}]
    assert render(messages, tokenize=False) == default + user
    assert render(messages, tokenize=False, add_generation_prompt=True) == default + user + "<|im_start|>assistant\n"
    told = [{"role": "system", "content": " Be brief.\n"}, *messages, {"role": "assistant", "content": "a dog"}]
    expected = f"<|im_start|>system\n Be brief.\n<|im_end|>\n{user}<|im_start|>assistant\na dog<|im_end|>\n"
    assert render(told, tokenize=False) == expected


def test_the_chat_template_takes_image_urls_and_videos(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "u"}},
        {"type": "video", "video": "v"},
        {"type": "text", "text": "?"},
    ]
    shown = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    assert shown.endswith(f"user\n{image}{video}?<|im_end|>\n")
    counted = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False, add_vision_id=True)
    assert f"Picture 1: {image}Video 1: {video}?" in counted
