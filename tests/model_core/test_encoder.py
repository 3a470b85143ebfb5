"""The Python face: chat in Qwen's message format, weights, comparison; and its clear refusals."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from model_core.errors import (
    ConfigError,
    EmptyImageError,
    ImageError,
    ImageNotFoundError,
    ImageParseError,
    ImageTooLargeError,
    InvalidImageUrlError,
    InvalidRequestError,
)
from model_core.processing.images import ImageLimits
from model_core.types import ARMS, messages_from_dicts
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
    assert encoder.engine.runner.store.num_open == 0


@pytest.mark.parametrize("changed", ["fusion", "model.visual", "model.language_model", "lm_head"])
def test_changed_weights_change_the_next_answer(changed: str, picture: Image.Image) -> None:
    """What was kept of features and prefixes came from the old ones."""
    encoder = tiny.encoder()
    asked = {"max_tokens": 4}
    before = encoder.compare_encoders(ask(picture), **asked).arms["fused"].log_likelihood
    with torch.no_grad():
        for parameter in encoder.model.get_submodule(changed).parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    after = encoder.compare_encoders(ask(picture), **asked).arms["fused"].log_likelihood
    encoder.engine.reset_caches()
    fresh = encoder.compare_encoders(ask(picture), **asked).arms["fused"].log_likelihood
    assert after == pytest.approx(fresh, abs=1e-5)
    assert after != pytest.approx(before, abs=1e-3)


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
        (ask("https://example.com/a.png"), InvalidImageUrlError, "Download it first.*fetch_image="),
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


URL = "HTTPS://example.com/a.png"


class Web:
    """Pictures by URL, and what was asked for."""

    def __init__(self, *pictures: object) -> None:
        self.pictures = {f"{URL}?{number}": given for number, given in enumerate(pictures)}
        self.urls, self.asked = list(self.pictures), []

    def __call__(self, url: str) -> Any:
        self.asked.append(url)
        return self.pictures[url]


def test_a_url_is_fetched_by_the_callers_function(picture: Image.Image) -> None:
    turned, encoder = picture.transpose(Image.Transpose.ROTATE_90), tiny.encoder()
    web = encoder.fetch_image = Web(encoded(picture), encoded(turned))
    local, remote = ask(picture, turned, picture), ask(web.urls[0], web.urls[1], web.urls[0])
    assert encoder.chat(remote, max_tokens=8) == encoder.chat(local, max_tokens=8)
    assert web.asked == web.urls, "a picture that comes twice is fetched once"
    assert encoder.analyze_fusion_weights(remote) == encoder.analyze_fusion_weights(local)
    web.asked.clear()
    found, expected = (encoder.compare_encoders(m, max_tokens=4).arms for m in (remote, local))
    assert web.asked == web.urls, "once for all arms"
    for arm in ARMS:
        assert found[arm].token_log_likelihoods == pytest.approx(expected[arm].token_log_likelihoods, abs=1e-5)
    frames = encoder.chat(ask(web.urls[:1] * 3, kind="video"), max_tokens=8)
    assert frames == encoder.chat(ask([picture] * 3, kind="video"), max_tokens=8)
    assert "".join(encoder.chat_stream(messages_from_dicts(ask(web.urls[0])), max_tokens=8))


def test_only_urls_go_to_the_callers_function(picture: Image.Image, tmp_path: Path) -> None:
    encoder = tiny.encoder()
    web = encoder.fetch_image = Web()
    picture.save(tmp_path / "p.png")
    data = base64.b64encode(encoded(picture)).decode()
    encoder.chat(ask(picture, tmp_path / "p.png", str(tmp_path / "p.png"), "data:;base64," + data), max_tokens=1)
    with pytest.raises(InvalidImageUrlError):
        encoder.chat(ask("gopher://example.com/a.png"))
    assert web.asked == []


def test_what_is_fetched_has_the_limits_of_any_picture(picture: Image.Image) -> None:
    encoder = tiny.encoder()
    web = encoder.fetch_image = Web(encoded(picture), encoded(picture)[:-40], b"", encoded(picture))
    encoder.configure(ImageLimits(max_pixels=90 * 60))
    assert encoder.chat(ask(web.urls[0]), max_tokens=1) is not None
    encoder.configure(ImageLimits(max_pixels=90 * 60 - 1))
    for url, error in zip(web.urls, (ImageTooLargeError, ImageTooLargeError, EmptyImageError), strict=False):
        with pytest.raises(error):
            encoder.chat(ask(url))
    encoder.configure(ImageLimits(max_bytes=len(encoded(picture)) - 1))
    for url, error in zip(web.urls, (ImageTooLargeError, ImageParseError), strict=False):
        with pytest.raises(error):
            encoder.chat(ask(url))
    assert not encoder.engine.has_work()


def test_the_fetching_functions_own_error_comes_through() -> None:
    encoder = tiny.encoder()

    def fails(url: str) -> bytes:
        raise TimeoutError(url)

    encoder.fetch_image = fails
    with pytest.raises(TimeoutError, match="example"):
        encoder.chat(ask(URL))
    assert not encoder.engine.has_work()


def test_both_ways_of_loading_take_the_function(picture: Image.Image, tmp_path: Path) -> None:
    from model_core import DualVisionEncoder

    web = Web(encoded(picture))
    made = DualVisionEncoder(tiny.save_qwen(tmp_path / "q"), tiny.save_dinov2(tmp_path / "d"), fetch_image=web)
    made.save_pretrained(tmp_path / "dual")
    loaded = DualVisionEncoder.from_pretrained(tmp_path / "dual", fetch_image=web)
    expected = made.chat(ask(picture), max_tokens=4)
    assert made.chat(ask(web.urls[0]), max_tokens=4) == loaded.chat(ask(web.urls[0]), max_tokens=4) == expected
    with pytest.raises(InvalidImageUrlError, match="turned off"):
        DualVisionEncoder.from_pretrained(tmp_path / "dual").chat(ask(URL))


def test_settings_that_contradict_each_other_are_refused() -> None:
    from model_core import DualVisionEncoder

    with pytest.raises(ConfigError, match=r"one of the two checkpoints is missing.*both names"):
        DualVisionEncoder(qwen_model_name="only/one")
    with pytest.raises(ConfigError, match=r"already built.*common_dim, fusion"):
        DualVisionEncoder(common_dim=512, fusion="concat")


def test_two_streams_at_once_keep_apart(encoder: Any, picture: Image.Image) -> None:
    """One stream's steps swallowed the other's events, which then waited for ever."""
    first, second = ask(picture), ask(picture.rotate(90, expand=True))
    alone = [encoder.chat(m, max_tokens=8) for m in (first, second)]
    one = encoder.chat_stream(first, max_tokens=8)
    started = next(one)
    two = encoder.chat_stream(second, max_tokens=8)
    mixed = next(two)
    compared = encoder.compare_encoders(first, max_tokens=2)
    assert [started + "".join(one), mixed + "".join(two)] == alone
    assert compared.arms["fused"].answer.finish_reason == "length"


def test_a_batch_with_one_bad_request_queues_none(encoder: Any, picture: Image.Image) -> None:
    from model_core.types import GenerationRequest

    good = GenerationRequest("good", messages_from_dicts(ask(picture)))
    bad = GenerationRequest("bad", messages_from_dicts(ask("/no/such/picture.png")))
    with pytest.raises(ImageNotFoundError):
        encoder.run_requests({"a": good, "b": bad})
    assert not encoder.engine.has_work()


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf"), None, "x", True])
def test_a_frame_rate_is_a_number(encoder: Any, picture: Image.Image, fps: Any) -> None:
    content = [{"type": "video", "video": [picture], "fps": fps}, {"type": "text", "text": "?"}]
    with pytest.raises(InvalidRequestError, match="'fps'"):
        encoder.chat([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "part", [{"type": "video", "video": "clip.mp4"}, {"type": "image", "image": b"", "max_pixels": "x"}]
)
def test_a_part_of_the_wrong_type_is_named(encoder: Any, part: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        encoder.chat([{"role": "user", "content": [part]}])


def test_an_uncalibrated_model_says_what_an_arm_puts_in_place(picture: Image.Image) -> None:
    from model_core.fusion.attribution import UNCALIBRATED

    model = tiny.trained_model()
    model.fusion.means.count.zero_()
    encoder = tiny.encoder(model)
    found = encoder.compare_encoders(ask(picture), max_tokens=1)
    assert UNCALIBRATED in found.arms["blind"].answer.fusion[0].warnings
    assert UNCALIBRATED not in found.arms["fused"].answer.fusion[0].warnings


def test_another_preprocessor_than_the_models_is_refused() -> None:
    from model_core.checkpoint import Loaded
    from model_core.encoder import DualVisionEncoder

    made = tiny.processor()
    made.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ConfigError, match="image_mean"):
        DualVisionEncoder.from_loaded(Loaded(tiny.dual_model(), made), "x")


def test_push_uploads_the_folder_that_save_writes(
    encoder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    from model_core import hub as module

    seen: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return huggingface_hub.RepoUrl(f"https://hub.test/{repo_id}", endpoint="https://hub.test")

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
            seen.update(options, repo_id=repo_id, files=sorted(p.name for p in folder_path.iterdir()))
            return "commit"

    monkeypatch.setattr(module, "HfApi", Hub)
    assert encoder.push_to_hub("me/model", token="t", commit_message="first") == "commit"
    encoder.save_pretrained(tmp_path / "saved")
    assert seen["files"] == sorted(p.name for p in (tmp_path / "saved").iterdir())
    encoder.save_pretrained(tmp_path / "m", max_shard_size="200KB", push_to_hub=True, token="u", repo_id="me/m")
    assert seen["files"] == sorted(p.name for p in (tmp_path / "m").iterdir())
    assert sum(name.endswith(".safetensors") for name in seen["files"]) > 1
    assert (seen["repo_id"], seen["token"]) == ("me/m", "u")
    encoder.push_to_hub("me/model", token="t", commit_message="first")
    assert (seen["repo_id"], seen["token"], seen["commit_message"]) == ("me/model", "t", "first")


def test_shards_are_as_large_as_asked(encoder: Any, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "one")
    encoder.save_pretrained(tmp_path / "many", max_shard_size="200KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1


def test_the_demo_models_dropout_is_set_and_saved(tmp_path: Path) -> None:
    from model_core import DualVisionEncoder

    made = DualVisionEncoder(dropout=0.25)
    assert made.model.fusion.dropout.p == 0.25
    made.save_pretrained(tmp_path / "saved")
    assert DualVisionEncoder.from_pretrained(tmp_path / "saved").model.fusion.dropout.p == 0.25
