"""Whatever a user gets wrong is refused in four parts: what, the value seen, what is allowed, and what to do."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model_core.checkpoint import LoadOptions, combine_checkpoints, load_checkpoint
from model_core.encoder import DualVisionEncoder
from model_core.errors import (
    CheckpointError,
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
    UnsupportedImageError,
)
from model_core.manifest import FORMAT, VERSION
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

    def say(self, messages: Any, **sampling: Any) -> None:
        self.encoder.chat(messages, **sampling)

    def fetch(self, given: Any) -> None:
        """Ask about what a URL's function gave."""
        encoder = tiny.encoder()
        encoder.fetch_image = lambda url: given
        encoder.chat([{"role": "user", "content": [{"type": "image", "image": "https://example.com/x.png"}]}])

    def load_with(self, name: str, manifest: str) -> None:
        """The checkpoint with this in the place of its manifest."""
        folder = shutil.copytree(self.dual, self.root / name)
        (folder / "manifest.json").write_text(manifest)
        load_checkpoint(folder)


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def opened(kind: str) -> Image.Image:
    """A picture file that was cut in half, as PIL opens it: its header is read, its pixels are not."""
    data = encoded(Image.effect_noise((60, 60), 90), kind)
    return Image.open(io.BytesIO(data[: len(data) // 2]))


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


def fixed(world: World, fusion: str, weights: list[float]) -> None:
    combine_checkpoints(world.qwen, world.dinov2, fusion=fusion, static_weights=weights)


TEXT = [{"role": "user", "content": "x"}]
MANIFEST = {"format": FORMAT, "version": VERSION, "extra": {}}

CASES: dict[str, tuple[type[DualVisionError], Callable[[World], Any]]] = {
    "no such picture": (ImageNotFoundError, lambda w: w.see("/no/such.png")),
    "a folder": (ImageNotFoundError, lambda w: w.see(w.root)),
    "no bytes": (EmptyImageError, lambda w: w.see(b"")),
    "too many bytes": (ImageTooLargeError, lambda w: w.see(w.png.ljust(2001, b"\0"))),
    "too large a file": (ImageTooLargeError, lambda w: w.see(w.root / "large.png")),
    "too long a data URL": (ImageTooLargeError, lambda w: w.see(url(w.png.ljust(2001, b"\0")))),
    "cut": (ImageParseError, lambda w: w.see(w.png[:-20])),
    "a PNG that PIL opened, cut": (ImageParseError, lambda w: w.see(opened("PNG"))),
    "a JPEG that PIL opened, cut": (ImageParseError, lambda w: w.see(opened("JPEG"))),
    "no image": (ImageParseError, lambda w: w.see(b"hello, world")),
    "too small": (ImageTooSmallError, lambda w: w.see(encoded(Image.new("RGB", (1, 1))))),
    "no base64": (InvalidBase64Error, lambda w: w.see("data:image/png;base64,@@@@")),
    "a data URL of text": (InvalidBase64Error, lambda w: w.see("data:text/plain,hello")),
    "remote": (InvalidImageUrlError, lambda w: w.see("https://example.com/x.png")),
    "fetched, and no bytes": (UnsupportedImageError, lambda w: w.fetch("text")),
    "fetched, and a page": (UnsupportedImageError, lambda w: w.fetch(b"<html>")),
    "another scheme": (InvalidImageUrlError, lambda w: w.see("gopher://x")),
    "another host's file": (InvalidImageUrlError, lambda w: w.see("file://host/x.png")),
    "no messages": (InvalidRequestError, lambda w: w.say([])),
    "no list": (InvalidRequestError, lambda w: w.say("hello")),
    "no role": (InvalidRequestError, lambda w: w.say([{"content": "x"}])),
    "another role": (InvalidRequestError, lambda w: w.say([{"role": "tool", "content": "x"}])),
    "no content": (InvalidRequestError, lambda w: w.say([{"role": "user", "content": []}])),
    "no part": (InvalidRequestError, lambda w: w.say([{"role": "user", "content": [{"type": "audio"}]}])),
    "a temperature": (InvalidRequestError, lambda w: w.say(TEXT, temperature=3.0)),
    "top_p": (InvalidRequestError, lambda w: w.say(TEXT, top_p=0.0)),
    "no token at all": (InvalidRequestError, lambda w: w.say(TEXT, max_tokens=0)),
    "a token that is not there": (InvalidRequestError, lambda w: w.say(TEXT, logit_bias={10**6: 1.0})),
    "past the context": (ContextLengthError, lambda w: w.say([{"role": "user", "content": "x" * 3000}])),
    "nothing to analyze": (
        InvalidRequestError,
        lambda w: w.encoder.analyze_fusion_weights([{"role": "user", "content": "x"}]),
    ),
    "nothing to compare": (InvalidRequestError, lambda w: w.encoder.compare_encoders(TEXT)),
    "no such folder": (CheckpointIncompleteError, lambda w: load_checkpoint("/no/such/folder")),
    "a folder without a config": (CheckpointIncompleteError, lambda w: load_checkpoint(w.root)),
    "a damaged manifest": (CheckpointIncompleteError, lambda w: w.load_with("damaged", "{")),
    "another manifest": (CheckpointIncompleteError, lambda w: w.load_with("foreign", json.dumps({"format": "x"}))),
    "a manifest of another version": (
        CheckpointError,
        lambda w: w.load_with("later", json.dumps({"format": FORMAT, "version": VERSION + 1, "files": {}})),
    ),
    "a manifest that leaves the folder": (
        CheckpointError,
        lambda w: w.load_with("outside", json.dumps(MANIFEST | {"files": {"../x": {"sha256": "", "size_bytes": 0}}})),
    ),
    "not a dual checkpoint": (CheckpointMismatchError, lambda w: load_checkpoint(w.qwen)),
    "no Qwen": (CheckpointMismatchError, lambda w: combine_checkpoints(w.dinov2, w.dinov2)),
    "no DINOv2": (CheckpointMismatchError, lambda w: combine_checkpoints(w.qwen, w.qwen)),
    "other weights": (CheckpointMismatchError, with_another_strategy),
    "an unknown setting": (ConfigError, lambda w: combine_checkpoints(w.qwen, w.dinov2, colour="red")),
    "too narrow": (ConfigError, lambda w: combine_checkpoints(w.qwen, w.dinov2, common_dim=32)),
    "no width": (ConfigError, lambda w: combine_checkpoints(w.qwen, w.dinov2, common_dim=0)),
    "an unknown strategy": (ConfigError, lambda w: combine_checkpoints(w.qwen, w.dinov2, fusion="magic")),
    "a strategy that is not there": (ConfigError, lambda w: combine_checkpoints(w.qwen, w.dinov2, fusion="json:Magic")),
    "a strategy that is none": (
        ConfigError,
        lambda w: combine_checkpoints(w.qwen, w.dinov2, fusion="json:JSONDecoder"),
    ),
    "too few weights": (ConfigError, lambda w: fixed(w, "static", [1.0])),
    "weights that sum to more": (ConfigError, lambda w: fixed(w, "static", [0.5, 0.6])),
    "a weight below 0": (ConfigError, lambda w: fixed(w, "static", [1.5, -0.5])),
    "weights for a gate": (ConfigError, lambda w: fixed(w, "gated", [0.5, 0.5])),
    "no patches at all": (ConfigError, lambda w: combine_checkpoints(w.qwen, w.dinov2, dinov2_max_patches=1)),
    "half a pair": (ConfigError, lambda w: DualVisionEncoder(w.qwen)),
    "the demo model rebuilt": (ConfigError, lambda w: DualVisionEncoder(common_dim=512)),
    "dropout": (ConfigError, lambda w: DualVisionEncoder(dropout=5)),
    "no such device": (ConfigError, lambda w: load_checkpoint(w.dual, LoadOptions("quantum"))),
    "no such dtype": (ConfigError, lambda w: load_checkpoint(w.dual, LoadOptions(dtype="float31"))),
    "an option of nothing": (ConfigError, lambda w: DualVisionEncoder.from_pretrained(w.dual, colour="red")),
    "another attention": (
        ConfigError,
        lambda w: DualVisionEncoder.from_pretrained(w.dual, attn_implementation="eager"),
    ),
    "no function": (ConfigError, lambda w: DualVisionEncoder.from_pretrained(w.dual, fetch_image="curl")),
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
