"""Files of many kinds, made here from one real clip, through both ffmpegs that users have."""

from __future__ import annotations

import logging
import os
import shutil
import struct
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from whisper_worker.audio import ffmpeg_child, plain_wav
from whisper_worker.audio.decode import DecodedAudio, decode
from whisper_worker.errors import AudioDecodeError, Cancelled, DeadlineExceeded, InvalidInput, TooLarge
from whisper_worker.settings import Settings
from whisper_worker.types import SAMPLE_RATE, CancelToken

CLIP = Path(__file__).parents[1] / "data" / "speech" / "jfk.flac"
CLIP_SECONDS = 11.0
SETTINGS = Settings()
Int16 = npt.NDArray[np.int16]

SYSTEM = shutil.which("ffmpeg") or ffmpeg_child.ffmpeg_binary()
"""The package's goes before it, so this one has to be looked for."""


def packaged() -> str:
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())


@pytest.fixture(params=["system", "package"])
def binary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    chosen = SYSTEM if request.param == "system" else packaged()
    monkeypatch.setattr(ffmpeg_child, "ffmpeg_binary", lambda: chosen)
    return chosen


def make(target: Path, *arguments: object, source: Path = CLIP) -> Path:
    """Convert ``source`` with ffmpeg's ``arguments``."""
    command = [SYSTEM, "-v", "error", "-nostdin", "-y", "-i", source, *arguments, target]
    subprocess.run([str(part) for part in command], check=True, timeout=60)
    return target


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make``, once for equal arguments."""
    directory, known = tmp_path_factory.mktemp("made"), dict[tuple[object, ...], Path]()

    def once(name: str, *arguments: object) -> Path:
        key = (name, *arguments)
        if key not in known:
            known[key] = make(directory / f"{len(known)}-{name}", *arguments)
        return known[key]

    return once


@pytest.fixture(scope="module")
def reference() -> Int16:
    return decode(CLIP, SETTINGS).waveform


def likeness(waveform: Int16, reference: Int16, *, lag_seconds: float = 0.08) -> float:
    """Largest correlation of two recordings of the same, at a small shift."""
    n = min(len(waveform), len(reference))
    one, two = waveform[:n].astype(np.float64), reference[:n].astype(np.float64)
    size = 2 * n
    spectrum = np.fft.rfft(one, size) * np.conj(np.fft.rfft(two, size))
    lags = np.fft.irfft(spectrum, size) / (np.linalg.norm(one) * np.linalg.norm(two) + 1)
    reach = int(lag_seconds * SAMPLE_RATE)
    return float(max(lags[:reach].max(), lags[-reach:].max()))


def seconds(start: float, end: float) -> slice:
    return slice(int(start * SAMPLE_RATE), int(end * SAMPLE_RATE))


def write_wav(path: Path, samples: npt.NDArray[np.int16], rate: int = SAMPLE_RATE) -> Path:
    """A plain WAV; ``samples`` of shape (n,) or (n, channels)."""
    n_channels = 1 if samples.ndim == 1 else samples.shape[1]
    data = samples.astype("<i2").tobytes()
    fmt = struct.pack("<IHHIIHH", 16, 1, n_channels, rate, rate * n_channels * 2, n_channels * 2, 16)
    header = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + fmt
    path.write_bytes(header + b"data" + struct.pack("<I", len(data)) + data)
    return path


def n_children() -> int:
    tasks = Path("/proc/self/task").glob("*/children")
    return sum(len(task.read_text().split()) for task in tasks)


def n_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# Everything that ffmpeg reads

PLAIN = {
    "mp3": ("a.mp3", "-c:a", "libmp3lame"),
    "mp3 without a length": ("b.mp3", "-c:a", "libmp3lame", "-q:a", 5, "-write_xing", 0),
    "aac in mp4, index last": ("a.m4a", "-c:a", "aac"),
    "aac in mp4, index first": ("b.m4a", "-c:a", "aac", "-movflags", "faststart"),
    "aac in fragments": ("a.mp4", "-c:a", "aac", "-movflags", "frag_keyframe+empty_moov"),
    "aac bare": ("a.aac", "-c:a", "aac"),
    "aac in ts": ("a.ts", "-c:a", "aac"),
    "opus": ("a.opus", "-c:a", "libopus"),
    "opus in webm": ("a.webm", "-c:a", "libopus"),
    "opus in a live webm": ("live.webm", "-c:a", "libopus", "-live", 1),
    "vorbis": ("a.ogg", "-c:a", "libvorbis"),
    "flac": ("a.flac",),
    "flac of 24 bit": ("b.flac", "-ar", 96000, "-sample_fmt", "s32"),
    "alac": ("c.m4a", "-c:a", "alac"),
    "wav": ("a.wav",),
    "wav of floats": ("b.wav", "-c:a", "pcm_f32le"),
    "wav of bytes": ("c.wav", "-c:a", "pcm_u8", "-ar", 11025),
    "mu-law wav": ("d.wav", "-c:a", "pcm_mulaw", "-ar", 8000),
    "adpcm wav": ("e.wav", "-c:a", "adpcm_ima_wav"),
    "au": ("a.au", "-c:a", "pcm_alaw", "-ar", 8000),
    "aiff": ("a.aiff",),
    "caf": ("a.caf",),
    "w64": ("a.w64",),
    "wma": ("a.wma", "-c:a", "wmav2"),
    "ac3": ("a.ac3",),
    "mp2": ("a.mp2",),
    "video": ("video.mp4", "-f", "lavfi", "-i", "color=size=64x48:rate=5", "-shortest", "-c:v", "mpeg4", "-c:a", "aac"),
    "video in avi": ("video.avi", "-f", "lavfi", "-i", "color=size=64x48:rate=5", "-shortest", "-c:a", "libmp3lame"),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_formats(binary: str, made: Callable[..., Path], reference: Int16, kind: str) -> None:
    audio = decode(made(*PLAIN[kind]), SETTINGS)
    assert audio.waveform.dtype == np.int16 and audio.waveform.ndim == 1
    assert audio.duration == len(audio.waveform) / SAMPLE_RATE == pytest.approx(CLIP_SECONDS, abs=0.08)
    assert likeness(audio.waveform, reference) > 0.95
    assert audio.warnings == ()
    assert n_children() == 0


def test_it_says_what_it_decoded(made: Callable[..., Path]) -> None:
    stereo = decode(made("a.m4a", "-c:a", "aac"), SETTINGS)
    mono = decode(made("mono.opus", "-c:a", "libopus", "-ac", 1), SETTINGS)
    assert (stereo.codec, stereo.n_channels) == ("aac", 2)
    assert (mono.codec, mono.n_channels) == ("opus", 1)


def test_both_ffmpegs_give_the_same_samples_of_lossless_files(
    monkeypatch: pytest.MonkeyPatch, reference: Int16
) -> None:
    monkeypatch.setattr(ffmpeg_child, "ffmpeg_binary", lambda: SYSTEM)
    other = decode(CLIP, SETTINGS).waveform
    assert len(other) == len(reference)
    assert np.abs(other.astype(int) - reference).max() <= 1


@pytest.mark.parametrize(
    "name", ["really.wav", "no extension", "-dash first.ogg", "100% & 'q' \"会議\".flac", "x.g722"]
)
def test_the_content_is_believed_not_the_name(
    binary: str, made: Callable[..., Path], tmp_path: Path, reference: Int16, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(made("a.mp3", "-c:a", "libmp3lame").read_bytes())
    audio = decode(path, SETTINGS)
    assert audio.codec == "mp3"
    assert likeness(audio.waveform, reference) > 0.95


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.g722", ("-c:a", "g722", "-ar", 16000, "-ac", 1)),
        ("a.gsm", ("-c:a", "libgsm", "-ar", 8000, "-ac", 1)),
        ("a.ulaw", ("-f", "mulaw", "-ar", 8000, "-ac", 1)),
        ("a.alaw", ("-f", "alaw", "-ar", 8000, "-ac", 1)),
        ("a.sln", ("-f", "s16le", "-ar", 8000, "-ac", 1)),
        ("a.sln16", ("-f", "s16le", "-ar", 16000, "-ac", 1)),
    ],
)
def test_headerless_formats_go_by_their_extension(
    binary: str, tmp_path: Path, reference: Int16, name: str, arguments: tuple[object, ...]
) -> None:
    encoders = subprocess.run([SYSTEM, "-v", "error", "-encoders"], capture_output=True, text=True, check=True).stdout
    if "libgsm" in arguments and "libgsm" not in encoders:
        pytest.skip("this ffmpeg has no GSM encoder")
    path = make(tmp_path / name, *arguments)
    audio = decode(path, SETTINGS)
    assert audio.duration == pytest.approx(CLIP_SECONDS, abs=0.05)
    assert likeness(audio.waveform, reference) > 0.9


def test_headerless_bytes_without_an_extension_are_an_error(binary: str, tmp_path: Path) -> None:
    path = make(tmp_path / "a.g722", "-c:a", "g722", "-ar", 16000, "-ac", 1).rename(tmp_path / "unnamed")
    with pytest.raises(AudioDecodeError):
        decode(path, SETTINGS)


# What is no audio


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        (b"\xef\xbb\xbf  \n<HTML><head></head></HTML>", "HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML document"),
        (b'{"error": "not found"}', "JSON document"),
        (b"PK\x03\x04" + bytes(100), "ZIP archive"),
        (b"%PDF-1.7\n" + bytes(100), "PDF document"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "image"),
        (b"#EXTM3U\n#EXTINF:1,\na.ts\n", "playlist"),
        (b"ffconcat version 1.0\nfile a.wav\n", "playlist"),
        (b"Not Found. Please check the address.\n", "text"),
        ("Grüße aus dem Speicher: kein Zugriff. ".encode() * 200, "text"),
        (bytes(5000), "could not be read"),
        (b"RIFF\x24\x00\x00\x00WAVE", "could not be read"),
    ],
)
def test_what_is_no_audio_is_named(binary: str, tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "download.mp3"
    path.write_bytes(content)
    with pytest.raises(AudioDecodeError, match=what) as caught:
        decode(path, SETTINGS)
    assert not caught.value.retryable
    assert "download" not in caught.value.message and "/" not in caught.value.message


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_are_no_audio(binary: str, tmp_path: Path, seed: int) -> None:
    path = tmp_path / "random.flac"
    path.write_bytes(np.random.default_rng(seed).bytes(200_000))
    with pytest.raises(AudioDecodeError):
        decode(path, SETTINGS)


def test_a_video_without_sound_is_said_to_be_one(binary: str, tmp_path: Path) -> None:
    path = tmp_path / "silent.mp4"
    command = [SYSTEM, "-v", "error", "-f", "lavfi", "-i", "color=size=64x48:duration=1", "-c:v", "mpeg4", str(path)]
    subprocess.run(command, check=True, timeout=60)
    with pytest.raises(AudioDecodeError, match="no audio stream"):
        decode(path, SETTINGS)


def test_an_mp4_without_its_index_keeps_ffmpegs_reason(binary: str, made: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.m4a"
    path.write_bytes(made("a.m4a", "-c:a", "aac").read_bytes()[:20_000])
    with pytest.raises(AudioDecodeError, match="moov atom not found") as caught:
        decode(path, SETTINGS)
    assert "/" not in caught.value.message


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "pipe", "."):
        with pytest.raises(InvalidInput):
            decode(tmp_path / name, SETTINGS)


def test_a_header_without_samples_is_an_empty_recording(binary: str, tmp_path: Path) -> None:
    audio = decode(write_wav(tmp_path / "a.wav", np.zeros(0, np.int16)), SETTINGS)
    assert len(audio.waveform) == 0 and audio.duration == 0
    assert audio.warnings == ("audio: the file holds no samples.",)


def test_a_few_samples_are_enough(binary: str, tmp_path: Path) -> None:
    samples = np.arange(160, dtype=np.int16)
    assert np.array_equal(decode(write_wav(tmp_path / "a.wav", samples), SETTINGS).waveform, samples)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.mp3", ()),
        ("tagless.mp3", ("-id3v2_version", 0, "-write_xing", 0)),
        ("a.aac", ()),
        ("a.ac3", ()),
        ("a.eac3", ()),
        ("a.dts", ("-strict", -2)),
        ("a.ts", ("-c:a", "aac")),
    ],
)
def test_a_few_frames_are_enough(
    binary: str, made: Callable[..., Path], tmp_path: Path, name: str, arguments: tuple[object, ...]
) -> None:
    """A key pressed and let go of: they were refused, since ffmpeg wants more frames before it names the format."""
    path = tmp_path / "of-no-known-kind"
    path.write_bytes(made(name, "-ss", 2, "-t", 0.03, *arguments).read_bytes())
    audio = decode(path, SETTINGS)
    assert 0.02 < audio.duration < 0.15 and audio.warnings == ()


@pytest.mark.parametrize("start", [b"ID3", b"\xff\xfb", b"\xff\xf1", b"\x0b\x77", b"\x7f\xfe\x80\x01", b"G"])
def test_bytes_that_begin_like_a_frame_are_no_audio(binary: str, tmp_path: Path, start: bytes) -> None:
    noise = np.random.default_rng(7).integers(0, 256, 3000, np.uint8).tobytes()
    path = tmp_path / "noise"
    path.write_bytes(start + noise[:187] + b"G" + noise)
    with pytest.raises(AudioDecodeError, match="no format was recognised"):
        decode(path, SETTINGS)


# Channels and streams


@pytest.fixture(scope="module")
def voice(reference: Int16) -> Int16:
    return reference[: 4 * SAMPLE_RATE]


def stereo(path: Path, left: Int16, right: Int16) -> Path:
    return write_wav(path, np.stack([left, right], axis=1))


def test_a_single_live_channel_comes_at_full_level(binary: str, tmp_path: Path, voice: Int16) -> None:
    audio = decode(stereo(tmp_path / "a.wav", np.zeros_like(voice), voice), SETTINGS)
    assert np.abs(audio.waveform.astype(int) - voice).max() <= 1
    assert audio.n_channels == 2


@pytest.mark.parametrize("coding", [("a.flac",), ("a.mp3", "-c:a", "libmp3lame"), ("a.opus", "-c:a", "libopus")])
def test_channels_that_cancel_are_heard(binary: str, tmp_path: Path, voice: Int16, coding: tuple[object, ...]) -> None:
    wav = stereo(tmp_path / "source.wav", voice, -voice)
    audio = decode(make(tmp_path / str(coding[0]), *coding[1:], source=wav), SETTINGS)
    assert likeness(audio.waveform, voice) > 0.95
    assert audio.waveform.std() == pytest.approx(voice.std(), rel=0.1)


def test_speech_in_the_centre_of_surround_keeps_its_level(binary: str, tmp_path: Path, voice: Int16) -> None:
    mono = write_wav(tmp_path / "mono.wav", voice)
    surround = "pan=5.1|FL=0*c0|FR=0*c0|FC=c0|LFE=0*c0|BL=0*c0|BR=0*c0"
    audio = decode(make(tmp_path / "a.flac", "-af", surround, source=mono), SETTINGS)
    assert audio.n_channels == 6
    assert np.abs(audio.waveform.astype(int) - voice).max() <= 4


def test_quiet_speech_is_left_as_it_is(binary: str, tmp_path: Path, voice: Int16) -> None:
    quiet = (voice // 128).astype(np.int16)
    assert np.array_equal(decode(write_wav(tmp_path / "a.wav", quiet), SETTINGS).waveform, quiet)


def test_one_channel_can_be_asked_for(binary: str, tmp_path: Path, voice: Int16) -> None:
    path = stereo(tmp_path / "a.wav", voice, voice[::-1])
    assert np.array_equal(decode(path, SETTINGS, channel=0).waveform, voice)
    assert np.array_equal(decode(path, SETTINGS, channel=1).waveform, voice[::-1])
    for channel in (2, -1):
        with pytest.raises(InvalidInput, match="has 2"):
            decode(path, SETTINGS, channel=channel)
    assert n_children() == 0


def tracks(path: Path, *sources: Path, codec: str = "aac") -> Path:
    inputs = [part for source in sources for part in ("-i", str(source))]
    maps = [part for number in range(len(sources)) for part in ("-map", str(number))]
    command = [SYSTEM, "-v", "error", "-y", *inputs, *maps, "-c:a", codec, str(path)]
    subprocess.run(command, check=True, timeout=60)
    return path


def test_the_track_with_sound_is_taken(binary: str, tmp_path: Path, voice: Int16) -> None:
    spoken = write_wav(tmp_path / "spoken.wav", voice)
    silent = write_wav(tmp_path / "silent.wav", np.zeros_like(voice))
    audio = decode(tracks(tmp_path / "a.mkv", silent, spoken), SETTINGS)
    assert likeness(audio.waveform, voice) > 0.95
    assert audio.warnings == ("audio: track 2 of 2 was taken.",)
    third = decode(tracks(tmp_path / "b.mkv", silent, silent, spoken), SETTINGS)
    assert likeness(third.waveform, voice) > 0.95
    first = decode(tracks(tmp_path / "c.mkv", spoken, silent), SETTINGS)
    assert likeness(first.waveform, voice) > 0.95 and first.warnings == ()
    none = decode(tracks(tmp_path / "d.mkv", silent, silent), SETTINGS)
    assert np.abs(none.waveform).max() <= 2 and none.duration == pytest.approx(4, abs=0.1)


# Damage


@pytest.mark.parametrize(
    ("coding", "least"),
    [
        (("a.mp3", "-c:a", "libmp3lame"), 5.5),
        (("b.m4a", "-c:a", "aac", "-movflags", "faststart"), 5.0),
        (("a.flac",), 5.0),
        (("a.wav",), 6.5),
    ],
    ids=["mp3", "m4a", "flac", "wav"],
)
def test_a_truncated_file_gives_what_there_is(
    binary: str,
    made: Callable[..., Path],
    tmp_path: Path,
    reference: Int16,
    coding: tuple[object, ...],
    least: float,
) -> None:
    whole = made(*coding)
    path = tmp_path / whole.name
    content = whole.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    audio = decode(path, SETTINGS)
    assert least < audio.duration < 7.5
    assert likeness(audio.waveform, reference) > 0.95
    assert any("cut off" in warning or "promises" in warning for warning in audio.warnings)


def test_a_damaged_middle_is_passed_over(
    binary: str, made: Callable[..., Path], tmp_path: Path, reference: Int16
) -> None:
    content = bytearray(made("a.mp3", "-c:a", "libmp3lame").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = np.random.default_rng(3).bytes(2000)
    path = tmp_path / "damaged.mp3"
    path.write_bytes(content)
    audio = decode(path, SETTINGS)
    assert audio.duration == pytest.approx(CLIP_SECONDS, abs=0.5)
    assert likeness(audio.waveform[seconds(0, 5)], reference[seconds(0, 5)]) > 0.9
    assert any("damaged" in warning for warning in audio.warnings)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, "three times", "a tenth"])
def test_a_wav_is_read_whatever_size_its_header_gives(
    binary: str, tmp_path: Path, voice: Int16, size: int | str
) -> None:
    path = write_wav(tmp_path / "a.wav", voice)
    content = bytearray(path.read_bytes())
    n_bytes = {"three times": 6 * len(voice), "a tenth": len(voice) // 10 * 2}.get(str(size), size)
    content[4:8] = struct.pack("<I", min(int(n_bytes) + 36, 0xFFFFFFFF))
    content[40:44] = struct.pack("<I", n_bytes)
    path.write_bytes(content)
    audio = decode(path, SETTINGS)
    assert np.array_equal(audio.waveform, voice)
    if size != "three times":
        assert audio.warnings == ()


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def riff(*chunks: bytes) -> bytes:
    return chunk(b"RIFF", b"WAVE" + b"".join(chunks))


def pcm(channels: int = 1, rate: int = SAMPLE_RATE, bits: int = 16) -> bytes:
    size = channels * bits // 8
    return chunk(b"fmt ", struct.pack("<HHIIHH", 1, channels, rate, rate * size, size, bits))


PLAIN_WAVS = {
    "bare": lambda data: riff(pcm(), chunk(b"data", data)),
    "tags before": lambda data: riff(pcm(), chunk(b"LIST", b"INFOabc"), chunk(b"data", data)),
    "tags behind": lambda data: riff(pcm(), chunk(b"data", data), chunk(b"LIST", b"INFO")),
}
OTHER_WAVS = {
    "two channels": lambda data: riff(pcm(2), chunk(b"data", data)),
    "another rate": lambda data: riff(pcm(rate=8000), chunk(b"data", data)),
    "bytes": lambda data: riff(pcm(bits=8), chunk(b"data", data)),
    "no samples": lambda data: riff(pcm(), chunk(b"data", b"")),
    "half a sample": lambda data: riff(pcm(), chunk(b"data", data[:-1])),
    "data twice": lambda data: riff(pcm(), chunk(b"data", data), chunk(b"data", data)),
    "format behind": lambda data: riff(chunk(b"data", data), pcm()),
    "format twice": lambda data: riff(pcm(), pcm(2), chunk(b"data", data)),
    "unknown chunk": lambda data: riff(pcm(), chunk(b"abcd", b"12"), chunk(b"data", data)),
    "many chunks": lambda data: riff(pcm(), *[chunk(b"LIST", b"")] * 100, chunk(b"data", data)),
    "more behind": lambda data: riff(pcm(), chunk(b"data", data)) + b"12345678",
    "cut off": lambda data: riff(pcm(), chunk(b"data", data))[:-1000],
    "data beyond the end": lambda data: riff(pcm(), b"data" + struct.pack("<I", 2 * len(data)), data),
    "only a header": lambda data: riff(pcm()),
    "cut in the format": lambda data: riff(pcm()[:-4]),
}


@pytest.mark.parametrize("kind", PLAIN_WAVS)
def test_a_plain_wav_needs_no_ffmpeg_and_is_what_ffmpeg_makes_of_it(
    tmp_path: Path, voice: Int16, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(PLAIN_WAVS[kind](voice.tobytes()))
    with monkeypatch.context() as patch:
        patch.setattr(ffmpeg_child, "run", None)
        audio = decode(path, SETTINGS)
        with pytest.raises(TooLarge):
            decode(path, Settings(max_audio_seconds=3))
    monkeypatch.setattr(plain_wav, "find_samples", lambda *_: None)
    expected = decode(path, SETTINGS)
    assert np.array_equal(audio.waveform, voice) and np.array_equal(expected.waveform, voice)
    assert audio.waveform.dtype == np.int16 and audio.waveform.flags.writeable
    assert replace(audio, waveform=voice) == replace(expected, waveform=voice)


@pytest.mark.parametrize("kind", OTHER_WAVS)
def test_any_other_wav_is_left_to_ffmpeg(tmp_path: Path, voice: Int16, kind: str) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(OTHER_WAVS[kind](voice.tobytes()))
    with path.open("rb") as file:
        assert plain_wav.find_samples(file, path.stat().st_size) is None


def test_a_plain_wav_that_shrinks_while_it_is_read_is_left_to_ffmpeg(tmp_path: Path, voice: Int16) -> None:
    path = write_wav(tmp_path / "a.wav", voice)
    with path.open("rb") as file:
        place = plain_wav.find_samples(file, path.stat().st_size)
        assert place == (44, len(voice))
        os.truncate(path, 1000)
        assert plain_wav.read_samples(file, place) is None


# Time


def test_a_late_start_keeps_its_offset(binary: str, tmp_path: Path, voice: Int16) -> None:
    """Times are those of the recording that people watch, not of its sound track."""
    path = tmp_path / "late.mp4"
    sound = write_wav(tmp_path / "a.wav", voice)
    picture = ["-f", "lavfi", "-i", "color=size=64x48:rate=10:duration=6"]
    command = [SYSTEM, "-v", "error", *picture, "-itsoffset", "2", "-i", str(sound), "-c:v", "mpeg4", "-c:a", "aac"]
    subprocess.run([*command, str(path)], check=True, timeout=60)
    audio = decode(path, SETTINGS)
    assert audio.duration == pytest.approx(6, abs=0.1)
    assert not audio.waveform[seconds(0, 1.9)].any()
    assert likeness(audio.waveform[seconds(2, 6)], voice) > 0.9
    assert audio.warnings == ()


@pytest.mark.parametrize("coding", [("a.webm", "libopus"), ("a.mkv", "libvorbis"), ("a.mp4", "aac")])
def test_a_gap_is_kept_as_silence(binary: str, tmp_path: Path, reference: Int16, coding: tuple[str, str]) -> None:
    name, codec = coding
    cut = "aselect=not(between(t\\,3\\,6))"
    audio = decode(make(tmp_path / name, "-af", cut, "-c:a", codec), SETTINGS)
    assert audio.duration == pytest.approx(CLIP_SECONDS, abs=0.1)
    assert np.abs(audio.waveform[seconds(3.2, 5.8)]).max() == 0
    assert likeness(audio.waveform[seconds(6.2, 11)], reference[seconds(6.2, 11)]) > 0.9
    (warning,) = audio.warnings
    assert "3.0 s are missing" in warning


@pytest.mark.parametrize("kind", ["mp3", "aac bare", "opus", "opus in webm", "aac in ts"])
def test_files_joined_end_to_end_are_read_to_the_end(
    binary: str, made: Callable[..., Path], tmp_path: Path, reference: Int16, kind: str
) -> None:
    """The clock of the second part starts anew; taken at its word, it would lie in the past and be dropped."""
    part = made(*PLAIN[kind])
    path = tmp_path / part.name
    path.write_bytes(part.read_bytes() * 2)
    audio = decode(path, SETTINGS)
    assert audio.duration == pytest.approx(2 * CLIP_SECONDS, abs=1.1)
    assert likeness(audio.waveform[-len(reference) :], reference) > 0.9


@pytest.mark.parametrize("codec", ["libvorbis", "libopus"])
def test_ogg_files_joined_end_to_end_are_not_called_damaged(
    binary: str, made: Callable[..., Path], tmp_path: Path, codec: str
) -> None:
    """Each file has its own serial number, unlike one that is doubled; radio recordings and voice notes come so."""
    parts = [made(f"{number}.ogg", "-c:a", codec, "-serial_offset", number) for number in (1, 2)]
    path = tmp_path / "joined.ogg"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    audio = decode(path, SETTINGS)
    assert audio.duration == pytest.approx(2 * CLIP_SECONDS, abs=0.1)
    assert audio.warnings == ()


def test_a_stream_that_changes_on_the_way_is_not_padded(binary: str, made: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "changing.aac"
    low = made("low.aac", "-c:a", "aac", "-ac", 1, "-ar", 22050)
    path.write_bytes(low.read_bytes() + made("a.aac", "-c:a", "aac").read_bytes())
    assert decode(path, SETTINGS).duration == pytest.approx(2 * CLIP_SECONDS, abs=0.2)


# Limits


def test_a_recording_may_not_be_longer_than_allowed(binary: str, made: Callable[..., Path]) -> None:
    for kind in ("flac", "mp3", "mp3 without a length", "opus in a live webm"):
        with pytest.raises(TooLarge, match="longer than the 5 s"):
            decode(made(*PLAIN[kind]), Settings(max_audio_seconds=5))
    assert decode(made(*PLAIN["flac"]), Settings(max_audio_seconds=CLIP_SECONDS)).duration == CLIP_SECONDS


def test_a_declared_length_over_the_limit_is_refused_before_it_is_decoded(
    binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_wav(tmp_path / "a.wav", np.ones((600 * SAMPLE_RATE, 2), np.int16))
    n_bytes = 0
    run = ffmpeg_child.run

    def counted(*arguments: object, on_output: Callable[[bytes], None], **more: object) -> int:
        def count(data: bytes) -> None:
            nonlocal n_bytes
            n_bytes += len(data)
            on_output(data)

        return run(*arguments, on_output=count, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ffmpeg_child, "run", counted)
    with pytest.raises(TooLarge):
        decode(path, Settings(max_audio_seconds=60))
    assert n_bytes < 1_000_000


def test_a_header_that_lies_about_the_length_does_not_decide(binary: str, tmp_path: Path, voice: Int16) -> None:
    path = write_wav(tmp_path / "a.wav", voice)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = struct.pack("<I", 1_000_000_000)
    path.write_bytes(content)
    assert decode(path, Settings(max_audio_seconds=60)).duration == 4


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bomb") / "bomb.flac"
    silence = "anullsrc=sample_rate=16000:channel_layout=stereo:duration=1800"
    subprocess.run([SYSTEM, "-v", "error", "-f", "lavfi", "-i", silence, str(path)], check=True, timeout=60)
    return path


def test_a_bomb_takes_no_more_memory_than_the_limit(binary: str, bomb: Path) -> None:
    """An hour's half in little more than nothing: decoding ends with the limit, not with the memory."""
    assert bomb.stat().st_size < 500_000
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decode(bomb, Settings(max_audio_seconds=60))
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert n_children() == 0


def fake_ffmpeg(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)


def test_decoding_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = fake_ffmpeg(tmp_path / "slow", "exec sleep 60")
    monkeypatch.setattr(ffmpeg_child, "ffmpeg_binary", lambda: slow)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        decode(CLIP, Settings(decode_timeout=0.3))
    assert caught.value.retryable
    assert time.monotonic() - started < 1.5
    assert n_children() == 0


@pytest.mark.parametrize("script", ["exec sleep 60", "trap '' TERM; while :; do echo x; done"])
def test_cancel_ends_ffmpeg_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    stubborn = fake_ffmpeg(tmp_path / "stubborn", script)
    monkeypatch.setattr(ffmpeg_child, "ffmpeg_binary", lambda: stubborn)
    cancel = CancelToken()
    cancelled_at: list[float] = []

    def withdraw() -> None:
        cancelled_at.append(time.monotonic())
        cancel.cancel()

    timer = threading.Timer(0.2, withdraw)
    timer.start()
    with pytest.raises(Cancelled):
        decode(CLIP, SETTINGS, cancel=cancel)
    assert time.monotonic() - cancelled_at[0] < 0.6
    timer.join()
    assert n_children() == 0


def test_the_child_is_poor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No secret of the environment, no file to write, no memory without end."""
    monkeypatch.setenv("RUNPOD_AI_API_KEY", "hunter2")
    monkeypatch.setenv("FFREPORT", f"file={tmp_path}/report.log")
    said = bytearray()
    child = fake_ffmpeg(tmp_path / "child", "sleep 0.3; ulimit -v; ulimit -f; env; pwd; touch file && echo x > file")
    with CLIP.open("rb") as file:
        status = ffmpeg_child.run(
            [child],
            file.fileno(),
            directory=tmp_path,
            deadline=time.monotonic() + 10,
            cancel=None,
            on_log=lambda data: None,
            on_output=said.extend,
        )
    lines = said.decode().splitlines()
    assert lines[:2] == [str(ffmpeg_child.MEMORY_LIMIT // 1024), "0"]
    assert b"hunter2" not in said and b"FFREPORT" not in said
    assert str(tmp_path) in lines
    assert status != 0 and (tmp_path / "file").stat().st_size == 0


def test_a_real_decode_fits_into_half_the_memory_limit(
    binary: str, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ffmpeg_child, "MEMORY_LIMIT", ffmpeg_child.MEMORY_LIMIT // 2)
    for kind in ("video", "opus in webm", "mp3"):
        assert decode(made(*PLAIN[kind]), SETTINGS).warnings == ()


def test_jobs_may_decode_side_by_side_and_leave_nothing_open(reference: Int16) -> None:
    n_open = n_open_files()

    def one(_: int) -> DecodedAudio:
        return decode(CLIP, SETTINGS)

    with ThreadPoolExecutor(4) as pool:
        for audio in pool.map(one, range(8)):
            assert np.array_equal(audio.waveform, reference)
    assert n_open_files() == n_open
    assert n_children() == 0


def test_the_log_tells_the_conversion_and_no_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "private-name.wav"
    decode(write_wav(path, np.ones(SAMPLE_RATE, np.int16)), SETTINGS)
    (record,) = caplog.records
    assert record.getMessage() == "Audio conversion completed"
    assert record.__dict__["fields"]["audio_seconds"] == 1
    assert "private-name" not in str(record.__dict__)


def test_the_package_s_ffmpeg_goes_before_the_system_s_and_without_any_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil
    import sys

    from whisper_worker.errors import InternalError

    monkeypatch.setattr(shutil, "which", lambda name: "/systems/ffmpeg")
    find = ffmpeg_child.ffmpeg_binary.__wrapped__
    assert Path(find()).is_file()
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert find() == "/systems/ffmpeg"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InternalError, match="ffmpeg is missing"):
        find()
