"""`dve publish`: a good run becomes a version, and whatever is wrong with one leaves nothing behind and says so."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model_core.checkpoint import Loaded, load_checkpoint
from model_core.cli.publish import main
from model_core.published import folder_name, read_state
from model_core.variant import load_variant
from tests.model_core.variants import save_base, train

ROOT = Path(__file__).parents[3]
MODEL_ID = "ft:tiny:acme:colours:ab12cd34"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_base(folder)
    return folder


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Loaded:
    return load_checkpoint(base_folder)


@pytest.fixture(scope="module")
def trained(base: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train(base, tmp_path_factory.mktemp("trained") / "run")
    (folder / "manifest.json").unlink()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run's folder as a worker finds it on a disk: without its manifest every damage is seen by its own check."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def publish(base: Path, run: Path, models: Path, *more: str) -> list[str]:
    return ["--base", str(base), "--run", str(run), "--out", str(models / folder_name(MODEL_ID)), *more]


def test_a_run_becomes_a_model_in_a_process_of_its_own(base_folder: Path, base: Loaded, run: Path, tmp_path: Path):
    command = [sys.executable, "-m", "model_core.cli.publish", *publish(base_folder, run, tmp_path / "models")]
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["id"], told["state"], told["components"]) == (MODEL_ID, "ready", ["fusion"])
    state = read_state(tmp_path / "models" / folder_name(MODEL_ID))
    assert (state.id, state.current, state.previous) == (MODEL_ID, told["version"], ())
    found, whole = load_variant(Path(told["folder"]), base), load_checkpoint(run)
    assert all(torch.equal(found.model.state_dict()[n], t) for n, t in whole.model.state_dict().items())


def test_a_held_version_is_not_promoted(base_folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(publish(base_folder, run, tmp_path / "models", "--hold")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "publishing"
    assert Path(told["folder"]).is_dir()
    assert read_state(tmp_path / "models" / folder_name(MODEL_ID)) is None


def truncate(run: Path) -> None:
    file = run / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def claim_a_huge_header(run: Path) -> None:
    file = run / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def change(run: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(run / "model.safetensors")
    edit(tensors)
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})


def reshape(run: Path) -> None:
    change(run, lambda t: t.update({"model.fusion.output_projector.bias": torch.zeros(3)}))


def lose_a_tensor(run: Path) -> None:
    change(run, lambda t: t.pop("model.fusion.output_projector.bias"))


def break_numbers(run: Path) -> None:
    change(run, lambda t: t["model.fusion.output_projector.bias"].fill_(float("nan")))


def lose_the_config(run: Path) -> None:
    (run / "config.json").unlink()


def another_config(run: Path) -> None:
    (run / "config.json").write_text('{"model_type": "dinov2"}')


def contradict_the_config(run: Path) -> None:
    """Once this came through as the configuration library's own error."""
    file = run / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))


def become_a_pickle(run: Path) -> None:
    (run / "model.safetensors").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")


def become_a_torch_file(run: Path) -> None:
    (run / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(100))


def vanish(run: Path) -> None:
    for file in run.iterdir():
        file.unlink()
    run.rmdir()


DAMAGE = [
    truncate, claim_a_huge_header, reshape, lose_a_tensor, break_numbers, lose_the_config, another_config,
    contradict_the_config, become_a_pickle, become_a_torch_file, vanish,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_run_is_never_published(base_folder: Path, run: Path, tmp_path: Path, capsys, damage) -> None:
    assert main(publish(base_folder, run, tmp_path / "models")) == 0
    before = read_state(tmp_path / "models" / folder_name(MODEL_ID))
    capsys.readouterr()
    damage(run)
    assert main(publish(base_folder, run, tmp_path / "models")) == 78
    told = capsys.readouterr()
    error = json.loads(told.out)["error"]
    assert error["code"] == "checkpoint_corrupt"
    assert told.err == f"dve publish: error: {error['message']}\n"
    assert "Got: " in error["message"] or "can't be read" in error["message"]
    assert read_state(tmp_path / "models" / folder_name(MODEL_ID)) == before
    model = tmp_path / "models" / folder_name(MODEL_ID)
    assert {entry.name for entry in model.iterdir()} == {"model.json", ".lock", before.current}


@pytest.mark.parametrize("wrong", ["--base", "--out"])
def test_a_wrong_call_is_told(base_folder: Path, run: Path, tmp_path: Path, capsys, wrong: str) -> None:
    argv = publish(base_folder, run, tmp_path / "models")
    argv[argv.index(wrong) + 1] = {"--base": str(tmp_path / "gone"), "--out": str(tmp_path / ".hidden")}[wrong]
    assert main(argv) == 78
    assert json.loads(capsys.readouterr().out)["error"]["code"] in ("checkpoint_incomplete", "invalid_value")


FULL = "I/O error: No space left on device (os error 28)"  # as safetensors tells it


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError(FULL)])
def test_a_full_disk_may_be_tried_again(
    base_folder: Path, run: Path, tmp_path: Path, capsys, monkeypatch, error
) -> None:
    from model_core import variant

    def full(*_, **__):
        raise error

    monkeypatch.setattr(variant, "save_file", full)
    assert main(publish(base_folder, run, tmp_path / "models")) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "storage_full"
    assert not any(p.is_dir() for p in (tmp_path / "models").rglob("*.tmp"))
