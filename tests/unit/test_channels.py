"""Channels are speakers only where they hold different sound."""

from __future__ import annotations

import subprocess
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from whisper_worker.audio.channels import alike, decode_channels
from whisper_worker.audio.ffmpeg_child import ffmpeg_binary
from whisper_worker.settings import Settings
from whisper_worker.types import CancelToken

Int16 = npt.NDArray[np.int16]


def noise(seed: int, seconds: float = 1.0) -> Int16:
    samples = np.random.default_rng(seed).normal(0, 3000, int(16_000 * seconds))
    return samples.astype(np.int16)


def stereo(path: Path, *channels: Int16) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.stack(channels, axis=1).tobytes())
    return path


def test_different_sounds_are_different_channels(tmp_path: Path) -> None:
    left, right = noise(1), noise(2)
    one, other = decode_channels(stereo(tmp_path / "a.wav", left, right), Settings(), tmp_path, CancelToken())
    assert np.abs(one.waveform.astype(int) - left).max() <= 1
    assert np.abs(other.waveform.astype(int) - right).max() <= 1
    assert one.warnings == other.warnings == ()


@pytest.mark.parametrize("second", [1.0, -1.0, 0.3], ids=["same", "opposed", "quieter"])
def test_one_scene_heard_twice_is_one_channel(tmp_path: Path, second: float) -> None:
    left = noise(1)
    right = (left * second + noise(2) * 0.1).astype(np.int16)
    (mix,) = decode_channels(stereo(tmp_path / "a.wav", left, right), Settings(), tmp_path, CancelToken())
    assert "the channels hold the same sound" in mix.warnings[-1]


def test_a_silent_channel_is_not_replaced_by_another_track(tmp_path: Path) -> None:
    """It was: one speaker's words came from a track that the other channels are no part of."""
    left, right = np.zeros(16_000, np.int16), noise(1)
    tracks = (stereo(tmp_path / "a.wav", left, right), stereo(tmp_path / "b.wav", noise(2, 2.5)))
    path = tmp_path / "tracks.mka"
    inputs = [word for track in tracks for word in ("-i", str(track))]
    command = [ffmpeg_binary(), "-v", "error", "-nostdin", *inputs, "-map", "0", "-map", "1", "-c", "copy", str(path)]
    subprocess.run(command, check=True, timeout=60)
    one, other = decode_channels(path, Settings(), tmp_path, CancelToken())
    assert not one.waveform.any()
    assert one.warnings == (), "the header's length is that of the longest track"
    assert np.abs(other.waveform.astype(int) - right).max() <= 1


def test_a_single_channel_says_so(tmp_path: Path) -> None:
    (mix,) = decode_channels(stereo(tmp_path / "a.wav", noise(1)), Settings(), tmp_path, CancelToken())
    assert "one channel" in mix.warnings[-1]


def test_crosstalk_and_silence_are_not_alike() -> None:
    left, right = noise(1, 2.5), noise(2, 2.0)
    assert not alike(left, (right + left[: len(right)] * 0.1).astype(np.int16))
    assert not alike(left, np.zeros_like(left))
