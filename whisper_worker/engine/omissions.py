"""What may a window's text have left out, and where is the window to be cut to hear it again?

Whisper writes a sentence that is said twice once, more often than not, with times that cover both.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from whisper_worker.audio.windows import Window, cut_at
from whisper_worker.engine.timestamps import Piece, Spans
from whisper_worker.types import SAMPLE_RATE

_LEAST_LETTERS_PER_SECOND = 9.0
"""Text that has fewer for a second of speech may leave some of it out. Of 800 pieces of read speech and prompts in
eight languages about one in a hundred had; of 58 sentences that were said twice and written once, 57."""
_LETTERS_PER_SECOND = 12.0
"""Of plain speech, at least."""
_LEAST_SPARSE_SECONDS = 2.5
"""Speech too short to tell a slow voice from a lost word."""

_MORE_LETTERS = 0.4
"""Share of a piece's letters by which its window's text must grow for the parts to be believed: of a sentence that
was said three times and written twice, half of the piece is missing."""
_LEAST_MORE_LETTERS = 8.0
"""Less than this may be another spelling."""

_EDGE_SECONDS = 0.5
"""How far from a pause the model may put the beginning or the end of a piece."""

_SYLLABLES = re.compile(
    "[\u1200-\u137f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Characters that stand for a syllable or more."""


@dataclass(frozen=True, slots=True)
class Hearing:
    """A window in parts, to be heard once more."""

    parts: tuple[Window, ...]
    least_letters: float
    """What the parts' text must come to, or the window's stands."""


def again(window: Window, read: float, pieces: Sequence[Piece], texts: Sequence[str], sure: Spans) -> Hearing | None:
    """How to hear a window again of which a piece has less text than its speech calls for, if one has.

    ``read``: seconds of the window up to where its text ends; what the parts may say of the rest is no gain.
    ``texts`` are those of the pieces; ``sure`` is the recording's detected speech, in its seconds. Of several such
    pieces the sparsest counts. The window is cut in its longest pause and, so that no part holds a repetition
    again, in those where it begins and ends.
    """
    offset = window.start / SAMPLE_RATE
    sparse = []
    for piece, text in zip(pieces, texts, strict=True):
        start, end = offset + piece.start, offset + piece.end
        seconds = sure.seconds(start, end)
        if is_sparse(text, seconds) and sure.pauses(start, end):
            sparse.append((letters(text) / seconds, start, end))
    if not sparse:
        return None
    density, start, end = min(sparse)
    cuts = {max(sure.pauses(start, end), key=lambda pause: pause[1] - pause[0])}
    around = sure.pauses(offset, window.stop / SAMPLE_RATE)
    for edge in (start, end):
        near = [pause for pause in around if _distance(pause, edge) <= _EDGE_SECONDS]
        cuts.update(sorted(near, key=lambda pause: _distance(pause, edge))[:1])
    pauses = [(round(low * SAMPLE_RATE), round(high * SAMPLE_RATE)) for low, high in sorted(cuts)]
    more = max(_LEAST_MORE_LETTERS, _MORE_LETTERS * density * sure.seconds(start, end))
    unread = _LETTERS_PER_SECOND * sure.seconds(offset + read, window.stop / SAMPLE_RATE)
    return Hearing(tuple(cut_at(window, pauses)), sum(map(letters, texts)) + more + unread)


def _distance(pause: tuple[float, float], at: float) -> float:
    return max(pause[0] - at, at - pause[1], 0.0)


def letters(text: str) -> float:
    """How much there is to say in a text, in letters of an alphabet: a Chinese character, a kana, a Korean or
    Ethiopic syllable counts as 2.5 of them, a digit as 4, since numbers are said in words."""
    n_syllables = len(_SYLLABLES.findall(text))
    # Vowels of Indian scripts and of Thai are marks upon their consonants.
    said = (c for c in text if c.isalnum() or unicodedata.category(c) in ("Mn", "Mc"))
    return sum(4.0 if c.isdigit() else 1.0 for c in said) + 1.5 * n_syllables


def is_sparse(text: str, speech_seconds: float) -> bool:
    """Whether a text is so short for its speech that some of it may have been left out."""
    return speech_seconds >= _LEAST_SPARSE_SECONDS and letters(text) < _LEAST_LETTERS_PER_SECOND * speech_seconds
