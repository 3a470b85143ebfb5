"""Files that lead elsewhere or unpack to too much (hostile.md, rows 28 and 29): refused, nothing outside is read."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from model_core import DualVisionDataset
from model_core.errors import ConfigError, DataFormatError, ImageNotFoundError, ImageTooLargeError, RecordError
from model_core.training.data import archive
from model_core.training.data.archive import Archive
from model_core.training.data.stores import FolderStore
from tests.model_core.training.data.corpus import jpeg, row, write_rows


def image_of(data: DualVisionDataset, index: int = 0) -> bytes:
    return data.conversation(index)[0].parts[0].image.read(10**6)


def make_zip(path: Path, members: dict[str, bytes | str], **options: object) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


DATA = json.dumps([row("1.jpg")])


def test_a_zip_is_read_where_it_lies(tmp_path: Path) -> None:
    first, second = json.dumps([row("images/1.jpg")]), json.dumps(row("/".join(["..", "top.jpg"])))
    path = make_zip(
        tmp_path / "corpus.zip",
        {"set/a.json": first, "set/images/1.jpg": jpeg(), "set/b.jsonl": second, "top.jpg": jpeg((0, 9, 9)),
         "__MACOSX/._a.json": "x", "set/.DS_Store": "x"},
        compression=zipfile.ZIP_DEFLATED,
    )  # fmt: skip
    data = DualVisionDataset(path)
    places = [data.place(i) for i in range(len(data))]
    assert [(place.file, place.row) for place in places] == [("set/a.json", 1), ("set/b.jsonl", 1)]
    assert image_of(data, 0) == jpeg()
    assert image_of(data, 1) == jpeg((0, 9, 9))
    assert sorted(os.listdir(tmp_path)) == ["corpus.zip"]
    assert image_of(pickle.loads(pickle.dumps(data)), 0) == jpeg(), "a spawned worker opens the zip anew"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "../x.jpg", "images/../../x.jpg"])
def test_a_path_that_leads_out_is_refused_unread(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jpg").write_bytes(jpeg())
    (tmp_path / "in").mkdir()
    plain = DualVisionDataset(write_rows(tmp_path / "in" / "data.json", [row(name)]))
    packed = DualVisionDataset(make_zip(tmp_path / "data.zip", {"in/data.json": json.dumps([row(name)])}))
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    for data in (plain, packed):
        with pytest.raises((RecordError, ImageNotFoundError)) as caught:
            image_of(data)
        # From a folder of the zip its top is within reach, and holds no such file.
        if data is plain or name in ("../../etc/passwd", "/etc/passwd"):
            assert caught.value.reason == "outside_root"


def test_image_root_confines_and_allows(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(jpeg())
    (tmp_path / "link").symlink_to(tmp_path / "images")
    rows = [row("1.jpg"), row(str(tmp_path / "images" / "1.jpg")), row("../images/1.jpg"), row("../data.json")]
    data = DualVisionDataset(write_rows(tmp_path / "data.json", rows), tmp_path / "link")
    assert [image_of(data, i) for i in range(3)] == [jpeg()] * 3
    with pytest.raises(RecordError, match="leads out"):
        image_of(data, 3)


def test_links_pipes_folders_and_circles_are_no_pictures(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (root / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "circle.jpg").symlink_to(root / "circle.jpg")
    os.mkfifo(root / "pipe.jpg")
    (root / "folder.jpg").mkdir()
    (root / "device.jpg").symlink_to("/dev/zero")
    store = FolderStore(root)
    for name in ("out.jpg", "device.jpg"):
        with pytest.raises(RecordError, match="leads out"):
            store.read(name, 10**6)
    for name in ("circle.jpg", "pipe.jpg", "folder.jpg", "none.jpg", "nul\0.jpg", "x" * 5000):
        with pytest.raises(ImageNotFoundError):
            store.read(name, 10**6)
    (root / "large.jpg").write_bytes(b"x" * 100)
    with pytest.raises(ImageTooLargeError):
        store.read("large.jpg", 99)


def _entry(name: str, mode: int = 0o100644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def zip_with(info: zipfile.ZipInfo, data: bytes = b"x") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("data.json", DATA)
        made.writestr(info, data)
    return file.getvalue()


def encrypted() -> bytes:
    data = bytearray(zip_with(_entry("1.jpg")))
    at = data.rindex(b"PK\x01\x02")
    data[at + 8] |= 1
    return bytes(data)


def twice() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w") as made:
        made.writestr("data.json", DATA)
        made.writestr("data.json", DATA)
    return file.getvalue()


def bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("data.json", DATA)
        for i in range(5):
            made.writestr(f"{i}.jpg", bytes(16 << 20))
    return file.getvalue()


def many(count: int) -> bytes:
    """A zip of `count` empty files, written by hand in a moment."""
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count & 0xFFFF, count & 0xFFFF, len(entry) * count, len(local), 0)
    return local + entry * count + end


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "out of it": (lambda: zip_with(_entry("../1.jpg")), "leads out"),
    "absolute": (lambda: zip_with(_entry("/1.jpg")), "leads out"),
    "a drive": (lambda: zip_with(_entry("C:1.jpg")), "leads out"),
    "a backslash": (lambda: zip_with(_entry("a\\..\\1.jpg")), "leads out"),
    "a link": (lambda: zip_with(_entry("1.jpg", stat.S_IFLNK | 0o777), b"/etc/passwd"), "link or a device"),
    "a device": (lambda: zip_with(_entry("1.jpg", stat.S_IFCHR | 0o666)), "link or a device"),
    "nested": (lambda: zip_with(_entry("more.zip")), "archive itself"),
    "nested tar": (lambda: zip_with(_entry("more.tar.gz")), "archive itself"),
    "a password": (encrypted, "password"),
    "a name twice": (twice, "stands twice"),
    "a bomb": (bomb, "unpacks to far more"),
    "a million files": (lambda: many(1_000_000), "1000000 files"),
    "cut": (lambda: zip_with(_entry("1.jpg"))[:-30], "can't be opened"),
    "a list beyond the limit": (lambda: many(1_500_000), "its list of files"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_zip_is_refused_whole(name: str, tmp_path: Path) -> None:
    make, said = HOSTILE[name]
    (tmp_path / "data.zip").write_bytes(make())
    with pytest.raises(DataFormatError, match=said):
        DualVisionDataset(tmp_path / "data.zip")
    assert os.listdir(tmp_path) == ["data.zip"]


def test_a_lying_size_can_not_unpack_more_than_it_says(tmp_path: Path) -> None:
    data = bytearray(make_zip(tmp_path / "x", {"a": bytes(1 << 20)}, compression=zipfile.ZIP_DEFLATED).read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<L", 10)
    (tmp_path / "data.zip").write_bytes(data)
    with pytest.raises(RecordError, match="damaged"):
        Archive(tmp_path / "data.zip").read("a", 10**9)


def test_a_damaged_member_is_named_and_a_large_one_stays_packed(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "data.zip", {"data.json": DATA, "1.jpg": jpeg()})
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\xd8") + 40] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(RecordError, match=r"damaged.*1\.jpg"):
        image_of(DualVisionDataset(path))
    with pytest.raises(ImageTooLargeError):
        DualVisionDataset(path).conversation(0)[0].parts[0].image.read(10)


@pytest.mark.parametrize("name", ["data.tar", "data.tar.gz", "none.json"])
def test_other_files_are_refused_by_kind(name: str, tmp_path: Path) -> None:
    if name != "none.json":
        (tmp_path / name).write_bytes(b"\x1f\x8b" + bytes(600) if name.endswith("gz") else bytes(1024))
    with pytest.raises(DataFormatError, match=r"not read|can't be read"):
        DualVisionDataset(tmp_path / name)


def test_image_root_must_be_a_folder_and_means_nothing_beside_a_zip(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        DualVisionDataset(write_rows(tmp_path / "data.json", [row(None)]), tmp_path / "none")
    with pytest.raises(ConfigError, match="holds its own"):
        DualVisionDataset(make_zip(tmp_path / "data.zip", {"data.json": DATA}), tmp_path)


def test_a_million_files_cost_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of a zip's entries take kilobytes each: the count must come first."""
    (tmp_path / "data.zip").write_bytes(many(1000))
    monkeypatch.setattr(archive, "MAX_ENTRIES", 999)
    monkeypatch.setattr(zipfile, "ZipInfo", lambda *_: pytest.fail("an entry was made"))
    with pytest.raises(DataFormatError, match="1000 files"):
        Archive(tmp_path / "data.zip")
