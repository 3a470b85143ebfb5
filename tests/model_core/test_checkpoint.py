"""A folder is written whole, loads by every door with the same answers, and fails with an error that helps."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from model_core import checkpoint
from model_core.checkpoint import Loaded, LoadOptions, combine_checkpoints, load_checkpoint, save_checkpoint
from model_core.config import DualVisionConfig
from model_core.encoder import DualVisionEncoder
from model_core.errors import (
    CheckpointIncompleteError,
    CheckpointMismatchError,
    ConfigError,
    HubUnreachableError,
)
from model_core.fusion import STRATEGIES
from model_core.manifest import recover, verify_folder
from model_core.model import DualVisionModel
from model_core.processing.processor import DualVisionProcessor
from tests.model_core import tiny
from tests.model_core.tiny import save_dinov2, save_qwen

ROOT = Path(__file__).parents[2]
PICTURE = Image.linear_gradient("L").convert("RGB").crop((0, 0, 90, 60))
MESSAGES = [
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what is this?"}]}
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture
def dual(tmp_path: Path) -> Path:
    save_checkpoint(tiny.trained_model(), tiny.processor(), tmp_path / "dual", extra={"step": 3})
    return tmp_path / "dual"


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    """The two public checkpoints, as a hub would give them."""
    return save_qwen(tmp_path / "qwen"), save_dinov2(tmp_path / "dinov2")


def answer(loaded: Loaded) -> str:
    return DualVisionEncoder.from_loaded(loaded, "x").chat(MESSAGES, max_tokens=12, stop=())


def logits(model: torch.nn.Module) -> torch.Tensor:
    inputs = tiny.processor()(images=PICTURE, text="<|image_pad|>what?")
    with torch.no_grad():
        return model(**inputs).logits


# --- one folder -------------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_it_should_and_no_pickle(dual: Path) -> None:
    assert {file.name for file in dual.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "modeling_dual_vision.py", "manifest.json",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    config = json.loads((dual / "config.json").read_text())
    assert config["model_type"] == "dual_vision"
    assert config["auto_map"]["AutoModel"] == "modeling_dual_vision.DualVisionModel"
    manifest = verify_folder(dual, deep=True)
    assert manifest.extra == {"step": 3}
    assert set(manifest.files) == {file.name for file in dual.iterdir()} - {"manifest.json"}


def test_weights_are_sharded_when_they_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", "200KB")
    model = tiny.trained_model()
    save_checkpoint(model, tiny.processor(), tmp_path / "dual")
    shards = sorted(file.name for file in (tmp_path / "dual").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-0000{len(shards)}.safetensors"
    assert torch.equal(logits(load_checkpoint(tmp_path / "dual").model), logits(model))
    (tmp_path / "dual" / shards[1]).unlink()
    with pytest.raises(CheckpointIncompleteError, match=rf"{shards[1]} is missing"):
        load_checkpoint(tmp_path / "dual")


@pytest.mark.parametrize("fusion", STRATEGIES)
def test_every_tensor_and_the_greedy_text_survive_the_round_trip(fusion: str, tmp_path: Path) -> None:
    model, processor = tiny.trained_model(fusion, registers=2), tiny.encoder(tiny.dual_model(fusion)).processor
    before = answer(Loaded(model, processor))
    save_checkpoint(model, processor, tmp_path / "dual")
    loaded = load_checkpoint(tmp_path / "dual")
    found, expected = loaded.model.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert loaded.processor.tokens_per_cell == model.fusion.tokens_per_cell
    assert len(before) > 3
    assert answer(loaded) == before
    auto = AutoModel.from_pretrained(tmp_path / "dual").eval()
    assert same_weights(auto, model)
    assert answer(Loaded(auto, loaded.processor)) == before


def test_transformers_auto_classes_load_the_folder(dual: Path) -> None:
    expected = logits(load_checkpoint(dual).model)
    assert isinstance(AutoConfig.from_pretrained(dual), DualVisionConfig)
    assert isinstance(AutoProcessor.from_pretrained(dual), DualVisionProcessor)
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained(dual)
        assert isinstance(model, DualVisionModel)
        assert torch.equal(logits(model.eval()), expected)


def python(code: str, *arguments: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=100)


def test_the_shim_names_our_classes_in_a_process_that_does_not_know_them(dual: Path, tmp_path: Path) -> None:
    code = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
assert not any(name.startswith("model_core") for name in sys.modules)
remote = {"trust_" + "remote_code": True}
for auto in (AutoConfig, AutoProcessor, AutoModel, AutoModelForImageTextToText):
    print(type(auto.from_pretrained(sys.argv[1], **remote)).__module__)
"""
    done = python(code, dual, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [
        "model_core.config", "model_core.processing.processor", "model_core.model", "model_core.model",
    ]  # fmt: skip


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_folder(dual: Path) -> None:
    before = load_checkpoint(dual)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            before.model.lm_head.weight.data.zero_()
            killed = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
            save_checkpoint(before.model, before.processor, dual, write_more=lambda _: killed())
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    verify_folder(dual, deep=True)
    after = load_checkpoint(dual)
    assert after.fingerprint == before.fingerprint
    assert torch.equal(after.model.lm_head.weight, before.model.lm_head.weight)
    assert len(done := recover(dual.parent)) == 1
    assert done[0].startswith("removed .dual.")
    assert [p.name for p in dual.parent.iterdir()] == ["dual"]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tiny.trained_model(), tiny.processor(), tmp_path / "dual", write_more=fail)
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_follows_the_weights_and_the_preprocessing(tmp_path: Path) -> None:
    model, prints = tiny.trained_model(), []
    for name, pixels in (("a", 112), ("b", 112), ("c", 84)):
        save_checkpoint(model, tiny.processor(max_pixels=pixels * pixels), tmp_path / name)
        prints.append(load_checkpoint(tmp_path / name).fingerprint)
    with torch.no_grad():
        model.fusion.output_projector.bias[0] += 1
    save_checkpoint(model, tiny.processor(), tmp_path / "d")
    prints.append(load_checkpoint(tmp_path / "d").fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


# --- two checkpoints into one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 2])
def test_a_combined_model_is_qwen_to_the_bit_and_the_same_code(registers: int, tmp_path: Path) -> None:
    qwen, dinov2 = save_qwen(tmp_path / "q"), save_dinov2(tmp_path / "d", registers)
    loaded = combine_checkpoints(qwen, dinov2)
    assert type(loaded.model) is DualVisionModel
    assert torch.equal(logits(loaded.model), logits(tiny.qwen_model()))
    assert not loaded.model.fusion.is_trained
    assert loaded.model.lm_head.weight is loaded.model.model.language_model.embed_tokens.weight
    theirs = AutoModel.from_pretrained(dinov2).state_dict()
    own = loaded.model.model.dinov2.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)
    assert loaded.model.config.qwen_model_name == str(qwen)
    save_checkpoint(loaded.model, loaded.processor, tmp_path / "dual")
    again = load_checkpoint(tmp_path / "dual")
    assert again.model.state_dict().keys() == loaded.model.state_dict().keys()
    assert torch.equal(logits(again.model), logits(loaded.model))


def test_parts_take_qwens_dtype_and_an_asked_one_wins(tmp_path: Path) -> None:
    qwen, dinov2 = save_qwen(tmp_path / "q", torch.bfloat16), save_dinov2(tmp_path / "d")
    own = combine_checkpoints(qwen, dinov2).model
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16}
    assert own.fusion.means.count.dtype == torch.int64
    for asked in ("float32", torch.float32):
        model = combine_checkpoints(qwen, dinov2, LoadOptions(dtype=asked)).model
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_pair_is_one_base_in_every_process(tmp_path: Path) -> None:
    """What a job trained from it is published as what differs: of two births the gate would differ as well."""
    qwen, dinov2 = save_qwen(tmp_path / "q"), save_dinov2(tmp_path / "d")
    one = combine_checkpoints(qwen, dinov2)
    state = torch.get_rng_state()
    torch.rand(3)
    two = combine_checkpoints(qwen, dinov2)
    assert same_weights(one.model, two.model) and one.fingerprint == two.fingerprint
    torch.set_rng_state(state)
    before = torch.rand(1)
    torch.set_rng_state(state)
    combine_checkpoints(qwen, dinov2)
    assert torch.equal(torch.rand(1), before), "a caller's random numbers are its own"


def same_weights(one: DualVisionModel, two: DualVisionModel) -> bool:
    states = one.state_dict(), two.state_dict()
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


# --- bad input --------------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 40)


def edit(**changes: object) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.json", Path.unlink, r"no config\.json.*dual"),
        ("model.safetensors", Path.unlink, r"model\.safetensors is missing.*\d+ bytes"),
        ("model.safetensors", cut, r"model\.safetensors has another size.*Got: \d+ bytes.*Allowed: \d+ bytes"),
        ("tokenizer.json", Path.unlink, r"tokenizer\.json is missing"),
        ("config.json", lambda file: file.write_text("{"), r"can't be read|another size"),
        ("manifest.json", lambda file: file.write_text("{"), "not a readable manifest"),
    ],
)
def test_a_damaged_folder_is_incomplete(dual: Path, file: str, damage: Callable[[Path], None], message: str) -> None:
    damage(dual / file)
    with pytest.raises(CheckpointIncompleteError, match=message):
        load_checkpoint(dual)


@pytest.mark.parametrize(
    ("file", "damage", "error", "message"),
    [
        ("qwen/config.json", Path.unlink, CheckpointIncompleteError, r"no config\.json"),
        ("qwen/model.safetensors", Path.unlink, CheckpointIncompleteError, "can't be read"),
        ("qwen/model.safetensors", cut, CheckpointIncompleteError, "can't be read.*Copy or download it again"),
        ("dinov2/model.safetensors", cut, CheckpointIncompleteError, "can't be read"),
        ("dinov2/config.json", lambda file: file.write_text("{"), CheckpointIncompleteError, "can't be read"),
        ("qwen/tokenizer.json", Path.unlink, CheckpointIncompleteError, "can't be read.*tokenizer"),
        ("qwen/preprocessor_config.json", Path.unlink, CheckpointIncompleteError, "can't.*image processor"),
        ("dinov2/config.json", edit(hidden_size=32), CheckpointMismatchError, r"don't fill.*is \(.*24.*\), not \(.*32"),
        ("dinov2/config.json", edit(num_hidden_layers=3), CheckpointMismatchError, r"don't fill.*layer\.2"),
        ("dinov2/config.json", edit(patch_size=16), ConfigError, r"patch size.*16.*14"),
    ],
)
def test_damaged_parts_are_named(
    parts: tuple[Path, Path], file: str, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    damage(parts[0].parent / file)
    with pytest.raises(error, match=message):
        combine_checkpoints(*parts)


def test_pickled_weights_are_never_opened(parts: tuple[Path, Path]) -> None:
    (parts[1] / "model.safetensors").unlink()
    (parts[1] / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(CheckpointIncompleteError, match=r"can't be read.*safetensors"):
        combine_checkpoints(*parts)


def test_another_architecture_is_a_mismatch(dual: Path, parts: tuple[Path, Path]) -> None:
    qwen, dinov2 = parts
    with pytest.raises(CheckpointMismatchError, match=r"qwen: qwen2_5_vl.*dual_vision.*--qwen_model_name"):
        load_checkpoint(qwen)
    for wrong, name in ((dinov2, "dinov2"), (dual, "dual_vision")):
        with pytest.raises(CheckpointMismatchError, match=rf"qwen_model_name is not.*{name}.*qwen2_5_vl, such as"):
            combine_checkpoints(wrong, dinov2)
    with pytest.raises(CheckpointMismatchError, match=r"dinov2_model_name is not.*qwen2_5_vl.*dinov2_with_registers"):
        combine_checkpoints(qwen, qwen)


def test_weights_of_another_strategy_are_refused_not_dropped(dual: Path) -> None:
    """transformers loads what fits and warns: a gated model would come back as `static`, its gate gone."""
    (dual / "manifest.json").unlink()  # as in a plain folder from a hub
    edit(fusion="static")(dual / "config.json")
    with pytest.raises(CheckpointMismatchError, match=r"fusion\.gate\.\d\.\w+ has no place"):
        load_checkpoint(dual)
    edit(fusion="cross_attention")(dual / "config.json")
    with pytest.raises(CheckpointMismatchError, match=r"fusion\.\w+.* missing"):
        load_checkpoint(dual)


def test_settings_are_checked_before_any_weight_is_read(parts: tuple[Path, Path]) -> None:
    for folder in parts:
        (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match=r"common_dim 48 is below the language model's width 64.*gated_residual"):
        combine_checkpoints(*parts, common_dim=48)
    with pytest.raises(ConfigError, match=r"unknown fusion strategy.*mixed"):
        combine_checkpoints(*parts, fusion="mixed")
    with pytest.raises(ConfigError, match=r"dropout.*1\.5"):
        combine_checkpoints(*parts, dropout=1.5)


def test_a_hub_id_out_of_reach_is_named(parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match=r"Nobody/nothing-1.*local folder.*Download it"):
        load_checkpoint("Nobody/nothing-1")
    with pytest.raises(HubUnreachableError, match="Nobody/nothing-2"):
        combine_checkpoints(parts[0], "Nobody/nothing-2")
    for absent in ("/nowhere/at/all", "./nowhere", "a/b/c"):
        with pytest.raises(CheckpointIncompleteError, match=rf"no such folder.*{absent}"):
            load_checkpoint(absent)


def test_options_are_honoured_or_refused(dual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = load_checkpoint(dual, LoadOptions(dtype="bfloat16", use_flash_attention=False)).model
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.fusion.means.count.dtype == torch.int64
    for options, message in (
        (
            LoadOptions(use_flash_attention=True),
            r"flash attention.*cpu, torch.float32.*CUDA.*leave use_flash_attention out",
        ),
        (LoadOptions(dtype="float31"), r"unknown dtype.*float31.*bfloat16"),
        (LoadOptions(device="cuda"), r"no such CUDA device.*cuda.*auto, cpu"),
        (LoadOptions(device="quantum"), r"unknown device.*quantum.*cuda:N"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_checkpoint(dual, options)
