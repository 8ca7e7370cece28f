"""From sampled tokens to honest times: segments, the seek rule, and word times.

Segments come from the model's own timestamp tokens, as in openai/whisper's transcribe.py.
Word times come from dynamic time warping over the cross-attention of the alignment heads,
as in its timing.py. Both are then held against the speech that the voice detector found:
nothing starts before its sound, and nothing spans a pause.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional

from whisper_worker.engine.recognizer import POSITION_SECONDS
from whisper_worker.types import Word

if TYPE_CHECKING:
    from whisper_worker.engine.tokenizer import Tokenizer

_MEDIAN_OF_7 = ((0, 5), (0, 3), (1, 6), (2, 4), (0, 1), (3, 5), (2, 6), (2, 3), (3, 6), (4, 5), (1, 4), (1, 3), (3, 4))
"""Exchanges after which the fourth of seven values is their median (the network known as opt_med7).
Seven encoder positions is openai/whisper's width; whole-tensor exchanges are many times faster than sorting."""


_ANTICIPATION_SECONDS = 0.04
"""By how much the attention runs ahead of the voice, in the median over read and spoken English."""

_LATER_SHARE = 0.4
"""Attention passes to a word before it is said, not after, so a word that seems to be on both sides of
a pause is said after it, even if only this much of what lies before lies there."""

_PAUSE_MARGIN_SECONDS = 0.5
_FOREIGN_SECONDS = 0.4
"""Overlap up to which a stretch of speech may belong to the segment next door."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text between two timestamps. Times are seconds from the start of the window."""

    start: float
    end: float
    tokens: tuple[int, ...]
    """With its timestamp tokens, as sampled."""


def cut_pieces(tokens: Sequence[int], tokenizer: Tokenizer, window_seconds: float) -> tuple[list[Piece], float]:
    """Pieces of a window, and how far (in seconds) the window was read.

    A pair of timestamps closes one piece and opens the next. What follows the last pair
    without a closing timestamp was left unfinished: it is dropped and the reading ends at
    the pair, so that the rest of the window is decoded again. Where the window ends with a
    single timestamp, reading ends there; the caller decides whether more speech follows.
    Text without any closing timestamp counts as the whole window.
    """
    begin = tokenizer.timestamp_begin
    stamped = [token >= begin for token in tokens]
    pairs = [i for i in range(1, len(tokens)) if stamped[i - 1] and stamped[i]]
    closed = len(tokens) >= 2 and stamped[-1] and not stamped[-2]
    bounds = [0, *pairs, *([len(tokens)] if closed or not pairs else [])]
    pieces: list[Piece] = []
    for first, last in itertools.pairwise(bounds):
        run = tuple(tokens[first:last])
        if all(token >= tokenizer.eot for token in run):
            continue
        start = tokenizer.timestamp(run[0]) if run[0] >= begin else 0.0
        end = tokenizer.timestamp(run[-1]) if run[-1] >= begin else window_seconds
        pieces.append(Piece(min(start, window_seconds), min(max(start, end), window_seconds), run))
    last_stamp = tokens[bounds[-1] - 1] if tokens and stamped[bounds[-1] - 1] else None
    # A lone opening timestamp with nothing after it says that there is nothing to read.
    read = window_seconds if last_stamp is None or not pieces else tokenizer.timestamp(last_stamp)
    return pieces, min(read, window_seconds)


def token_times(attention: torch.Tensor) -> npt.NDArray[np.float64]:
    """Boundaries of tokens in seconds, ``(n_tokens + 1,)``: token ``j`` lies between ``j`` and ``j + 1``.

    ``attention``: softmaxed weights ``(n_heads, n_tokens + 1, n_positions)`` of the steps
    that predict each text token and, last, the end of text.
    """
    std, mean = torch.std_mean(attention, dim=-2, keepdim=True, unbiased=False)
    weights = _median_filter((attention - mean) / std.clamp_min(1e-8))
    rows, columns = warp(-weights.mean(dim=0).double().cpu().numpy())
    jumps = np.diff(rows, prepend=-1).astype(bool)
    times: npt.NDArray[np.float64] = columns[jumps] * POSITION_SECONDS
    # A word that begins with the window has nothing to run ahead of.
    return np.where(columns[jumps] > 0, times + _ANTICIPATION_SECONDS, times)


def _median_filter(x: torch.Tensor) -> torch.Tensor:
    """Median of seven over the last dimension, reflected at its ends; too short an input is left alone."""
    n = x.shape[-1]
    if n <= 3:
        return x
    padded = functional.pad(x, (3, 3), mode="reflect")
    values = [padded[..., shift : shift + n] for shift in range(7)]
    for low, high in _MEDIAN_OF_7:
        values[low], values[high] = torch.minimum(values[low], values[high]), torch.maximum(values[low], values[high])
    return values[3]


def warp(cost: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cheapest monotonic path through ``cost (n, m)``: the row and column of each of its cells.

    Moves go down, right or both. Cells of one anti-diagonal do not depend on each other, so
    each is one vector operation; the matrix is kept skewed so that they are contiguous.
    """
    n, m = cost.shape
    skewed = np.full((n + m - 1, n), np.inf)
    for row in range(n):
        skewed[row : row + m, row] = cost[row]
    moves = np.zeros((n + m - 1, n), dtype=np.int8)
    previous = np.full(n, np.inf)
    before = np.full(n, np.inf)
    for diagonal in range(n + m - 1):
        if diagonal == 0:
            best = np.zeros(n)
            best[1:] = np.inf
        else:
            up = np.concatenate(([np.inf], previous[:-1]))
            both = np.concatenate(([np.inf], before[:-1]))
            choices = np.stack((both, up, previous))
            move = choices.argmin(axis=0)
            moves[diagonal] = move
            best = np.take_along_axis(choices, move[None], axis=0)[0]
        before, previous = previous, best + skewed[diagonal]
    row, column = n - 1, m - 1
    path = [(row, column)]
    while row or column:
        move = moves[row + column, row]
        row -= move != 2
        column -= move != 1
        path.append((row, column))
    rows, columns = np.array(path[::-1]).T
    return rows, columns


def words_of(
    tokens: Sequence[int],
    boundaries: npt.NDArray[np.float64],
    probabilities: Sequence[float],
    tokenizer: Tokenizer,
    language: str | None,
    prepend: str,
    append: str,
) -> list[tuple[Word, int]]:
    """Words of a window's text tokens with times from its start, and how many tokens each has.

    ``boundaries`` as :func:`token_times` gives them; ``probabilities`` one for each token.
    Punctuation is joined to its word: ``prepend`` to the next, ``append`` to the one before.
    """
    texts, groups = tokenizer.split_words(tokens, language)
    words: list[tuple[Word, int]] = []
    place = 0
    for text, group in zip(texts, groups, strict=True):
        stop = place + len(group)
        probability = float(np.mean(probabilities[place:stop]))
        words.append((Word(text, float(boundaries[place]), float(boundaries[stop]), probability), len(group)))
        place = stop
    return _merge_punctuation(words, prepend, append)


def _merge_punctuation(words: list[tuple[Word, int]], prepend: str, append: str) -> list[tuple[Word, int]]:
    merged: list[tuple[Word, int]] = []
    opening: tuple[Word, int] | None = None
    for word, n_tokens in words:
        current, count = word, n_tokens
        text = word.word
        if opening is not None:
            current = replace(word, word=opening[0].word + text)
            count += opening[1]
            opening = None
        if text.startswith(" ") and text.strip() in prepend and text.strip():
            opening = (current, count)
            continue
        if merged and text in append and not merged[-1][0].word.endswith(" ") and current is word:
            last, last_count = merged[-1]
            merged[-1] = (replace(last, word=last.word + text), last_count + count)
            continue
        merged.append((current, count))
    if opening is not None:
        merged.append(opening)
    return merged


class Spans:
    """Rising, disjoint stretches of time (seconds), found by place without walking the whole file's."""

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        self.all = list(spans)
        self._starts = [low for low, _ in self.all]
        self._ends = [high for _, high in self.all]

    def near(self, start: float, end: float) -> list[tuple[float, float]]:
        """Those that overlap ``[start, end]``, whole."""
        return self.all[bisect_right(self._ends, start) : bisect_left(self._starts, end)]

    def seconds(self, start: float, end: float) -> float:
        """How much of ``[start, end]`` they cover."""
        return sum(min(high, end) - max(low, start) for low, high in self.near(start, end))

    def after(self, at: float) -> float | None:
        """Where the first stretch that reaches beyond ``at`` begins, or ``at`` itself if that lies inside."""
        place = bisect_right(self._ends, at)
        return max(self._starts[place], at) if place < len(self.all) else None

    def pauses(self, start: float, end: float) -> list[tuple[float, float]]:
        """The gaps in ``[start, end]`` that have half a second of them on either side inside."""
        return [
            (low, high)
            for (_, low), (high, _) in itertools.pairwise(self.near(start, end))
            if min(self.seconds(start, low), self.seconds(high, end)) >= _PAUSE_MARGIN_SECONDS
        ]

    def silence(self, start: float, end: float, total: float) -> float:
        """Length of the silence around an interval that overlaps none of them, in a file of ``total`` seconds."""
        place = bisect_right(self._ends, start)
        before = self._ends[place - 1] if place else 0.0
        after = self._starts[place] if place < len(self.all) else total
        return max(after, end) - before

    def without(self, covered: Spans) -> list[tuple[float, float]]:
        """The parts of these that no stretch of ``covered`` touches."""
        left: list[tuple[float, float]] = []
        for low, high in self.all:
            start = low
            for first, last in covered.near(low, high):
                if first > start:
                    left.append((start, first))
                start = max(start, last)
            if start < high:
                left.append((start, high))
        return left


def clip_word(start: float, end: float, spans: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Move a word into one stretch of speech: the one it overlaps most, or a later one if that is not much less.

    ``spans`` are rising and disjoint. A word that overlaps none is left alone: the detector
    may have missed quiet speech.
    """
    best: tuple[float, float] | None = None
    most = 0.0
    for low, high in spans:
        shared = min(end, high) - max(start, low)
        if shared > 0 and shared >= _LATER_SHARE * most:
            best, most = (low, high), shared
    return (start, end) if best is None else (max(start, best[0]), min(end, best[1]))


def clip_segment(start: float, end: float, spans: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Draw a segment's ends in to the speech between them.

    Whisper rounds segment times, so the tail of the last segment's speech, or the beginning
    of the next one's, may lie inside: a span of which only a small part does is another's.
    """
    inside = [(low, high) for low, high in spans if low < end and high > start]
    own = [
        (low, high)
        for low, high in inside
        if (shared := min(end, high) - max(start, low)) >= _FOREIGN_SECONDS or shared >= 0.5 * (high - low)
    ]
    kept = own or inside
    return (start, end) if not kept else (max(start, kept[0][0]), min(end, kept[-1][1]))
