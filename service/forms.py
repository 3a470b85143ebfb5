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
            raise InvalidBodyError("the form has too many parts", allowed=f"at most {_MAX_PARTS}")
        self._headers, self._value = {}, bytearray()

    def _grow(self, buffer: bytearray, data: bytes) -> None:
        buffer += data
        if len(buffer) > _MAX_HEADER_BYTES:
            raise InvalidBodyError("a part of the form has a header that is too long")

    def _header_end(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name, self._header_value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise InvalidBodyError("a part of the form has no name", allowed='form-data; name="..."')
        self._name, self._is_file = _text(options[b"name"]), b"filename" in options
        if self._is_file:
            if self._name != "file" or self.form.filename is not None:
                raise InvalidBodyError(
                    "the form has a file too many", value=self._name, allowed="one, named 'file'", param="file"
                )
            self.form.filename = _text(options[b"filename"])
        elif self._name == "file":
            raise InvalidBodyError("'file' is a text, not a file", allowed="a part with a filename", param="file")
        elif self._name in self.form.fields:
            raise InvalidBodyError("a field of the form stands twice", value=self._name, param=self._name[:64])

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.pending += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidBodyError(
                "a field of the form is too long", allowed=f"at most {_MAX_FIELD_BYTES} bytes", param=self._name[:64]
            )

    def _end(self) -> None:
        if not self._is_file:
            self.form.fields[self._name] = _text(bytes(self._value))


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidBodyError("a name or field of the form is not UTF-8") from None


async def read_form(content_type: str | None, body: AsyncIterator[bytes], write: Callable[[bytes], None]) -> FormFields:
    """`write` gets the file's bytes in a thread, piece by piece. Raises InvalidBodyError, and what `write` raises."""
    media_type, options = parse_options_header(content_type or "")
    if media_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidBodyError("the body is not a form", allowed="multipart/form-data with a boundary")
    reader = _Reader()
    try:
        parser = python_multipart.MultipartParser(options[b"boundary"], reader.callbacks())
        async for chunk in body:
            parser.write(chunk)
            if len(reader.pending) >= _AT_ONCE_BYTES:
                await _drain(reader, write)
    except FormParserError:
        raise InvalidBodyError("the form can't be read", allowed="multipart/form-data as RFC 7578 has it") from None
    if not reader.has_ended:
        raise InvalidBodyError("the form breaks off", allowed="a form with its closing boundary")
    if reader.form.filename is None:
        raise InvalidBodyError("the form holds no file", allowed="a field 'file' with a filename", param="file")
    await _drain(reader, write)
    return reader.form


async def _drain(reader: _Reader, write: Callable[[bytes], None]) -> None:
    data = bytes(reader.pending)
    reader.pending.clear()
    await asyncio.to_thread(write, data)
