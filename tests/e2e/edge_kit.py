"""The edge on loopback: Caddy with TLS in front of a live service, each a process that can be killed and come back."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
import wave
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from tests.models import model_cache
from whisper_worker.audio.decode import decode
from whisper_worker.settings import Settings

ROOT = Path(__file__).parents[2]
EDGE = ROOT / "deploy" / "edge"
SPEECH = ROOT / "tests" / "data" / "speech"
JFK_TEXT = "and so my fellow americans ask not what your country can do for you ask what you can do for your country"

_T = TypeVar("_T")


def until(condition: Callable[[], _T], seconds: float = 30.0) -> _T:
    """Wait for something to become true, and give it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return value


def free_ports(n: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def get(url: str, ca: Path | None = None) -> tuple[int, bytes]:
    """Status and body; status 0 where nobody answers."""
    context = ssl.create_default_context(cafile=str(ca)) if ca else None
    try:
        with urllib.request.urlopen(url, timeout=5, context=context) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except OSError:
        return 0, b""


class Process:
    """A child with its output in a file; started, stopped and killed as often as one likes."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.command, self.environment, self.log = command, environment, log
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                self.command, env={**os.environ, **self.environment}, cwd=ROOT, stdout=log, stderr=log
            )

    def end(self, number: signal.Signals) -> None:
        if self.child is not None:
            self.child.send_signal(number)
            self.child.wait(30)
            self.child = None

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


class LiveService(Process):
    """``whisper-worker live`` with tiny.en."""

    def __init__(self, directory: Path, **settings: str) -> None:
        self.port, self.health_port = free_ports(2)
        ports = ["--port", str(self.port), "--health-port", str(self.health_port)]
        command = [sys.executable, "-m", "whisper_worker", "live", "--host", "127.0.0.1", *ports]
        environment = {"WHISPER_MODEL_CACHE": str(model_cache("tiny.en")), "WHISPER_THREADS": "2", **settings}
        super().__init__(command, environment, directory / "live.log")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def health_url(self) -> str:
        return f"http://127.0.0.1:{self.health_port}"

    def wait(self) -> None:
        until(lambda: get(f"{self.health_url}/ready")[0] == 200, 90)


class Caddy(Process):
    """The Caddyfile as it is, on high ports and with an authority of its own."""

    def __init__(self, directory: Path, gpu_url: str, health_url: str, host: str = "127.0.0.1") -> None:
        program = shutil.which("caddy")
        if program is None:
            pytest.skip("NO CADDY, the edge is untested: install it (apt-get install caddy)")
        self.port, http_port, self.admin_port = free_ports(3)
        self.ca = directory / "data" / "caddy" / "pki" / "authorities" / "local" / "root.crt"
        environment = {
            "EDGE_HOST": host,
            "EDGE_ADMIN": f"127.0.0.1:{self.admin_port}",
            "EDGE_HTTP_PORT": str(http_port),
            "EDGE_HTTPS_PORT": str(self.port),
            "EDGE_SITE": str(EDGE / "site"),
            "GPU_URL": gpu_url,
            "GPU_HEALTH_URL": health_url,
            "XDG_DATA_HOME": str(directory / "data"),
            "XDG_CONFIG_HOME": str(directory / "config"),
        }
        self.config = ["--config", str(EDGE / "Caddyfile"), "--adapter", "caddyfile"]
        super().__init__([program, "run", *self.config], environment, directory / "caddy.log")

    @property
    def url(self) -> str:
        return f"https://{self.environment['EDGE_HOST']}:{self.port}"

    def wait(self) -> None:
        until(lambda: self.ca.exists() and get(f"{self.url}/", self.ca)[0] == 200)

    def reload(self) -> None:
        command = [self.command[0], "reload", "--force", "--address", f"127.0.0.1:{self.admin_port}", *self.config]
        subprocess.run(command, env={**os.environ, **self.environment}, check=True, capture_output=True, timeout=30)


@contextmanager
def running(process: Any) -> Iterator[Any]:
    process.start()
    try:
        process.wait()
        yield process
    finally:
        process.end(signal.SIGTERM)


def waveform(name: str) -> npt.NDArray[np.int16]:
    """A file of tests/data/speech as 16 kHz mono."""
    samples: npt.NDArray[np.int16] = decode(SPEECH / name, Settings()).waveform
    return samples


def write_wav(path: Path, samples: npt.NDArray[np.int16], rate: int = 16000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return path


def words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower().replace("'", "")).split()
