"""Options of loading: those of the hub are passed on, any other is refused before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model_core import checkpoint
from model_core.encoder import DualVisionEncoder
from model_core.errors import ConfigError
from model_core.hub import LOADING, check_options
from tests.model_core import tiny
from tests.model_core.test_identity import CASES, logits


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "dual"
    tiny.encoder().save_pretrained(folder)
    return folder


def test_the_hubs_options_reach_everything_that_is_read(
    dual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"revision": "main", "token": None, "cache_dir": tmp_path, "local_files_only": True}
    assert set(asked) == set(LOADING)
    seen: dict[str, dict[str, Any]] = {}
    for owner in (checkpoint.AutoConfig, checkpoint.DualVisionModel, checkpoint.DualVisionProcessor):
        original = owner.from_pretrained

        def load(*args: Any, of: str = owner.__name__, original: Any = original, **options: Any) -> Any:
            seen.setdefault(of, options)
            return original(*args, **options)

        monkeypatch.setattr(owner, "from_pretrained", load)
    loaded = DualVisionEncoder.from_pretrained(dual, device="cpu", model_id="x", **asked)
    assert (loaded.info.model_id, loaded.info.device) == ("x", "cpu")
    assert len(seen) == 3
    assert all(asked.items() <= options.items() for options in seen.values())


@pytest.mark.parametrize(
    ("option", "fix"),
    [
        ({"colour": "red"}, "Leave it out"),
        ({"devcie": "cpu"}, "Write 'device'"),
        ({"torch_dtype": "float32"}, "Write 'dtype'"),
        ({"local_files": True}, "Write 'local_files_only'"),
        ({"attn_implementation": "eager"}, "use_flash_attention=True or False"),
        ({"device_map": "auto"}, "Name one device"),
        ({"quantization_config": {}}, "Leave it out: weights"),
    ],
)
def test_an_unknown_option_is_told_with_the_nearest(option: dict[str, Any], fix: str, dual: Path) -> None:
    """It said "download it again" of an option, and of another that a keyword came twice."""
    with pytest.raises(ConfigError, match="unknown option") as caught:
        DualVisionEncoder.from_pretrained(dual, **option)
    assert caught.value.value == next(iter(option))
    assert fix in caught.value.fix
    for name in ("revision", "device", "fetch_image"):
        assert name in caught.value.allowed.split(", ")


def test_an_unknown_option_is_refused_before_a_checkpoint_is_looked_for() -> None:
    with pytest.raises(ConfigError, match="unknown option"):
        DualVisionEncoder.from_pretrained("/no/such/folder", colour="red")


def test_what_the_refusal_of_another_attention_recommends_works(dual: Path) -> None:
    encoder = DualVisionEncoder.from_pretrained(dual)
    before = logits(encoder.model, CASES["one image"])
    encoder.model.set_attn_implementation("eager")
    assert encoder.model.model.language_model.config._attn_implementation == "eager"
    assert torch.allclose(logits(encoder.model, CASES["one image"]), before, atol=1e-4)
    question = [{"role": "user", "content": "hello"}]
    assert encoder.chat(question, max_tokens=4) == DualVisionEncoder.from_pretrained(dual).chat(question, max_tokens=4)


def test_several_unknown_options_are_all_told() -> None:
    with pytest.raises(ConfigError) as caught:
        check_options({"b": 1, "a": 2, "token": 3}, LOADING)
    assert caught.value.value == "a, b"
