"""The HTTP service for its tests: on loopback, with a real model, in a thread or in a process of its own."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import numpy.typing as npt

from tests.models import model_cache
from whisper_worker.audio.decode import decode
from whisper_worker.doors.http_app import create_app
from whisper_worker.doors.http_server import Server
from whisper_worker.service import Service
from whisper_worker.settings import Settings
from whisper_worker.types import SAMPLE_RATE

ROOT = Path(__file__).parents[2]
SPEECH = ROOT / "tests" / "data" / "speech"
JFK = SPEECH / "jfk.flac"
PRINTING = SPEECH / "LJ001-0001.flac"
STEW = SPEECH / "1089-134686-0000.flac"
SILENCE = SPEECH / "silence_3s.flac"
GERMAN = SPEECH / "test_de.flac"

_T = TypeVar("_T")


def until(condition: Callable[[], _T], seconds: float = 30.0) -> _T:
    """Wait for something to become true, and give it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return value


def base_settings(model: str = "tiny.en", **changes: Any) -> Settings:
    return replace(Settings(), model_cache=model_cache(model), threads=2, **changes)


@cache
def loaded_service(model: str = "tiny.en") -> Service:
    """One of each model for all tests of the process."""
    service = Service(base_settings(model))
    # A process that ends in the middle of a batch, which a test may have left behind, is aborted by the C++ library.
    atexit.register(service.close)
    service.load()
    return service


@contextlib.contextmanager
def serving(jobs_dir: Path, model: str = "tiny.en", **changes: Any) -> Iterator[httpx.Client]:
    """The service under these settings, and a client of it."""
    settings = base_settings(model, **changes)
    app = create_app(loaded_service(model), settings, jobs_dir)
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(app, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
            until(lambda: server.started and client.get("/ready").status_code == 200)
            yield client
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


class Process:
    """``whisper-worker serve`` as people start it."""

    def __init__(self, directory: Path, *arguments: str, **variables: str) -> None:
        self.log = directory / f"log-{time.monotonic_ns()}"
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "WHISPER_MODEL_CACHE": str(model_cache("tiny.en")),
            "WHISPER_THREADS": "2",
            "WHISPER_TMPDIR": str(directory),
            "WHISPER_JOBS_DIR": str(directory / "jobs"),
            **variables,
        }
        where = arguments or ("--host", "127.0.0.1", "--port", "0")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "whisper_worker", "serve", *where], cwd=ROOT, env=environment, stderr=log
            )

    def client(self) -> httpx.Client:
        def port() -> re.Match[str] | None:
            assert self.process.poll() is None, self.log.read_text()
            return re.search(r"Listening port=(\d+)", self.log.read_text())

        return httpx.Client(base_url=f"http://127.0.0.1:{until(port)[1]}", timeout=60)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@cache
def waveform(path: Path) -> npt.NDArray[np.int16]:
    return decode(path, Settings()).waveform


def write_wav(path: Path, samples: npt.NDArray[np.int16]) -> Path:
    """16 kHz; shape (n,) or (n, channels)."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    return path


def long_speech(path: Path, minutes: float) -> Path:
    """Different sentences again and again, with pauses between them."""
    pause = np.zeros(SAMPLE_RATE, np.int16)
    turn = np.concatenate([waveform(PRINTING), pause, waveform(STEW), pause, waveform(JFK), pause])
    return write_wav(path, np.resize(turn, int(minutes * 60 * SAMPLE_RATE)))


def metric(client: httpx.Client, name: str) -> float:
    """The sum over all labels."""
    found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))
