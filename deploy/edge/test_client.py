#!/usr/bin/env python3
"""Speak a recording to the live service and print what it answers: the debugging client of the edge.

    test_client.py wss://EDGE/ws --audio test-audio.wav
    test_client.py ws://GPU:9090 --audio talk.wav --speed 1 --language en

The recording is a WAV file, 16 kHz, mono, 16-bit; `ffmpeg -i IN -ar 16000 -ac 1 OUT.wav` makes one. Lines begin
with the seconds since the start. The standard library is all it needs, so that it runs on a bare edge.

exit codes:
  0  words came (and --expect was among them)
  2  wrong arguments, or a file that is not such a WAV
  3  nobody listens there, or the name is unknown
  4  TLS failed: --insecure accepts any certificate, --ca FILE trusts one authority
  5  the WebSocket was refused; the status says by whom
  6  the service gave no seat or an error
  7  no words came, or not those of --expect
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import secrets
import select
import socket
import ssl
import struct
import sys
import threading
import time
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_RATE = 16_000
_FRAME = 1_600
"""Samples a message: 100 ms."""
_ACCEPT = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TEXT, _BINARY, _CLOSE, _PING, _PONG = 1, 2, 8, 9, 10


class Failure(Exception):
    """Why it ends, with the exit status that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Options:
    url: str
    audio: Path
    speed: float
    language: str | None
    key: str | None
    expect: str | None
    insecure: bool
    ca: Path | None
    timeout: float
    quiet: bool


class WebSocket:
    """As much of RFC 6455 as a client of this service needs. One thread may send while another receives."""

    def __init__(self, options: Options) -> None:
        """Raises :class:`Failure` with status 2 to 5."""
        parts = urlsplit(options.url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise Failure(2, "the address must begin with ws:// or wss://")
        port = parts.port or (443 if parts.scheme == "wss" else 80)
        try:
            self._socket = socket.create_connection((parts.hostname, port), timeout=options.timeout)
        except OSError as error:
            raise Failure(3, f"cannot connect: {error.strerror or error}") from error
        if parts.scheme == "wss":
            self._socket = self._secure(self._socket, parts.hostname, options)
        self._timeout = options.timeout
        # OpenSSL lets one thread at a time use a connection: with two, a read may report an end that there was not.
        self._using = threading.Lock()
        self._received = b""
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._shake_hands(path, parts.netloc.rpartition("@")[2], options.key)

    @staticmethod
    def _secure(plain: socket.socket, host: str, options: Options) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(options.ca) if options.ca else None)
        if options.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        try:
            return context.wrap_socket(plain, server_hostname=host)
        except (ssl.SSLError, OSError) as error:
            raise Failure(4, f"TLS failed: {getattr(error, 'reason', None) or error}") from error

    def _shake_hands(self, path: str, host: str, key: str | None) -> None:
        nonce = base64.b64encode(secrets.token_bytes(16))
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: {host}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {nonce.decode()}",
            "Sec-WebSocket-Version: 13",
            *([f"Authorization: Bearer {key}"] if key else []),
        ]
        try:
            self._socket.sendall("\r\n".join([*lines, "", ""]).encode())
            while b"\r\n\r\n" not in self._received:
                if not (data := self._socket.recv(4096)) or len(self._received) > 65536:
                    raise Failure(5, "the connection was closed instead of an answer")
                self._received += data
        except OSError as error:
            raise Failure(5, f"no answer to the handshake: {error.strerror or error}") from error
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        first, *headers = head.decode("latin-1").split("\r\n")
        status = first.split(" ")[1] if " " in first else "?"
        if status != "101":
            meaning = {"401": "a key is wanted", "502": "the proxy cannot reach the service", "503": "no room"}
            raise Failure(5, f"the WebSocket was refused with {status}: {meaning.get(status, 'no live service there')}")
        accept = base64.b64encode(hashlib.sha1(nonce + _ACCEPT).digest()).decode()
        if f"sec-websocket-accept: {accept}".lower() not in [line.lower() for line in headers]:
            raise Failure(5, "the answer to the handshake is not a WebSocket's")

    def send(self, payload: bytes, kind: int) -> None:
        mask = secrets.token_bytes(4)
        repeated = (mask * (len(payload) // 4 + 1))[: len(payload)]
        masked = (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(len(payload), "big")
        size = len(payload)
        length = (
            bytes([0x80 | size])
            if size < 126
            else b"\xfe" + struct.pack("!H", size)
            if size < 65536
            else b"\xff" + struct.pack("!Q", size)
        )
        with self._using:
            self._socket.settimeout(self._timeout)
            self._socket.sendall(bytes([0x80 | kind]) + length + mask + masked)

    def receive(self) -> tuple[int, bytes]:
        """The next message's kind and payload, with pings answered. Raises ``OSError`` at the connection's end."""
        message, first_kind = b"", 0
        while True:
            head = self._exactly(2)
            kind, size = head[0] & 15, head[1] & 127
            if size == 126:
                size = struct.unpack("!H", self._exactly(2))[0]
            elif size == 127:
                size = struct.unpack("!Q", self._exactly(8))[0]
            payload = self._exactly(size)
            if kind == _PING:
                self.send(payload, _PONG)
            elif kind == _CLOSE:
                return kind, payload
            elif kind != _PONG:
                first_kind, message = first_kind or kind, message + payload
                if head[0] & 0x80:
                    return first_kind, message

    def _exactly(self, n: int) -> bytes:
        while len(self._received) < n:
            data = self._read()
            if not data:
                raise ConnectionError("closed without a farewell")
            self._received += data
        data, self._received = self._received[:n], self._received[n:]
        return data

    def _read(self) -> bytes:
        """What has come, once something has; nothing at the end. It is waited for with the connection left free."""
        while True:
            with self._using, contextlib.suppress(ssl.SSLWantReadError, BlockingIOError):
                self._socket.settimeout(0)
                return self._socket.recv(65536)
            if not select.select([self._socket], [], [], self._timeout)[0]:
                raise TimeoutError("no answer in time")

    def close(self) -> None:
        self._socket.close()


class Session:
    """One recording spoken to the service."""

    def __init__(self, options: Options, samples: bytes) -> None:
        self._options = options
        self._samples = samples
        self._begun = time.monotonic()
        self._spoken = 0.0
        """Seconds of sound sent so far."""
        self.words: dict[str, str] = {}
        """Completed segments by their starts."""

    def run(self) -> str:
        """The completed text. Raises :class:`Failure`."""
        options = self._options
        connection = WebSocket(options)
        self._say("connected")
        try:
            config = {"uid": f"test-client-{os.getpid()}", "language": options.language, "task": "transcribe"}
            connection.send(json.dumps({**config, "model": "", "use_vad": True}).encode(), _TEXT)
            speaker = threading.Thread(target=self._speak, args=[connection], daemon=True)
            while True:
                kind, payload = connection.receive()
                if kind == _CLOSE:
                    code = struct.unpack("!H", payload[:2])[0] if len(payload) >= 2 else 1005
                    self._say(f"closed with {code}")
                    break
                message = json.loads(payload)
                if message.get("message") == "SERVER_READY":
                    self._say("ready; speaking")
                    speaker.start()
                else:
                    self._hear(message)
        except (OSError, ValueError) as error:
            raise Failure(6, f"the connection broke: {error}") from error
        finally:
            connection.close()
        return "".join(self.words.values()).strip()

    def _speak(self, connection: WebSocket) -> None:
        samples = struct.unpack(f"<{len(self._samples) // 2}h", self._samples)
        begun = time.monotonic()
        try:
            for first in range(0, len(samples), _FRAME):
                frame = samples[first : first + _FRAME]
                connection.send(struct.pack(f"<{len(frame)}f", *(one / 32768 for one in frame)), _BINARY)
                self._spoken = (first + len(frame)) / _RATE
                time.sleep(max(0.0, begun + self._spoken / self._options.speed - time.monotonic()))
            connection.send(b"END_OF_AUDIO", _BINARY)
        except OSError:
            pass  # The receiving side sees the same end, and says so.

    def _hear(self, message: dict[str, Any]) -> None:
        if message.get("status") == "WAIT":
            raise Failure(6, f"all seats are taken; one may be free in {float(message['message']):.1f} min")
        if message.get("status") == "ERROR":
            raise Failure(6, f"the service says: {message['message']}")
        if message.get("status") == "WARNING":
            self._say(f"warning: {message['message']}")
        for segment in message.get("segments", []):
            known = segment["start"] in self.words
            if segment["completed"]:
                self.words[segment["start"]] = segment["text"]
            if not known:
                lag = self._spoken - float(segment["end"])
                mark = "final  " if segment["completed"] else "partial"
                self._say(f"{mark} {segment['start']}-{segment['end']} ({lag:.1f} s behind){segment['text']}")

    def _say(self, text: str) -> None:
        if not self._options.quiet:
            print(f"{time.monotonic() - self._begun:7.2f} {text}", flush=True)


def read_wav(path: Path) -> bytes:
    """Its samples as 16-bit little-endian. Raises :class:`Failure` where it is another kind of file."""
    try:
        with wave.open(str(path), "rb") as file:
            found = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            samples = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise Failure(2, "the recording cannot be read; it must be a WAV file") from error
    if found != (1, 2, _RATE):
        raise Failure(2, "the recording must be 16 kHz, mono, 16-bit: ffmpeg -i IN -ar 16000 -ac 1 OUT.wav")
    return samples


def parse(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="ws://HOST:PORT or wss://HOST/ws")
    parser.add_argument("--audio", type=Path, default=Path(__file__).parent / "site" / "test-audio.wav")
    parser.add_argument("--speed", type=float, default=1.0, help="times as fast as it was spoken (default: 1)")
    parser.add_argument("--language", help="a code such as en; default: detected")
    parser.add_argument("--expect", help="words that must be among those that come; case and points do not matter")
    parser.add_argument("--insecure", action="store_true", help="accept any certificate")
    parser.add_argument("--ca", type=Path, help="trust the certificates of this authority (a PEM file)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds without an answer (default: 60)")
    parser.add_argument("--quiet", action="store_true", help="print the text alone")
    given = parser.parse_args(arguments)
    if given.speed <= 0:
        parser.error("--speed must be above 0")
    # On the command line, others on the machine could read it.
    return Options(**vars(given), key=os.environ.get("WHISPER_API_KEY") or None)


def folded(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        text = Session(options, read_wav(options.audio)).run()
        if not text:
            raise Failure(7, "no words came")
        if options.expect and folded(options.expect) not in folded(text):
            raise Failure(7, f"other words came: {text}")
    except Failure as failure:
        print(f"{failure} (exit status {failure.status})", file=sys.stderr)
        return failure.status
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
