"""Hostile addresses and files: refused with the right error, and nothing inside is touched.

The victim is a real server on loopback that counts connections. It must count none. Where a
test needs a first server that may be reached, a guard lets exactly that one through, by
address and port, as the public internet would be.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import pytest

from whisper_worker.audio import decode as decode_module
from whisper_worker.audio import fetch as fetch_module
from whisper_worker.audio import ffmpeg_child
from whisper_worker.audio.address import AddressGuard, IPAddress
from whisper_worker.audio.decode import decode
from whisper_worker.audio.fetch import fetch
from whisper_worker.errors import AudioDecodeError, Forbidden
from whisper_worker.settings import Settings
from whisper_worker.types import AudioSource

SETTINGS = Settings(download_timeout=10)


class Listener:
    """Accepts on loopback (IPv4 and IPv6), counts, and answers every request with ``answer``."""

    def __init__(self, answer: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret") -> None:
        self.n_connections = 0
        self._answer = answer
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port: int = self._sockets[0].getsockname()[1]
        if socket.has_ipv6:
            with suppress(OSError):  # a container may have no IPv6 after all
                self._sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))
        self._threads = [threading.Thread(target=self._accept, args=(each,), daemon=True) for each in self._sockets]
        for thread in self._threads:
            thread.start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            self.n_connections += 1
            with connection:
                connection.settimeout(5)
                with suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(self._answer)

    def close(self) -> None:
        for each in self._sockets:
            try:
                each.shutdown(socket.SHUT_RDWR)
            finally:
                each.close()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def victim() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()
    assert listener.n_connections == 0, "the victim was reached"


LOOPBACK = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7F.1",
    "0177.0.0.1",
    "017700000001",
    "127.0.0.1.",
    "127%2e0%2e0%2e1",
    "0",
    "0.0.0.0",
    "localhost",
    "LOCALHOST.",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "user:password@127.0.0.1",
    "93.184.216.34@127.0.0.1",
]
"""Spellings under which the system itself reaches the victim."""


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_is_refused_in_every_notation(victim: Listener, tmp_path: Path, host: str) -> None:
    with pytest.raises(Forbidden):
        fetch(AudioSource(url=f"http://{host}:{victim.port}/talk.mp3"), tmp_path, SETTINGS)


@pytest.mark.parametrize("host", LOOPBACK)
def test_each_notation_would_reach_the_victim(tmp_path: Path, host: str) -> None:
    """The guard alone stands between: with it lifted, every one of them arrives."""
    listener = Listener()
    try:
        source = AudioSource(url=f"http://{host}:{listener.port}/talk.mp3")
        fetched = fetch(source, tmp_path, Settings(allow_private_urls=True, download_timeout=10))
        assert fetched.path.read_bytes() == b"secret"
        assert listener.n_connections == 1
    finally:
        listener.close()


@pytest.mark.parametrize(
    "host",
    [
        "[::1]",
        "[::]",
        "[::127.0.0.1]",
        "[::ffff:0:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[2001:0:53aa:64c:0:7b:80ff:fffe]",
        "[fe80::1%25lo]",
        "[fd00:ec2::254]",
        "[ff02::1]",
        "169.254.169.254",
        "0xa9fea9fe",
        "2852039166",
        "[::ffff:a9fe:a9fe]",
        "metadata.google.internal",
        "10.0.0.1",
        "10.1",
        "172.16.0.1",
        "192.168.1.1",
        "3232235777",
        "100.64.0.1",
        "100.100.100.200",
        "168.63.129.16",
        "198.18.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "kubernetes",
        "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460",
        "127\u30020\u30020\u30021",
        "127.0.0.1\\@93.184.216.34",
        "127.0.0.1#@93.184.216.34",
        "127.0.0.1?@93.184.216.34",
        "256.256.256.256",
    ],
)
def test_private_reserved_and_metadata_addresses_are_refused(victim: Listener, tmp_path: Path, host: str) -> None:
    with pytest.raises(Forbidden):
        fetch(AudioSource(url=f"http://{host}:{victim.port}/talk.mp3"), tmp_path, SETTINGS)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file://127.0.0.1:{port}/etc/passwd",
        "gopher://127.0.0.1:{port}/_GET%20/",
        "ftp://127.0.0.1:{port}/talk.mp3",
        "dict://127.0.0.1:{port}/stats",
        "ldap://127.0.0.1:{port}/",
        "concat:http://127.0.0.1:{port}/a.mp3",
        "tcp://127.0.0.1:{port}",
        "//127.0.0.1:{port}/talk.mp3",
        "127.0.0.1:{port}/talk.mp3",
        "/etc/passwd",
        "https://127.0.0.1:{port}/talk.mp3",
    ],
)
def test_other_schemes_are_refused(victim: Listener, tmp_path: Path, url: str) -> None:
    with pytest.raises(Forbidden):
        fetch(AudioSource(url=url.format(port=victim.port)), tmp_path, SETTINGS)


class OnlyThis(AddressGuard):
    """Takes one address and port for the public internet; all else is judged as ever."""

    def __init__(self, address: str, port: int, answers: list[str] | None = None) -> None:
        self.n_lookups = 0
        self._answers = iter(answers or [])
        self._permitted = ip_address(address), port
        super().__init__(resolve=self._next_answer)

    def _next_answer(self, host: str, port: int) -> list[IPAddress]:
        self.n_lookups += 1
        return [ip_address(next(self._answers))]

    def permits(self, address: IPAddress, port: int) -> bool:
        return (address, port) == self._permitted or super().permits(address, port)


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/",
        "http://2130706433:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://[::1]:{port}/",
        "//127.1:{port}/",
        "http://localhost:{port}/",
        "https://127.0.0.1:{port}/",
        "http://user@127.0.0.1:{port}/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:{port}/_x",
        "http://169.254.169.254/latest/meta-data/",
    ],
)
def test_a_redirect_to_the_inside_is_refused(victim: Listener, tmp_path: Path, location: str) -> None:
    head = f"HTTP/1.1 302 Found\r\nLocation: {location.format(port=victim.port)}\r\nContent-Length: 0\r\n\r\n"
    first = Listener(head.encode())
    try:
        with pytest.raises(Forbidden):
            fetch(
                AudioSource(url=f"http://127.0.0.1:{first.port}/talk.mp3"),
                tmp_path,
                SETTINGS,
                guard=OnlyThis("127.0.0.1", first.port),
            )
        assert first.n_connections == 1
    finally:
        first.close()


def test_a_name_is_looked_up_once_for_each_connection(victim: Listener, tmp_path: Path) -> None:
    """What was checked is what is connected to, though the name leads inside a moment later."""
    first = Listener()
    guard = OnlyThis("127.0.0.1", first.port, ["127.0.0.1", "127.0.0.2"])
    try:
        url = f"http://rebind.example:{first.port}/talk.mp3"
        assert fetch(AudioSource(url=url), tmp_path, SETTINGS, guard=guard).path.read_bytes() == b"secret"
        assert (guard.n_lookups, first.n_connections) == (1, 1)
    finally:
        first.close()


@pytest.mark.parametrize("second", ["attempt", "redirect"])
def test_a_name_that_changes_its_address_is_checked_again(
    tmp_path: Path, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First it is one that may be reached, then one that may not: 127.0.0.2 is the victim's here."""
    monkeypatch.setattr(fetch_module, "BACKOFF", 0.01)
    answer = {
        "attempt": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\ncut off",
        "redirect": b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n",
    }[second]
    first = Listener(answer)
    inside = socket.create_server(("127.0.0.2", first.port))
    inside.setblocking(False)
    guard = OnlyThis("127.0.0.1", first.port, ["127.0.0.1", "127.0.0.2"])
    try:
        with pytest.raises(Forbidden):
            fetch(AudioSource(url=f"http://rebind.example:{first.port}/"), tmp_path, SETTINGS, guard=guard)
        assert (guard.n_lookups, first.n_connections) == (2, 1)
        with pytest.raises(BlockingIOError):
            inside.accept()
    finally:
        inside.close()
        first.close()


def test_one_private_answer_among_public_ones_is_enough(victim: Listener, tmp_path: Path) -> None:
    guard = AddressGuard(resolve=lambda host, port: [ip_address("127.0.0.1"), ip_address("93.184.216.34")])
    with pytest.raises(Forbidden):
        fetch(AudioSource(url=f"http://mixed.example:{victim.port}/"), tmp_path, SETTINGS, guard=guard)


# Files that name other files

TONE = struct.pack("<8000h", *(12000 if n // 20 % 2 else -12000 for n in range(8000)))
WAV = (
    b"RIFF" + struct.pack("<I", 36 + len(TONE)) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)
) + (b"data" + struct.pack("<I", len(TONE)) + TONE)

HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{target}'\nduration 5\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" mediaPresentationDuration="PT9S"><Period><AdaptationSet '
    'mimeType="audio/wav"><Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>"
)
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {target} RTP/AVP 0\n"
ID3 = b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10)


def other_ffmpeg() -> str:
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())


@pytest.fixture(params=["system", "package"])
def binary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two ffmpegs that users have: the distribution's and the package's newer one."""
    chosen = ffmpeg_child.ffmpeg_binary() if request.param == "system" else other_ffmpeg()
    monkeypatch.setattr(ffmpeg_child, "ffmpeg_binary", lambda: chosen)
    return chosen


@pytest.fixture
def bait(tmp_path: Path) -> Path:
    path = tmp_path / "private.wav"
    path.write_bytes(WAV)
    os.utime(path, ns=(0, path.stat().st_mtime_ns))
    return path


def test_the_bait_is_audio_and_plain_ffmpeg_takes_it(binary: str, bait: Path) -> None:
    """Otherwise an error would prove nothing: the attack works where nothing stands in its way."""
    assert decode(bait, SETTINGS).duration == 0.5
    script = bait.with_name("script.mp3")
    script.write_text(CONCAT.format(target=bait.name))
    plain = [binary, "-v", "error", "-nostdin", "-i", str(script), "-f", "s16le", "-"]
    assert len(subprocess.run(plain, capture_output=True, timeout=30, check=True).stdout) >= len(TONE)


@pytest.mark.parametrize("sniffed", [True, False], ids=["sniffed", "ffmpeg alone"])
@pytest.mark.parametrize("prefix", [b"", ID3], ids=["plain", "behind a tag"])
@pytest.mark.parametrize("script", [HLS, CONCAT, DASH, SDP], ids=["hls", "concat", "dash", "sdp"])
def test_a_script_inside_an_mp3_opens_nothing(
    victim: Listener,
    binary: str,
    bait: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    prefix: bytes,
    sniffed: bool,
) -> None:
    if not sniffed:
        monkeypatch.setattr(decode_module, "_refuse_what_is_no_audio", lambda head: None)
    targets = [str(victim.port)]
    if script is not SDP:
        targets = [bait.name, str(bait), f"file:{bait}", f"http://127.0.0.1:{victim.port}/a.wav"]
    for target in targets:
        download = bait.with_name("download.mp3")
        download.write_bytes(prefix + script.format(target=target).encode())
        with pytest.raises(AudioDecodeError) as caught:
            decode(download, SETTINGS, directory=bait.parent)
        assert str(bait.parent) not in caught.value.message
        assert str(victim.port) not in caught.value.message
    assert bait.stat().st_atime_ns == 0, "the bait was read"
