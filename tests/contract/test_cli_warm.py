"""The command with a model kept warm: a real local service behind a Unix socket, and the same transcript everywhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.models import model_cache
from whisper_worker.doors.cli_inputs import Input
from whisper_worker.doors.cli_warm import WarmEngine, runtime_directory, service_key
from whisper_worker.errors import Busy
from whisper_worker.settings import Settings
from whisper_worker.types import AudioSource, Progress, Segment, Transcript

TESTS = Path(__file__).parents[1]
JFK = TESTS / "data" / "speech" / "jfk.flac"
SECONDS = 120


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A directory for sockets: pytest's own have longer paths than a socket may have."""
    with tempfile.TemporaryDirectory(prefix="warm-") as directory:
        yield Path(directory)


@pytest.fixture
def variables(runtime: Path) -> Iterator[dict[str, str]]:
    """What the commands of a test run with; services that they leave are ended with the test."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    yield {
        **kept,
        "PYTHONPATH": str(TESTS.parent),
        "WHISPER_MODEL_CACHE": str(model_cache("tiny.en")),
        "WHISPER_DEVICE": "cpu",
        "WHISPER_RUNTIME_DIR": str(runtime),
        "WHISPER_API_KEYS": "one-key,another-key",
        "HF_HUB_OFFLINE": "1",
    }
    for path in runtime.glob("whisper-worker/*.sock"):
        if pid := serving(path):
            os.kill(pid, signal.SIGKILL)


def start(module: str, *arguments: object, variables: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"whisper_worker.doors.{module}", *map(str, arguments)],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    return out, err


def serving(path: Path) -> int | None:
    """Process id of whoever listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return None
        pid: int = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid


@contextmanager
def at_a_port(path: Path) -> Iterator[str]:
    """The service behind a Unix socket, at an address of loopback."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # either side may have heard enough
            while block := source.recv(1 << 16):
                sink.sendall(block)
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        outer, _ = listening.accept()
        with outer, socket.socket(socket.AF_UNIX) as inner:
            inner.connect(str(path))
            back = threading.Thread(target=pump, args=(inner, outer))
            back.start()
            pump(outer, inner)
            back.join(SECONDS)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(SECONDS)


def test_one_service_serves_all_calls_gives_what_a_cold_one_gives_and_ends(
    tmp_path: Path, runtime: Path, variables: dict[str, str]
) -> None:
    arguments = ("--language", "en", "--word_timestamps", "True")
    # Two that start at once: one of them starts the service, both use it.
    both = [
        start("cli", JFK, *arguments, "--keep-warm=60", "-o", tmp_path / name, variables=variables)
        for name in ("one", "two")
    ]
    said = [finished(process) for process in both]
    assert said[0] == said[1]
    assert said[0][1] == ""
    (path,) = runtime.glob("whisper-worker/*.sock")
    first = serving(path)
    assert first is not None
    listeners = [
        one.parent.name
        for one in Path("/proc").glob("[0-9]*/cmdline")
        if str(path).encode() in one.read_bytes() and b"serve" in one.read_bytes()
    ]
    assert listeners == [str(first)]
    assert path.parent.stat().st_mode & 0o777 == 0o700

    # The same through the remote command, and without any service.
    with at_a_port(path) as url:
        (tmp_path / "key").write_text("another-key\n")
        there = ("--server", url, "--key-file", tmp_path / "key")
        far = start("remote", JFK, *arguments, "-o", tmp_path / "far", *there, variables=variables)
        assert finished(far) == said[0]
    finished(start("cli", JFK, *arguments, "-o", tmp_path / "cold", variables=variables))
    for fmt in ("txt", "srt", "vtt", "tsv", "json"):
        texts = {(tmp_path / name / f"jfk.{fmt}").read_text() for name in ("one", "two", "far", "cold")}
        assert len(texts) == 1, fmt
    assert json.loads((tmp_path / "cold" / "jfk.json").read_text())["segments"][0]["words"]

    # A service that was killed is replaced, and one that has nothing to do ends.
    os.kill(first, signal.SIGKILL)
    again = start("cli", JFK, *arguments, "--keep-warm=1", "-o", tmp_path / "again", variables=variables)
    assert finished(again) == said[0]
    until = time.monotonic() + SECONDS
    while serving(path) is not None:
        assert time.monotonic() < until, "the service did not end"
        time.sleep(0.2)


def test_a_model_or_a_device_that_is_not_there_is_told_at_once(tmp_path: Path, variables: dict[str, str]) -> None:
    """The service stays up where its model does not load, and would be waited for in vain."""
    process = start("cli", JFK, "--model", "small", "--keep-warm", "--model_dir", tmp_path, variables=variables)
    _, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 3
    assert "save_pipeline.py --model small" in told.splitlines()[-1]

    import torch

    if not torch.cuda.is_available():
        process = start("cli", JFK, "--device", "cuda", "--keep-warm", variables=variables)
        _, told = process.communicate(timeout=SECONDS)
        assert process.returncode == 3
        assert "--device cpu" in told.splitlines()[-1]


class Fallback:
    """Stands for the engine in this process."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def transcribe(
        self,
        item: Input,
        on_segment: Callable[[Segment], None],
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Transcript:
        self.done.append(item.shown)
        return Transcript("here", "en", 1.0, 1.0, ())

    def prepare(self) -> None:
        self.done.append("prepared")


def test_where_no_service_can_be_had_the_work_is_done_here(runtime: Path) -> None:
    fallback, lines = Fallback(), list[str]()
    engine = WarmEngine({}, Settings(runtime_dir=runtime), 60.0, fallback, lines.append, serve=("false",))
    item = Input("a.flac", Path("a"), AudioSource(path=JFK))
    assert engine.transcribe(item, lambda segment: None).text == "here"
    assert engine.transcribe(item, lambda segment: None).text == "here"
    engine.prepare()
    assert fallback.done == ["a.flac", "a.flac", "prepared"]
    (line,) = lines
    assert "--keep-warm does not work here" in line


def test_a_directory_that_cannot_be_made_gives_way(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ``su`` the variable names what is another user's."""
    monkeypatch.setattr("tempfile.tempdir", str(runtime))
    (runtime / "file").write_text("")
    assert runtime_directory(Settings(runtime_dir=runtime / "file")).parent == runtime


def test_a_directory_that_others_may_enter_is_not_used(runtime: Path) -> None:
    """Who can make the socket first hears every recording."""
    assert runtime_directory(Settings(runtime_dir=runtime)).stat().st_mode & 0o777 == 0o700
    (runtime / "whisper-worker").chmod(0o755)
    with pytest.raises(Busy, match="belong to this user"):
        runtime_directory(Settings(runtime_dir=runtime))
    elsewhere = runtime / "elsewhere"
    (runtime / "home").mkdir()
    elsewhere.mkdir()
    (elsewhere / "whisper-worker").symlink_to(runtime / "home")
    with pytest.raises(Busy, match="belong to this user"):
        runtime_directory(Settings(runtime_dir=elsewhere))


@pytest.mark.parametrize("other", [{"model": "base"}, {"device": "cuda"}, {"compute_type": "float32"}, {"threads": 1}])
def test_what_changes_the_model_takes_another_service(other: dict[str, Any]) -> None:
    assert service_key(Settings()) != service_key(Settings(**other))
    assert service_key(Settings()) == service_key(Settings(log_format="json"))


def test_other_cards_take_another_service(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for cards in ("0", "1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cards)
        keys.add(service_key(Settings()))
    assert len(keys) == 2
