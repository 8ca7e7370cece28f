"""Downloads against a server that does what it is told, byte by byte."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import socket
import socketserver
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from whisper_worker.audio import fetch as fetch_module
from whisper_worker.audio.address import AddressGuard, IPAddress
from whisper_worker.audio.fetch import FetchedAudio, fetch
from whisper_worker.errors import (
    Cancelled,
    DeadlineExceeded,
    DownloadError,
    Forbidden,
    InvalidInput,
    TooLarge,
)
from whisper_worker.settings import Settings
from whisper_worker.types import AudioSource, CancelToken

BODY = bytes(range(256)) * 1200  # 300 KiB, no two neighbouring bytes alike
LOCAL = Settings(allow_private_urls=True, download_timeout=20)


@dataclass
class Request:
    target: str
    headers: dict[str, str]
    connection: socket.socket
    number: int

    def reply(self, status: int, body: bytes = b"", **headers: object) -> None:
        """A whole answer, or what of it ``body`` holds where a Content_Length is given that promises more."""
        headers.setdefault("Content_Length", len(body))
        lines = [f"HTTP/1.1 {status} So"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items() if value is not None]
        self.connection.sendall("\r\n".join([*lines, "", ""]).encode("utf-8") + body)

    def ranged(self, body: bytes = BODY, tag: str = '"one"') -> None:
        """Answer as a server that knows ranges and versions does."""
        start = self.headers.get("range", "").removeprefix("bytes=").rstrip("-")
        if start and self.headers.get("if-range") == tag:
            first = int(start)
            where = f"bytes {first}-{len(body) - 1}/{len(body)}"
            self.reply(206, body[first:], Content_Range=where, ETag=tag)
        else:
            self.reply(200, body, ETag=tag)


class Server:
    """Answers every request by ``script`` and keeps what was asked."""

    def __init__(self, script: Callable[[Request], None], context: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        server = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                connection = self.request
                try:
                    if context is not None:
                        connection = context.wrap_socket(connection, server_side=True)
                    head = b""
                    while not head.endswith(b"\r\n\r\n"):
                        piece = connection.recv(1)
                        if not piece:
                            return
                        head += piece
                    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
                    headers = dict(line.split(": ", 1) for line in lines)
                    request = Request(
                        first.split()[1],
                        {name.lower(): value for name, value in headers.items()},
                        connection,
                        len(server.requests),
                    )
                    server.requests.append(request)
                    script(request)
                except OSError:  # the client went away, which several tests are about
                    pass
                finally:
                    connection.close()

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def url(self, target: str = "/talk.mp3") -> str:
        return f"http://127.0.0.1:{self.port}{target}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(script: Callable[[Request], None], **more: Any) -> Server:
        servers.append(Server(script, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "BACKOFF", 0.01)


def get(url: str, directory: Path, settings: Settings = LOCAL, **source: Any) -> FetchedAudio:
    return fetch(AudioSource(url=url, **source), directory, settings)


def changed(**changes: Any) -> Settings:
    return Settings(**{"allow_private_urls": True, "download_timeout": 20, **changes})


@contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


# The ordinary case


def test_a_file_is_brought_whole_and_for_this_user_alone(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda request: request.reply(200, BODY))
    fetched = get(server.url("/path/talk.MP3?signature=abc"), tmp_path)
    assert fetched.path.read_bytes() == BODY
    assert fetched.n_bytes == len(BODY)
    assert fetched.path.parent == tmp_path and fetched.path.suffix == ".mp3"
    assert stat.S_IMODE(fetched.path.stat().st_mode) == 0o600
    (request,) = server.requests
    assert request.target == "/path/talk.MP3?signature=abc"
    assert request.headers["host"] == f"127.0.0.1:{server.port}"
    assert request.headers["accept-encoding"] == "identity"
    assert "authorization" not in request.headers


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("/a b/réunion.ogg?q=ü", "/a%20b/r%C3%A9union.ogg?q=%C3%BC"),
        ("/100% done.ogg", "/100%25%20done.ogg"),
        ("/a%20b.ogg#part", "/a%20b.ogg"),
        ("?only=query", "/?only=query"),
    ],
)
def test_a_url_is_asked_for_as_it_must_be_spelt(
    serve: Callable[..., Server], tmp_path: Path, written: str, asked: str
) -> None:
    server = serve(lambda request: request.reply(200, b"x"))
    get(server.url(written), tmp_path)
    assert server.requests[0].target == asked


def test_chunks_and_bodies_without_a_length_are_taken(serve: Callable[..., Server], tmp_path: Path) -> None:
    def script(request: Request) -> None:
        if request.target == "/chunks":
            request.reply(200, b"4\r\nabcd\r\n2\r\nef\r\n0\r\n\r\n", Transfer_Encoding="chunked", Content_Length=None)
        else:
            request.reply(200, b"abcdef", Content_Length=None)

    server = serve(script)
    for number, target in enumerate(("/chunks", "/until-closed")):
        directory = tmp_path / str(number)
        directory.mkdir()
        assert get(server.url(target), directory).path.read_bytes() == b"abcdef"


def test_the_environments_proxies_are_not_used(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would connect to the address itself, past the guard."""
    proxy = serve(lambda request: request.reply(200, b"from the proxy"))
    server = serve(lambda request: request.reply(200, b"from the server"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url("/"))
    assert get(server.url(), tmp_path).path.read_bytes() == b"from the server"
    assert proxy.requests == []


# Headers and credentials


def test_headers_and_the_urls_credentials_are_sent(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda request: request.reply(200, b"x"))
    get(server.url().replace("//", "//us%40er:pa%3Ass@"), tmp_path, headers=(("X-Key", "k"), ("User-Agent", "mine")))
    sent = server.requests[0].headers
    assert sent["authorization"] == "Basic " + base64.b64encode(b"us@er:pa:ss").decode()
    assert sent["x-key"] == "k"
    assert sent["user-agent"] == "mine"


def test_a_given_authorization_goes_before_the_urls(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda request: request.reply(200, b"x"))
    get(server.url().replace("//", "//user:pass@"), tmp_path, headers=(("authorization", "Bearer t"),))
    assert server.requests[0].headers["authorization"] == "Bearer t"


def test_headers_and_credentials_stay_with_their_host(serve: Callable[..., Server], tmp_path: Path) -> None:
    """The URL's credentials were lost at a redirect within the host, which then refused access."""
    other = serve(lambda request: request.reply(200, b"there"))

    def script(request: Request) -> None:
        there = other.url("/there") if request.target == "/second" else "/second"
        request.reply(302, Location=there)

    first = serve(script)
    url = first.url("/first").replace("//", "//user:pass@")
    assert get(url, tmp_path, headers=(("X-Key", "secret"),)).path.read_bytes() == b"there"
    assert [request.headers.get("x-key") for request in first.requests] == ["secret", "secret"]
    assert "x-key" not in other.requests[0].headers
    assert [request.headers.get("authorization") for request in first.requests] == ["Basic dXNlcjpwYXNz"] * 2
    assert "authorization" not in other.requests[0].headers


@pytest.mark.parametrize(
    "header",
    [("Host", "x"), ("range", "bytes=0-"), ("X-A", "b\r\nX-C: d"), ("X A", "b"), ("X-A", "„"), ("", "b")],
)
def test_headers_that_break_http_or_are_ours_are_refused(tmp_path: Path, header: tuple[str, str]) -> None:
    with pytest.raises(InvalidInput, match="headers"):
        get("http://127.0.0.1:9/", tmp_path, headers=(header,))


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(serve: Callable[..., Server], tmp_path: Path, status: int) -> None:
    def script(request: Request) -> None:
        if request.target == "/réunion".replace("é", "%C3%A9"):
            request.reply(200, b"here")
        else:
            request.reply(status, Location="../réunion")

    server = serve(script)
    assert get(server.url("/a/b"), tmp_path).path.read_bytes() == b"here"


def test_redirects_end(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda request: request.reply(302, Location="/again"))
    with pytest.raises(DownloadError, match="redirects more than 2 times") as caught:
        get(server.url(), tmp_path, changed(max_redirects=2))
    assert not caught.value.retryable
    assert len(server.requests) == 3


def test_a_redirect_to_nowhere_is_an_error(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda request: request.reply(302))
    with pytest.raises(DownloadError, match="without saying where") as caught:
        get(server.url(), tmp_path)
    assert not caught.value.retryable


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "gopher://127.0.0.1/", "data:,x", "http://[::1", "ftp://h/"]
)
def test_a_redirect_to_another_scheme_is_forbidden(serve: Callable[..., Server], tmp_path: Path, location: str) -> None:
    server = serve(lambda request: request.reply(302, Location=location))
    with pytest.raises(Forbidden):
        get(server.url(), tmp_path)
    assert len(server.requests) == 1


# Broken-off downloads


def cut_once(request: Request, then: Callable[[Request], None], *, at: int = 100_000, **headers: object) -> None:
    """First a body that ends too early, then ``then``."""
    if request.number == 0:
        request.reply(200, BODY[:at], Content_Length=len(BODY), **headers)
    else:
        then(request)


def test_a_download_that_broke_off_is_resumed(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda request: cut_once(request, Request.ranged, ETag='"one"'))
    fetched = get(server.url(), tmp_path)
    assert fetched.path.read_bytes() == BODY
    assert fetched.n_bytes == len(BODY)
    assert server.requests[1].headers["range"] == "bytes=100000-"
    assert server.requests[1].headers["if-range"] == '"one"'


def test_the_date_stands_in_for_a_missing_tag(serve: Callable[..., Server], tmp_path: Path) -> None:
    date = "Sat, 18 Jan 2025 12:00:00 GMT"

    def rest(request: Request) -> None:
        where = f"bytes 100000-{len(BODY) - 1}/{len(BODY)}"
        request.reply(206, BODY[100_000:], Content_Range=where, Last_Modified=date)

    server = serve(lambda request: cut_once(request, rest, Last_Modified=date, ETag='W/"weak"'))
    assert get(server.url(), tmp_path).path.read_bytes() == BODY
    assert server.requests[1].headers["if-range"] == date


def test_without_a_version_the_download_starts_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Bytes of two versions must never be joined."""
    server = serve(lambda request: cut_once(request, lambda again: again.reply(200, BODY)))
    assert get(server.url(), tmp_path).path.read_bytes() == BODY
    assert "range" not in server.requests[1].headers


def test_a_server_without_ranges_sends_it_all_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda request: cut_once(request, lambda again: again.reply(200, BODY), ETag='"one"'))
    assert get(server.url(), tmp_path).path.read_bytes() == BODY


def test_a_file_that_changed_meanwhile_is_brought_anew(serve: Callable[..., Server], tmp_path: Path) -> None:
    new = b"new" * 70_000
    server = serve(lambda request: cut_once(request, lambda again: again.ranged(new, '"two"'), ETag='"one"'))
    assert get(server.url(), tmp_path).path.read_bytes() == new


@pytest.mark.parametrize(
    "wrong",
    [
        {"Content_Range": f"bytes 99999-{len(BODY) - 1}/{len(BODY)}"},
        {"Content_Range": f"bytes 100000-{len(BODY) - 1}/{len(BODY) + 5}"},
        {"Content_Range": f"bytes 100000-{len(BODY) - 1}/{len(BODY)}", "ETag": '"two"'},
        {},
    ],
    ids=["start", "total", "version", "missing"],
)
def test_a_continuation_that_does_not_fit_is_not_appended(
    serve: Callable[..., Server], tmp_path: Path, wrong: dict[str, str]
) -> None:
    def script(request: Request) -> None:
        if request.number == 0:
            request.reply(200, BODY[:100_000], Content_Length=len(BODY), ETag='"one"')
        elif request.number == 1:
            request.reply(206, BODY[100_000:], **wrong)
        else:
            assert "range" not in request.headers
            request.reply(200, BODY)

    server = serve(script)
    assert get(server.url(), tmp_path).path.read_bytes() == BODY
    assert len(server.requests) == 3


def test_a_range_that_is_refused_starts_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    def script(request: Request) -> None:
        if request.number == 1:
            request.reply(416, Content_Range="bytes */50")
        else:
            cut_once(request, lambda again: again.reply(200, BODY), ETag='"one"')

    server = serve(script)
    assert get(server.url(), tmp_path).path.read_bytes() == BODY
    assert "range" not in server.requests[2].headers


def test_a_refused_range_at_the_end_means_all_is_there(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Chunked: every byte came, only the closing chunk was lost."""

    def script(request: Request) -> None:
        if request.number == 0:
            request.reply(200, b"6\r\nabcdef\r\n", Transfer_Encoding="chunked", Content_Length=None, ETag='"one"')
        else:
            request.reply(416, Content_Range="bytes */6")

    server = serve(script)
    assert get(server.url(), tmp_path).path.read_bytes() == b"abcdef"
    assert len(server.requests) == 2


def test_cut_chunks_are_noticed(serve: Callable[..., Server], tmp_path: Path) -> None:
    def script(request: Request) -> None:
        if request.number == 0:
            request.reply(200, b"1000\r\nabc", Transfer_Encoding="chunked", Content_Length=None)
        else:
            request.reply(200, b"abcdef")

    server = serve(script)
    assert get(server.url(), tmp_path).path.read_bytes() == b"abcdef"


def test_attempts_are_counted(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda request: request.reply(200, BODY[:10], Content_Length=len(BODY)))
    with pytest.raises(DownloadError, match="after 3 attempts: the server sent fewer bytes") as caught:
        get(server.url(), tmp_path, changed(download_retries=2))
    assert caught.value.retryable
    assert len(server.requests) == 3


def test_a_refused_connection_is_tried_again(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(DownloadError, match="after 2 attempts: the connection failed") as caught:
        get(f"http://127.0.0.1:{port}/", tmp_path, changed(download_retries=1))
    assert caught.value.retryable


# Statuses


@pytest.mark.parametrize(
    ("status", "hint"), [(400, "does not hand out"), (401, "`headers`"), (403, "expired"), (404, "URL"), (410, "URL")]
)
def test_a_final_answer_is_not_asked_for_again(
    serve: Callable[..., Server], tmp_path: Path, status: int, hint: str
) -> None:
    server = serve(lambda request: request.reply(status, b"no"))
    with pytest.raises(DownloadError, match=f"HTTP {status}.*{hint}") as caught:
        get(server.url(), tmp_path)
    assert not caught.value.retryable
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_passing_failure_is_tried_again(serve: Callable[..., Server], tmp_path: Path, status: int) -> None:
    server = serve(lambda request: request.reply(*((status, b"") if request.number == 0 else (200, BODY))))
    assert get(server.url(), tmp_path).path.read_bytes() == BODY
    assert len(server.requests) == 2


def test_the_pause_a_server_asks_for_is_kept(serve: Callable[..., Server], tmp_path: Path) -> None:
    def script(request: Request) -> None:
        if request.number == 0:
            request.reply(503, Retry_After="1")
        else:
            request.reply(200, BODY)

    started = time.monotonic()
    get(serve(script).url(), tmp_path)
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("pause", ["3600", "Wed, 01 Jan 2200 00:00:00 GMT"])
def test_a_pause_beyond_the_time_limit_is_not_begun(serve: Callable[..., Server], tmp_path: Path, pause: str) -> None:
    server = serve(lambda request: request.reply(429, Retry_After=pause))
    with within(2), pytest.raises(DownloadError, match="after 1 attempt: the server answered HTTP 429") as caught:
        get(server.url(), tmp_path)
    assert caught.value.retryable


# Limits


def test_a_promised_size_over_the_limit_is_refused_unread(serve: Callable[..., Server], tmp_path: Path) -> None:
    def script(request: Request) -> None:
        request.reply(200, b"x", Content_Length=10_000)
        time.sleep(5)

    server = serve(script)
    with within(2), pytest.raises(TooLarge, match=r"5000 bytes.*WHISPER_MAX_DOWNLOAD_BYTES"):
        get(server.url(), tmp_path, changed(max_download_bytes=5000))


def test_an_unpromised_size_over_the_limit_is_cut(serve: Callable[..., Server], tmp_path: Path) -> None:
    def endless(request: Request) -> None:
        request.reply(200, b"", Content_Length=None)
        while True:
            request.connection.sendall(b"x" * 65536)

    with within(3), pytest.raises(TooLarge):
        get(serve(endless).url(), tmp_path, changed(max_download_bytes=1_000_000))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1_000_000


def stall_in_header(request: Request) -> None:
    request.connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    request.connection.recv(1)


def stall_in_body(request: Request) -> None:
    request.reply(200, b"abc", Content_Length=1000)
    request.connection.recv(1)


def drip(request: Request) -> None:
    """Never silent for long, so no stall ends it; only the time limit does."""
    request.reply(200, b"", Content_Length=1_000_000)
    while True:
        request.connection.sendall(b"x")
        time.sleep(0.05)


@pytest.mark.parametrize("script", [stall_in_header, stall_in_body, drip])
def test_cancel_is_noticed_while_the_server_stalls(
    serve: Callable[..., Server],
    tmp_path: Path,
    script: Callable[[Request], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = serve(script)
    cancel = CancelToken()
    cancelled_at: list[float] = []

    def withdraw() -> None:
        cancelled_at.append(time.monotonic())
        cancel.cancel()

    timer = threading.Timer(0.3, withdraw)
    timer.start()
    with pytest.raises(Cancelled):
        fetch(AudioSource(url=server.url()), tmp_path, LOCAL, cancel)
    assert time.monotonic() - cancelled_at[0] < 0.6
    timer.join()
    ended = time.monotonic() + 2
    while any(thread.name == "download" for thread in threading.enumerate()):
        assert time.monotonic() < ended, "the download's thread goes on"
        time.sleep(0.02)
    assert "trying again" not in caplog.text  # the attempt was ended from here


@pytest.mark.parametrize("script", [stall_in_header, stall_in_body, drip])
def test_a_download_has_a_time_limit(
    serve: Callable[..., Server], tmp_path: Path, script: Callable[[Request], None]
) -> None:
    with within(2), pytest.raises(DeadlineExceeded) as caught:
        get(serve(script).url(), tmp_path, changed(download_timeout=0.5))
    assert caught.value.retryable


def test_a_stall_counts_as_broken_off(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "STALL_TIMEOUT", 0.2)
    server = serve(lambda request: stall_in_body(request) if request.number == 0 else request.reply(200, BODY))
    assert get(server.url(), tmp_path).path.read_bytes() == BODY


def test_a_slow_resolver_does_not_hold_the_job(tmp_path: Path) -> None:
    release = threading.Event()

    def resolve(host: str, port: int) -> list[IPAddress]:
        release.wait(10)
        return []

    try:
        with within(2), pytest.raises(DeadlineExceeded):
            fetch(
                AudioSource(url="http://audio.test/"),
                tmp_path,
                changed(download_timeout=0.3),
                guard=AddressGuard(resolve=resolve),
            )
    finally:
        release.set()


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for audio.test and its key in one file, made for this run."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "audio.test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("audio.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "audio.test.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@pytest.fixture
def secure(
    serve: Callable[..., Server], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, list[str | None]]]:
    """A TLS server for audio.test that is trusted here, and the names that clients asked it for."""
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda connection, name, own: asked.append(name)
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(fetch_module, "tls_context", lambda: trusting)
    yield serve(lambda request: request.reply(200, BODY), context=context), asked


def loopback(host: str, port: int) -> list[IPAddress]:
    return [ip_address("127.0.0.1")]


def test_https_to_a_pinned_address_keeps_the_hosts_name(
    secure: tuple[Server, list[str | None]], tmp_path: Path
) -> None:
    server, asked = secure
    guard = AddressGuard(allow_private=True, resolve=loopback)
    url = f"https://audio.test.:{server.port}/talk.mp3"
    fetched = fetch(AudioSource(url=url), tmp_path, LOCAL, guard=guard)
    assert fetched.path.read_bytes() == BODY
    assert asked == ["audio.test"]
    assert server.requests[0].headers["host"] == f"audio.test:{server.port}"


@pytest.mark.parametrize("host", ["other.test", "127.0.0.1"])
def test_a_certificate_for_another_name_is_not_accepted(
    secure: tuple[Server, list[str | None]], tmp_path: Path, host: str
) -> None:
    server, _ = secure
    guard = AddressGuard(allow_private=True, resolve=loopback)
    with pytest.raises(DownloadError, match="certificate") as caught:
        fetch(AudioSource(url=f"https://{host}:{server.port}/"), tmp_path, LOCAL, guard=guard)
    assert not caught.value.retryable
    assert server.requests == []


# The checksum


def test_the_checksum_is_compared(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda request: request.reply(200, BODY))
    right = hashlib.sha256(BODY).hexdigest()
    (tmp_path / "a").mkdir()
    assert get(server.url(), tmp_path / "a", sha256=right.upper()).n_bytes == len(BODY)
    (tmp_path / "b").mkdir()
    with pytest.raises(DownloadError, match="sha256") as caught:
        get(server.url(), tmp_path / "b", sha256=right[::-1])
    assert not caught.value.retryable
    with pytest.raises(InvalidInput, match="64 hexadecimal"):
        get(server.url(), tmp_path / "b", sha256="abc")


# From the request itself

BINARY = bytes(range(256)) + b"\xff\xfe\xfd"


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(BINARY).decode(),
        base64.b64encode(BINARY).decode().rstrip("="),
        base64.urlsafe_b64encode(BINARY).decode(),
        base64.encodebytes(BINARY).decode(),
        " \r\n" + base64.b64encode(BINARY).decode() + "\t",
        "data:audio/wav;base64," + base64.b64encode(BINARY).decode(),
        "DATA:audio/wav; rate=8000 ;BASE64 ," + base64.b64encode(BINARY).decode(),
    ],
)
def test_base64_is_taken_in_all_its_spellings(tmp_path: Path, text: str) -> None:
    fetched = fetch(AudioSource(base64=text), tmp_path, Settings())
    assert fetched.path.read_bytes() == BINARY
    assert fetched.n_bytes == len(BINARY)
    assert stat.S_IMODE(fetched.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("url", "content"),
    [
        ("data:,hello%20world", b"hello world"),
        ("data:audio/wav,%00%FF", b"\x00\xff"),
        ("data:audio/wav;base64,%2B%2F%2B%2F", b"\xfb\xff\xbf"),
        ("data:;base64,AAEC", b"\x00\x01\x02"),
    ],
)
def test_data_urls(tmp_path: Path, url: str, content: bytes) -> None:
    assert get(url, tmp_path, Settings()).path.read_bytes() == content


@pytest.mark.parametrize("text", ["abc*", "A", "AAAAA", "äää", "data:audio/wav;base64", "QU=JD"])
def test_damaged_base64_is_named_as_such(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInput):
        fetch(AudioSource(base64=text), tmp_path, Settings())


def test_what_the_request_holds_has_a_limit_too(tmp_path: Path) -> None:
    with pytest.raises(TooLarge):
        fetch(AudioSource(base64=base64.b64encode(b"x" * 101).decode()), tmp_path, Settings(max_download_bytes=100))
    fetch(AudioSource(base64=base64.b64encode(b"x" * 100).decode()), tmp_path, Settings(max_download_bytes=100))


# From this machine


def test_a_local_file_is_used_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "talk.wav"
    path.write_bytes(BODY)
    job = tmp_path / "job"
    job.mkdir()
    assert fetch(AudioSource(path=path), job, Settings()) == FetchedAudio(path, len(BODY))
    assert list(job.iterdir()) == []


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "pipe", "."):
        with within(1), pytest.raises(InvalidInput):
            fetch(AudioSource(path=tmp_path / name), tmp_path, Settings())
    (tmp_path / "large").write_bytes(b"x" * 101)
    with pytest.raises(TooLarge):
        fetch(AudioSource(path=tmp_path / "large"), tmp_path, Settings(max_download_bytes=100))


def test_a_source_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        fetch(AudioSource(), tmp_path, Settings())


# What may not leave


def test_no_host_query_or_secret_in_messages_and_logs(
    serve: Callable[..., Server], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answers = iter([503, 200, 403])
    server = serve(lambda request: request.reply(next(answers), b"x" * 10))
    url = server.url("/private-name.mp3?token=hunter2").replace("//", "//user:passw0rd@")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    get(url, tmp_path / "a", headers=(("X-Key", "k3y"),))
    with pytest.raises(DownloadError) as caught:
        get(url, tmp_path / "b")
    with pytest.raises(Forbidden) as refused:
        get(url, tmp_path, Settings())
    said = caplog.text + caught.value.message + refused.value.message
    said += " ".join(str(record.__dict__.get("fields")) for record in caplog.records)
    for secret in ("127.0.0.1", str(server.port), "private-name", "hunter2", "passw0rd", "k3y", str(tmp_path)):
        assert secret not in said
    messages = [record.getMessage() for record in caplog.records]
    assert "Processing audio from URL" in messages
    assert "Downloaded" in messages
    downloaded = next(record for record in caplog.records if record.getMessage() == "Downloaded")
    assert downloaded.__dict__["fields"]["bytes"] == 10
