"""Tokens to text without broken characters or leaked stop strings."""

from __future__ import annotations

import random

import pytest

from model_core.engine.detokenizer import Detokenizer, bytes_of, text_of
from tests.model_core import tiny

TOKENIZER = tiny.byte_tokenizer()
EMOJI = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # a family of three, joined
ALPHABET = [
    "a",
    "b",
    " ",
    "\n",
    "\u00e9",
    "e\u0301",
    "\u4e2d\u6587",
    "\uac00",
    "\u0928\u093f",
    "\U0001f600",
    EMOJI,
    "\ufb01",
]


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)


def stream(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The pieces shown, as the engine asks for them, and whether a stop string ended it."""
    detokenizer, pieces = Detokenizer(TOKENIZER, stop), []
    for token in ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.is_stopped:
            break
    return [*pieces, detokenizer.finish()], detokenizer.is_stopped


@pytest.mark.parametrize("character", ALPHABET)
def test_a_character_comes_whole_with_its_last_byte(character: str) -> None:
    pieces, _ = stream(ids_of(character))
    assert "".join(pieces) == character
    ends, at = set(), 0
    for one in character:
        at += len(one.encode())
        ends.add(at - 1)
    assert {i for i, piece in enumerate(pieces) if piece} == ends
    assert "\ufffd" not in "".join(pieces)


def test_streamed_text_equals_the_full_decode_for_random_text() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices(ALPHABET, k=rng.randint(0, 12)))
        pieces, _ = stream(ids_of(text))
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_streamed_text_equals_the_full_decode_for_random_bytes() -> None:
    """A model may produce any bytes: what is no UTF-8 becomes U+FFFD, as in a decode of the whole."""
    rng, some = random.Random(1), ids_of("ab\u00e9\u4e2d\U0001f600\ufffd") + list(range(len(tiny.SPECIAL)))
    for _ in range(300):
        ids = rng.choices([*some, rng.randrange(len(TOKENIZER))], k=rng.randint(1, 16))
        pieces, _ = stream(ids)
        assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_an_unfinished_character_is_shown_at_the_end_only() -> None:
    pieces, _ = stream(ids_of("a\U0001f600")[:-1])
    assert pieces == ["a", "", "", "", "\ufffd"]


def test_special_tokens_are_silent() -> None:
    ids = [*ids_of("a"), tiny.token_id("<|im_end|>"), tiny.token_id("<|image_pad|>"), *ids_of("b")]
    assert "".join(stream(ids)[0]) == "ab"


def test_a_stop_string_across_token_borders_is_never_shown() -> None:
    pieces, is_stopped = stream(ids_of("one STOP two"), ("STOP",))
    assert is_stopped
    assert "".join(pieces) == "one "


def test_the_beginning_of_a_stop_string_is_held_back_and_released() -> None:
    pieces, is_stopped = stream(ids_of("a STO! b"), ("STOP",))
    assert pieces == ["a", " ", "", "", "", "STO!", " ", "b", ""]
    assert not is_stopped
    pieces, is_stopped = stream(ids_of("a STO"), ("STOP",))
    assert (pieces[-1], is_stopped) == ("STO", False), "what was held back comes out at the end"


def test_a_stop_string_that_overlaps_itself_is_found() -> None:
    assert "".join(stream(ids_of("xaaab"), ("aab",))[0]) == "xa"
    assert "".join(stream(ids_of("ababac"), ("abac",))[0]) == "ab"


def test_the_first_of_several_stop_strings_wins() -> None:
    for text, stops, shown in [
        ("hello world", ("wor", "lo"), "hel"),
        ("abcdef", ("cdefg", "de"), "abc"),
        ("\u4e2d\u6587\U0001f600!", ("\U0001f600", "!"), "\u4e2d\u6587"),
        ("plain", ("zzz", "inner"), "plain"),
    ]:
        pieces, is_stopped = stream(ids_of(text), stops)
        assert "".join(pieces) == shown
        assert is_stopped == (shown != text)


def test_stop_strings_equal_a_search_in_the_whole_text() -> None:
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(rng.choices(["a", "b", "c", "\u00e9"], k=rng.randint(1, 20)))
        stops = tuple(
            "".join(rng.choices(["a", "b", "c", "\u00e9"], k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))
        )
        # The text as it stood when the first stop string was complete; the earliest of those in it cuts.
        ended = min((text.find(s) + len(s) for s in stops if s in text), default=None)
        seen = text[:ended]
        cut = min((seen.find(s) for s in stops if s in seen), default=len(text))
        pieces, is_stopped = stream(ids_of(text), stops)
        assert ("".join(pieces), is_stopped) == (text[:cut], ended is not None), (text, stops)


def test_a_long_run_of_broken_bytes_is_shown_as_it_comes() -> None:
    """It was held back to its end and decoded anew at every token: quadratic time, and no text."""
    tokenizer = tiny.byte_tokenizer()
    broken = tokenizer.encode("\u00e9", add_special_tokens=False)[1]  # a continuation byte on its own
    detokenizer = Detokenizer(tokenizer)
    shown = [detokenizer.push(broken) for _ in range(300)]
    assert len("".join(shown)) == 299
    assert len(detokenizer._ids) < 20
    assert "".join(shown) + detokenizer.finish() == "\ufffd" * 300


def test_a_token_as_text_and_as_bytes() -> None:
    ids = ids_of("a \u00e9\U0001f600")
    assert bytes(byte for token in ids for byte in bytes_of(TOKENIZER, token)) == "a \u00e9\U0001f600".encode()
    assert [text_of(TOKENIZER, token) for token in ids[:3]] == ["a", " ", "\ufffd"]
    end = tiny.token_id("<|im_end|>")
    assert text_of(TOKENIZER, end) == "<|im_end|>"
    assert bytes(bytes_of(TOKENIZER, end)) == b"<|im_end|>"
