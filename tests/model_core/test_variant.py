"""A version holds what training changed, loads as the whole model, and shares the rest with its base."""

from __future__ import annotations

import copy
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from model_core.checkpoint import Loaded, combine_checkpoints, load_checkpoint, save_checkpoint
from model_core.encoder import DualVisionEncoder
from model_core.engine.config import EngineConfig
from model_core.errors import CheckpointError, ConfigError
from model_core.manifest import write_folder
from model_core.probe import check_model
from model_core.published import (
    VariantRecord,
    models_in,
)
from model_core.variant import load_variant, own_bytes, publish_variant
from tests.model_core import tiny
from tests.model_core.tiny import save_dinov2, save_qwen
from tests.model_core.variants import everywhere, in_fusion, move, save_base, train

PICTURE = Image.linear_gradient("L").convert("RGB").crop((0, 0, 90, 60))
MESSAGES = [
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what is this?"}]}
]
MOVES = {
    "fusion": in_fusion,
    "one projection of the language model": lambda name: name.endswith("layers.0.self_attn.q_proj.weight"),
    "the head and the fusion": lambda name: in_fusion(name) or "embed_tokens" in name,
    "dinov2": lambda name: ".dinov2." in name,
    "everything": everywhere,
    "nothing": lambda name: False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return save_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def version(base: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good one, not to be changed."""
    root = tmp_path_factory.mktemp("version")
    return publish(base, train(base, root / "run"), root / "m")[1]


def publish(base: Loaded, run: Path, out: Path) -> tuple[VariantRecord, Path]:
    return publish_variant(base, run, out, base_name="tiny", created_unix=1_700_000_000)


def logits(loaded: Loaded) -> torch.Tensor:
    inputs = loaded.processor(images=PICTURE, text="<|image_pad|>what?")
    with torch.no_grad():
        return loaded.model(**inputs).logits


@pytest.mark.parametrize("moved", MOVES)
def test_a_version_on_its_base_is_the_whole_model_to_the_bit(base: Loaded, tmp_path: Path, moved: str) -> None:
    run = train(base, tmp_path / "run", moves=MOVES[moved])
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    record, folder = publish(base, run, tmp_path / "m")
    whole, found = load_checkpoint(run), load_variant(folder, base)
    expected, got = whole.model.state_dict(), found.model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert torch.equal(logits(found), logits(whole))
    assert torch.equal(logits(found), logits(base)) == (moved == "nothing")
    assert all(torch.equal(base.model.state_dict()[name], tensor) for name, tensor in before.items())
    assert record == VariantRecord.read(folder)
    own = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert {name for name in own if not MOVES[moved](name)} == set()
    assert record.num_tensors == len(own)


def test_loading_leaves_torchs_default_type_alone(base: Loaded, tmp_path: Path, monkeypatch) -> None:
    """transformers sets it for all threads while it builds a part: an engine beside it would compute in bfloat16."""
    half = Loaded(copy.deepcopy(base.model).to(torch.bfloat16), base.processor, base.fingerprint)
    _, folder = publish(half, train(half, tmp_path / "run"), tmp_path / "m")
    seen: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", seen.append)
    loaded = load_variant(folder, half)
    assert set(seen) <= {torch.float32}
    assert seen, "it would have noticed"
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.fusion.means.qwen.dtype == torch.float32


def test_only_what_changed_is_written_and_held(base: Loaded, tmp_path: Path) -> None:
    record, folder = publish(base, train(base, tmp_path / "run"), tmp_path / "m")
    found = load_variant(folder, base)
    fusion = sum(t.nbytes for t in base.model.fusion.parameters())
    assert record.components == ("fusion",)
    assert 0.5 * fusion < record.num_bytes <= fusion
    assert fusion <= own_bytes(found.model, base.model) < 1.1 * fusion + 1000
    for name in ("visual", "language_model", "dinov2"):
        assert getattr(found.model.model, name) is getattr(base.model.model, name)
    assert sum(file.stat().st_size for file in folder.iterdir()) < record.num_bytes + 20_000


def test_within_a_changed_component_the_rest_shares_the_bases_memory(base: Loaded, tmp_path: Path) -> None:
    run = train(base, tmp_path / "run", moves=lambda name: name.endswith("mlp.down_proj.weight"))
    _, folder = publish(base, run, tmp_path / "m")
    found = load_variant(folder, base)
    changed = sum(p.nbytes for n, p in base.model.named_parameters() if n.endswith("language_model.mlp.down_proj"))
    downs = sum(p.nbytes for n, p in base.model.model.language_model.named_parameters() if "down_proj" in n)
    assert changed == 0
    assert downs <= own_bytes(found.model, base.model) <= 2 * downs
    language_model = found.model.model.language_model
    assert language_model is not base.model.model.language_model
    assert found.model.lm_head.weight is language_model.embed_tokens.weight
    assert language_model.embed_tokens.weight.data_ptr() == base.model.lm_head.weight.data_ptr()


def test_another_fusion_strategy_on_the_same_base(base: Loaded, tmp_path: Path) -> None:
    model = tiny.trained_model("interleave")
    processor = tiny.processor()
    processor.tokens_per_cell = model.fusion.tokens_per_cell
    save_checkpoint(model, processor, tmp_path / "run")
    record, folder = publish(base, tmp_path / "run", tmp_path / "m")
    found, whole = load_variant(folder, base), load_checkpoint(tmp_path / "run")
    assert record.fusion == "interleave"
    assert found.processor.tokens_per_cell == 2
    assert base.processor.tokens_per_cell == 1
    assert torch.equal(logits(found), logits(whole))


def test_engines_beside_each_other_answer_as_each_does_alone(base: Loaded, tmp_path: Path) -> None:
    """Fused layers, packed weights and kept features are shared, and none of it may leak from one to the other."""
    runs = {
        "fusion": train(base, tmp_path / "fusion", scale=1.0),
        "half the layer": train(base, tmp_path / "half", moves=lambda n: "q_proj" in n or "up_proj" in n),
    }
    alone = {name: DualVisionEncoder.from_pretrained(run).chat(MESSAGES, max_tokens=16) for name, run in runs.items()}
    first = DualVisionEncoder.from_loaded(base, "base")
    answer = first.chat(MESSAGES, max_tokens=16)
    made = {}
    for name, run in runs.items():
        _, folder = publish(base, run, tmp_path / "m" / name.replace(" ", "-"))
        made[name] = first.beside(folder, name, EngineConfig(kv_cache_bytes=2**20, shrinks_context=True))
    for _ in range(2):
        assert first.chat(MESSAGES, max_tokens=16) == answer
        assert {name: one.chat(MESSAGES, max_tokens=16) for name, one in made.items()} == alone
    assert len({answer, *alone.values()}) == 3
    fused = made["fusion"].engine
    assert fused.runner.decoder is first.engine.runner.decoder
    assert fused.runner.features is first.engine.runner.features
    assert fused.stats().encoder_cache_hits == {}
    assert made["half the layer"].engine.runner.decoder is not first.engine.runner.decoder
    assert made["fusion"].info.fingerprint != made["half the layer"].info.fingerprint
    assert fused.stats().num_images_encoded == 0, "the base's features were kept"


def test_the_same_weights_are_the_same_version_and_published_once(base: Loaded, tmp_path: Path) -> None:
    run = train(base, tmp_path / "run")
    first, folder = publish(base, run, tmp_path / "m")
    before = folder.stat().st_mtime_ns
    second, again = publish(base, run, tmp_path / "m")
    assert (second.fingerprint, again, folder.stat().st_mtime_ns) == (first.fingerprint, folder, before)
    other, _ = publish(base, train(base, tmp_path / "other", seed=2), tmp_path / "m")
    assert other.fingerprint != first.fingerprint


def test_a_published_version_that_was_damaged_is_published_anew(base: Loaded, tmp_path: Path) -> None:
    run = train(base, tmp_path / "run")
    _, folder = publish(base, run, tmp_path / "m")
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        load_variant(folder, base)
    publish(base, run, tmp_path / "m")
    load_variant(folder, base)


def test_a_version_of_another_base_is_refused(base: Loaded, tmp_path: Path) -> None:
    _, folder = publish(base, train(base, tmp_path / "run"), tmp_path / "m")
    with pytest.raises(CheckpointError, match="another base") as caught:
        load_variant(folder, Loaded(base.model, base.processor, "0123456789ab"))
    assert caught.value.code == "checkpoint_corrupt"
    with pytest.raises(ConfigError, match="files can't be found"):
        publish(Loaded(base.model, base.processor), tmp_path / "run", tmp_path / "m")


def test_a_run_of_another_architecture_or_tokenizer_is_refused(base: Loaded, tmp_path: Path) -> None:
    save_checkpoint(tiny.trained_model(registers=2), tiny.processor(), tmp_path / "registers")
    save_checkpoint(tiny.trained_model(), tiny.processor(max_pixels=56 * 56), tmp_path / "pixels")
    for run, why in (("registers", "another architecture"), ("pixels", "preprocessor_config.json")):
        with pytest.raises(CheckpointError, match=why) as caught:
            publish(base, tmp_path / run, tmp_path / "m")
        assert caught.value.code == "checkpoint_corrupt"
    assert not (tmp_path / "m").exists()


def test_a_model_that_computes_no_numbers_fails_its_load_test(base: Loaded, tmp_path: Path) -> None:
    """Finite weights are not enough: these overflow inside."""
    run = train(base, tmp_path / "run", moves=lambda n: "output_projector.weight" in n, scale=3e38)
    with pytest.raises(CheckpointError, match="finite") as caught:
        publish(base, run, tmp_path / "m")
    assert caught.value.code == "checkpoint_corrupt"
    assert list(models_in(tmp_path / "m")) == []


def test_a_gate_whose_weights_are_no_shares_fails_its_load_test(base: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    check_model(base)
    gate = type(base.model.fusion)
    fuse = gate.fuse

    def doubled(self, inputs):
        output = fuse(self, inputs)
        object.__setattr__(output, "weights", output.weights * 2)
        return output

    monkeypatch.setattr(gate, "fuse", doubled)
    with pytest.raises(CheckpointError, match="no shares"):
        check_model(base)


def rewrite(folder: Path, edit: Callable[[Path], None]) -> None:
    """Change a version as somebody who also keeps its manifest right."""
    (folder / "manifest.json").unlink()
    edit(folder)
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    shutil.rmtree(folder)

    def write(target: Path) -> None:
        for name, content in kept.items():
            (target / name).write_bytes(content)

    write_folder(folder, write, extra={})


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)

    return change


BIAS = "model.fusion.output_projector.bias"
REWRITES = {
    "another shape": edit_tensors(lambda t: t.update({BIAS: torch.zeros(3)})),
    "another name": edit_tensors(lambda t: t.update({"model.nobody": t.pop(BIAS)})),
    "a tensor less": edit_tensors(lambda t: t.pop(BIAS)),
    "not a number": edit_tensors(lambda t: t[BIAS].fill_(float("nan"))),
    "infinite inside": edit_tensors(lambda t: t["model.fusion.output_projector.weight"].fill_(3e38)),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "another architecture": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1')
    ),
    "no record": lambda folder: (folder / "variant.json").unlink(),
    "half a record": lambda folder: (folder / "variant.json").write_text('{"format": "dve-variant"}'),
    "no weights": lambda folder: next(folder.glob("*.safetensors")).unlink(),
}


@pytest.mark.parametrize("how", REWRITES)
def test_what_a_manifest_can_not_tell_is_found_all_the_same(base: Loaded, version: Path, tmp_path: Path, how: str):
    folder = tmp_path / "damaged"
    shutil.copytree(version, folder)
    rewrite(folder, REWRITES[how])
    with pytest.raises(CheckpointError) as caught:
        load_variant(folder, base)
    assert caught.value.code == "checkpoint_corrupt"


HEADER = struct.pack("<Q", 2**60)
DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "a header of 2^60 bytes": lambda data: HEADER + data[8:],
    "one bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "a pickle": lambda data: b"\x80\x04." + bytes(len(data) - 3),
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("keeps_manifest", [True, False])
def test_a_damaged_version_is_refused(base: Loaded, version: Path, tmp_path: Path, how: str, keeps_manifest: bool):
    folder = tmp_path / "damaged"
    shutil.copytree(version, folder)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(DAMAGES[how](file.read_bytes()))
    if not keeps_manifest:
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_variant(folder, base)
    assert caught.value.code == "checkpoint_corrupt"


def test_moving_moves(base: Loaded) -> None:
    """The tests above rest on it."""
    model = tiny.trained_model()
    before = model.fusion.output_projector.weight.clone()
    move(model, in_fusion, 1, 0.2)
    assert not torch.equal(before, model.fusion.output_projector.weight)


def test_a_run_of_a_pair_is_published_on_the_pair(tmp_path: Path) -> None:
    """A pair has no manifest; its name is of its files, so that a server that combined them knows its variants."""
    save_qwen(tmp_path / "q")
    save_dinov2(tmp_path / "d")
    base, again = (combine_checkpoints(tmp_path / "q", tmp_path / "d") for _ in range(2))
    assert base.fingerprint == again.fingerprint != ""
    record, folder = publish(base, train(base, tmp_path / "run"), tmp_path / "m")
    assert record.base_fingerprint == base.fingerprint
    loaded, wanted = (
        load_variant(folder, again).model.state_dict(),
        load_checkpoint(tmp_path / "run").model.state_dict(),
    )
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    save_dinov2(tmp_path / "d", registers=2)
    assert combine_checkpoints(tmp_path / "q", tmp_path / "d").fingerprint != base.fingerprint
