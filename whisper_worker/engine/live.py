"""Speech that is still being spoken: what to decode next, and which words are settled.

    samples ─▶ voice stream ─▶ spans ─▶ Request ─▶ (a recognizer, elsewhere) ─▶ Hypothesis
                                                                                     │
       completed segments, which never change ◀─ settled words ◀─ agreement of two ◀─┘

A :class:`LiveSession` does no I/O, starts nothing and reads no clock of its own, so a whole
conversation can be played to it in microseconds. One thread or task at a time may call it.

The last sound (the window, up to 24 s) is decoded again and again as it grows, each time
forced to begin with the words already settled. A word is settled once two decodes in a row
agree on it and the sound has gone on behind it (LocalAgreement-2: Liu et al. 2020, Macháček
et al. 2023), the further the less sure the model is of it; a pause settles all. Settled words
do not change. A pause ends the window only where that is long enough, or the silence is.
Segments are cut from settled words alone, so how text is shown does not touch how sound is cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from whisper_worker.audio.vad import FRAME_SAMPLES
from whisper_worker.engine.timestamps import clip_word
from whisper_worker.types import SAMPLE_RATE, Segment, Word

MAX_PENDING_SECONDS = 30.0
"""Sound not yet transcribed that a session holds; whoever feeds it waits when that is reached."""

PAUSE_SECONDS = 0.5
"""Silence that settles what was said before it, unless the session is told otherwise."""
STALL_SECONDS = 1.0
"""Time without any new sound that settles it too."""

_LEAST_SPEECH_SECONDS = 0.2
_PAD_SECONDS = 0.3
"""Real sound kept before and after the speech of a window, as far as the pause allows."""
_WINDOW_SECONDS, _SHORT_PAUSE_SECONDS = 15.0, 0.25
"""From this length on a window ends in a pause, even one this short. Until then what was said before a
pause stays in the window: its sound is the best context for what follows, but each decode costs more."""
_SILENCE_SECONDS = 2.0
"""Silence that ends a window of any length."""
_CAP_SECONDS, _CAP_SEARCH_SECONDS = 24.0, 6.0
"""Length at which a window ends without a pause, where speech is least sure within its last stretch."""

_FIRST_SECONDS = 0.5
"""Speech heard before a window is decoded for the first time."""
_INTERVAL_SECONDS = (0.35, 3.0)
"""Least and greatest stretch of new sound between two decodes of a window; in between, twice what a decode
took: on a busy machine half of the time is left for windows that are over."""
_HOLD_SECONDS = 0.4
"""Sound that must follow a word before it may settle: at the edge the model guesses."""
_DOUBT_SECONDS = 1.5
"""Further sound for a word of which the model is not sure, in the measure of its doubt: two decodes soon after
another agree on a wrong word as well, and what comes behind it is what sets it right."""
_LEAST_WORD_SECONDS, _WHOLE_WORD_SECONDS = 0.03, 0.15
"""Several words in a row that take less than this each were not said, but for those as long as a word can be."""
_NEG_SHARE = 0.7
_SPAN_END_FRAMES = 4
"""A span of speech ends after this many frames (128 ms) under ``_NEG_SHARE`` of the threshold."""

_HISTORY_TOKENS = 48
"""Tokens of earlier text that stand before a window: enough for names and style, too few to be looped on."""

_SENTENCE_END = (".", "?", "!", "。", "？", "！", "…")
_CLAUSE_END = (",", ";", ":", "、", "，", "；")
_CLAUSE_SECONDS, _GAP_SECONDS, _GAP_AFTER_SECONDS, _SEGMENT_SECONDS = 3.0, 0.3, 2.0, 6.0
"""A segment may end after a sentence; after a clause or a gap between words once it is so long; and at this length."""


class Detector(Protocol):
    """:class:`whisper_worker.audio.vad.VoiceStream` as the session uses it."""

    def feed(self, samples: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class LiveWord:
    """A word with times from the start of the session, and the text tokens it is made of."""

    word: Word
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One window to decode."""

    waveform: npt.NDArray[np.int16]
    start: float
    """Where the waveform begins, in seconds from the start of the session."""
    final: bool
    """The window is over: nothing will be added to it."""
    doubtful: bool
    """The detector was nowhere sure of speech."""
    speech_seconds: float
    history: tuple[int, ...]
    """Text tokens before the window."""
    prefix: tuple[int, ...]
    """Text tokens that the window is known to begin with."""
    asked: float
    """When, by the session's clock."""

    @property
    def seconds(self) -> float:
        return len(self.waveform) / SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What a recognizer heard in a request's window behind its prefix."""

    words: tuple[LiveWord, ...]
    avg_logprob: float = 0.0
    no_speech_prob: float = 0.0
    compression_ratio: float = 0.0
    temperature: float = 0.0
    discarded: bool = False
    """It failed the guards: nothing is settled by it, and what was shown stays."""


@dataclass(frozen=True, slots=True)
class OpenSegment:
    """The text after the last completed segment. ``words[:n_settled]`` will not change any more."""

    words: tuple[Word, ...]
    n_settled: int

    @property
    def start(self) -> float:
        return self.words[0].start

    @property
    def end(self) -> float:
        return self.words[-1].end

    @property
    def text(self) -> str:
        return "".join(word.word for word in self.words)


class LiveSession:
    """One speaker's stream. Feed it, ask for a request, give back the hypothesis, take what is complete."""

    def __init__(self, detector: Detector, clock: Callable[[], float], *, threshold: float = 0.5) -> None:
        """``threshold``: probability from which a frame is speech; from 0.5 on the detector is sure."""
        self._detector = detector
        self._clock = clock
        self.threshold = threshold
        self.pause_seconds = PAUSE_SECONDS
        self._audio = np.empty(0, dtype=np.int16)
        self._base = 0
        """Sample that ``_audio`` and ``_probabilities`` begin with; a multiple of a frame."""
        self._probabilities = np.empty(0, dtype=np.float32)
        self._spans: list[list[int]] = []
        """Speech not yet settled, ``[start, end]`` in samples; the last one grows while ``_speaking``."""
        self._speaking = False
        self._quiet_frames = 0
        self._anchor = 0
        """Where the window begins."""
        self._settled_to = 0
        """Sample before which all is settled, in the window or at its beginning."""
        self._speech_before = 0
        """Samples of speech in the window before that."""
        self._last_input = clock()
        self._ended = False
        self._flushes: deque[int] = deque()
        """Samples up to each of which all is to be settled, in that order."""
        self.n_settles = 0
        """How many times a pause, or what counts as one, settled all that was said before it."""
        self._requested = 0
        """Sample up to which the window was decoded."""
        self._turnaround = 0.0
        self._settled: list[LiveWord] = []
        """Of this window."""
        self._n_complete = 0
        """How many of them are in completed segments."""
        self._tail: tuple[LiveWord, ...] = ()
        self._history: tuple[int, ...] = ()
        self._last: Hypothesis | None = None
        self._n_segments = 0
        self._floor = 0.0
        self._completed: list[Segment] = []

    # -- in --------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Sound received so far."""
        return self._stop / SAMPLE_RATE

    @property
    def room(self) -> int:
        """Samples that may be fed now."""
        return max(0, round(MAX_PENDING_SECONDS * SAMPLE_RATE) - (self._stop - self._settled_to))

    @property
    def _stop(self) -> int:
        return self._base + len(self._audio)

    def feed(self, samples: npt.NDArray[np.int16]) -> None:
        """Add int16 mono samples at 16 kHz."""
        if not len(samples):
            return
        self._last_input = self._clock()
        self._audio = np.concatenate([self._audio, samples])
        found = self._detector.feed(samples)
        first = self._base // FRAME_SAMPLES + len(self._probabilities)
        self._probabilities = np.concatenate([self._probabilities, found])
        for place, probability in enumerate(found.tolist()):
            self._hear((first + place) * FRAME_SAMPLES, probability)
        if not self._spans and self._stop - self._settled_to >= _SILENCE_SECONDS * SAMPLE_RATE:
            # Silence is let go of, but for what may turn out to be the onset of a word.
            self._open_window(self._stop - round(_PAD_SECONDS * SAMPLE_RATE))

    def flush(self) -> None:
        """Settle all sound received so far, as a pause would; apart from what comes after it."""
        self._flushes.append(self._stop)

    def finish(self) -> None:
        """No more sound will come."""
        self._ended = True

    def _hear(self, at: int, probability: float) -> None:
        end = at + FRAME_SAMPLES
        if probability >= self.threshold:
            if not self._speaking:
                self._spans.append([max(at, self._settled_to), end])
            self._speaking, self._quiet_frames = True, 0
            self._spans[-1][1] = end
        elif self._speaking and probability < _NEG_SHARE * self.threshold:
            self._quiet_frames += 1
            self._speaking = self._quiet_frames < _SPAN_END_FRAMES
        elif self._speaking:
            self._quiet_frames = 0
            self._spans[-1][1] = end

    # -- what to decode --------------------------------------------------------------------

    @property
    def speech(self) -> tuple[float, float] | None:
        """Where the speech that is not settled yet begins and where it ends so far, in seconds."""
        return (self._spans[0][0] / SAMPLE_RATE, self._spans[-1][1] / SAMPLE_RATE) if self._spans else None

    @property
    def settled_seconds(self) -> float:
        """Seconds before which there is nothing left to settle."""
        return (self._settled_to if self._spans else self._stop) / SAMPLE_RATE

    @property
    def done(self) -> bool:
        """Whether all sound was dealt with after :meth:`finish`."""
        return self._ended and not self._spans

    def request(self) -> Request | None:
        """The next window to decode, if there is one now. Give its hypothesis to :meth:`apply` before asking again."""
        cut = self._cut()
        if cut is not None:
            enough = self._speech(cut) >= _LEAST_SPEECH_SECONDS * SAMPLE_RATE
            if enough or self._settled or self._tail:
                return self._window(cut, final=True)
            self._settle_to(cut)
            return self.request()
        if not self._spans:
            return None
        heard = self._spans[-1][1]
        new = heard - max(self._requested, self._spans[0][0])
        least, most = _INTERVAL_SECONDS
        interval = min(max(least, 2 * self._turnaround), most) if self._requested > self._settled_to else _FIRST_SECONDS
        if new < interval * SAMPLE_RATE:
            return None
        return self._window(self._stop, final=False)

    def wake_at(self) -> float | None:
        """When, by the clock, to ask for a request again though no sound has come; None: not before there is some."""
        return self._last_input + STALL_SECONDS if self._spans and not self._ended else None

    def _window(self, stop: int, *, final: bool) -> Request:
        self._requested = stop
        first, last = self._anchor // FRAME_SAMPLES, -(-stop // FRAME_SAMPLES)
        offset = self._base // FRAME_SAMPLES
        sound = self._probabilities[max(0, first - offset) : last - offset]
        return Request(
            waveform=self._audio[self._anchor - self._base : stop - self._base].copy(),
            start=self._anchor / SAMPLE_RATE,
            final=final,
            doubtful=not len(sound) or float(sound.max()) < 0.5,
            speech_seconds=(self._speech_before + self._speech(stop)) / SAMPLE_RATE,
            history=self._history,
            prefix=tuple(token for word in self._settled for token in word.tokens),
            asked=self._clock(),
        )

    def _speech(self, stop: int) -> int:
        return sum(max(0, min(end, stop) - start) for start, end in self._spans)

    def _cut(self) -> int | None:
        """Where the window ends, if that is known."""
        while self._flushes and not (self._spans and self._spans[0][0] < self._flushes[0]):
            self._flushes.popleft()
        cut = self._heard_cut()
        if not self._flushes:
            return cut
        return self._flushes[0] if cut is None else min(cut, self._flushes[0])

    def _heard_cut(self) -> int | None:
        """As far as the sound itself tells."""
        pad = round(_PAD_SECONDS * SAMPLE_RATE)
        # What is settled is not decoded again: no cut before it, or the next window would begin with it.
        least = round(self._settled[-1].word.end * SAMPLE_RATE) if self._settled else self._anchor
        cap = self._anchor + round(_CAP_SECONDS * SAMPLE_RATE)
        for place, (_, end) in enumerate(self._spans):
            is_last = place == len(self._spans) - 1
            if (is_last and self._speaking) or end > cap:
                break
            until = self._stop if is_last else self._spans[place + 1][0]
            long = end - self._anchor >= _WINDOW_SECONDS * SAMPLE_RATE
            cut = min(end + pad, until if is_last else (end + until) // 2)
            if cut >= least and until - end >= (_SHORT_PAUSE_SECONDS if long else self.pause_seconds) * SAMPLE_RATE:
                return cut
        if self._spans and self._stop >= cap:
            low = (max(least, cap - round(_CAP_SEARCH_SECONDS * SAMPLE_RATE)) - self._base) // FRAME_SAMPLES
            high = max((cap - self._base) // FRAME_SAMPLES, low + 1)
            quietest = low + int(self._probabilities[low:high].argmin())
            return min(max(least, self._base + quietest * FRAME_SAMPLES + FRAME_SAMPLES // 2), self._stop)
        stalled = self.room > 0 and self._clock() - self._last_input >= STALL_SECONDS
        if self._spans and (self._ended or stalled):
            return self._stop
        return None

    # -- what was heard --------------------------------------------------------------------

    def apply(self, request: Request, hypothesis: Hypothesis) -> None:
        """Take a recognizer's answer to the last request."""
        self._turnaround = self._clock() - request.asked
        words = self._placed(hypothesis.words, request.start + request.seconds)
        if not hypothesis.discarded:
            self._last = hypothesis
        if request.final:
            # A discarded reading of what is over leaves nothing better than what two others agreed on.
            self._settled.extend(words if not hypothesis.discarded else ())
            self._settle_to(round(request.start * SAMPLE_RATE) + len(request.waveform))
            return
        if hypothesis.discarded:
            return
        heard = request.start + request.seconds
        agreed = 0
        for before, now in zip(self._tail, words[:-1], strict=False):
            hold = _HOLD_SECONDS + _DOUBT_SECONDS * (1 - now.word.probability)
            if folded(before.word.word) != folded(now.word.word) or now.word.end + hold > heard:
                break
            agreed += 1
        self._settled.extend(words[:agreed])
        self._tail = tuple(words[agreed:])
        self._complete(closing=False)

    def _placed(self, words: Sequence[LiveWord], stop: float) -> list[LiveWord]:
        """Words inside the speech that was heard before ``stop``, none before the end of the one before it.

        The model may let a word end in the silence that fills its window up; what lies there is not its speech.
        """
        spans = [(start / SAMPLE_RATE, min(end / SAMPLE_RATE, stop)) for start, end in self._spans]
        spans = [(start, end) for start, end in spans if start < end]
        floor = max(self._settled[-1].word.end if self._settled else 0.0, self._floor)
        placed: list[LiveWord] = []
        for one in words:
            start, end = clip_word(one.word.start, one.word.end, spans)
            start = min(max(start, floor), stop)
            end = min(max(end, start), stop)
            floor = end
            placed.append(replace(one, word=replace(one.word, start=start, end=end)))
        return _spoken(placed)

    def _settle_to(self, stop: int) -> None:
        """All words before ``stop`` are settled; a window that is long enough ends there."""
        self._tail = ()
        self.n_settles += 1
        self._complete(closing=True)
        self._speech_before += self._speech(stop)
        self._spans = [[max(start, stop), end] for start, end in self._spans if end > stop]
        self._speaking = self._speaking and bool(self._spans)
        self._settled_to = self._requested = stop
        if stop - self._anchor >= _WINDOW_SECONDS * SAMPLE_RATE or not self._settled:
            self._open_window(stop)

    def _open_window(self, at: int) -> None:
        """Begin a new window, once all before it is settled; its sound is forgotten, some of its text is not."""
        said = tuple(token for word in self._settled for token in word.tokens)
        self._history = (*self._history, *said)[-_HISTORY_TOKENS:]
        self._settled, self._n_complete, self._speech_before = [], 0, 0
        self._anchor = max(self._anchor, at)
        self._settled_to = max(self._settled_to, self._anchor)
        self._requested = max(self._requested, self._anchor)
        n_frames = min((self._anchor - self._base) // FRAME_SAMPLES, len(self._probabilities))
        self._audio = self._audio[n_frames * FRAME_SAMPLES :].copy()
        self._probabilities = self._probabilities[n_frames:].copy()
        self._base += n_frames * FRAME_SAMPLES

    # -- out -------------------------------------------------------------------------------

    def take_completed(self) -> tuple[Segment, ...]:
        """Segments completed since the last call. They never change."""
        taken, self._completed = tuple(self._completed), []
        return taken

    @property
    def open_segment(self) -> OpenSegment | None:
        """What is being said, settled words first; None where nothing is."""
        settled = self._settled[self._n_complete :]
        words = tuple(one.word for one in (*settled, *self._tail))
        return OpenSegment(words, len(settled)) if words else None

    def _complete(self, *, closing: bool) -> None:
        """Cut settled words into segments; the last word waits for what follows it unless the window closes."""
        while self._n_complete < len(self._settled):
            words = [one.word for one in self._settled[self._n_complete :]]
            n = _segment_length(words)
            if n == 0 and not closing:
                return
            n = n or len(words)
            self._emit(words[:n])
            self._n_complete += n

    def _emit(self, words: Sequence[Word]) -> None:
        floor = self._floor
        rounded: list[Word] = []
        for word in words:
            start = max(round(word.start, 3), floor)
            floor = max(round(word.end, 3), start)
            rounded.append(replace(word, start=start, end=floor))
        self._floor = floor
        last = self._last or Hypothesis(())
        self._completed.append(
            Segment(
                id=self._n_segments,
                start=rounded[0].start,
                end=rounded[-1].end,
                text="".join(word.word for word in rounded),
                avg_logprob=last.avg_logprob,
                no_speech_prob=last.no_speech_prob,
                compression_ratio=last.compression_ratio,
                temperature=last.temperature,
                words=tuple(rounded),
            )
        )
        self._n_segments += 1


def _spoken(words: Sequence[LiveWord]) -> list[LiveWord]:
    """Those of these words that there was time for: what the model repeats or adds lies squeezed together."""
    doubted: set[int] = set()
    for first in range(len(words)):
        for last in range(first + 1, len(words)):
            n = last - first + 1
            at_end = last == len(words) - 1
            seconds = words[last].word.end - words[first].word.start
            if n >= (2 if at_end else 3) and seconds < _LEAST_WORD_SECONDS * n:
                doubted.update(range(first, last + 1))
    return [
        one
        for number, one in enumerate(words)
        if number not in doubted or one.word.end - one.word.start >= _WHOLE_WORD_SECONDS
    ]


def _segment_length(words: Sequence[Word]) -> int:
    """Words of the first segment of these, which are settled; 0 where it may still grow."""
    for n in range(1, len(words)):
        text = words[n - 1].word.rstrip()
        seconds = words[n - 1].end - words[0].start
        gap = words[n].start - words[n - 1].end
        if (
            text.endswith(_SENTENCE_END)
            or (seconds >= _CLAUSE_SECONDS and text.endswith(_CLAUSE_END))
            or (seconds >= _GAP_AFTER_SECONDS and gap >= _GAP_SECONDS)
            or words[n].end - words[0].start >= _SEGMENT_SECONDS
        ):
            return n
    return 0


def folded(text: str) -> str:
    """A word without case and punctuation, as two hypotheses are compared."""
    return "".join(character for character in text.lower() if character.isalnum())
