"""`/v1/files`: OpenAI's file endpoints, for training files and for pictures.

Purpose `vision` is any key's, and its files are that key's own; everything else takes a training key, and belongs to
all of those. A file is checked before it is kept: what is there is `processed`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from model_core.errors import EmptyImageError, UnsupportedImageError
from model_core.processing.image_formats import sniff
from service.errors import InvalidBodyError, InvalidTrainingFileError, UploadNotFoundError
from service.forms import FormFields, read_form
from service.job_desk import JobDesk
from service.job_objects import file_object, list_object
from service.jobs.dataset_file import check_dataset_file
from service.jobs.files import IncomingFile
from service.jobs.job import FilePurpose, FileRecord
from service.keys import Caller
from service.media import MediaLimits, check_image_bytes
from service.routes.parts import CallerOf, Parts

router = APIRouter()

_UPLOAD_PURPOSES: Mapping[str, FilePurpose] = {"fine-tune": "fine-tune", "vision": "vision"}
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_MIN_EXPIRY_SECONDS, _MAX_EXPIRY_SECONDS = 3600, 2_592_000
_MAX_NAME_CHARACTERS = 255
_PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
#: Larger files are read in a process of their own: their JSON would take the interpreter's lock from the engine.
_SMALL_FILE_BYTES = 4 << 20


@router.post("/v1/files", operation_id="create_file")
async def create_file(request: Request, parts: Parts, caller: CallerOf) -> dict[str, Any]:
    """Upload a file: multipart with `file`, `purpose` (fine-tune or vision) and `expires_after`."""
    desk = parts.desk
    incoming = await asyncio.to_thread(desk.folder.receive, parts.request_limits.max_upload_bytes)
    with incoming:
        form = await read_form(request.headers.get("content-type"), request.stream(), incoming.write)
        purpose, expires = _purpose(form.fields), _expiry(form.fields)
        if purpose != "vision":
            caller.require("training")
        await asyncio.to_thread(incoming.flush)
        await _check(incoming, purpose, parts.media.limits)
        return file_object(await asyncio.to_thread(_keep, desk, incoming, form, purpose, caller, expires))


def _keep(
    desk: JobDesk, incoming: IncomingFile, form: FormFields, purpose: FilePurpose, caller: Caller, expires: float | None
) -> FileRecord:
    file_id, path, num_bytes = desk.folder.keep(incoming, purpose, caller.key_id)
    name = (form.filename or "")[:_MAX_NAME_CHARACTERS].replace("\0", "")
    try:
        return desk.store.files.add(
            file_id, caller.key_id, name, purpose=purpose, num_bytes=num_bytes, path=path, expires_seconds=expires,
            status="processed",
        )  # fmt: skip
    except BaseException:
        desk.folder.delete(path)
        raise


def _purpose(fields: Mapping[str, str]) -> FilePurpose:
    for name in fields:
        if name not in _FIELDS:
            raise InvalidBodyError(
                "unknown form field", value=name, allowed=f"file, {', '.join(_FIELDS)}",
                fix="Leave it out, or correct its name", param=name[:64],
            )  # fmt: skip
    given = fields.get("purpose")
    if given is None or given not in _UPLOAD_PURPOSES:
        raise InvalidBodyError(
            "this purpose is not served" if given else "the form names no purpose", value=given,
            allowed=", ".join(_UPLOAD_PURPOSES), param="purpose",
            fix="Set 'purpose' to fine-tune for training data, to vision for a picture",
        )  # fmt: skip
    return _UPLOAD_PURPOSES[given]


def _expiry(fields: Mapping[str, str]) -> float | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidBodyError(
            "files expire counted from their creation alone", value=anchor, allowed="created_at",
            fix="Set expires_after[anchor] to created_at", param="expires_after.anchor",
        )  # fmt: skip
    is_number = seconds is not None and seconds.isascii() and seconds.isdecimal() and len(seconds) <= 10
    if not is_number or not _MIN_EXPIRY_SECONDS <= int(seconds or 0) <= _MAX_EXPIRY_SECONDS:
        raise InvalidBodyError(
            "this is no life of a file", value=seconds, param="expires_after.seconds",
            allowed=f"{_MIN_EXPIRY_SECONDS} to {_MAX_EXPIRY_SECONDS} seconds",
            fix="Set expires_after[seconds] to a whole number in that range",
        )  # fmt: skip
    return float(seconds or 0)


async def _check(incoming: IncomingFile, purpose: FilePurpose, limits: MediaLimits) -> None:
    """Raises InvalidTrainingFileError, ImageError."""
    if purpose == "vision":
        check_image_bytes(incoming.num_bytes, limits, "file")
        await asyncio.to_thread(_check_picture, incoming.path)
    elif incoming.num_bytes <= _SMALL_FILE_BYTES:
        await asyncio.to_thread(check_dataset_file, incoming.path)
    else:
        await _check_elsewhere(incoming.path)


def _check_picture(path: Path) -> None:
    data = path.read_bytes()
    if not data:
        fix = "Check that the file was written and sent whole"
        raise EmptyImageError("the image is empty", value="0 bytes", allowed="an encoded image", fix=fix, param="file")
    if (found := sniff(data)) not in _PICTURES:
        raise UnsupportedImageError(
            "this is no picture that is read here", value=found or "bytes of no known format",
            allowed=", ".join(_PICTURES), fix="Convert it to PNG or JPEG", param="file",
        )  # fmt: skip


async def _check_elsewhere(path: Path) -> None:
    command = (sys.executable, "-m", "service.jobs.dataset_file", str(path))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    report = json.loads(out) if process.returncode == 0 else {}
    if "ok" not in report:
        error = report.get("error", {})
        raise InvalidTrainingFileError(
            error.get("what", "the file can't be read"), value=error.get("value"), allowed=error.get("allowed", ""),
            fix=error.get("fix", "Upload it again"), param="file",
        )  # fmt: skip


@router.get("/v1/files", operation_id="list_files")
async def list_files(
    parts: Parts,
    caller: CallerOf,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=32)] = None,
) -> dict[str, Any]:
    """Files that this key may see, newest first."""
    records, has_more = await asyncio.to_thread(
        parts.desk.store.files.page, after=after, limit=limit, purpose=purpose, is_ascending=order == "asc",
        vision_of=caller.key_id, has_others=caller.scope == "training",
    )  # fmt: skip
    return list_object([file_object(record) for record in records], has_more=has_more)


@router.get("/v1/files/{file_id}", operation_id="get_file")
async def get_file(file_id: str, parts: Parts, caller: CallerOf) -> dict[str, Any]:
    return file_object(await asyncio.to_thread(_visible, parts.desk, file_id, caller))


@router.get("/v1/files/{file_id}/content", operation_id="get_file_content", response_class=Response)
async def get_file_content(file_id: str, parts: Parts, caller: CallerOf) -> Response:
    """The bytes, as they were uploaded or as a worker wrote them."""
    record = await asyncio.to_thread(_visible, parts.desk, file_id, caller)
    path = parts.desk.folder.path(record.path)
    if not await asyncio.to_thread(path.is_file):
        raise UploadNotFoundError(
            "the file's bytes are gone", value=file_id, allowed="a file whose bytes are on the server's disk",
            fix="Upload it again, or ask whoever runs the server to restore it", param="file_id",
        )  # fmt: skip
    # Never shown by a browser, whatever is in it.
    disposition = f"attachment; filename*=utf-8''{quote(record.name, safe='')}"
    return FileResponse(path, media_type="application/octet-stream", headers={"content-disposition": disposition})


@router.delete("/v1/files/{file_id}", operation_id="delete_file")
async def delete_file(file_id: str, parts: Parts, caller: CallerOf) -> dict[str, Any]:
    """409 file_in_use while a job that has not ended reads it."""
    await asyncio.to_thread(_delete, parts.desk, file_id, caller)
    return {"id": file_id, "object": "file", "deleted": True}


def _delete(desk: JobDesk, file_id: str, caller: Caller) -> None:
    _visible(desk, file_id, caller)
    desk.folder.delete(desk.store.files.delete(file_id).path)


def _visible(desk: JobDesk, file_id: str, caller: Caller) -> FileRecord:
    """Raises UploadNotFoundError, for what this key may not see as for what is not there."""
    record = desk.store.files.get(file_id)
    is_own = record.owner == caller.key_id
    if is_own if record.purpose == "vision" else caller.scope == "training":
        return record
    raise UploadNotFoundError(
        "there is no such file, or not any more", value=file_id, allowed="the id of an uploaded file",
        fix="Upload it again", param="file_id",
    )  # fmt: skip
