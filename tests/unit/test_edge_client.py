"""The debugging client of the edge, played to by a WebSocket peer in this process."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CLIENT = Path(__file__).parents[2] / "deploy" / "edge" / "test_client.py"
N = 50


@pytest.fixture(scope="module")
def client() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("edge_client", CLIENT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def answer(listener: socket.socket) -> None:
    """Shake hands, then answer whatever comes with a short text, until ``N`` were sent; then say farewell."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(10)
        request = b""
        while b"\r\n\r\n" not in request:
            request += connection.recv(4096)
        key = next(line.split(b": ")[1] for line in request.split(b"\r\n") if line.startswith(b"Sec-WebSocket-Key"))
        accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        connection.sendall(b"HTTP/1.1 101 Switching\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n")
        for _ in range(N):
            connection.recv(65536)
            connection.sendall(b"\x81\x02{}")
        connection.sendall(b"\x88\x02\x03\xe8")
        while connection.recv(65536):
            pass


class OneAtATime:
    """A socket that notices when two threads use it at once."""

    def __init__(self, real: socket.socket) -> None:
        self._real = real
        self._using = threading.Lock()
        self.clashes = 0

    @contextmanager
    def _use(self) -> Iterator[None]:
        free = self._using.acquire(blocking=False)
        self.clashes += not free
        try:
            yield
        finally:
            if free:
                self._using.release()

    def recv(self, n: int) -> bytes:
        with self._use():
            return self._real.recv(n)

    def sendall(self, data: bytes) -> None:
        with self._use():
            self._real.sendall(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_its_connection_is_used_by_one_thread_at_a_time(client: ModuleType) -> None:
    """OpenSSL now and then told the reading thread of an end that there was not, while the other one sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = threading.Thread(target=answer, args=[listener])
        peer.start()
        options = client.parse([f"ws://127.0.0.1:{listener.getsockname()[1]}/", "--timeout", "10"])
        connection = client.WebSocket(options)
        connection._socket = watched = OneAtATime(connection._socket)
        answered = threading.Semaphore()

        def speak() -> None:
            for _ in range(N):
                # The peer counts what it reads, not messages.
                assert answered.acquire(timeout=10)
                connection.send(b"sound", 2)

        speaker = threading.Thread(target=speak)
        speaker.start()
        try:
            for _ in range(N):
                assert connection.receive() == (1, b"{}")
                answered.release()
            assert connection.receive() == (8, b"\x03\xe8")
        finally:
            connection.close()
            speaker.join()
            peer.join()
    assert watched.clashes == 0
