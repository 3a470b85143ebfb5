"""The random checkpoints load where they should, and their second encoder is not skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from benchmarks import make_checkpoint
from benchmarks.make_checkpoint import SHAPES, build_parts, build_tokenizer, main
from model_core.analysis.workload import Workload
from model_core.encoder import DualVisionEncoder
from model_core.types import ChatMessage, GenerationRequest, ImagePart, SamplingParams, TextPart


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    assert main([str(folder), "tiny"]) == 0
    return folder


@pytest.fixture(scope="module")
def dual(out: Path) -> DualVisionEncoder:
    return DualVisionEncoder.from_pretrained(out / "dual")


def request(arm: str = "fused") -> GenerationRequest:
    question, jpeg = Workload().items(5, 1)[0]
    message = ChatMessage("user", (ImagePart(jpeg), TextPart(question)))
    return GenerationRequest(arm, (message,), SamplingParams(max_tokens=4, ignore_eos=True), arm)


def test_both_encoders_run_and_both_count(dual: DualVisionEncoder) -> None:
    assert dual.info.fusion_trained
    found = dual.run_requests({arm: request(arm) for arm in ("fused", "qwen-only", "unfused")})
    (fusion,) = found["fused"].fusion
    assert fusion.weights.keys() == {"qwen", "dinov2"}
    assert not any("calibrat" in warning for one in found.values() for warning in one.fusion[0].warnings)
    stats = dual.engine.stats()
    assert all(stats.encoder_seconds[name] > 0 for name in ("qwen", "dinov2"))
    assert 0.01 < fusion.relative_update < 1, "moved, and not drowned"
    assert 80 <= found["fused"].usage.prompt_tokens <= 110, "the load that the peers were measured with has 94"
    assert found["fused"].usage.image_tokens == 64


def test_the_two_public_folders_make_a_fresh_dual_model(out: Path, dual: DualVisionEncoder) -> None:
    fresh = DualVisionEncoder(out / "qwen", out / "dinov2")
    assert not fresh.info.fusion_trained
    own = {name: tensor for name, tensor in fresh.model.state_dict().items() if ".fusion." not in name}
    saved = dual.model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in own.items()), "the same weights in all folders"
    assert fresh.chat([{"role": "user", "content": "hello"}], max_tokens=4)


def test_transformers_loads_the_qwen_folder(out: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(out / "qwen", dtype="auto")
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert round(sum(p.numel() for p in model.parameters()) / 1e5) == 95
    tokenizer = AutoTokenizer.from_pretrained(out / "qwen")
    parts = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "what?"}]
    shown = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert shown == "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>\n"
    ids = tokenizer.encode(shown)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nwhat?\n"
    assert tokenizer.decode(ids) == shown


def test_a_tokenizer_names_every_id_of_a_large_vocabulary() -> None:
    tokenizer = build_tokenizer(vocab_size=6000, num_files=3)
    assert len(tokenizer) == 6000
    assert all(tokenizer.decode([token]) for token in range(8, 6000, 97))
    assert tokenizer.decode([5999]) == " word5999"


@pytest.mark.parametrize(("size", "millions"), [("mid", 450), ("3b", 3755), ("7b", 8292)])
def test_the_shapes_are_those_they_are_named_after(size: str, millions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "build_tokenizer", lambda _: build_tokenizer(SHAPES[size].vocab, 40))
    qwen, dinov2, _ = build_parts(SHAPES[size], "meta")
    assert round(sum(p.numel() for p in qwen.parameters()) / 1e6) == millions
    assert {p.dtype for part in (qwen, dinov2) for p in part.parameters()} == {torch.bfloat16}


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full:
        free = 10**6

    monkeypatch.setattr(make_checkpoint.shutil, "disk_usage", lambda _: Full)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "new"), "tiny"])
    assert end.value.code == 1
    assert "choose fewer --parts" in capsys.readouterr().err
    assert list((tmp_path / "new").iterdir()) == []


def test_an_unknown_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "tiny", "--parts", "dual,nose"])
    assert "unknown part nose" in capsys.readouterr().err
