"""The body of a request: its fields, and the upload in a file of its own.

A body is read piece by piece as it arrives and its file part goes straight to disk. The
framework's form parser is not used: it takes the whole upload before anybody can object to
its size, and keeps what it took in a directory that outlives a killed process.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from starlette.requests import Request

from whisper_worker.doors.http_errors import Refused
from whisper_worker.errors import DeadlineExceeded, InvalidInput, TooLarge
from whisper_worker.settings import Settings

FILE_FIELDS = ("audio", "file", "audio_file")
"""Names under which clients send the recording."""

MAX_JSON_BYTES = 64 << 20
"""Largest JSON body: it is held in memory, a file is not."""

_MAX_JSON_VALUES = 10_000
"""Audio is one long string; what holds more values than this only costs memory and time."""
_MAX_FIELDS_BYTES = 1 << 20
_MAX_FIELDS = 200
_MULTIPART_OVERHEAD = 2 << 20
_STALL_TIMEOUT = 60.0
"""Seconds without a byte after which an upload counts as given up."""
_WRITE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Body:
    """What a request brought: fields as the schema takes them, and the file if there was one."""

    fields: dict[str, Any]
    upload: Path | None = None
    filename: str = "audio"
    """The caller's name for the file: shown to the caller again, never used as a path."""


async def read_body(request: Request, directory: Path, settings: Settings) -> Body:
    """Read a multipart or JSON body; an upload is written into ``directory``.

    Query parameters count as fields. A field given several times becomes a list, and ``name[]``
    is ``name``. Raises :class:`InvalidInput`, :class:`TooLarge`, :class:`DeadlineExceeded`,
    :class:`Refused` for a type of body that is not taken, and ``ClientDisconnect``.
    """
    content_type, options = _content_type(request)
    if content_type == "multipart/form-data":
        body = await _read_multipart(request, options.get("boundary", ""), directory, settings)
    elif content_type == "application/json":
        body = Body(await _read_json(request))
    else:
        raise Refused(415, "INVALID_INPUT", "Send the audio as multipart/form-data, or JSON with audio_url.")
    for name, value in _collected(request.query_params.multi_items()).items():
        if name in body.fields:
            raise InvalidInput(f"The field {name} is given twice, in the address and in the body.")
        body.fields[name] = value
    return body


async def _pieces(request: Request, limit: int, message: str) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises :class:`TooLarge` at ``limit`` bytes, before reading where it was announced."""
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > limit:
        raise TooLarge(message)
    stream = request.stream()
    n_bytes = 0
    try:
        while True:
            try:
                piece = await asyncio.wait_for(anext(stream), _STALL_TIMEOUT)
            except StopAsyncIteration:
                return
            n_bytes += len(piece)
            if n_bytes > limit:
                raise TooLarge(message)
            yield piece
    except asyncio.TimeoutError:
        raise DeadlineExceeded("The upload stopped arriving; send it again.") from None


async def _read_json(request: Request) -> dict[str, Any]:
    message = f"A JSON body may hold {MAX_JSON_BYTES >> 20} MiB; send the audio as multipart/form-data."
    body = b"".join([piece async for piece in _pieces(request, MAX_JSON_BYTES, message)])
    if sum(body.count(mark) for mark in (b"[", b"{", b",")) > _MAX_JSON_VALUES:
        raise InvalidInput(f"A JSON body may hold {_MAX_JSON_VALUES} values.")
    try:
        fields = await asyncio.to_thread(json.loads, body)
        if re.search(rb"\\u[dD]", body):
            # Half of a surrogate pair can be written, but neither logged nor answered.
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise InvalidInput("The body is not JSON.") from None
    if not isinstance(fields, dict):
        raise InvalidInput('The body must be an object, such as {"audio_url": "https://..."}.')
    return fields


async def _read_multipart(request: Request, boundary: str, directory: Path, settings: Settings) -> Body:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser

    if not boundary:
        raise InvalidInput("The Content-Type has no boundary: let the client set it.")
    message = (
        f"The upload is larger than the {settings.max_download_bytes} bytes that this service takes; "
        "send it in parts or in a compressed format."
    )
    form = _Form(directory, settings.max_download_bytes, message)
    damaged = "The multipart body is damaged or was cut; send it again."
    try:
        parser = MultipartParser(boundary.encode("latin-1", "replace"), form.callbacks())  # type: ignore[arg-type]
        async for piece in _pieces(request, settings.max_download_bytes + _MULTIPART_OVERHEAD, message):
            parser.write(piece)
            if len(form.pending) >= _WRITE_BYTES:
                await asyncio.to_thread(form.write_pending)
        await asyncio.to_thread(form.write_pending)
    except FormParserError:
        raise InvalidInput(damaged) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = "The service has no disk space left for the upload; try again later."
        raise Refused(507, "INTERNAL", message, retryable=True) from None
    finally:
        form.close()
    if not form.ended:
        raise InvalidInput(damaged)
    return Body(_collected(form.fields), form.path, form.filename)


@dataclass(slots=True)
class _Form:
    """Takes the parser's callbacks for one body, part by part."""

    directory: Path
    max_bytes: int
    too_large: str
    fields: list[tuple[str, str]] = field(default_factory=list)
    path: Path | None = None
    filename: str = "audio"
    pending: bytearray = field(default_factory=bytearray)
    ended: bool = False
    _file: IO[bytes] | None = None
    _in_file: bool = False
    _n_bytes: int = 0
    _n_fields_bytes: int = 0
    _name: str = ""
    _value: bytearray = field(default_factory=bytearray)
    _header: bytearray = field(default_factory=bytearray)
    _header_value: bytearray = field(default_factory=bytearray)
    _disposition: bytes = b""

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
            "on_header_end": self._end_of_header,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end_of_part,
            "on_end": self._end,
        }

    def write_pending(self) -> None:
        if self._file is not None:
            self._file.write(self.pending)
        self.pending.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _begin(self) -> None:
        self._value.clear()
        self._disposition = b""

    def _end_of_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._disposition)
        self._name = _text(options.get(b"name", b""))
        self._in_file = b"filename" in options
        if not self._in_file:
            return
        if self._name not in FILE_FIELDS:
            raise InvalidInput(f"The file must be sent as one of the fields {', '.join(FILE_FIELDS)}.")
        if self.path is not None:
            raise InvalidInput("Send one audio file in a request.")
        self.filename = PurePosixPath(_text(options[b"filename"]).replace("\\", "/")).name or "audio"
        # Only headerless formats need the extension; the content decides everything else.
        suffix = PurePosixPath(self.filename).suffix.lower()
        self.path = self.directory / ("upload" + (suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ""))
        self._file = os.fdopen(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._n_bytes += end - start
            if self._n_bytes > self.max_bytes:
                raise TooLarge(self.too_large)
            self.pending += data[start:end]
            return
        self._n_fields_bytes += end - start
        if self._n_fields_bytes > _MAX_FIELDS_BYTES:
            raise TooLarge(
                f"The fields beside the file hold more than {_MAX_FIELDS_BYTES >> 20} MiB; send audio as file."
            )
        self._value += data[start:end]

    def _end_of_part(self) -> None:
        if not self._in_file:
            self.fields.append((self._name, _text(self._value)))
            if len(self.fields) > _MAX_FIELDS:
                raise InvalidInput(f"A request may have {_MAX_FIELDS} fields.")

    def _end(self) -> None:
        self.ended = True


def _collected(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Fields by name: one value as it is, several as a list, and always a list for ``name[]``."""
    fields: dict[str, Any] = {}
    for spelled, value in pairs:
        name = spelled.removesuffix("[]")
        if name in fields:
            before = fields[name]
            fields[name] = [*(before if isinstance(before, list) else [before]), value]
        else:
            fields[name] = [value] if spelled.endswith("[]") else value
    return fields


def _text(raw: bytes | bytearray) -> str:
    return raw.decode("utf-8", "replace")


def _content_type(request: Request) -> tuple[str, dict[str, str]]:
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(request.headers.get("content-type", ""))
    return kind.decode("latin-1"), {key.decode("latin-1"): _text(value) for key, value in options.items()}
