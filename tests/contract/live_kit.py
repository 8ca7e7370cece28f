"""A live service on loopback in a thread of its own, and the clients that WhisperLive's users have."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
import threading
import wave
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.models import MODELS
from whisper_worker.audio.decode import decode
from whisper_worker.doors.live import LiveServer
from whisper_worker.doors.live_health import Vitals
from whisper_worker.service import Service
from whisper_worker.settings import Settings

SPEECH = Path(__file__).parents[1] / "data" / "speech"
JFK = "and so my fellow americans ask not what your country can do for you ask what you can do for your country"

_CLIENTS = MODELS.parent / "live-clients"
_STAND_IN = '''"""Takes the place of PyAudio: a sound card that plays at once and hears nothing."""

paInt16 = 8


class _Stream:
    def write(self, data):
        pass

    def close(self):
        pass

    def stop_stream(self):
        pass


class PyAudio:
    def open(self, **settings):
        return _Stream()

    def get_format_from_width(self, width):
        return paInt16

    def terminate(self):
        pass
'''


class RunningServer:
    """Use as a context; ``port`` is where it listens. The service may be shared by several."""

    def __init__(self, service: Service, settings: Settings) -> None:
        self._service = service
        self._settings = settings
        self.vitals = Vitals(0, settings.max_clients, {})

    def __enter__(self) -> RunningServer:
        listening: Future[int] = Future()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()

        async def serve() -> None:
            try:
                self.server = LiveServer(self._service, self._settings, self.vitals)
                async with self.server.open("127.0.0.1", 0) as port:
                    listening.set_result(port)
                    await self._stop.wait()
            except BaseException as error:
                if not listening.done():
                    listening.set_exception(error)
                raise

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(serve())
            self._loop.close()

        self._thread = threading.Thread(target=run, name="live-server")
        self._thread.start()
        self.port = listening.result(timeout=120)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Flush the sessions and close; a second call finds nothing to do."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout=90)
        assert not self._thread.is_alive()


def sound(name: str) -> npt.NDArray[np.int16]:
    """A file of tests/data as 16 kHz mono."""
    waveform: npt.NDArray[np.int16] = decode(SPEECH / name, Settings()).waveform
    return waveform


def write_wav(path: Path, waveform: npt.NDArray[np.int16]) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(waveform.tobytes())
    return path


def client_packages(*requirements: str) -> Path:
    """A directory with these distributions, unmodified and without their dependencies, made once and kept."""
    directory = _CLIENTS / "_".join(requirements)
    _CLIENTS.mkdir(parents=True, exist_ok=True)
    with (_CLIENTS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = directory / ".done"
        if not done.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory)]
            subprocess.run([*pip, *requirements], check=True, capture_output=True, timeout=300)
            (directory / "pyaudio.py").write_text(_STAND_IN, encoding="utf-8")
            # Imported by the clients' utilities and never used.
            (directory / "scipy.py").write_text("", encoding="utf-8")
            done.touch()
    return directory


def start_client(packages: Path, program: str, *arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """Run a program against those packages."""
    environment = {**os.environ, "PYTHONPATH": str(packages), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish_client(process: subprocess.Popen[str], timeout: float) -> str:
    """What it printed. Fails where it hangs or ends badly."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"the client hangs: {output[-2000:]}") from None
    assert process.returncode == 0, output[-3000:]
    return output


def folded(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def config(**changes: Any) -> dict[str, Any]:
    return {"uid": "test", "language": "en", "task": "transcribe", "model": "tiny.en", "use_vad": True, **changes}
