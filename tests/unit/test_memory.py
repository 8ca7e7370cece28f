"""What keeps a worker's memory from growing with the number of its jobs."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import model_cache
from whisper_worker.audio import channels as channels_module
from whisper_worker.audio import decode as decode_module
from whisper_worker.engine import memory
from whisper_worker.errors import WhisperWorkerError
from whisper_worker.service import Service
from whisper_worker.settings import Settings
from whisper_worker.types import AudioSource, JobInput

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def resident_mb() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def leave_a_hole(size_mb: int) -> tuple[ctypes.CDLL, int]:
    """Fill the allocator's heap and free all of it but its last block, which is given with the library."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    block = 16 << 10
    blocks = [libc.malloc(block) for _ in range(size_mb << 20 >> 14)]
    for address in blocks:
        ctypes.memset(address, 1, block)
    for address in blocks[:-1]:
        libc.free(address)
    return libc, blocks[-1]


@glibc
@pytest.mark.parametrize("name", ["pages_in_holes", "a_job_gives_back", "a_long_job_gives_back_on_its_way"])
def test_pages_in_holes_go_back_to_the_system(name: str) -> None:
    """In a process of its own: the heap of this one has holes that other tests left, and fills those first."""
    code = f"from tests.unit import test_memory; test_memory.{name}()"
    root = Path(__file__).resolve().parents[2]
    alone = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr


def pages_in_holes() -> None:
    before = resident_mb()
    libc, last = leave_a_hole(100)
    assert resident_mb() - before > 80, "the allocator keeps what lies below a block in use"
    memory.GIVE_BACK_SECONDS = 3600.0
    memory.give_back_unused()
    assert resident_mb() - before > 80, "the last time is not long ago"
    memory.GIVE_BACK_SECONDS = 0.0
    memory.give_back_unused()
    assert resident_mb() - before < 20
    libc.free(last)


def a_job_gives_back() -> None:
    """300 requests grew a service by 72 MB: what ended jobs had used was kept."""
    service = Service(Settings(model_cache=model_cache("tiny.en"), threads=1))
    service.load()
    missing = JobInput(source=AudioSource(path=Path("/nowhere.wav")))
    before = resident_mb()
    libc, last = leave_a_hole(100)
    memory.GIVE_BACK_SECONDS = memory.GIVE_BACK_IDLE_SECONDS = 3600.0
    with pytest.raises(WhisperWorkerError):
        service.transcribe(missing)
    assert resident_mb() - before > 80, "the last time is not long ago"
    memory.GIVE_BACK_IDLE_SECONDS = 0.0
    with pytest.raises(WhisperWorkerError):
        service.transcribe(missing)
    assert resident_mb() - before < 20
    libc.free(last)
    service.close()


def a_long_job_gives_back_on_its_way() -> None:
    """Two hours of one recording held 100 MB more at their end than where they were given back now and then."""
    service = Service(Settings(model_cache=model_cache("tiny.en"), threads=1))
    service.load()
    job = JobInput(source=AudioSource(path=Path("tests/data/speech/jfk.flac")))
    service.transcribe(job)
    before = resident_mb()
    libc, last = leave_a_hole(300)
    memory.GIVE_BACK_SECONDS = 0.0
    seen: list[float] = []
    service.transcribe(job, on_progress=lambda _: seen.append(resident_mb()))
    assert seen and seen[0] - before < 150
    libc.free(last)
    service.close()


@pytest.mark.parametrize("ask", ["transcribe", "transcribe_channels", "detect_language"])
def test_a_jobs_waveform_is_gone_when_memory_is_given_back(monkeypatch: pytest.MonkeyPatch, ask: str) -> None:
    """The caller's frame held it: of a quarter of an hour 27 MB stayed until the next job."""
    # Of speech the scheduler's thread may hold a batch for a moment more.
    clip = Path(__file__).parents[1] / "data" / "speech" / "silence_3s.flac"
    service = Service(Settings(model_cache=model_cache("tiny.en"), threads=2))
    waveforms: list[weakref.ref[object]] = []
    held: list[bool] = []
    original = decode_module.decode

    def decoded(*arguments: Any, **options: Any) -> decode_module.DecodedAudio:
        audio = original(*arguments, **options)
        waveforms.append(weakref.ref(audio.waveform))
        return audio

    def look(*, idle: bool = False) -> None:
        if idle:
            held.append(any(waveform() is not None for waveform in waveforms))

    monkeypatch.setattr(decode_module, "decode", decoded)
    monkeypatch.setattr(channels_module, "decode", decoded)
    monkeypatch.setattr(memory, "give_back_unused", look)
    try:
        getattr(service, ask)(JobInput(source=AudioSource(path=clip)))
    finally:
        service.close()
    assert waveforms and held == [False]


def test_kernel_caches_are_bounded_unless_they_are_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    memory.bound_native_memory()
    assert int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"


@glibc
@pytest.mark.parametrize(
    ("given", "most"), [({}, max(2, len(os.sched_getaffinity(0)))), ({"MALLOC_ARENA_MAX": "7"}, 7)]
)
def test_threads_share_heaps(given: dict[str, str], most: int) -> None:
    code = "from tests.unit import test_memory; test_memory.many_threads_allocate()"
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, timeout=60, capture_output=True, text=True, env={**os.environ, **given})
    assert done.stdout.split() == [str(most)], done.stderr


def many_threads_allocate() -> None:
    """Print among how many heaps a dozen threads, all there at once, share what they allocate."""
    memory.bound_native_memory()
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    libc.malloc.restype = ctypes.c_void_p
    together = threading.Barrier(12)

    def allocate(_: int) -> None:
        libc.malloc(1000)
        together.wait(30)

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(allocate, range(12)))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "heaps"
        file = ctypes.c_void_p(libc.fopen(str(path).encode(), b"w"))
        libc.malloc_info(0, file)
        libc.fclose(file)
        print(path.read_text().count("<heap nr="))


@pytest.mark.parametrize(
    ("row_mb", "free_mb", "windows"), [(12, 8000, 8), (24, 8000, 4), (320, 8000, 4), (320, 3000, 2)]
)
def test_batches_on_a_cpu_follow_the_model_and_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, row_mb: int, free_mb: int, windows: int
) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: free_mb * 10**6)
    assert memory.batch_size(row_mb * 10**6, torch.device("cpu")) == windows
