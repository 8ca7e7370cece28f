"""A long file in pieces is the same, sample for sample, as in one go; else it is decoded in one go."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from whisper_worker.audio import ffmpeg_child, pieces
from whisper_worker.audio.decode import DecodedAudio, decode
from whisper_worker.errors import Cancelled, TooLarge
from whisper_worker.settings import Settings
from whisper_worker.types import CancelToken

CLIP = Path(__file__).parents[1] / "data" / "speech" / "jfk.flac"
SETTINGS = Settings()
SYSTEM = shutil.which("ffmpeg") or ffmpeg_child.ffmpeg_binary()


@pytest.fixture(params=["system", "package"])
def binary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio_ffmpeg

    chosen = SYSTEM if request.param == "system" else str(imageio_ffmpeg.get_ffmpeg_exe())
    monkeypatch.setattr(ffmpeg_child, "ffmpeg_binary", lambda: chosen)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines of the children started, in a machine that has the cores, for pieces of three seconds."""
    started: list[list[str]] = []
    run = ffmpeg_child.run

    def noted(command: list[str], *arguments: object, **more: object) -> int:
        started.append(command)
        return run(command, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ffmpeg_child, "run", noted)
    monkeypatch.setattr(pieces, "n_workers", lambda: 3)
    monkeypatch.setattr(pieces, "LEAST_SECONDS", 10.0)
    monkeypatch.setattr(pieces, "PIECE_SECONDS", 3)
    return started


def make(target: Path, *arguments: object, source: Path = CLIP) -> Path:
    command = [SYSTEM, "-v", "error", "-nostdin", "-y", "-i", source, *arguments, target]
    subprocess.run([str(part) for part in command], check=True, timeout=60)
    return target


def in_one_go(path: Path) -> DecodedAudio:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "n_workers", lambda: 1)
        return decode(path, SETTINGS)


def assert_same(one: DecodedAudio, other: DecodedAudio) -> None:
    assert np.array_equal(one.waveform, other.waveform)
    assert (one.codec, one.n_channels, one.warnings) == (other.codec, other.n_channels, other.warnings)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.wav", ()),
        ("b.wav", ("-c:a", "pcm_mulaw", "-ar", 8000, "-ac", 1)),
        ("a.flac", ("-ar", 48000)),
        ("a.mp3", ("-c:a", "libmp3lame", "-b:a", "128k")),
        ("b.mp3", ("-c:a", "libmp3lame", "-q:a", 6)),
        ("c.mp3", ("-c:a", "libmp3lame", "-ar", 16000, "-ac", 1, "-b:a", "32k")),
    ],
)
@pytest.mark.usefixtures("binary")
def test_pieces_give_the_same_samples(
    tmp_path: Path, commands: list[list[str]], name: str, arguments: tuple[object, ...]
) -> None:
    path = make(tmp_path / name, *arguments)
    audio = decode(path, SETTINGS)
    # The one that read the header, then 0-3, 3-6 and the rest; no further one for the whole.
    assert sorted(command[command.index("-ss") + 1] for command in commands if "-ss" in command) == ["1", "4"]
    assert len(commands) == 4
    assert_same(audio, in_one_go(path))


@pytest.mark.parametrize("name", ["a.m4a", "a.opus", "a.webm"])
def test_formats_without_exact_seeking_are_decoded_in_one_go(
    tmp_path: Path, commands: list[list[str]], name: str
) -> None:
    decode(make(tmp_path / name), SETTINGS)
    assert len(commands) == 1


@pytest.mark.usefixtures("binary")
def test_more_sound_than_the_header_says_is_not_lost(tmp_path: Path, commands: list[list[str]]) -> None:
    """Two files joined: the header of the first knows nothing of the second."""
    path = make(tmp_path / "a.mp3", "-c:a", "libmp3lame")
    path.write_bytes(path.read_bytes() * 2)
    audio = decode(path, SETTINGS)
    assert audio.duration > 21.9
    assert_same(audio, in_one_go(path))


@pytest.mark.usefixtures("binary")
def test_a_damaged_file_is_decoded_in_one_go(tmp_path: Path, commands: list[list[str]]) -> None:
    path = make(tmp_path / "a.mp3", "-c:a", "libmp3lame")
    content = bytearray(path.read_bytes())
    content[80_000:83_000] = np.random.default_rng(3).bytes(3000)
    path.write_bytes(content)
    audio = decode(path, SETTINGS)
    assert any("damaged" in warning for warning in audio.warnings)
    assert_same(audio, in_one_go(path))


def test_a_seam_that_does_not_fit_is_noticed(
    tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seek that lands one millisecond off, as some demuxers' do."""
    path = make(tmp_path / "a.wav", "-ar", 16000)
    command_of = ffmpeg_child.decode_command

    def off(descriptor: int, *, stream: int | None, options: dict[str, object]) -> list[str]:
        shifted = {**options, "ss": f"{options['ss']}.001"} if "ss" in options else options
        return command_of(descriptor, stream=stream, options=shifted)

    monkeypatch.setattr(ffmpeg_child, "decode_command", off)
    audio = decode(path, SETTINGS)
    assert "-ss" in commands[-2] and "-ss" not in commands[-1], "the last run is over the whole file"
    assert_same(audio, in_one_go(path))


def test_limits_hold_in_pieces_too(tmp_path: Path, commands: list[list[str]]) -> None:
    path = make(tmp_path / "a.flac", "-ar", 16000)
    with pytest.raises(TooLarge):
        decode(path, Settings(max_audio_seconds=10.5))
    assert decode(path, Settings(max_audio_seconds=11)).duration == 11


@pytest.fixture
def stuck_after_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An ffmpeg that never gets anywhere once it is asked for a piece."""
    script = tmp_path / "ffmpeg"
    script.write_text(f'#!/bin/sh\ncase "$*" in *" -t "*) exec sleep 60;; *) exec {SYSTEM} "$@";; esac\n')
    script.chmod(0o700)
    monkeypatch.setattr(ffmpeg_child, "ffmpeg_binary", lambda: str(script))
    yield
    children = [task.read_text().split() for task in Path("/proc/self/task").glob("*/children")]
    assert not any(children)


@pytest.mark.usefixtures("stuck_after_the_header")
def test_cancel_ends_all_pieces_at_once(commands: list[list[str]]) -> None:
    cancel = CancelToken()
    timer = threading.Timer(0.5, cancel.cancel)
    timer.start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        decode(CLIP, SETTINGS, cancel=cancel)
    assert len(commands) > 2
    assert time.monotonic() - started < 2
    timer.join()


def test_pieces_are_for_machines_with_cores_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    for n_cores, expected in ((1, 1), (2, 1), (4, 4), (64, 8)):
        monkeypatch.setattr(pieces.os, "sched_getaffinity", lambda pid, n=n_cores: set(range(n)))
        assert pieces.n_workers() == expected
