"""The Python face: chat in Qwen's message format, weights, comparison; and its clear refusals."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model_core.errors import (
    ConfigError,
    ImageError,
    ImageNotFoundError,
    InvalidImageUrlError,
    InvalidRequestError,
)
from model_core.types import ARMS
from tests.model_core import tiny


@pytest.fixture(scope="module")
def encoder() -> Any:
    return tiny.encoder()


@pytest.fixture
def picture() -> Image.Image:
    return Image.radial_gradient("L").resize((90, 60)).convert("RGB")


def ask(*images: object, text: str = "what?", kind: str = "image") -> list[dict[str, Any]]:
    content = [{"type": kind, kind: image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_every_way_of_giving_a_picture_is_the_same_picture(encoder: Any, picture: Image.Image, tmp_path: Path) -> None:
    data = encoded(picture)
    path = tmp_path / "p.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    answers = {encoder.chat(ask(given), max_tokens=8) for given in (picture, data, str(path), path, url)}
    assert len(answers) == 1
    assert answers != {encoder.chat(ask(picture.rotate(90, expand=True)), max_tokens=8)}


def test_streamed_equals_not_streamed(encoder: Any, picture: Image.Image) -> None:
    pieces = list(encoder.chat_stream(ask(picture), max_tokens=24))
    assert "".join(pieces) == encoder.chat(ask(picture), max_tokens=24)
    assert len(pieces) > 1


def test_text_only_system_and_multi_turn(encoder: Any, picture: Image.Image) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        *ask(picture),
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "and now?"},
    ]
    assert encoder.chat(turns, max_tokens=4) != encoder.chat(turns[1:], max_tokens=4)
    assert isinstance(encoder.chat([{"role": "user", "content": "hello"}], max_tokens=4), str)


def test_video_is_a_list_of_frames(encoder: Any, picture: Image.Image) -> None:
    frames = [picture.rotate(angle) for angle in (0, 20, 40, 60)]
    still = encoder.analyze_fusion_weights(ask(frames[0]))
    moving = encoder.analyze_fusion_weights(ask(frames, kind="video"))
    assert len(moving["images"]) == 1
    assert moving["qwen_weight"] != still["qwen_weight"]


def test_a_seed_repeats_and_another_differs(encoder: Any, picture: Image.Image) -> None:
    def answer(seed: int) -> str:
        return encoder.chat(ask(picture), max_tokens=16, temperature=1.5, seed=seed)

    assert answer(7) == answer(7)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_an_abandoned_stream_leaves_nothing_behind(encoder: Any, picture: Image.Image) -> None:
    stream = encoder.chat_stream(ask(picture), max_tokens=200)
    next(stream)
    stream.close()
    assert not encoder.engine.has_work()
    assert len(encoder.engine.runner.cache) == 0


def test_weights_are_means_over_images_and_each_images_own(encoder: Any, picture: Image.Image) -> None:
    found = encoder.analyze_fusion_weights(ask(picture, picture.transpose(Image.Transpose.ROTATE_90)))
    assert found["qwen_weight"] + found["dinov2_weight"] == pytest.approx(1.0, abs=1e-6)
    assert found["dominant_encoder"] in ("qwen", "dinov2")
    assert found["fusion_trained"] is True
    assert len(found["images"]) == 2
    mean = sum(image["qwen_weight"] for image in found["images"]) / 2
    assert found["qwen_weight"] == pytest.approx(mean)
    assert sum(found["images"][0]["contribution"].values()) == pytest.approx(1.0)


def test_a_fresh_model_says_that_its_weights_say_nothing(picture: Image.Image) -> None:
    found = tiny.encoder(tiny.dual_model()).analyze_fusion_weights(ask(picture))
    assert (found["qwen_weight"], found["dominant_encoder"]) == (0.5, "tie")
    assert found["fusion_trained"] is False
    assert "not trained" in found["images"][0]["warnings"][0]


def test_a_strategy_without_a_gate_has_no_weights(picture: Image.Image) -> None:
    found = tiny.encoder(tiny.trained_model("concat")).analyze_fusion_weights(ask(picture))
    assert found["qwen_weight"] is None
    assert found["dominant_encoder"] is None
    assert found["images"][0]["relative_update"] > 0


def test_compare_scores_the_fused_answer_under_every_arm(encoder: Any, picture: Image.Image) -> None:
    found = encoder.compare_encoders(ask(picture), max_tokens=6)
    assert tuple(found.arms) == ARMS
    both = found.arms["fused"].log_likelihood
    assert found.reliance["dinov2"] == pytest.approx(both - found.arms["qwen-only"].log_likelihood)
    assert found.reliance["qwen"] == pytest.approx(both - found.arms["dinov2-only"].log_likelihood)
    assert sum(found.shapley.values()) == pytest.approx(both - found.arms["blind"].log_likelihood)
    assert len(found.arms["blind"].token_log_likelihoods) == 6
    assert found.arms["fused"].first_divergence is None


def test_an_interleaved_model_answers(picture: Image.Image) -> None:
    encoder = tiny.encoder(tiny.trained_model("interleave"))
    assert encoder.chat(ask(picture), max_tokens=4) != encoder.chat(ask(picture), max_tokens=4, arm="qwen-only")


@pytest.mark.parametrize(
    ("messages", "error", "says"),
    [
        ([], InvalidRequestError, "list of at least one message"),
        ("hello", InvalidRequestError, "messages must be a list"),
        ([{"content": "x"}], InvalidRequestError, r"messages\[0\] has no role"),
        ([{"role": "tool", "content": "x"}], InvalidRequestError, "system, user, assistant"),
        ([{"role": "user", "content": []}], InvalidRequestError, "no content"),
        (ask("x", kind="audio"), InvalidRequestError, "not a part that can be read"),
        (ask("/no/such/picture.png"), ImageNotFoundError, "/no/such/picture.png"),
        (ask("https://example.com/a.png"), InvalidImageUrlError, "Download it first"),
    ],
)
def test_bad_messages_are_told_apart(encoder: Any, messages: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        encoder.chat(messages)
    assert not encoder.engine.has_work()


def test_only_images_can_be_analyzed_and_compared(encoder: Any) -> None:
    text = [{"role": "user", "content": "hello"}]
    with pytest.raises(InvalidRequestError, match="no image"):
        encoder.analyze_fusion_weights(text)
    with pytest.raises(InvalidRequestError, match="no image"):
        encoder.compare_encoders(text)


def test_the_servers_engine_opens_no_path(encoder: Any, tmp_path: Path, picture: Image.Image) -> None:
    from model_core.types import ChatMessage, GenerationRequest, ImagePart

    path = tmp_path / "secret.png"
    picture.save(path)
    request = GenerationRequest("r", (ChatMessage("user", (ImagePart(str(path)),)),))
    with pytest.raises(ImageError) as caught:
        encoder.engine.prepare(request)
    assert caught.value.code in ("invalid_image_url", "image_not_found", "invalid_image")


def test_settings_that_contradict_each_other_are_refused() -> None:
    from model_core import DualVisionEncoder

    with pytest.raises(ConfigError, match=r"one of the two checkpoints is missing.*both names"):
        DualVisionEncoder(qwen_model_name="only/one")
    with pytest.raises(ConfigError, match=r"already built.*common_dim, fusion"):
        DualVisionEncoder(common_dim=512, fusion="concat")
