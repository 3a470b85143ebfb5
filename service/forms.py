"""A multipart form with one file, read as it comes: the file's bytes go to a sink, never into memory whole.

In: a request. Out: its text fields. It refuses what a small form does not need: many parts, large fields, two files.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from service.errors import InvalidBodyError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MAX_PARTS = 16
_MAX_FIELD_BYTES = 4096
_MAX_HEADER_BYTES = 4096
_AT_ONCE_BYTES = 1 << 20


@dataclass(slots=True)
class FormFields:
    """`fields`: texts by name. `filename`: the file's, as the client calls it."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


class _Reader:
    """Parser callbacks: they are synchronous, so file bytes wait in `pending` until the caller has written them."""

    def __init__(self) -> None:
        self.form = FormFields()
        self.pending = bytearray()
        self._num_parts = 0
        self._header_name, self._header_value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._name, self._is_file = "", False
        self._value = bytearray()
        self.has_ended = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._grow(self._header_name, data[start:end]),
            "on_header_value": lambda data, start, end: self._grow(self._header_value, data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._end_of_form,
        }

    def _end_of_form(self) -> None:
        self.has_ended = True

    def _begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise InvalidBodyError(
                "the form has too many parts", value=f"more than {_MAX_PARTS}", allowed=f"at most {_MAX_PARTS}",
                fix="Send only 'file', 'purpose' and 'expires_after'",
            )  # fmt: skip
        self._headers, self._value = {}, bytearray()

    def _grow(self, buffer: bytearray, data: bytes) -> None:
        buffer += data
        if len(buffer) > _MAX_HEADER_BYTES:
            raise InvalidBodyError(
                "a part of the form has a header that is too long", value=f"{len(buffer)} bytes or more",
                allowed=f"at most {_MAX_HEADER_BYTES} bytes", fix="Shorten the part's name or filename",
            )  # fmt: skip

    def _header_end(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name, self._header_value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        if b"name" not in options:
            raise InvalidBodyError(
                "a part of the form has no name", value=disposition.decode("ascii", "replace") or "no such header",
                allowed='form-data; name="..."', fix="Name each part in its Content-Disposition header",
            )  # fmt: skip
        self._name, self._is_file = _text(options[b"name"]), b"filename" in options
        if self._is_file:
            if self._name != "file" or self.form.filename is not None:
                raise InvalidBodyError(
                    "the form has a file too many", value=self._name, allowed="one, named 'file'",
                    fix="Send each file in a request of its own, as the part 'file'", param="file",
                )  # fmt: skip
            self.form.filename = _text(options[b"filename"])
        elif self._name == "file":
            raise InvalidBodyError(
                "'file' is a text, not a file", value="no filename", allowed="a part with a filename",
                fix="Give the part a filename, as curl -F file=@FILE does", param="file",
            )  # fmt: skip
        elif self._name in self.form.fields:
            raise InvalidBodyError(
                "a field of the form stands twice", value=self._name, allowed="each field once",
                fix="Leave one of the two out", param=self._name[:64],
            )  # fmt: skip

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.pending += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidBodyError(
                "a field of the form is too long", value=f"{len(self._value)} bytes or more",
                allowed=f"at most {_MAX_FIELD_BYTES} bytes", fix="Shorten it; only the part 'file' may be large",
                param=self._name[:64],
            )  # fmt: skip

    def _end(self) -> None:
        if not self._is_file:
            self.form.fields[self._name] = _text(bytes(self._value))


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidBodyError(
            "a name or field of the form is not UTF-8", value=data[:40], allowed="UTF-8",
            fix="Encode names and fields in UTF-8",
        ) from None  # fmt: skip


async def read_form(content_type: str | None, body: AsyncIterator[bytes], write: Callable[[bytes], None]) -> FormFields:
    """`write` gets the file's bytes in a thread, piece by piece. Raises InvalidBodyError, and what `write` raises."""
    media_type, options = parse_options_header(content_type or "")
    if media_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidBodyError(
            "the body is not a form", value=content_type or "no content-type",
            allowed="multipart/form-data with a boundary",
            fix="Let the HTTP client write the form, as curl -F purpose=fine-tune -F file=@FILE does",
        )  # fmt: skip
    reader = _Reader()
    try:
        parser = python_multipart.MultipartParser(options[b"boundary"], reader.callbacks())
        async for chunk in body:
            parser.write(chunk)
            if len(reader.pending) >= _AT_ONCE_BYTES:
                await _drain(reader, write)
    except FormParserError as error:
        raise InvalidBodyError(
            "the form can't be read", value=str(error), allowed="multipart/form-data as RFC 7578 has it",
            fix="Let the HTTP client write the form, and content-type's boundary with it",
        ) from None  # fmt: skip
    if not reader.has_ended:
        raise InvalidBodyError(
            "the form breaks off", value="no closing boundary", allowed="a form with its closing boundary",
            fix="Check that the form was sent whole, and send it again",
        )  # fmt: skip
    if reader.form.filename is None:
        raise InvalidBodyError(
            "the form holds no file", value="nothing", allowed="a field 'file' with a filename",
            fix="Add the file, as curl -F file=@FILE does", param="file",
        )  # fmt: skip
    await _drain(reader, write)
    return reader.form


async def _drain(reader: _Reader, write: Callable[[bytes], None]) -> None:
    data = bytes(reader.pending)
    reader.pending.clear()
    await asyncio.to_thread(write, data)
