"""Where windows are cut."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_worker.audio.vad import FRAME_SAMPLES, SpeechSpan
from whisper_worker.audio.windows import GAP_SECONDS, MAX_SECONDS, Window, cut_at, plan_windows

RATE = 16_000


def plan(*spans: tuple[float, float], total: float, probabilities: np.ndarray | None = None) -> tuple[Window, ...]:
    n = round(total * RATE)
    if probabilities is None:
        probabilities = np.full(n // FRAME_SAMPLES + 1, 0.9, dtype=np.float32)
    return plan_windows([SpeechSpan(round(a * RATE), round(b * RATE)) for a, b in spans], probabilities, n)


def seconds(windows: tuple[Window, ...]) -> list[tuple[float, float]]:
    return [(window.start / RATE, window.stop / RATE) for window in windows]


def test_no_speech_no_windows() -> None:
    assert plan(total=60.0) == ()


def test_one_utterance_is_one_padded_window() -> None:
    (window,) = plan((5.0, 9.0), total=60.0)
    assert 4.5 <= window.start / RATE < 5.0
    assert 9.0 < window.stop / RATE <= 9.5


def test_long_silence_is_in_no_window_and_short_gaps_are() -> None:
    windows = plan((1.0, 3.0), (4.0, 6.0), (20.0, 22.0), total=30.0)
    assert len(windows) == 2
    assert windows[0].start / RATE <= 1.0 and windows[0].stop / RATE >= 6.0
    assert windows[1].start / RATE > 19.0


def test_cuts_fall_into_the_long_pauses() -> None:
    """Pauses at 10, 18 and 22 s; the one at 18 is the longest near the target."""
    windows = plan((0, 10), (10.15, 18), (18.8, 22), (22.15, 40), total=40.0)
    assert any(abs(window.stop / RATE - 18.35) < 0.5 for window in windows)


def test_parts_share_the_pauses_between_them() -> None:
    pauses = [(16_000 * 4, 16_000 * 5), (16_000 * 7, 16_000 * 7 + 320)]
    first, second, third = cut_at(Window(1600, 16_000 * 10, doubtful=True), pauses)
    assert first.start == 1600 and third.stop == 16_000 * 10
    assert 4.2 < first.stop / RATE <= second.start / RATE < 4.8
    assert 16_000 * 7 <= second.stop <= third.start + 160 <= 16_000 * 7 + 480
    assert second.start % 160 == third.start % 160 == 0
    assert first.doubtful and second.doubtful and third.doubtful


def test_speech_without_a_pause_is_cut_where_it_is_weakest() -> None:
    probabilities = np.full(60 * RATE // FRAME_SAMPLES, 0.95, dtype=np.float32)
    weak = [round(at * RATE / FRAME_SAMPLES) for at in (19.0, 39.0)]
    probabilities[weak] = 0.3
    windows = plan((0, 60), total=60.0, probabilities=probabilities)
    assert [round(stop) for _, stop in seconds(windows)] == [19, 39, 60]


def test_a_window_without_sure_speech_is_doubtful() -> None:
    spans = [SpeechSpan(0, 3 * RATE), SpeechSpan(20 * RATE, 23 * RATE)]
    windows = plan_windows(spans, np.full(1000, 0.9, dtype=np.float32), 30 * RATE, sure=spans[:1])
    assert [window.doubtful for window in windows] == [False, True]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.05, 4.0), st.floats(0.2, 50.0)), max_size=12), st.integers(0, 2**32 - 1))
def test_whatever_the_speech_windows_cover_it_in_order(parts: list[tuple[float, float]], seed: int) -> None:
    """Every span is covered, windows are disjoint, rising, inside the file, and never over 30 s."""
    at, spans = 0.0, []
    for gap, length in parts:
        spans.append((at + gap, at + gap + length))
        at += gap + length
    n = round((at + 1.0) * RATE)
    probabilities = np.random.default_rng(seed).random(n // FRAME_SAMPLES + 1).astype(np.float32)
    made = [SpeechSpan(round(a * RATE), round(b * RATE)) for a, b in spans]
    windows = plan_windows(made, probabilities, n)
    for before, after in itertools.pairwise(windows):
        assert before.stop <= after.start + 160
    for window in windows:
        assert 0 <= window.start < window.stop <= n
        assert window.start % 160 == 0
        assert window.seconds <= MAX_SECONDS
    for span in made:
        inside = sum(max(0, min(span.end, w.stop) - max(span.start, w.start)) for w in windows)
        assert inside >= span.end - span.start
    gaps = sum(w.stop - w.start for w in windows) - sum(span.end - span.start for span in made)
    assert gaps <= len(made) * (GAP_SECONDS + 1.0) * RATE
