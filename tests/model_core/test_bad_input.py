"""Whatever a user gets wrong is refused in four parts: what, the value seen, what is allowed, and what to do."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model_core.checkpoint import LoadOptions, combine_checkpoints, load_checkpoint
from model_core.encoder import DualVisionEncoder
from model_core.errors import (
    CheckpointIncompleteError,
    CheckpointMismatchError,
    ConfigError,
    ContextLengthError,
    DualVisionError,
    EmptyImageError,
    ImageNotFoundError,
    ImageParseError,
    ImageTooLargeError,
    ImageTooSmallError,
    InvalidBase64Error,
    InvalidImageUrlError,
    InvalidRequestError,
)
from model_core.processing.images import ImageLimits
from tests.model_core import tiny


class World:
    """A model that reads little, its files and its pictures."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.encoder = tiny.encoder()
        self.encoder.configure(ImageLimits(max_bytes=2000))
        self.qwen, self.dinov2, self.dual = tiny.save_qwen(root / "q"), tiny.save_dinov2(root / "d"), root / "dual"
        self.encoder.save_pretrained(self.dual)
        self.png = encoded(Image.new("RGB", (60, 60), "green"))
        (root / "large.png").write_bytes(self.png.ljust(2001, b"\0"))

    def see(self, image: Any) -> None:
        self.encoder.chat([{"role": "user", "content": [{"type": "image", "image": image}]}])

    def say(self, messages: Any) -> None:
        self.encoder.chat(messages)


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def with_another_strategy(world: World) -> None:
    loaded = load_checkpoint(world.dual)
    config = replace(loaded.model.config, fusion="static")
    config.save_pretrained(world.root / "other")
    for name in ("model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (world.root / "other" / name).write_bytes((world.dual / name).read_bytes())
    load_checkpoint(world.root / "other")


CASES: dict[str, tuple[type[DualVisionError], Callable[[World], Any]]] = {
    "no such picture": (ImageNotFoundError, lambda w: w.see("/no/such.png")),
    "a folder": (ImageNotFoundError, lambda w: w.see(w.root)),
    "no bytes": (EmptyImageError, lambda w: w.see(b"")),
    "too many bytes": (ImageTooLargeError, lambda w: w.see(w.png.ljust(2001, b"\0"))),
    "too large a file": (ImageTooLargeError, lambda w: w.see(w.root / "large.png")),
    "too long a data URL": (ImageTooLargeError, lambda w: w.see(url(w.png.ljust(2001, b"\0")))),
    "cut": (ImageParseError, lambda w: w.see(w.png[:-20])),
    "no image": (ImageParseError, lambda w: w.see(b"hello, world")),
    "too small": (ImageTooSmallError, lambda w: w.see(encoded(Image.new("RGB", (1, 1))))),
    "no base64": (InvalidBase64Error, lambda w: w.see("data:image/png;base64,@@@@")),
    "a data URL of text": (InvalidBase64Error, lambda w: w.see("data:text/plain,hello")),
    "remote": (InvalidImageUrlError, lambda w: w.see("https://example.com/x.png")),
    "another scheme": (InvalidImageUrlError, lambda w: w.see("gopher://x")),
    "another host's file": (InvalidImageUrlError, lambda w: w.see("file://host/x.png")),
    "no messages": (InvalidRequestError, lambda w: w.say([])),
    "no list": (InvalidRequestError, lambda w: w.say("hello")),
    "no role": (InvalidRequestError, lambda w: w.say([{"content": "x"}])),
    "another role": (InvalidRequestError, lambda w: w.say([{"role": "tool", "content": "x"}])),
    "no content": (InvalidRequestError, lambda w: w.say([{"role": "user", "content": []}])),
    "no part": (InvalidRequestError, lambda w: w.say([{"role": "user", "content": [{"type": "audio"}]}])),
    "past the context": (ContextLengthError, lambda w: w.say([{"role": "user", "content": "x" * 3000}])),
    "nothing to analyze": (
        InvalidRequestError,
        lambda w: w.encoder.analyze_fusion_weights([{"role": "user", "content": "x"}]),
    ),
    "no such folder": (CheckpointIncompleteError, lambda w: load_checkpoint("/no/such/folder")),
    "a folder without a config": (CheckpointIncompleteError, lambda w: load_checkpoint(w.root)),
    "not a dual checkpoint": (CheckpointMismatchError, lambda w: load_checkpoint(w.qwen)),
    "no Qwen": (CheckpointMismatchError, lambda w: combine_checkpoints(w.dinov2, w.dinov2)),
    "no DINOv2": (CheckpointMismatchError, lambda w: combine_checkpoints(w.qwen, w.qwen)),
    "other weights": (CheckpointMismatchError, with_another_strategy),
    "an unknown setting": (ConfigError, lambda w: combine_checkpoints(w.qwen, w.dinov2, colour="red")),
    "half a pair": (ConfigError, lambda w: DualVisionEncoder(w.qwen)),
    "the demo model rebuilt": (ConfigError, lambda w: DualVisionEncoder(common_dim=512)),
    "dropout": (ConfigError, lambda w: DualVisionEncoder(dropout=5)),
    "no such device": (ConfigError, lambda w: load_checkpoint(w.dual, LoadOptions("quantum"))),
    "no such dtype": (ConfigError, lambda w: load_checkpoint(w.dual, LoadOptions(dtype="float31"))),
    "an option of an upload": (ConfigError, lambda w: w.encoder.save_pretrained(w.root / "x", repo_id="me/x")),
    "an unknown option": (ConfigError, lambda w: w.encoder.push_to_hub("me/x", colour="red")),
    "a size of shards": (ConfigError, lambda w: w.encoder.save_pretrained(w.root / "x", max_shard_size="huge")),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_says_what_was_seen_what_is_allowed_and_what_to_do(world: World, case: str) -> None:
    kind, do = CASES[case]
    with pytest.raises(DualVisionError) as caught:
        do(world)
    error = caught.value
    assert type(error) is kind
    assert error.value is not None and error.allowed and error.fix
    for part in ("Got: ", f"Allowed: {error.allowed}", error.fix):
        assert part in str(error)
    assert not (world.root / "x").exists()


@pytest.mark.parametrize("device", ["meta", "xpu", "mps:7", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_before_anything_is_loaded(device: str) -> None:
    with pytest.raises(ConfigError, match=r"no such \w+ device here.*Allowed: auto, cpu") as caught:
        LoadOptions(device).resolve_device()
    assert (caught.value.value, caught.value.param) == (device, "device")
    assert caught.value.fix
