"""The voice detector: equal to the package's own model, deaf to noise, not to quiet speech."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import threading
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from whisper_worker.audio import vad
from whisper_worker.audio.decode import decode
from whisper_worker.audio.vad import FRAME_SAMPLES, SpeechSpan, VoiceDetector, VoiceStream, speech_spans
from whisper_worker.errors import ModelError
from whisper_worker.settings import Settings
from whisper_worker.types import SAMPLE_RATE

SPEECH = Path(__file__).parents[1] / "data" / "speech"
SECONDS = 12
RNG_SEED = 7


@pytest.fixture(scope="module")
def detector() -> VoiceDetector:
    return VoiceDetector()


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    waveform: np.ndarray = decode(SPEECH / "1089-134686-0000.flac", Settings()).waveform
    return waveform


def at_peak(samples: np.ndarray, dbfs: float) -> np.ndarray:
    wave = samples.astype(np.float64)
    return np.round(wave * 10 ** (dbfs / 20) * 32767 / np.abs(wave).max()).astype(np.int16)


def covered(spans: tuple[SpeechSpan, ...], truth: tuple[SpeechSpan, ...]) -> float:
    """Share of ``truth`` that lies inside ``spans``."""
    inside = sum(max(0, min(a.end, b.end) - max(a.start, b.start)) for a in spans for b in truth)
    return inside / sum(span.end - span.start for span in truth)


# -- the network ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock_model() -> Iterator[Any]:
    """The package's TorchScript model, without the import that would set torch to one thread."""
    spec = importlib.util.find_spec("silero_vad")
    assert spec is not None and spec.submodule_search_locations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield torch.jit.load(str(Path(spec.submodule_search_locations[0]) / "data" / "silero_vad.jit"))


def test_probabilities_equal_the_stock_model(stock_model: Any, speech: np.ndarray) -> None:
    ours = vad._Network(vad._load_weights()).run(speech, np.ones(-(-len(speech) // 512), dtype=np.float32), 0, None)[0]
    wave = torch.from_numpy(np.pad(speech, (0, -len(speech) % 512)).astype(np.float32) / 32768)
    stock_model.reset_states()
    with torch.inference_mode():
        stock = [stock_model(frame, SAMPLE_RATE).item() for frame in wave.split(FRAME_SAMPLES)]
    assert ours.max() > 0.9 and ours.min() < 0.1
    np.testing.assert_allclose(ours, stock, atol=5e-5)


def test_block_borders_leave_no_trace(
    detector: VoiceDetector, speech: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = detector.probabilities(speech)
    monkeypatch.setattr(vad, "_BLOCK", 37)
    np.testing.assert_allclose(detector.probabilities(speech), whole, atol=5e-5)


def test_short_recordings_do_not_stand_behind_longer_ones(speech: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = VoiceDetector()
    alone = detector.probabilities(speech)
    monkeypatch.setattr(vad, "_TURN", 64)
    begun, go_on = threading.Event(), threading.Event()
    turns: list[int] = []
    run = vad._Network.run

    def gated(network: Any, waveform: np.ndarray, *rest: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        turns.append(len(waveform))
        return run(network, waveform, *rest)

    monkeypatch.setattr(vad._Network, "run", gated)
    with ThreadPoolExecutor(3) as pool:
        long = pool.submit(detector.probabilities, speech)
        assert begun.wait(10)
        middle = pool.submit(detector.probabilities, speech[: 40 * FRAME_SAMPLES])
        while len(detector._turns._waiting) < 1:
            assert not middle.done()
        short = pool.submit(detector.probabilities, speech[: 3 * FRAME_SAMPLES])
        while len(detector._turns._waiting) < 2:
            assert not short.done()
        go_on.set()
        assert (len(short.result()), len(middle.result())) == (3, 40)
        np.testing.assert_allclose(long.result(), alone, atol=5e-5)
    assert turns[1:3] == [3 * FRAME_SAMPLES, 40 * FRAME_SAMPLES]
    assert len(turns) > 4


@pytest.mark.parametrize("n", [0, 1, 2, 511, 512, 513, 1024, 16 * 512 + 1])
def test_one_probability_for_each_begun_frame(detector: VoiceDetector, speech: np.ndarray, n: int) -> None:
    probabilities = detector.probabilities(speech[:n])
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (-(-n // FRAME_SAMPLES),)
    assert np.all((probabilities >= 0) & (probabilities <= 1))


def test_shared_by_threads_and_leaves_torch_threads_alone(speech: np.ndarray) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        detector = VoiceDetector()
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(detector.probabilities, [speech] * 4))
            assert torch.get_num_threads() == 2
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    assert detector._worker is not None
    assert detector._worker.submit(torch.get_num_threads).result() == 1


# -- what is speech ------------------------------------------------------------------------


def noises() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(RNG_SEED)
    n = SECONDS * SAMPLE_RATE
    t = np.arange(n) / SAMPLE_RATE
    spectrum = np.fft.rfft(rng.normal(size=n))
    frequency = np.maximum(np.fft.rfftfreq(n, 1 / SAMPLE_RATE), 20)
    pink = np.fft.irfft(spectrum / np.sqrt(frequency), n)
    hum = sum(np.sin(2 * np.pi * 50 * k * t + k) / k for k in range(1, 12))
    clicks = np.zeros(n)
    for place in rng.integers(0, n - 300, 6 * SECONDS):
        clicks[place : place + 300] += rng.normal(size=300) * np.exp(-np.arange(300) / 60)
    chord = sum(np.sin(2 * np.pi * f * t) * np.exp(-4 * (t % 0.5)) for f in (220.0, 277.2, 329.6))
    return {
        "white": rng.normal(size=n),
        "pink": pink,
        "hum": np.asarray(hum),
        "breathing": pink * np.sin(np.pi * t / 2) ** 8,
        "clicks": clicks + 0.003 * rng.normal(size=n),
        "chord": np.asarray(chord),
        "siren": np.sin(2 * np.pi * np.cumsum(800 + 500 * np.sin(2 * np.pi * 0.4 * t)) / SAMPLE_RATE),
    }


@pytest.mark.parametrize("name", list(noises()))
@pytest.mark.parametrize("dbfs", [-75, -50, -25, -6])
def test_noise_at_no_level_is_speech_nor_doubtful(detector: VoiceDetector, name: str, dbfs: float) -> None:
    noise = at_peak(noises()[name], dbfs)
    assert speech_spans(detector.probabilities(noise), len(noise), 0.15) == ()


def test_digital_noise_and_silence_are_not_speech(detector: VoiceDetector) -> None:
    rng = np.random.default_rng(RNG_SEED)
    for samples in (np.zeros(SECONDS * SAMPLE_RATE), rng.integers(-1, 2, SECONDS * SAMPLE_RATE)):
        wave = samples.astype(np.int16)
        assert speech_spans(detector.probabilities(wave), len(wave), 0.15) == ()


@pytest.mark.parametrize("dbfs", [-20, -40, -50, -60])
def test_quiet_recordings_are_heard(detector: VoiceDetector, speech: np.ndarray, dbfs: float) -> None:
    truth = speech_spans(detector.probabilities(speech), len(speech))
    quiet = at_peak(speech, dbfs)
    found = speech_spans(detector.probabilities(quiet), len(quiet))
    assert covered(found, truth) > 0.95
    assert covered(truth, found) > 0.9


def test_a_quiet_speaker_after_a_loud_one_is_heard(detector: VoiceDetector, speech: np.ndarray) -> None:
    pause = np.zeros(SAMPLE_RATE, dtype=np.int16)
    loud, faint = at_peak(speech, -6), at_peak(speech, -43)
    joined = np.concatenate([loud, pause, faint, pause])
    offset = len(loud) + len(pause)
    truth = speech_spans(detector.probabilities(faint), len(faint))
    expected = tuple(SpeechSpan(offset + span.start, offset + span.end) for span in truth)
    spans = speech_spans(detector.probabilities(joined), len(joined))
    assert covered(spans, expected) > 0.9
    # The same samples without the level's help: the network is deaf to them.
    network = detector._network
    assert network is not None
    deaf = network.run(joined, np.ones(-(-len(joined) // FRAME_SAMPLES), dtype=np.float32), 0, None)[0]
    assert covered(speech_spans(deaf, len(joined)), expected) < 0.5


def test_speech_after_long_noise_begins_in_time(detector: VoiceDetector, speech: np.ndarray) -> None:
    rng = np.random.default_rng(RNG_SEED)
    before = 10 * SAMPLE_RATE
    joined = np.concatenate([np.zeros(before), at_peak(speech, -6)]) + 33 * rng.normal(size=before + len(speech))
    joined = np.round(joined).astype(np.int16)
    truth = speech_spans(detector.probabilities(speech), len(speech))[0].start
    start = speech_spans(detector.probabilities(joined), len(joined))[0].start - before
    assert abs(start - truth) < 0.25 * SAMPLE_RATE


@pytest.mark.parametrize("piece", [160, 512, 4096, 100_000])
def test_a_stream_hears_what_the_whole_file_holds(detector: VoiceDetector, speech: np.ndarray, piece: int) -> None:
    stream = VoiceStream(detector)
    parts = [stream.feed(speech[at : at + piece]) for at in range(0, len(speech), piece)]
    heard = np.concatenate(parts)
    assert len(heard) == len(speech) // FRAME_SAMPLES
    # Only the gain differs: a file knows the level of the second to come.
    truth = speech_spans(detector.probabilities(speech), len(speech))
    spans = speech_spans(heard, len(speech))
    assert covered(spans, truth) > 0.97 and covered(truth, spans) > 0.97


def test_a_stream_hears_a_quiet_speaker(detector: VoiceDetector, speech: np.ndarray) -> None:
    faint = at_peak(speech, -43)
    stream = VoiceStream(detector)
    heard = np.concatenate([stream.feed(faint[at : at + 1600]) for at in range(0, len(faint), 1600)])
    truth = speech_spans(detector.probabilities(speech), len(speech))
    assert covered(speech_spans(heard, len(faint)), truth) > 0.85


def test_gain_is_one_for_loud_sound_and_bounded_for_faint() -> None:
    rng = np.random.default_rng(RNG_SEED)
    loud = np.round(6000 * rng.normal(size=5 * SAMPLE_RATE)).clip(-32768, 32767).astype(np.int16)
    assert np.all(vad._gains(loud) == 1.0)
    # Bursts that peak at -60 dBFS over digital silence: the most that is ever given.
    bursts = np.round(20 * rng.normal(size=5 * SAMPLE_RATE)) * (np.arange(5 * SAMPLE_RATE) % 8000 < 4000)
    assert vad._gains(bursts.astype(np.int16)).max() == pytest.approx(100.0, rel=1e-4)
    # Steady noise may rise to the floor's limit, no further.
    steady = np.round(20 * rng.normal(size=5 * SAMPLE_RATE)).astype(np.int16)
    level = 20 * np.log10(vad._gains(steady) * 20 / 32768)
    assert level.min() > -46.5 and level.max() < -43.5


# -- the weights ---------------------------------------------------------------------------


def package_at(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory stand for the installed package; returns the place of its model file."""
    spec = ModuleSpec("silero_vad", None, is_package=True)
    assert spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(directory))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    (directory / "data").mkdir()
    return directory / "data" / "silero_vad.jit"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="silero-vad is missing"):
        VoiceDetector().probabilities(np.zeros(512, dtype=np.int16))


def test_damaged_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package_at(tmp_path, monkeypatch).write_bytes(b"not an archive")
    with pytest.raises(ModelError, match="cannot be read"):
        VoiceDetector().probabilities(np.zeros(512, dtype=np.int16))


def test_a_hostile_archive_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "touched"),)

    index = io.BytesIO()
    pickle.Pickler(index, protocol=2).dump(Hostile())
    with zipfile.ZipFile(package_at(tmp_path, monkeypatch), "w") as archive:
        archive.writestr("model/data.pkl", index.getvalue())
    with pytest.raises(ModelError):
        VoiceDetector().probabilities(np.zeros(512, dtype=np.int16))
    assert not (tmp_path / "touched").exists()


# -- spans ---------------------------------------------------------------------------------


def frames(*runs: tuple[int, float]) -> np.ndarray:
    return np.concatenate([np.full(count, value, dtype=np.float32) for count, value in runs])


def spans_of(*runs: tuple[int, float], **options: Any) -> list[tuple[int, int]]:
    """Spans in frames, without padding."""
    probabilities = frames(*runs)
    spans = speech_spans(probabilities, len(probabilities) * FRAME_SAMPLES, speech_pad_ms=0, **options)
    return [(span.start // FRAME_SAMPLES, span.end // FRAME_SAMPLES) for span in spans]


def test_speech_ends_only_after_a_real_pause() -> None:
    assert spans_of((20, 0.1), (20, 0.9), (3, 0.1), (20, 0.9), (20, 0.1)) == [(20, 63)]
    assert spans_of((20, 0.1), (20, 0.9), (5, 0.1), (20, 0.9), (20, 0.1)) == [(20, 40), (45, 65)]


def test_between_the_thresholds_speech_goes_on_but_does_not_begin() -> None:
    assert spans_of((20, 0.9), (20, 0.4), (20, 0.1)) == [(0, 40)]
    assert spans_of((20, 0.4), (20, 0.1)) == []
    assert spans_of((20, 0.9), (20, 0.4), (20, 0.1), neg_threshold=0.45) == [(0, 20)]


def test_a_low_threshold_still_ends_at_pauses() -> None:
    assert spans_of((20, 0.2), (10, 0.05), (20, 0.2), (10, 0.05), threshold=0.15) == [(0, 20), (30, 50)]


def test_blips_are_dropped_and_the_end_of_the_file_ends_speech() -> None:
    assert spans_of((10, 0.1), (5, 0.9), (10, 0.1), (20, 0.9)) == [(25, 45)]
    assert spans_of((10, 0.1), (5, 0.9), (10, 0.1), min_speech_duration_ms=100) == [(10, 15)]


def test_padding_stays_inside_the_file_and_meets_halfway() -> None:
    probabilities = frames((1, 0.1), (20, 0.9), (5, 0.1), (20, 0.9), (1, 0.1))
    n = len(probabilities) * FRAME_SAMPLES - 100
    first, second = speech_spans(probabilities, n, speech_pad_ms=1000)
    assert (first.start, second.end) == (0, n)
    assert first.end == second.start == int(23.5 * FRAME_SAMPLES)


def test_spans_equal_the_packages_own() -> None:
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from silero_vad.utils_vad import get_speech_timestamps_from_probs
    torch.set_num_threads(threads)
    rng = np.random.default_rng(RNG_SEED)
    for _ in range(50):
        steps = np.cumsum(rng.normal(0, 0.25, 400))
        probabilities = (0.5 + 0.5 * np.sin(steps)).astype(np.float32)
        n = len(probabilities) * FRAME_SAMPLES - int(rng.integers(0, FRAME_SAMPLES))
        theirs = get_speech_timestamps_from_probs(probabilities.tolist(), audio_length_samples=n)
        ours = [{"start": span.start, "end": span.end} for span in speech_spans(probabilities, n)]
        assert ours == theirs


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(0, 200), elements=st.floats(0, 1, width=32)),
    st.floats(0.05, 0.95),
    st.integers(0, 300),
    st.integers(0, 200),
)
def test_spans_rise_and_stay_inside(probabilities: np.ndarray, threshold: float, silence: int, pad: int) -> None:
    n = len(probabilities) * FRAME_SAMPLES
    spans = speech_spans(probabilities, n, threshold, min_silence_duration_ms=silence, speech_pad_ms=pad)
    edges = [edge for span in spans for edge in (span.start, span.end)]
    assert edges == sorted(edges)
    assert all(0 <= span.start < span.end <= n for span in spans)
