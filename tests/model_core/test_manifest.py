"""The manifest: complete or refused, the old folder or the new one, and never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model_core import manifest
from model_core.errors import CheckpointError, CheckpointIncompleteError, DualVisionError
from model_core.manifest import check_safetensors, recover, verify_folder, write_folder

ROOT = Path(__file__).parents[2]


def weights(value: float = 1.0) -> dict[str, np.ndarray]:
    return {
        "a": np.full((3, 4), value, np.float32),
        "b": np.arange(5, dtype=np.int64),
        "empty": np.zeros((0, 2), np.float16),
    }


def writer(value: float = 1.0) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_file(weights(value), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / "sub").mkdir()
        (folder / "sub" / "trainer.json").write_text(json.dumps({"value": value}))

    return write


def safetensors(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def value_of(folder: Path) -> float:
    return json.loads((folder / "sub" / "trainer.json").read_text())["value"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "step-1", writer(), extra={"step": 1})
    return tmp_path / "step-1"


class TestWrite:
    def test_what_is_written_verifies(self, tmp_path: Path) -> None:
        written = write_folder(tmp_path / "runs" / "step-1", writer(), extra={"step": 1})
        read = verify_folder(tmp_path / "runs" / "step-1", deep=True)
        assert read == written and read.extra == {"step": 1}
        assert sorted(read.files) == ["config.json", "model.safetensors", "sub/trainer.json"]
        entry = read.files["config.json"]
        assert (entry.sha256, entry.size_bytes) == (hashlib.sha256(b"{}").hexdigest(), 2)
        assert names(tmp_path / "runs") == ["step-1"]
        assert os.stat(tmp_path / "runs" / "step-1").st_mode == os.stat(tmp_path / "runs").st_mode

    def test_the_manifest_comes_last_and_everything_is_on_disk_before_the_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        fsync, rename = manifest._fsync, os.rename
        monkeypatch.setattr(manifest, "_fsync", lambda path: (synced.append(path.name), fsync(path)))
        monkeypatch.setattr(os, "rename", lambda a, b: (synced.append("RENAME"), rename(a, b)))
        write_folder(tmp_path / "c", writer(), extra={})
        at = synced.index("manifest.json")
        assert sorted(synced[:at]) == ["config.json", "model.safetensors", "trainer.json"]
        assert synced[at + 1].endswith(".tmp") and synced[at + 2 :] == ["sub", "RENAME", tmp_path.name]

    def test_an_older_checkpoint_is_replaced(self, folder: Path) -> None:
        write_folder(folder, writer(2.0), extra={"step": 2})
        assert value_of(folder) == 2.0 and verify_folder(folder, deep=True).extra == {"step": 2}
        assert names(folder.parent) == ["step-1"]

    def test_replacing_without_renameat2(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(manifest, "_exchange", lambda a, b: False)
        write_folder(folder, writer(2.0), extra={})
        assert value_of(folder) == 2.0 and names(folder.parent) == ["step-1"]

    def test_a_failed_second_rename_puts_the_old_one_back(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rename = os.rename

        def fails(a: Path, b: Path) -> None:
            if str(a).endswith(".tmp"):
                raise OSError(28, "No space left on device")
            rename(a, b)

        monkeypatch.setattr(manifest, "_exchange", lambda a, b: False)
        monkeypatch.setattr(os, "rename", fails)
        with pytest.raises(OSError, match="space"):
            write_folder(folder, writer(2.0), extra={})
        assert value_of(folder) == 1.0 and names(folder.parent) == ["step-1"]

    @pytest.mark.parametrize("error", [OSError(28, "disk full"), KeyboardInterrupt(), ValueError("bug")])
    def test_a_failed_write_leaves_everything_as_it_was(self, folder: Path, error: BaseException) -> None:
        def write(target: Path) -> None:
            (target / "half").write_bytes(b"x")
            raise error

        with pytest.raises(type(error)):
            write_folder(folder, write, extra={})
        with pytest.raises(type(error)):
            write_folder(folder.parent / "new", write, extra={})
        assert names(folder.parent) == ["step-1"] and verify_folder(folder, deep=True)

    def test_what_is_not_ours_is_not_replaced(self, tmp_path: Path, folder: Path) -> None:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.txt").write_text("x")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "manifest.json").write_text('{"name": "a web app"}')
        (tmp_path / "file").write_text("x")
        (tmp_path / "link").symlink_to(folder)
        for name in ("home", "other", "file", "link"):
            with pytest.raises(CheckpointError):
                write_folder(tmp_path / name, lambda _: pytest.fail("written"), extra={})
        assert (tmp_path / "home" / "thesis.txt").exists()
        (tmp_path / "empty").mkdir()
        write_folder(tmp_path / "empty", writer(), extra={})
        assert verify_folder(tmp_path / "empty", deep=True)

    def test_what_may_not_be_in_a_checkpoint(self, tmp_path: Path) -> None:
        def link(folder: Path) -> None:
            (folder / "a.json").symlink_to("/etc/passwd")

        def linked_folder(folder: Path) -> None:
            (folder / "a").symlink_to("/etc")

        for write in (
            link, linked_folder, lambda folder: None, lambda folder: (folder / "optimizer.pt").write_bytes(b""),
            lambda folder: (folder / "manifest.json").write_text("{}"),
        ):  # fmt: skip
            with pytest.raises(CheckpointError):
                write_folder(tmp_path / "c", write, extra={})
        with pytest.raises((TypeError, ValueError)):
            write_folder(tmp_path / "c", lambda _: pytest.fail("written"), extra={"loss": float("nan")})
        assert names(tmp_path) == []

    def test_a_kill_at_any_moment_leaves_one_complete_checkpoint(self, folder: Path) -> None:
        """The child replaces the folder for ever; whenever it dies, the name leads to a whole one."""
        code = (
            "import sys; from pathlib import Path; from model_core.manifest import write_folder\n"
            "def write(folder):\n"
            "    for i in range(3): (folder / f'{i}.json').write_text('x' * 10000)\n"
            "print('go', flush=True)\n"
            "while True: write_folder(Path(sys.argv[1]), write, extra={})\n"
        )
        for wait in range(6):
            child = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
            child.stdout.readline()
            for _ in range(300 * wait):
                assert verify_folder_or_swapped(folder)
            child.kill()
            child.communicate()
            assert verify_folder(folder, deep=True) is not None
            recover(folder.parent)
            assert names(folder.parent) == ["step-1"]


def verify_folder_or_swapped(folder: Path) -> bool:
    """The folder is there at every look: the swap is one step. (Its content may be swapped while we read.)"""
    return (folder / "manifest.json").exists()


class TestRecover:
    def test_half_written_folders_go_and_lost_names_return(self, folder: Path) -> None:
        parent = folder.parent
        folder.rename(parent / ".step-1.0123abcd.old")
        (parent / ".step-1.89abcdef.tmp").mkdir()
        for mine in (".git", ".cache.tmp", ".notes.old"):
            (parent / mine).mkdir()
        with pytest.raises(CheckpointIncompleteError, match="0123abcd"):
            verify_folder(folder, deep=False)
        assert recover(parent) == ("restored step-1", "removed .step-1.89abcdef.tmp")
        assert names(parent) == [".cache.tmp", ".git", ".notes.old", "step-1"] and verify_folder(folder, deep=True)
        (parent / ".step-1.0123abcd.old").mkdir()
        assert recover(parent) == ("removed .step-1.0123abcd.old",) and recover(parent) == ()


class TestVerify:
    def test_a_missing_file(self, folder: Path) -> None:
        (folder / "sub" / "trainer.json").unlink()
        with pytest.raises(CheckpointIncompleteError, match=r"sub/trainer.json is missing.*no file.*14 bytes"):
            verify_folder(folder, deep=False)

    def test_another_size(self, folder: Path) -> None:
        (folder / "config.json").write_text("{ }")
        with pytest.raises(CheckpointIncompleteError, match=r"config.json has another size.*3 bytes.*2 bytes"):
            verify_folder(folder, deep=False)

    def test_another_byte_is_found_by_a_deep_look(self, folder: Path) -> None:
        (folder / "config.json").write_text("[]")
        assert verify_folder(folder, deep=False) is not None
        old, new = (hashlib.sha256(text).hexdigest() for text in (b"{}", b"[]"))
        with pytest.raises(CheckpointIncompleteError, match=f"config.json has other content.*{new}.*{old}"):
            verify_folder(folder, deep=True)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointIncompleteError, match="no such"):
            verify_folder(tmp_path / "x", deep=False)

    @pytest.mark.parametrize("cut", [0, 1, 50, 200])
    def test_a_damaged_manifest(self, folder: Path, cut: int) -> None:
        file = folder / "manifest.json"
        file.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(CheckpointIncompleteError, match="not a readable manifest"):
            verify_folder(folder, deep=False)

    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
    def test_a_manifest_that_points_outside(self, folder: Path, name: str) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        content["files"][name] = {"sha256": "", "size_bytes": 0}
        (folder / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="outside"):
            verify_folder(folder, deep=False)

    def test_another_version(self, folder: Path) -> None:
        file = folder / "manifest.json"
        file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
        with pytest.raises(CheckpointError, match="version"):
            verify_folder(folder, deep=False)

    def test_a_plain_hugging_face_folder(self, folder: Path) -> None:
        (folder / "manifest.json").unlink()
        assert verify_folder(folder, deep=True) is None
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
        with pytest.raises(CheckpointIncompleteError, match=r"model-1\.safetensors is missing"):
            verify_folder(folder, deep=False)

    def test_a_hub_cache_of_links(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "snapshot").mkdir()
        (tmp_path / "snapshot" / "model.safetensors").symlink_to(folder / "model.safetensors")
        assert verify_folder(tmp_path / "snapshot", deep=True) is None


class TestPickles:
    @pytest.mark.parametrize("name", ["a.pth", "b.pt", "pytorch_model.bin", "c.PKL", "sub/d.ckpt"])
    def test_by_name(self, folder: Path, name: str) -> None:
        (folder / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"pickle.*safetensors.torch.save_file"):
            verify_folder(folder, deep=False)

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_by_magic(self, folder: Path, protocol: int) -> None:
        for content in ({"a": 1}, "x" * 3000, list(range(99))):
            for name in ("weights", "model-2.safetensors"):
                (folder / name).write_bytes(pickle.dumps(content, protocol))
                with pytest.raises(CheckpointError, match="pickle"):
                    verify_folder(folder, deep=False)
                (folder / name).unlink()

    def test_a_torch_file_under_another_name(self, folder: Path) -> None:
        for name, entry in (("model-2.safetensors", "x/data"), ("optimizer", "archive/data.pkl")):
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr(entry, b"x")
            with pytest.raises(CheckpointError, match="pickle"):
                verify_folder(folder, deep=False)
            (folder / name).unlink()

    def test_a_pickle_is_never_run(self, folder: Path, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(tmp_path / "ran"),)

        (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError):
            verify_folder(folder, deep=True)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580, 0x10280])
    def test_a_header_length_that_looks_like_a_pickle_is_none(self, folder: Path, length: int) -> None:
        """A header of 640 bytes makes the file begin 80 02, the magic of pickle protocol 2."""
        header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        file = folder / "other.safetensors"
        file.write_bytes(safetensors(header.ljust(length), b"x"))
        assert load_file(file)["a"][0] == ord("x")
        assert verify_folder(folder, deep=False) is not None


class TestSafetensors:
    def test_a_good_one(self, folder: Path) -> None:
        header = check_safetensors(folder / "model.safetensors")
        assert sorted(header) == ["a", "b", "empty"] and header["a"]["shape"] == [3, 4]

    def test_cut_anywhere(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        whole = file.read_bytes()
        for at in range(len(whole)):
            file.write_bytes(whole[:at])
            with pytest.raises(CheckpointIncompleteError):
                check_safetensors(file)

    def test_changed_bytes_raise_nothing_else(self, folder: Path) -> None:
        file, chance = folder / "model.safetensors", random.Random(0)
        whole = file.read_bytes()
        for _ in range(500):
            data = bytearray(whole)
            data[chance.randrange(len(data))] = chance.randrange(256)
            file.write_bytes(data)
            try:
                check_safetensors(file)
            except DualVisionError as error:
                assert isinstance(error, CheckpointError)
            else:
                load_file(file)  # what we accept, safetensors accepts

    @pytest.mark.parametrize(
        ("header", "data"),
        [(b"\xff\xfe", b""), (b"[]", b""), (b"[" * 200_000, b""), ({"a": 5}, b""), ({"a": {"dtype": "U8"}}, b""),
         ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}, b"x"),
         ({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [1, 0]}}, b"x"),
         ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"x"),
         ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1e9]}}, b"x"),
         ({"a": {"dtype": "U7", "shape": [1], "data_offsets": [0, 1]}}, b"x"),
         ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"xy"),
         ({n: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} for n in "ab"}, b"x"),
         (b'{%s,%s}' % ((b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}',) * 2), b"x")],
    )  # fmt: skip
    def test_headers_that_lie(self, tmp_path: Path, header: object, data: bytes) -> None:
        file = tmp_path / "m.safetensors"
        file.write_bytes(safetensors(header, data))
        with pytest.raises(CheckpointError, match=r"m\.safetensors is damaged"):
            check_safetensors(file)

    def test_a_header_of_2_to_the_60(self, tmp_path: Path) -> None:
        file = tmp_path / "m.safetensors"
        file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
        with pytest.raises(CheckpointIncompleteError, match=str(2**60)):
            check_safetensors(file)

    def test_bytes_after_the_last_tensor(self, folder: Path) -> None:
        with open(folder / "model.safetensors", "ab") as file:
            file.write(b"x")
        with pytest.raises(CheckpointIncompleteError, match="bytes of tensors"):
            check_safetensors(folder / "model.safetensors")
