"""Where to cut: stretches of speech become windows of about 20 s, never over 30 s.

Cuts are chosen for the whole stretch at once, by dynamic programming: a window should be
near the target length, and a cut should fall into a pause, the longer the better. Inside
speech without a pause the cut goes where the voice detector is least sure. Long silence
belongs to no window, so it is never decoded; short gaps stay, because they are context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from whisper_worker.audio.vad import FRAME_SAMPLES, SpeechSpan
from whisper_worker.types import SAMPLE_RATE

MAX_SECONDS = 30.0
TARGET_SECONDS = 20.0
GAP_SECONDS = 2.0
"""Silence longer than this always ends a window: to decode it costs more than a new window's padding."""
PAD_SECONDS = 0.3
"""Real sound kept before and after the speech of a window, as far as the pause allows."""

_GOOD_PAUSE = 0.5
"""A pause of this many seconds or more is as good a cut as any."""
_INSIDE_SPEECH = 3.0
_SHORT_PAUSE = 1.5
_WINDOW = 0.5
_OVER_TARGET = 8.0
"""Costs, in no unit: a cut inside speech, a cut in a pause of no length, a window as such, and a
window of the full 30 s (rising from the target with the square of the excess)."""

_CUT_STEP = 0.5
"""Seconds of unbroken speech for each of which one place to cut is considered."""


@dataclass(frozen=True, slots=True)
class Window:
    """Samples ``[start, stop)`` of the waveform; ``start`` is a multiple of a mel frame (160)."""

    start: int
    stop: int
    doubtful: bool = False
    """No surely detected speech inside: decoded, but held to stricter guards."""

    @property
    def seconds(self) -> float:
        return (self.stop - self.start) / SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class _Cut:
    """A place where a window may end and the next begin, with its cost."""

    end: int
    """Last sample of speech before it."""
    start: int
    """First sample of speech after it."""
    cost: float


def plan_windows(
    spans: Sequence[SpeechSpan],
    probabilities: npt.NDArray[np.float32],
    n_samples: int,
    *,
    first_sample: int = 0,
    sure: Sequence[SpeechSpan] | None = None,
    target_seconds: float = TARGET_SECONDS,
) -> tuple[Window, ...]:
    """Windows that cover all ``spans``, in order and disjoint, of the samples ``[first_sample, n_samples)``.

    ``spans``: rising, disjoint stretches to decode. ``probabilities``: the voice detector's,
    one for each ``FRAME_SAMPLES``. ``sure``: the spans known to be speech (default: all); a
    window without any is marked doubtful.
    """
    windows: list[Window] = []
    for stretch in _stretches(spans):
        cuts = _cut_places(stretch, probabilities)
        for first, last in _best_cuts(cuts, target_seconds):
            windows.append(Window(cuts[first].start, cuts[last].end))
    padded = _pad(windows, first_sample, n_samples)
    if sure is None:
        return tuple(padded)
    return tuple(
        Window(w.start, w.stop, not any(span.start < w.stop and span.end > w.start for span in sure)) for w in padded
    )


def cut_at(window: Window, pauses: Sequence[tuple[int, int]]) -> list[Window]:
    """A window cut in rising pauses: speech ends at the first sample of a pair, and begins again at the second."""
    starts = [window.start, *(start for _, start in pauses)]
    stops = [*(end for end, _ in pauses), window.stop]
    parts = [Window(start, stop) for start, stop in zip(starts, stops, strict=True)]
    return [replace(part, doubtful=window.doubtful) for part in _pad(parts, window.start, window.stop)]


def _stretches(spans: Sequence[SpeechSpan]) -> list[list[SpeechSpan]]:
    """Runs of spans with no gap over ``GAP_SECONDS``."""
    runs: list[list[SpeechSpan]] = []
    for span in spans:
        if span.end <= span.start:
            continue
        if runs and span.start - runs[-1][-1].end <= GAP_SECONDS * SAMPLE_RATE:
            runs[-1].append(span)
        else:
            runs.append([span])
    return runs


def _cut_places(stretch: Sequence[SpeechSpan], probabilities: npt.NDArray[np.float32]) -> list[_Cut]:
    """Start of the stretch, every pause, every weak place inside long speech, end of the stretch."""
    cuts = [_Cut(stretch[0].start, stretch[0].start, 0.0)]
    for place, span in enumerate(stretch):
        cuts.extend(_inside(span, probabilities))
        if place + 1 < len(stretch):
            pause = (stretch[place + 1].start - span.end) / SAMPLE_RATE
            cost = _SHORT_PAUSE * max(0.0, 1 - pause / _GOOD_PAUSE)
            cuts.append(_Cut(span.end, stretch[place + 1].start, cost))
    cuts.append(_Cut(stretch[-1].end, stretch[-1].end, 0.0))
    return cuts


def _inside(span: SpeechSpan, probabilities: npt.NDArray[np.float32]) -> list[_Cut]:
    """Per step of unbroken speech the frame least like speech. Short spans need no cut inside."""
    if (span.end - span.start) / SAMPLE_RATE < TARGET_SECONDS / 4:
        return []
    step = round(_CUT_STEP * SAMPLE_RATE / FRAME_SAMPLES)
    low, high = span.start // FRAME_SAMPLES + step, min(span.end // FRAME_SAMPLES, len(probabilities)) - step
    cuts = []
    for first in range(low, high, step):
        frame = first + int(np.argmin(probabilities[first : first + step]))
        sample = frame * FRAME_SAMPLES + FRAME_SAMPLES // 2
        cuts.append(_Cut(sample, sample, _INSIDE_SPEECH * (0.5 + 0.5 * float(probabilities[frame]))))
    return cuts


def _best_cuts(cuts: Sequence[_Cut], target_seconds: float) -> list[tuple[int, int]]:
    """Pairs of cut indices, each a window, of least total cost."""
    room = (MAX_SECONDS - 2 * PAD_SECONDS) * SAMPLE_RATE
    slack = MAX_SECONDS - target_seconds
    total = [0.0] + [np.inf] * (len(cuts) - 1)
    came_from = [0] * len(cuts)
    for last in range(1, len(cuts)):
        for first in range(last - 1, -1, -1):
            length = cuts[last].end - cuts[first].start
            if length > room and first < last - 1:
                break
            excess = max(0.0, length / SAMPLE_RATE - target_seconds) / slack
            cost = total[first] + cuts[last].cost + _WINDOW + _OVER_TARGET * excess**2
            if cost < total[last]:
                total[last], came_from[last] = cost, first
    pairs = []
    last = len(cuts) - 1
    while last > 0:
        pairs.append((came_from[last], last))
        last = came_from[last]
    return pairs[::-1]


def _pad(windows: Sequence[Window], first_sample: int, n_samples: int) -> list[Window]:
    """Widen each window into the pauses around it, at most halfway to its neighbours."""
    pad = round(PAD_SECONDS * SAMPLE_RATE)
    padded = []
    for place, window in enumerate(windows):
        before = windows[place - 1].stop if place else -n_samples
        after = windows[place + 1].start if place + 1 < len(windows) else 2 * n_samples
        start = max(first_sample, window.start - min(pad, max(0, (window.start - before) // 2)))
        stop = min(n_samples, window.stop + min(pad, max(0, (after - window.stop) // 2)))
        padded.append(Window(start - start % 160, stop))
    return padded
