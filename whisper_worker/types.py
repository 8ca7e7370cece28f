"""The nouns of the product. Frozen, slotted, free of heavy imports.

Times are float seconds from the start of the original recording. Dicts appear only at
the edges (``schema.py``); everything between two floors is one of these.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from whisper_worker.errors import Cancelled

SAMPLE_RATE = 16_000
"""Samples per second of every waveform inside the worker."""

Task = Literal["transcribe", "translate"]

FORMATS = ("txt", "vtt", "srt", "tsv", "json")
"""Text formats a transcript can be written in; the names are openai/whisper's."""

FLAGS = ("loop", "text_over_silence", "low_logprob", "prompt_echo", "fallback")
"""Doubts that a segment may carry: see :class:`Segment`."""


class CancelToken:
    """Set once by a door, read by every loop of the job. Safe across threads."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise :class:`Cancelled` once :meth:`cancel` was called."""
        if self._event.is_set():
            raise Cancelled("The job was cancelled; send it again if it is still wanted.")


@dataclass(frozen=True, slots=True)
class Word:
    """One word with its times; ``word`` keeps Whisper's leading blank."""

    word: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True, slots=True)
class Segment:
    """One line of the transcript.

    ``seek`` is the start of the decoded window in hundredths of a second, as in
    openai/whisper. ``flags`` names the doubts that the guards had and could not settle:
    ``loop`` (the text repeats itself), ``text_over_silence`` (text where neither the voice
    detector nor the model hears speech), ``low_logprob`` (the model was unsure even after
    the last attempt), ``prompt_echo`` (the text is the prompt), ``fallback`` (an earlier
    attempt failed; ``temperature`` says which one was kept).
    """

    id: int
    start: float
    end: float
    text: str
    avg_logprob: float
    no_speech_prob: float
    compression_ratio: float
    temperature: float
    tokens: tuple[int, ...] = ()
    seek: int = 0
    language: str | None = None
    words: tuple[Word, ...] | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a job cost and on what it ran."""

    stages: dict[str, float]
    """Seconds by stage: fetch, decode, vad, recognize, format, total."""
    audio_seconds: float
    speech_seconds: float
    """Seconds in which the voice detector heard speech."""
    transcribed_seconds: float
    """Seconds of that speech which lie inside a segment."""
    gaps: tuple[tuple[float, float], ...]
    """Stretches of detected speech, a second or longer, that no segment covers."""
    rtfx: float
    """Audio seconds per wall second of the whole job."""
    windows: int
    retried_windows: int
    batch_size: int
    """Upper bound in force; lower than configured after an out-of-memory error."""
    device: str
    compute_type: str
    engine: str
    peak_memory_mb: float
    model: str
    revision: str | None
    cost: float | None = None
    """Price of the job where WHISPER_PRICE_PER_HOUR is set."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """The one answer of all doors."""

    text: str
    language: str | None
    language_probability: float | None
    duration: float
    segments: tuple[Segment, ...]
    warnings: tuple[str, ...] = ()
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True)
class TranscribeOptions:
    """The options of openai/whisper by their own names, plus a few of ours.

    Defaults are openai/whisper's API defaults, but for ``condition_on_previous_text``
    (False: windows are decoded side by side) and ``vad`` (True).
    """

    language: str | None = None
    task: Task = "transcribe"
    temperature: float | tuple[float, ...] = 0.0
    """One start value, raised by ``temperature_increment_on_fallback`` up to 1.0, or the whole ladder."""
    best_of: int | None = 5
    beam_size: int | None = None
    """Beams at temperature 0; 1 is greedy decoding; None leaves the number to the engine."""
    patience: float | None = None
    length_penalty: float | None = None
    suppress_tokens: str = "-1"
    """Comma-separated token ids; -1 stands for the model's list of non-speech symbols; empty for none."""
    initial_prompt: str | None = None
    condition_on_previous_text: bool = False
    temperature_increment_on_fallback: float | None = 0.2
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    word_timestamps: bool = False
    prepend_punctuations: str = "\"'“¿([{-"
    append_punctuations: str = "\"'.。,，!！?？:：”)]}、"
    clip_timestamps: tuple[float, ...] = ()
    """start, end, start, end, ... of the parts to transcribe; a last start without an end runs to the end."""
    hallucination_silence_threshold: float | None = None
    vad: bool = True
    vad_threshold: float = 0.5
    hotwords: str | None = None
    languages: tuple[str, ...] = ()
    """Allow-list for language detection; empty allows all."""
    multilingual: bool = False
    """Detect the language again for every window."""
    prefix: str | None = None
    without_timestamps: bool = False
    seed: int | None = None
    """Seed of sampling at temperatures above 0; None takes a fixed one, so that equal jobs give equal text."""
    strict: bool = False
    """Refuse what the loaded model would ignore, rather than warn."""


@dataclass(frozen=True, slots=True)
class AudioSource:
    """Where a job's audio comes from: exactly one of the fields is set.

    ``headers`` are sent to the host of ``url`` alone and dropped when a redirect leaves it.
    """

    url: str | None = None
    """http, https or data URL."""
    base64: str | None = field(default=None, repr=False)
    path: Path | None = None
    """A local file: the command line and uploads already on disk. Never set from a request body."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    sha256: str | None = None
    """Where given, the fetched bytes must have this digest."""

    @property
    def over_http(self) -> bool:
        """Whether the audio is fetched from another machine, to which ``headers`` go."""
        return self.url is not None and not self.url.lstrip().lower().startswith("data:")


@dataclass(frozen=True, slots=True)
class JobInput:
    """One request, whatever door it came through."""

    source: AudioSource
    options: TranscribeOptions = TranscribeOptions()
    formats: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """What the schema had to ignore or coerce; passed on into the transcript."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Seconds of audio done out of the seconds there are; ``stage`` is the receipt's name for it."""

    stage: str
    done_seconds: float
    total_seconds: float
