"""Segments out of decoded windows: texts, times held against the detected speech, words, flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from whisper_worker.audio.windows import Window
from whisper_worker.engine.quality import Attempt
from whisper_worker.engine.timestamps import Piece, Spans, clip_segment, clip_word, token_times, words_of
from whisper_worker.types import SAMPLE_RATE, Segment, TranscribeOptions, Word

if TYPE_CHECKING:
    import torch

    from whisper_worker.engine.tokenizer import Tokenizer

_PAUSE_SECONDS = 1.0
"""A pause this long between two words ends a segment, where word times are known."""

_Clip = Callable[[float, float, Sequence[tuple[float, float]]], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What was kept of a window."""

    window: Window
    language: str | None
    attempt: Attempt
    pieces: Sequence[Piece]
    read: float
    """Seconds of the window up to where its text ends."""
    flags: AbstractSet[str]


class Assembler:
    """Makes a job's segments. ``sure``: stretches of detected speech; ``heard``: doubtful ones too; in seconds."""

    def __init__(
        self, tokenizer: Tokenizer, options: TranscribeOptions, heard: Spans, sure: Spans, duration: float
    ) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._heard = heard
        self._sure = sure
        self._duration = duration

    def segment(self, decoded: Decoded, piece: Piece, words: tuple[Word, ...] | None = None) -> Segment:
        """One piece as a segment; its id is yet to come, see :meth:`placed`."""
        offset = decoded.window.start / SAMPLE_RATE
        if words:
            start, end = words[0].start, words[-1].end
        else:
            start, end = self._clip(clip_segment, offset + piece.start, offset + piece.end)
        flags = set(decoded.flags)
        if not self._heard.near(start, end):
            flags.add("text_over_silence")
        result = decoded.attempt.result
        return Segment(
            id=0,
            start=start,
            end=end,
            text=self._tokenizer.decode(piece.tokens),
            avg_logprob=result.avg_logprob,
            no_speech_prob=result.no_speech_prob,
            compression_ratio=decoded.attempt.compression_ratio,
            temperature=result.temperature,
            tokens=piece.tokens,
            seek=decoded.window.start // 160,
            language=decoded.language,
            words=words,
            flags=tuple(sorted(flags)),
        )

    def with_words(self, decoded: Decoded, attention: torch.Tensor, probabilities: list[float]) -> list[Segment]:
        """Word times for the window's pieces; a piece is split where its words pause.

        ``attention`` and ``probabilities``: of their text tokens, as :meth:`Recognizer.cross_attention` gives them.
        """
        offset = decoded.window.start / SAMPLE_RATE
        # Attention may drift into the silence that is put behind a window. In the recording the next words are there.
        boundaries = np.minimum(token_times(attention), decoded.window.seconds)
        segments: list[Segment] = []
        place = 0
        for piece in decoded.pieces:
            tokens = [token for token in piece.tokens if token < self._tokenizer.eot]
            stop = place + len(tokens)
            timed = words_of(
                tokens,
                boundaries[place : stop + 1],
                probabilities[place:stop],
                self._tokenizer,
                decoded.language,
                self._options.prepend_punctuations,
                self._options.append_punctuations,
            )
            place = stop
            run: list[Word] = []
            run_tokens: list[int] = []
            taken = 0
            for word, n_tokens in timed:
                start, end = self._clip(clip_word, offset + word.start, offset + word.end)
                if run:
                    start = max(start, run[-1].end)
                placed = replace(word, start=start, end=max(start, end))
                if run and placed.start - run[-1].end >= _PAUSE_SECONDS:
                    segments.append(self.segment(decoded, replace(piece, tokens=tuple(run_tokens)), tuple(run)))
                    run, run_tokens = [], []
                run.append(placed)
                run_tokens.extend(tokens[taken : taken + n_tokens])
                taken += n_tokens
            if run:
                whole = not taken or len(run_tokens) == len(tokens)
                kept = piece if whole else replace(piece, tokens=tuple(run_tokens))
                segments.append(self.segment(decoded, kept, tuple(run)))
        return segments

    def without_silence(self, segments: list[Segment]) -> list[Segment]:
        """``hallucination_silence_threshold``: text inside a silence longer than this was not said."""
        threshold = self._options.hallucination_silence_threshold
        if threshold is None:
            return segments
        return [
            segment
            for segment in segments
            if "text_over_silence" not in segment.flags
            or self._heard.silence(segment.start, segment.end, self._duration) <= threshold
        ]

    def placed(self, segment: Segment, number: int, floor: float) -> Segment:
        """The segment with its id, its times from ``floor`` on, in order and inside the recording."""
        words: list[Word] | None = None
        if segment.words is not None:
            words = []
            for word in segment.words:
                start = min(max(word.start, words[-1].end if words else floor), self._duration)
                end = min(max(word.end, start), self._duration)
                words.append(replace(word, start=round(start, 3), end=round(end, 3)))
        start = min(max(segment.start, floor), self._duration)
        end = min(max(segment.end, start), self._duration)
        if words:
            start, end = words[0].start, words[-1].end
        return replace(
            segment,
            id=number,
            start=round(start, 3),
            end=round(end, 3),
            words=tuple(words) if words is not None else None,
        )

    def _clip(self, clip: _Clip, start: float, end: float) -> tuple[float, float]:
        """Hold times against sure speech; where there is none, against doubtful speech."""
        clipped = clip(start, end, self._sure.near(start, end))
        return clipped if clipped != (start, end) else clip(start, end, self._heard.near(start, end))
