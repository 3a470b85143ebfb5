"""Files: what is taken, what is refused and in which words, and that a full disk or a cut wire leaves nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from service.errors import InvalidTrainingFileError, RequestTooLargeError, StorageFullError
from service.jobs import dataset_file
from service.jobs.dataset_file import check_dataset_file
from service.jobs.files import FileFolder
from tests.service.conftest import LiveServer
from tests.service.jobs.rows import PICTURE, jsonl, row, zipped

ROWS = jsonl()
#: As the client spells a quote and line breaks in a form.
SENT_NAME = "a%2522b%250A..%2Fc.jsonl"


def made(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "upload"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (ROWS, {"format": "jsonl", "rows": 3}),
        (b"\xef\xbb\xbf" + ROWS + b"\n  \n", {"format": "jsonl", "rows": 3}),
        (zipped(**{"train.jsonl": ROWS, "images__1.png": PICTURE}), {"format": "zip", "entries": 2}),
        (zipped(**{"data__vqa.json": b"[]"}), {"format": "zip", "entries": 1}),
    ],
)
def test_training_files_are_taken(data: bytes, found: dict, tmp_path: Path) -> None:
    assert check_dataset_file(made(tmp_path, data)) == found


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "no row"),
        (ROWS + b"{not json}\n", "row 4 is not JSON. Got: {not json}"),
        (ROWS + b"[1]\n", "row 4 is not a JSON object"),
        (b'{"messages": []}\n', "row 1: 'messages' is not a list of messages. Got: an empty list"),
        (b'{"prompt": "x"}\n', "Got: no such key"),
        (b'{"messages": [{"content": "x"}]}\n', r"messages\[0\] has no role"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "row 1 is not JSON"),
        (b"\x1f\x8b\x08\x00rest", "archive of this kind"),
        (b"PK\x03\x04 and nothing more", "the zip can't be read"),
    ],
)
def test_what_is_no_training_file_is_told_with_its_row(data: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidTrainingFileError, match=words):
        check_dataset_file(made(tmp_path, data))


@pytest.mark.parametrize("name", ["../x.jsonl", "/etc/x.jsonl", "a/../../x.jsonl", "..\\x.jsonl", "C:\\x.jsonl"])
def test_entries_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), ROWS)
    with pytest.raises(InvalidTrainingFileError, match="leads out"):
        check_dataset_file(made(tmp_path, buffer.getvalue()))


def _entry(name: str = "train.jsonl", mode: int = 0, data: bytes = ROWS, **more) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **more) as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        info.compress_type = archive.compression
        archive.writestr(info, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_entry(mode=stat.S_IFLNK | 0o777), "a link or a device"),
        (_entry(mode=stat.S_IFCHR | 0o666), "a link or a device"),
        (zipped(**{"train.jsonl": ROWS, "inner.zip": zipped(a=b"x")}), "an archive in it"),
        (_entry(data=b" " * (50 << 20), compression=zipfile.ZIP_DEFLATED), "a bomb"),
        (_entry(compression=zipfile.ZIP_LZMA), "a method that is not read"),
        (zipped(**{"a.png": PICTURE}), "holds no rows"),
    ],
)
def test_what_a_zip_may_not_hold(data: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidTrainingFileError, match=words):
        check_dataset_file(made(tmp_path, data))


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    data = bytearray(zipped(**{"train.jsonl": ROWS}))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(InvalidTrainingFileError, match="encrypted"):
        check_dataset_file(made(tmp_path, bytes(data)))


def test_a_million_entries_are_refused_before_the_directory_is_read(tmp_path: Path) -> None:
    data = bytearray(zipped(**{"train.jsonl": ROWS}))
    end = data.index(b"PK\x05\x06")
    data[end + 8 : end + 12] = b"\xff\xff\xff\xff"
    with pytest.raises(InvalidTrainingFileError, match="too many entries"):
        check_dataset_file(made(tmp_path, bytes(data)))


def test_a_line_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_file, "MAX_LINE_BYTES", 1000)
    with pytest.raises(InvalidTrainingFileError, match="row 2 is too long"):
        check_dataset_file(made(tmp_path, json.dumps({"messages": [{"role": "x"}]}).encode() + b"\n" + b"x" * 5000))


def left(live: LiveServer) -> list[str]:
    return [path.name for path in (live.data_dir / "files").rglob("*") if path.is_file()]


def post(live: LiveServer, data: bytes, purpose: str | None = "fine-tune", name: str = "t.jsonl", **fields: str):
    form = {**({"purpose": purpose} if purpose else {}), **fields}
    return live.http.post("/v1/files", files={"file": (name, data)}, data=form)


def refusal(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_refused_uploads_leave_nothing(start: Callable[..., LiveServer]) -> None:
    live = start(max_upload_bytes=100_000)
    wrong = [
        (post(live, b"not json\n"), (400, "invalid_training_file", "file")),
        (post(live, ROWS, None), (400, "invalid_value", "purpose")),
        (post(live, ROWS, "assistants"), (400, "invalid_value", "purpose")),
        (post(live, ROWS, surprise="x"), (400, "invalid_value", "surprise")),
        (post(live, ROWS, **{"expires_after[seconds]": "3600"}), (400, "invalid_value", "expires_after.anchor")),
        (
            post(live, ROWS, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "-1"}),
            (400, "invalid_value", "expires_after.seconds"),
        ),
        (post(live, ROWS, "vision"), (400, "unsupported_image_media_type", "file")),
        (post(live, b"", "vision"), (400, "empty_image_file", "file")),
        (post(live, b"x" * 100_001), (413, "request_too_large", "file")),
        (post(live, b"x" * 400_000), (413, "request_too_large", None)),
        (live.http.post("/v1/files", data={"purpose": "fine-tune"}), (400, "invalid_value", None)),
        (live.http.post("/v1/files", json={}), (400, "invalid_value", None)),
        (live.http.post("/v1/files", files={"file": (None, b"x"), "purpose": (None, "fine-tune")}),
         (400, "invalid_value", "file")),
        (live.http.post("/v1/files", files=[("file", ("a", ROWS)), ("file", ("b", ROWS))]),
         (400, "invalid_value", "file")),
        (live.http.post("/v1/files", files=[(f"f{i}", (None, b"x")) for i in range(1000)]),
         (400, "invalid_value", None)),
    ]  # fmt: skip
    for response, expected in wrong:
        assert refusal(response) == expected, response.text
    assert left(live) == []
    assert live.http.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize("cut", ["", "; boundary=", "; boundary=other"])
def test_broken_forms(cut: str, shared: LiveServer) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
    for data in (body, body[: len(body) // 2]):
        headers = {"content-type": f"multipart/form-data{cut or '; boundary=x'}"}
        assert shared.http.post("/v1/files", content=data, headers=headers).status_code == 400


def test_a_large_file_is_checked_in_a_process_of_its_own(start: Callable[..., LiveServer]) -> None:
    live = start()
    large = json.dumps(row("x" * 5_000_000)).encode() + b"\n"
    assert post(live, large).json()["status"] == "processed"
    broken = post(live, large + b"oops\n")
    assert refusal(broken) == (400, "invalid_training_file", "file") and "row 2" in broken.json()["error"]["message"]
    assert len(left(live)) == 1


def test_quotas_and_lists(start: Callable[..., LiveServer]) -> None:
    live = start(max_file_bytes_per_key=2 * len(ROWS) + 10)
    first, second = (post(live, ROWS).json()["id"] for _ in range(2))
    refused = post(live, ROWS)
    assert refusal(refused) == (429, "quota_exceeded", "file") and refused.headers["x-should-retry"] == "false"
    assert len(left(live)) == 2
    assert [file.id for file in live.openai.files.list(limit=1)] == [second, first]
    assert [file.id for file in live.openai.files.list(order="asc")] == [first, second]
    live.openai.files.delete(first)
    assert left(live) == [second]
    assert live.http.get("/v1/files/file-none").json()["error"]["code"] == "file_not_found"
    name = post(live, ROWS, name='a"b\n../c.jsonl').json()["id"]
    sent = live.http.get(f"/v1/files/{name}/content").headers
    assert sent["content-disposition"] == "attachment; filename*=utf-8''" + SENT_NAME


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = FileFolder(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageFullError), folder.receive(100) as incoming:
        incoming.write(b"abc")
        monkeypatch.setattr(os, "fsync", full)
        folder.keep(incoming, "fine-tune", "me")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    folder = FileFolder(tmp_path)
    with folder.receive(10) as incoming:
        incoming.write(b"12345")
        with pytest.raises(RequestTooLargeError):
            incoming.write(b"678901")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    file_id, path, num_bytes = folder.write(b"step,loss\n", "fine-tune-results", "me")
    assert folder.path(path).read_bytes() == b"step,loss\n" and num_bytes == 10 and path.endswith(file_id)
    for outside in ("../x", "/etc/passwd", "jobs.sqlite3"):
        with pytest.raises(ValueError, match="no path"):
            folder.path(outside)
    assert folder.read_picture("../../fine-tune-results/" + file_id, "me") is None
    stale = tmp_path / "files" / "incoming" / "stale"
    stale.write_bytes(b"x")
    folder.drop_stale(lambda: stale.stat().st_mtime + 25 * 3600)
    assert not stale.exists()
