"""Bring a job's audio to a file: from a URL, from base64 or from this machine's disk.

A download runs in a thread of its own, because a server can stall anywhere: in DNS, in the
handshake, between two bytes. The job's thread waits beside it and leaves at once when the job
is cancelled or its time is over.

http.client speaks on a socket that was connected here, to an address that was checked: there
is no second look-up, no environment proxy and no redirect that the guard does not see.
"""

from __future__ import annotations

import base64
import binascii
import contextvars
import errno
import functools
import hashlib
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote, unquote_to_bytes, urljoin

from whisper_worker import log
from whisper_worker.audio.address import AddressGuard, HttpUrl, parse_http_url
from whisper_worker.errors import (
    DeadlineExceeded,
    DownloadError,
    Forbidden,
    InvalidInput,
    TooLarge,
)
from whisper_worker.settings import Settings
from whisper_worker.types import AudioSource, CancelToken

if TYPE_CHECKING:
    import http.client
    import ssl

CONNECT_TIMEOUT = 10.0
"""Seconds for one address to take a connection."""
STALL_TIMEOUT = 30.0
"""Seconds without a byte after which a download counts as broken off."""
BACKOFF = 0.5
"""Seconds before the first further attempt; doubled for each one after it."""

_POLL = 0.1
_CHUNK = 1 << 16
_OWN_HEADERS = frozenset(
    "host connection content-length transfer-encoding te upgrade range if-range accept-encoding".split()
)
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_PASSING = frozenset((408, 425, 429))
_log = log.get_logger("fetch")


@dataclass(frozen=True, slots=True)
class FetchedAudio:
    """The job's audio as a file; ``path`` keeps the source's extension, which only headerless formats need."""

    path: Path
    n_bytes: int


def fetch(
    source: AudioSource,
    directory: Path,
    settings: Settings,
    cancel: CancelToken | None = None,
    *,
    guard: AddressGuard | None = None,
) -> FetchedAudio:
    """Bring ``source`` to a file in ``directory``; a local path is used where it is.

    ``guard`` replaces the settings' rule on addresses.

    Raises :class:`Forbidden` for an address or scheme that must not be touched, :class:`TooLarge`,
    :class:`DownloadError`, :class:`DeadlineExceeded`, :class:`InvalidInput` and :class:`Cancelled`.
    """
    if cancel is not None:
        cancel.check()
    _check_digest_form(source.sha256)
    if source.path is not None:
        _log.info("Processing audio from a file")
        path, n_bytes = _local_file(source.path, settings)
    elif source.over_http:
        path, n_bytes = _from_network(source, directory, settings, cancel, guard)
    elif source.url is not None or source.base64 is not None:
        _log.info("Processing audio from the request")
        path, n_bytes = _from_request(source, directory, settings)
    else:
        raise InvalidInput("No audio was given; send a URL or base64.")
    if source.sha256 is not None and _digest(path, cancel) != source.sha256.lower():
        raise DownloadError("The audio is not what its sha256 promises; check both.", retryable=False)
    return FetchedAudio(path, n_bytes)


def _check_digest_form(sha256: str | None) -> None:
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise InvalidInput("sha256 must be 64 hexadecimal digits.")


def _digest(path: Path, cancel: CancelToken | None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            if cancel is not None:
                cancel.check()
            digest.update(chunk)
    return digest.hexdigest()


def _too_large(settings: Settings) -> TooLarge:
    return TooLarge(
        f"The audio is larger than the {settings.max_download_bytes} bytes that this worker takes; "
        "send it in parts or in a compressed format, or raise WHISPER_MAX_DOWNLOAD_BYTES."
    )


def _local_file(path: Path, settings: Settings) -> tuple[Path, int]:
    try:
        status = path.stat()
    except (OSError, ValueError):
        raise InvalidInput("The audio file does not exist or may not be read.") from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidInput("The audio path is not a regular file.")
    if status.st_size > settings.max_download_bytes:
        raise _too_large(settings)
    return path, status.st_size


def _from_request(source: AudioSource, directory: Path, settings: Settings) -> tuple[Path, int]:
    text = (source.url if source.url is not None else source.base64 or "").strip()
    if text[:5].lower() == "data:":
        media_type, comma, payload = text[5:].partition(",")
        if not comma:
            raise InvalidInput("The data URL has no comma; it must read data:<type>;base64,<data>.")
        if media_type.rpartition(";")[2].strip().lower() == "base64":
            # Where the URL was escaped on its way, + and = are spelt %2B and %3D.
            content = _base64_bytes(unquote(payload))
        else:
            content = unquote_to_bytes(payload)
    else:
        content = _base64_bytes(text)
    if len(content) > settings.max_download_bytes:
        raise _too_large(settings)
    path = directory / "audio"
    with _writing(), _create(path) as file:
        file.write(content)
    return path, len(content)


def _base64_bytes(text: str) -> bytes:
    compact = "".join(text.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInput("The base64 audio is damaged: it holds a foreign character or was cut.") from None


def _create(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "wb")


@contextmanager
def _writing() -> Iterator[None]:
    """Turns a full disk into a typed error, apart from the network's own OSErrors."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "has no disk space left for" if full else "could not write"
        raise DownloadError(f"The worker {what} the audio; try again later.") from error


def _from_network(
    source: AudioSource,
    directory: Path,
    settings: Settings,
    cancel: CancelToken | None,
    guard: AddressGuard | None,
) -> tuple[Path, int]:
    url = parse_http_url((source.url or "").strip())
    _log.info("Processing audio from URL", extra={"fields": {"scheme": url.scheme}})
    suffix = PurePosixPath(unquote(url.target.partition("?")[0])).suffix.lower()
    path = directory / ("audio" + (suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ""))
    download = _Download(
        url,
        _checked_headers(source.headers),
        path,
        settings,
        guard or AddressGuard(allow_private=settings.allow_private_urls),
    )
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            download.run()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    started = time.monotonic()
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="download", daemon=True)
    thread.start()
    try:
        while not outcome.done():
            thread.join(_POLL)
            if cancel is not None:
                cancel.check()
            if not outcome.done() and time.monotonic() > download.deadline:
                raise DeadlineExceeded(
                    f"The download took longer than {settings.download_timeout:g} s; "
                    "try again, or raise WHISPER_DOWNLOAD_TIMEOUT."
                )
        outcome.result()
    finally:
        download.abandon()
        thread.join(_POLL)
    seconds = round(time.monotonic() - started, 3)
    _log.info("Downloaded", extra={"fields": {"bytes": download.n_bytes, "seconds": seconds}})
    return path, download.n_bytes


def _checked_headers(headers: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Custom headers as a mapping. Raises :class:`InvalidInput` for one that the worker sets or that breaks HTTP."""
    checked: dict[str, str] = {}
    for name, value in headers:
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not re.fullmatch(
            r"[\t\x20-\x7e\xa0-\xff]*", value
        ):
            raise InvalidInput("headers: a name or value holds characters that HTTP does not allow.")
        if name.lower() in _OWN_HEADERS:
            raise InvalidInput(f"headers: {name} is set by the worker; leave it out.")
        checked[name] = value
    return checked


@functools.cache
def tls_context() -> ssl.SSLContext:
    import ssl

    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:
        # Slim images have no certificates of their own. Where the system's are read lazily
        # from a folder they count as none too, and certifi's are the same ones.
        import certifi

        context.load_verify_locations(certifi.where())
    return context


class _BrokenOff(Exception):
    """This attempt failed in a way that a further one may not."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after


class _Abandoned(Exception):
    """Nobody waits for the download any more."""


class _Download:
    """One file from one URL, over as many redirects and attempts as the settings allow."""

    def __init__(
        self, url: HttpUrl, headers: Mapping[str, str], path: Path, settings: Settings, guard: AddressGuard
    ) -> None:
        self.deadline = time.monotonic() + settings.download_timeout
        self.n_bytes = 0
        self.n_total: int | None = None
        self._url = url
        self._headers = headers
        self._path = path
        self._settings = settings
        self._guard = guard
        self._validator: str | None = None
        self._abandoned = threading.Event()
        self._socket: socket.socket | None = None

    def abandon(self) -> None:
        """Wake the download's thread from whatever it waits for and have it end. Called from another thread."""
        self._abandoned.set()
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        """Download the file. Raises the typed errors of :func:`fetch`."""
        with _writing(), _create(self._path) as file:
            attempt = 0
            while True:
                try:
                    return self._attempt(file)
                except _BrokenOff as failure:
                    attempt += 1
                    self._wait_for_next(attempt, failure)

    def _wait_for_next(self, attempt: int, failure: _BrokenOff) -> None:
        if self._abandoned.is_set():  # what broke the attempt off was this
            raise _Abandoned
        pause = max(BACKOFF * 2 ** (attempt - 1), failure.retry_after)
        if attempt > self._settings.download_retries or time.monotonic() + pause > self.deadline:
            tries = "1 attempt" if attempt == 1 else f"{attempt} attempts"
            raise DownloadError(f"The audio could not be downloaded after {tries}: {failure.reason}.") from failure
        _log.warning(
            "Download broke off, trying again",
            extra={"fields": {"attempt": attempt, "bytes": self.n_bytes, "pause": pause, "reason": failure.reason}},
        )
        if self._abandoned.wait(pause):
            raise _Abandoned

    def _attempt(self, file: IO[bytes]) -> None:
        import http.client
        import ssl

        url, headers = self._url, self._headers
        try:
            for _ in range(self._settings.max_redirects + 1):
                with (
                    closing(self._connect(url)) as connection,
                    closing(self._request(connection, url, headers)) as response,
                ):
                    if response.status not in _REDIRECTS:
                        return self._receive(response, file)
                    target = _redirect_target(url, response)
                # Headers and credentials are meant for the host that the caller named, and for no other.
                if target.origin != url.origin:
                    headers = {}
                elif target.credentials is None:
                    target = replace(target, credentials=url.credentials)
                url = target
        except ssl.SSLCertVerificationError:
            raise DownloadError(
                "The server's certificate could not be verified; check the URL.", retryable=False
            ) from None
        except TimeoutError:
            raise _BrokenOff("the server did not answer in time") from None
        except (OSError, http.client.HTTPException) as error:
            if self._abandoned.is_set():
                raise _Abandoned from None
            raise _BrokenOff(f"the connection failed ({type(error).__name__})") from None
        raise DownloadError(
            f"The URL redirects more than {self._settings.max_redirects} times; give the address it ends at.",
            retryable=False,
        )

    def _connect(self, url: HttpUrl) -> http.client.HTTPConnection:
        """A connection to one of the host's checked addresses; TLS is verified for the host's name."""
        failure: OSError | None = None
        for address in self._guard.addresses(url.host, url.port):
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            raw = socket.socket(family, socket.SOCK_STREAM)
            try:
                self._use(raw).settimeout(CONNECT_TIMEOUT)
                raw.connect((str(address), url.port))
            except OSError as error:
                raw.close()
                failure = error
                continue
            return self._speak_http(url, raw)
        assert failure is not None
        raise failure

    def _speak_http(self, url: HttpUrl, raw: socket.socket) -> http.client.HTTPConnection:
        import http.client

        connection = http.client.HTTPConnection(url.host, url.port)
        connection.sock = raw
        try:
            if url.scheme == "https":
                secured = tls_context().wrap_socket(raw, server_hostname=url.host, do_handshake_on_connect=False)
                connection.sock = self._use(secured)
                secured.do_handshake()
            connection.sock.settimeout(STALL_TIMEOUT)
        except BaseException:
            connection.close()
            raise
        return connection

    def _use(self, opened: socket.socket) -> socket.socket:
        self._socket = opened
        if self._abandoned.is_set():
            opened.close()
            raise _Abandoned
        return opened

    def _request(
        self, connection: http.client.HTTPConnection, url: HttpUrl, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        own = {
            "Host": url.host_header,
            "User-Agent": "whisper-worker",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        if url.credentials is not None:
            own["Authorization"] = "Basic " + base64.b64encode(url.credentials.encode()).decode()
        if self.n_bytes and self._validator:
            own["Range"] = f"bytes={self.n_bytes}-"
            own["If-Range"] = self._validator
        given = {name.lower() for name in headers}
        connection.request(
            "GET", url.target, headers={**{k: v for k, v in own.items() if k.lower() not in given}, **headers}
        )
        return connection.getresponse()

    def _receive(self, response: http.client.HTTPResponse, file: IO[bytes]) -> None:
        """Write the body behind what is already there, or from the start if it is not its continuation."""
        if response.status == 416 and self._continues_at_end(response):
            return
        if response.status not in (200, 206):
            if response.status == 416:
                self._restart(file)
            raise _failure(response)
        if response.status == 206:
            if not self._continues(response):
                self._restart(file)
                raise _BrokenOff("the file changed on the server")
        else:
            self._restart(file)
            self.n_total = response.length
            self._validator = _validator(response)
        limit = self._settings.max_download_bytes
        if self.n_total is not None and self.n_total > limit:
            raise _too_large(self._settings)
        while chunk := response.read1(_CHUNK):
            self.n_bytes += len(chunk)
            if self.n_bytes > limit:
                raise _too_large(self._settings)
            with _writing():
                file.write(chunk)
        if self.n_total is not None and self.n_bytes != self.n_total:
            raise _BrokenOff("the server sent fewer bytes than it promised")

    def _restart(self, file: IO[bytes]) -> None:
        with _writing():
            file.seek(0)
            file.truncate()
        self.n_bytes, self.n_total, self._validator = 0, None, None

    def _continues(self, response: http.client.HTTPResponse) -> bool:
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if span is None or int(span[1]) != self.n_bytes or not self.n_bytes:
            return False
        if _validator(response) not in (None, self._validator):
            return False
        n_total = None if span[3] == "*" else int(span[3])
        if n_total is not None and self.n_total is not None and n_total != self.n_total:
            return False
        self.n_total = n_total if self.n_total is None else self.n_total
        return True

    def _continues_at_end(self, response: http.client.HTTPResponse) -> bool:
        """Whether a range was refused because all is there already: the length was unknown, the end was not seen."""
        return bool(self.n_bytes) and response.headers.get("Content-Range", "").strip() == f"bytes */{self.n_bytes}"


def _redirect_target(url: HttpUrl, response: http.client.HTTPResponse) -> HttpUrl:
    # http.client reads headers as Latin-1, while servers that send raw names send UTF-8.
    location = response.headers.get("Location", "").strip().encode("latin-1", "replace").decode("utf-8", "replace")
    if not location:
        raise DownloadError("The server redirects without saying where to; check the URL.", retryable=False)
    try:
        absolute = urljoin(f"{url.scheme}://{url.host_header}{url.target}", location)
    except ValueError:
        raise Forbidden("The URL redirects to something that is not a URL.") from None
    return parse_http_url(absolute)


def _validator(response: http.client.HTTPResponse) -> str | None:
    """What names this version of the file in If-Range; a weak tag does not (RFC 9110, 13.1.5)."""
    tag: str | None = response.headers.get("ETag")
    if tag is not None and not tag.startswith("W/"):
        return tag
    return response.headers.get("Last-Modified")


def _failure(response: http.client.HTTPResponse) -> Exception:
    status = response.status
    if status >= 500 or status in _PASSING:
        return _BrokenOff(f"the server answered HTTP {status}", _retry_after(response))
    if status == 416:
        return _BrokenOff("the file changed on the server")
    if status in (401, 403):
        what = "the server refuses access. The link may have expired, or `headers` with a key are needed"
    elif status in (404, 410):
        what = "the file is not there. Check the URL"
    else:
        what = "the server does not hand out the file. Check the URL"
    return DownloadError(f"HTTP {status}: {what}.", retryable=False)


def _retry_after(response: http.client.HTTPResponse) -> float:
    """Seconds that the server asks to be left alone; 0 where it does not."""
    from datetime import datetime, timezone
    from email.utils import parsedate_to_datetime

    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    with suppress(ValueError, TypeError):
        when = parsedate_to_datetime(value)
        if when.tzinfo is None:
            when = when.replace(tzinfo=timezone.utc)
        return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())
    return 0.0
