"""The HTTP service seen from the command: files are sent to it, transcripts come back.

Standard library only, and little of it: the command has to be there in a blink. A file is
streamed from disk; what is busy or away is asked again until the time for the file is over.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import select
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from whisper_worker import __version__
from whisper_worker.doors.cli_inputs import Input
from whisper_worker.errors import (
    Busy,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidInput,
    ModelError,
    TooLarge,
    WhisperWorkerError,
)
from whisper_worker.schema import segment_from_dict, transcript_from_dict
from whisper_worker.types import Progress, Segment, Transcript

_BLOCK = 256 * 1024
_MAX_ANSWER_BYTES = 256 * 1024**2
_CONNECT_SECONDS = 10.0
_LONGEST_PAUSE = 30.0
_READY_SECONDS = 10.0

_ERRORS = {cls.code: cls for cls in WhisperWorkerError.__subclasses__()}
_BUSY_STATUS = (429, 502, 503, 504)


class Unreachable(Busy):
    """No connection, or it broke off before the answer was there."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service listens: at a host and port, or on a Unix socket."""

    host: str
    port: int | None = None
    tls: bool = False
    prefix: str = ""
    """Path in front of the service's own."""
    socket: Path | None = None

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises :class:`InvalidInput` for what is no plain http or https address."""
        try:
            parts = urlsplit(url.strip())
            port = parts.port
        except ValueError:
            raise InvalidInput("The service's address is not a URL.") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput("The service's address must begin with http:// or https:// and name a host.")
        if parts.username is not None or parts.query or parts.fragment:
            raise InvalidInput("The service's address must hold no user, query or fragment; a key goes in --key-file.")
        return cls(parts.hostname, port, parts.scheme == "https", parts.path.rstrip("/"))


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    retry_after: str | None
    body: bytes


class _Listener:
    """Passes on what a service tells while it works. A further attempt tells no segment a second time."""

    def __init__(self, on_segment: Callable[[Segment], None], on_progress: Callable[[Progress], None] | None) -> None:
        self._on_segment = on_segment
        self._on_progress = on_progress
        self._n_told = 0
        self._n_heard = 0

    def begin(self) -> None:
        self._n_heard = 0

    def event(self, name: str, data: Any) -> None:
        # What is malformed is passed over: the whole transcript comes at the end, and is checked.
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            if name == "segment":
                self._n_heard += 1
                if self._n_heard > self._n_told:
                    self._tell(segment_from_dict(data))
            elif name == "progress" and self._on_progress is not None:
                done, total = float(data["done_seconds"]), float(data["total_seconds"])
                self._on_progress(Progress(str(data["stage"]), done, total))

    def finish(self, transcript: Transcript) -> None:
        for segment in transcript.segments[self._n_told :]:
            self._tell(segment)

    def _tell(self, segment: Segment) -> None:
        self._n_told += 1
        self._on_segment(segment)


class ServiceClient:
    """One service; see :class:`whisper_worker.doors.cli_run.Engine`."""

    def __init__(
        self,
        address: Address,
        payload: Mapping[str, object],
        *,
        key: str | None = None,
        client_cert: Path | None = None,
        timeout: float = 1200.0,
        retries: int = 4,
        reconnects: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``timeout``: seconds for one file, retries included. ``payload``: the common request, less its audio.

        ``reconnects``: whether a further attempt is made where there was no connection, not only where the
        service was busy.
        """
        self._address = address
        self._fields = {name: _as_text(value) for name, value in payload.items()}
        self._key = key
        self._client_cert = client_cert
        self._timeout = timeout
        self._retries = retries
        self._reconnects = reconnects
        self._say = say

    def transcribe(
        self,
        item: Input,
        on_segment: Callable[[Segment], None],
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Transcript:
        """Send one recording and wait for its transcript; segments and progress are reported as they come.

        Raises the service's own typed errors, :class:`Unreachable`, :class:`DeadlineExceeded`.
        """
        listener = _Listener(on_segment, on_progress)
        answer = self._insist(item, time.monotonic() + self._timeout, listener)
        try:
            data = json.loads(answer.body)
        except ValueError:
            data = {}
        transcript = transcript_from_dict(data if isinstance(data, dict) else {})
        listener.finish(transcript)
        return transcript

    def prepare(self) -> None:
        """Wait until the service is ready. Raises :class:`Busy` where it takes too long, :class:`ModelError`."""
        deadline = time.monotonic() + self._timeout
        for pause in self._pauses(deadline):
            if self.is_ready():
                return
            time.sleep(pause)
        raise Busy("The service is not ready; try again later.")

    def is_ready(self) -> bool:
        """Whether the service answers and its model is loaded. Raises :class:`ModelError` where it never will be."""
        try:
            answer = self._exchange("GET", "/ready", time.monotonic() + _READY_SECONDS)
        except (Unreachable, DeadlineExceeded):
            return False
        with contextlib.suppress(ValueError, KeyError, TypeError):
            told = json.loads(answer.body)
            if told["status"] == "failed":
                raise ModelError(" ".join(str(told["message"]).split())[:500])
        return answer.status == 200

    def _insist(self, item: Input, deadline: float, listener: _Listener) -> _Answer:
        pauses = self._pauses(deadline)
        while True:
            asked: float | None = None
            try:
                listener.begin()
                answer = self._exchange("POST", "/transcribe", deadline, item, listener)
                if answer.status == 200:
                    return answer
                error = _error_of(answer)
                if not error.retryable:
                    raise error
                asked = _seconds_of(answer.retry_after)
            except Unreachable as unreachable:
                if not self._reconnects:
                    raise
                error = unreachable
            pause = next(pauses, None)
            if pause is None:
                raise error
            pause = max(pause, asked or 0.0)
            if time.monotonic() + pause >= deadline:
                raise error
            self._say(f"{item.shown}: {error.message} Trying again in {pause:.1f} s.")
            time.sleep(pause)

    def _pauses(self, deadline: float) -> Iterator[float]:
        """Seconds before each further attempt: doubling, spread so that callers do not come back all at once."""
        for attempt in range(self._retries):
            if time.monotonic() < deadline:
                yield min(_LONGEST_PAUSE, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)

    def _exchange(
        self, method: str, path: str, deadline: float, item: Input | None = None, listener: _Listener | None = None
    ) -> _Answer:
        with contextlib.ExitStack() as stack:
            body = None if item is None else stack.enter_context(_Form.of(item, self._fields))
            try:
                connection = self._connect(deadline)
            except OSError as error:
                raise _unreachable(error) from error
            stack.callback(connection.close)
            try:
                return self._talk(connection, method, path, deadline, body, listener)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"The service did not answer within {self._timeout:g} seconds; give it more with --timeout."
                ) from None
            except (OSError, http.client.HTTPException) as error:
                raise Unreachable("The connection to the service broke off.") from error

    def _connect(self, deadline: float) -> http.client.HTTPConnection:
        address = self._address
        timeout = min(_CONNECT_SECONDS, max(0.1, deadline - time.monotonic()))
        connection: http.client.HTTPConnection
        if address.socket is not None:
            connection = _UnixConnection(address.socket, timeout)
        elif address.tls:
            context = ssl.create_default_context()
            if self._client_cert is not None:
                try:
                    context.load_cert_chain(self._client_cert)
                except (OSError, ssl.SSLError):
                    raise InvalidInput("The file of --client-cert is not a PEM certificate with its key.") from None
            connection = http.client.HTTPSConnection(address.host, address.port, timeout=timeout, context=context)
        else:
            connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout)
        connection.connect()
        return connection

    def _talk(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        deadline: float,
        body: _Form | None,
        listener: _Listener | None,
    ) -> _Answer:
        def within_time() -> None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            # The response holds the socket once the connection is to be closed after it.
            if sock.fileno() >= 0:
                sock.settimeout(remaining)

        sock = connection.sock
        within_time()
        connection.putrequest(method, self._address.prefix + path, skip_accept_encoding=True)
        # A stream of events shows how far it is, and its signs of life keep proxies from hanging up.
        connection.putheader("Accept", "application/json" + (", text/event-stream" if listener else ""))
        connection.putheader("User-Agent", f"whisper-worker/{__version__}")
        connection.putheader("Connection", "close")
        if self._key is not None:
            connection.putheader("Authorization", f"Bearer {self._key}")
        if body is not None:
            connection.putheader("Content-Type", body.content_type)
            connection.putheader("Content-Length", str(body.n_bytes))
        connection.endheaders()
        for block in body.blocks() if body is not None else ():
            within_time()
            if _has_answered(sock):
                break
            try:
                connection.send(block)
            except (BrokenPipeError, ConnectionResetError):
                break  # whoever closes early has mostly said why
        within_time()
        response = connection.getresponse()
        if listener is not None and response.headers.get_content_type() == "text/event-stream":
            return _hear(response, listener, within_time)
        content = bytearray()
        while block := response.read1(_BLOCK):
            content += block
            if len(content) > _MAX_ANSWER_BYTES:
                raise TooLarge("The service's answer is too large.")
            within_time()
        return _Answer(response.status, response.headers.get("Retry-After"), bytes(content))


def _hear(response: http.client.HTTPResponse, listener: _Listener, within_time: Callable[[], None]) -> _Answer:
    """Follow a stream of events to its end: the transcript, or the error. Raises where it breaks off before."""
    name, n_bytes = "", 0
    while line := response.readline(_MAX_ANSWER_BYTES):
        within_time()
        n_bytes += len(line)
        if n_bytes > 2 * _MAX_ANSWER_BYTES:
            raise TooLarge("The service's answer is too large.")
        key, _, value = line.rstrip(b"\r\n").partition(b": ")
        if key == b"event":
            name = value.decode(errors="replace")
        elif key == b"data" and name == "done":
            return _Answer(200, None, value)
        elif key == b"data" and name == "error":
            return _Answer(500, None, value)
        elif key == b"data":
            with contextlib.suppress(ValueError):
                listener.event(name, json.loads(value))
    raise http.client.IncompleteRead(b"")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(str(self._path))
        except OSError:
            self.close()
            raise


class _Form:
    """A multipart form with one recording, of known length and read from disk while it is sent."""

    def __init__(self, head: bytes, file: IO[bytes] | None, file_bytes: int, tail: bytes, boundary: str) -> None:
        self._head, self._file, self._file_bytes, self._tail = head, file, file_bytes, tail
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self.n_bytes = len(head) + file_bytes + len(tail)

    @classmethod
    @contextlib.contextmanager
    def of(cls, item: Input, fields: Mapping[str, str]) -> Iterator[_Form]:
        """Raises :class:`InvalidInput` where the recording cannot be read."""
        boundary = f"{random.SystemRandom().getrandbits(128):032x}"
        tail = f"\r\n--{boundary}--\r\n".encode()
        fields = dict(fields)
        if item.source.url is not None:
            fields["audio_url"] = item.source.url
        head = b"".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
            for name, value in fields.items()
        )
        path = item.source.path
        if path is None:
            yield cls(head[:-2], None, 0, tail, boundary)
            return
        # The name stays here: it may tell who was called. Its extension helps with files that have no header.
        suffix = path.suffix if path.suffix.isascii() and path.suffix[1:].isalnum() else ""
        head += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="audio"; filename="audio{suffix}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        try:
            file = path.open("rb")
        except (OSError, ValueError):
            raise InvalidInput("The audio file does not exist or may not be read.") from None
        with file:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise InvalidInput("The audio path is not a regular file.")
            yield cls(head, file, status.st_size, tail, boundary)

    def blocks(self) -> Iterator[bytes]:
        yield self._head
        left = self._file_bytes
        while self._file is not None and left:
            block = self._file.read(min(_BLOCK, left))
            if not block:
                raise InvalidInput("The audio file became shorter while it was sent.")
            left -= len(block)
            yield block
        yield self._tail


def _has_answered(sock: socket.socket) -> bool:
    """Whether the service speaks before it has heard all: it refuses. Under TLS other things arrive, too."""
    return not isinstance(sock, ssl.SSLSocket) and bool(select.select([sock], [], [], 0)[0])


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unreachable(error: OSError) -> WhisperWorkerError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return Forbidden("The service's certificate cannot be verified; SSL_CERT_FILE may name the one to trust.")
    return Unreachable("The service cannot be reached; check its address and whether it runs.")


def _error_of(answer: _Answer) -> WhisperWorkerError:
    """The service's own error, or what its status says."""
    try:
        data: Any = json.loads(answer.body)
        told = data.get("error", data)
        message = " ".join(str(told["message"]).split())[:500]
        return _ERRORS[told["code"]](message, retryable=bool(told.get("retryable")))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    status = answer.status
    if status in (401, 403):
        return Forbidden("The service refuses this caller: --key-file must name a file with one of its keys.")
    if status == 413:
        return TooLarge("The service takes no file of this size.")
    if status in _BUSY_STATUS:
        return Busy("The service is busy.")
    if status < 500:
        return InvalidInput(f"The service answered with status {status}: is the address that of a whisper service?")
    return InternalError(f"The service failed with status {status}.", retryable=False)


def _seconds_of(retry_after: str | None) -> float | None:
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return None
