"""Features against transformers' extractor (librosa's filters, numpy's transform), over whole files and slices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from whisper_worker.engine.features import log_mel, log_mel_peak


def _file(seconds: float, seed: int = 0) -> NDArray[np.int16]:
    """Chirps over noise that swells and fades by 100 dB, so that loud, quiet and clamped frames occur."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16000)) / 16000
    tones = np.sin(2 * np.pi * (200 + 90 * time) * time) + 0.3 * np.sin(2 * np.pi * 3100 * time)
    loudness = 10 ** (2.5 * (np.sin(time * 0.7) - 1))
    return np.asarray(20000 * loudness * (0.6 * tones + 0.05 * rng.standard_normal(len(time))), dtype=np.int16)


def _reference(samples: NDArray[np.int16], n_mels: int) -> torch.Tensor:
    """The whole file's features; openai/whisper's 30 s of silence at the end are cut off again."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    padded = np.concatenate([samples.astype(np.float32) / 32768, np.zeros(480_000, np.float32)])
    features = extractor(padded, sampling_rate=16000, padding="longest", truncation=False, return_tensors="pt")
    return features.input_features[0][:, : math.ceil(len(samples) / 160)]


@pytest.mark.parametrize("n_mels", [80, 128])
def test_equals_the_reference(n_mels: int) -> None:
    samples = _file(33.333)
    features = log_mel(samples, n_mels, peak=log_mel_peak(samples, n_mels))
    assert features.dtype == torch.float32
    assert features.shape == (n_mels, 3334)
    assert (features - _reference(samples, n_mels)).abs().max() <= 1e-5


def test_a_stretch_equals_the_slice_of_the_whole_file() -> None:
    samples = _file(25)
    peak = log_mel_peak(samples, 80)
    whole = log_mel(samples, 80, peak=peak)
    for start, stop in [(0, 100), (160, 16000), (160 * 777, 160 * 777 + 79_999), (160 * 2400, len(samples))]:
        stretch = log_mel(samples, 80, start, stop, peak=peak)
        assert stretch.shape[1] == math.ceil((stop - start) / 160)
        assert (stretch - whole[:, start // 160 :][:, : stretch.shape[1]]).abs().max() < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_the_peak_is_the_whole_files_maximum_wherever_it_lies(seed: int) -> None:
    """Quiet frames are skipped on the way to it; the loudest one must not be."""
    samples = _file(40, seed) // 50
    at = 16000 * (5 + 13 * seed)
    samples[at : at + 400] = (15000 * np.sin(np.arange(400) * (0.3 + 0.8 * seed))).astype(np.int16)
    peak = log_mel_peak(samples, 80)
    assert float(log_mel(samples, 80, peak=peak).max()) == pytest.approx((peak + 4) / 4, abs=1e-5)
    assert float(log_mel(samples, 80).max()) == pytest.approx((peak + 4) / 4, abs=1e-5)


def test_int16_float32_and_tensors_give_the_same() -> None:
    samples = _file(2)
    samples.flags.writeable = False
    scaled = samples.astype(np.float32) / 32768
    expected = log_mel(samples, 80)
    for form in (scaled, torch.from_numpy(scaled), torch.from_numpy(samples.copy())):
        assert torch.equal(log_mel(form, 80), expected)
        assert log_mel_peak(form, 80) == log_mel_peak(samples, 80)


@pytest.mark.parametrize("n_samples", [1, 150, 399])
def test_the_shortest_files_are_mirrored_as_the_reference_mirrors_them(n_samples: int) -> None:
    samples = _file(1)[5000 : 5000 + n_samples].copy()
    assert (log_mel(samples, 80) - _reference(samples, 80)).abs().max() <= 1e-5


def test_silence_and_nothing() -> None:
    silence = np.zeros(16000, np.int16)
    assert log_mel_peak(silence, 80) == -10.0
    assert torch.equal(log_mel(silence, 80, peak=-10.0), torch.full((80, 100), -1.5))
    assert log_mel(silence[:0], 80).shape == (80, 0)
    assert log_mel_peak(silence[:0], 80) == -10.0
