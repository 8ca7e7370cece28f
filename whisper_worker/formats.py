"""A transcript as text: txt, vtt, srt, tsv and json, laid out as openai/whisper's writers do.

Where a text holds nothing special the result equals theirs byte for byte. It differs only
where theirs would not parse: line ends and control characters inside a text become one
blank, ``&``, ``<`` and ``>`` are escaped in WebVTT, ``-->`` is broken up in SubRip, cues
without text are left out, and a cue that lasts no time lasts a millisecond. Breaks at natural
places and a reading speed are ours, and off unless asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from whisper_worker.errors import InvalidInput
from whisper_worker.types import FORMATS, Segment, Transcript, Word

_UNPRINTABLE = re.compile("[\x00-\x08\x0a-\x1f\x7f\x85\u2028\u2029]+")
_LONG_PAUSE = 3.0
"""Seconds between the starts of two words that end a cue when lines are filled across segments."""

NATURAL_LINE_WIDTH = 42
NATURAL_LINE_COUNT = 2
"""What broadcasters' style guides agree on; they hold for natural breaks where nothing else is asked for."""
_LONGEST_CUE = 7.0
"""Seconds; with natural breaks only."""
_PAUSE = 0.5
"""Seconds of silence behind a word that make a good place to break."""
_SENTENCE_END = frozenset(".?!…。！？")
_CLAUSE_END = frozenset(",;:–—、，；：")
_CLOSING = "\"'”’»)]}」』"
_LINKS = frozenset("and but or nor so because that which who when where while if although".split())
"""Words that a line may well begin with."""


@dataclass(frozen=True, slots=True)
class SubtitleLayout:
    """How words are laid out in cues: openai/whisper's options of the same names.

    They need word times and act on vtt and srt alone. With both ``max_line_width``
    (characters) and ``max_line_count`` lines are filled across segments; otherwise each
    segment starts a new cue, and ``max_words_per_line`` splits it further.
    ``highlight_words`` writes a cue for every word, with that word underlined.

    ``natural_breaks`` ends cues and lines with sentences, clauses and pauses, across segments,
    and wins over ``max_words_per_line``. ``max_chars_per_second`` lets a cue stand until it can
    be read at that speed, but never into the next one; it needs no word times, and does nothing
    beside ``highlight_words``.
    """

    max_line_width: int | None = None
    max_line_count: int | None = None
    max_words_per_line: int | None = None
    highlight_words: bool = False
    natural_breaks: bool = False
    max_chars_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class _Cue:
    start: int
    """Milliseconds."""
    end: int
    pieces: tuple[str, ...]
    """Text in pieces, blanks and line breaks included; they are escaped one by one."""
    marked: int | None = None
    """Index of the piece to underline."""


def write(transcript: Transcript, fmt: str, layout: SubtitleLayout | None = None) -> str:
    """The transcript in one of :data:`FORMATS`.

    Subtitles are made of words wherever the transcript has them, of segments elsewhere.
    Raises :class:`InvalidInput` for a format it does not know.
    """
    layout = layout or SubtitleLayout()
    if fmt == "txt":
        return "".join(f"{_one_line(segment.text)}\n" for segment in transcript.segments)
    if fmt == "vtt":
        return _vtt(_cues(transcript, layout))
    if fmt == "srt":
        return _srt(_cues(transcript, layout))
    if fmt == "tsv":
        return _tsv(transcript.segments)
    if fmt == "json":
        return _json(transcript)
    raise InvalidInput(f"The format {fmt!r} is not known; use one of {', '.join(FORMATS)}.")


def timestamp(seconds: float) -> str:
    """``mm:ss.mmm``, with hours in front where there are any: what openai/whisper prints beside each line."""
    return _clock(_milliseconds(seconds), ".", hours=False)


def _vtt(cues: Iterable[_Cue]) -> str:
    blocks = ["WEBVTT\n"]
    for cue in cues:
        text = _cue_text(cue, _escape_vtt)
        blocks.append(f"{_clock(cue.start, '.', hours=False)} --> {_clock(cue.end, '.', hours=False)}\n{text}\n")
    return "\n".join(blocks) + "\n"


def _srt(cues: Iterable[_Cue]) -> str:
    blocks = []
    for number, cue in enumerate(cues, start=1):
        text = _cue_text(cue, str).replace("-->", "->")
        blocks.append(
            f"{number}\n{_clock(cue.start, ',', hours=True)} --> {_clock(cue.end, ',', hours=True)}\n{text}\n"
        )
    return "".join(f"{block}\n" for block in blocks)


def _tsv(segments: Iterable[Segment]) -> str:
    rows = ["start\tend\ttext"]
    for segment in segments:
        text = _one_line(segment.text).replace("\t", " ")
        rows.append(f"{_milliseconds(segment.start)}\t{_milliseconds(segment.end)}\t{text}")
    return "\n".join(rows) + "\n"


def _json(transcript: Transcript) -> str:
    segments = []
    for segment in transcript.segments:
        entry: dict[str, object] = {
            "id": segment.id,
            "seek": segment.seek,
            "start": segment.start,
            "end": segment.end,
            "text": segment.text,
            "tokens": list(segment.tokens),
            "temperature": segment.temperature,
            "avg_logprob": segment.avg_logprob,
            "compression_ratio": segment.compression_ratio,
            "no_speech_prob": segment.no_speech_prob,
        }
        if segment.words is not None:
            entry["words"] = [
                {"word": word.word, "start": word.start, "end": word.end, "probability": word.probability}
                for word in segment.words
            ]
        segments.append(entry)
    return json.dumps({"text": transcript.text, "segments": segments, "language": transcript.language})


def _cues(transcript: Transcript, layout: SubtitleLayout) -> Iterable[_Cue]:
    segments = transcript.segments
    if not any(segment.words for segment in segments):
        spoken = [(segment, text) for segment in segments if (text := _one_line(segment.text))]
        cues = [_cue(segment.start, segment.end, (text,)) for segment, text in spoken]
    else:
        grouped = (_natural_cues if layout.natural_breaks else _word_cues)(segments, layout)
        if layout.highlight_words:
            return (cue for words, pieces in grouped for cue in _highlighted(words, pieces))
        cues = [_cue(words[0].start, words[-1].end, pieces) for words, pieces in grouped]
    if layout.max_chars_per_second:
        return _readable(cues, layout.max_chars_per_second, _milliseconds(transcript.duration))
    return cues


def _readable(cues: list[_Cue], speed: float, limit: int) -> Iterator[_Cue]:
    """The cues, each standing for as long as reading it takes at ``speed`` characters a second, if there is room."""
    for cue, following in zip(cues, [*cues, None][1:], strict=True):
        wanted = cue.start + round(1000 * len("".join(cue.pieces)) / speed)
        room = limit if following is None else following.start
        yield replace(cue, end=max(cue.end, min(wanted, room)))


def _word_cues(
    segments: tuple[Segment, ...], layout: SubtitleLayout
) -> Iterator[tuple[tuple[Word, ...], tuple[str, ...]]]:
    """The words of each cue, and beside each word its text with the blank or line break before it."""
    width = layout.max_line_width or 1000
    count = layout.max_line_count or 0
    fill = bool(layout.max_line_width) and count > 0
    words: list[Word] = []
    pieces: list[str] = []
    room = width
    lines = 1
    previous: float | None = None
    for word, first_of_line in _words(segments, layout.max_words_per_line or 1000):
        text = _UNPRINTABLE.sub(" ", word.word)
        new_cue = bool(words) and first_of_line and not fill
        paused = fill and previous is not None and word.start - previous > _LONG_PAUSE
        if words and not new_cue and not paused and len(text) <= room:
            pieces.append(text)
            room -= len(text)
        else:
            text = text.strip()
            full = count > 0 and (paused or lines >= count)
            if words and (new_cue or full):
                yield tuple(words), tuple(pieces)
                words, pieces, lines = [], [], 1
            elif words:
                lines += 1
            pieces.append("\n" + text if words else text)
            room = width - len(text)
        words.append(word)
        previous = word.start
    if words:
        yield tuple(words), tuple(pieces)


def _words(segments: tuple[Segment, ...], per_line: int) -> Iterator[tuple[Word, bool]]:
    """Every word with text, and whether a line has to start with it; a segment without words counts as one."""
    for segment in segments:
        whole = Word(word=segment.text, start=segment.start, end=segment.end, probability=0.0)
        spoken = [word for word in segment.words or (whole,) if _one_line(word.word)]
        for index, word in enumerate(spoken):
            yield word, index % per_line == 0


def _natural_cues(
    segments: tuple[Segment, ...], layout: SubtitleLayout
) -> Iterator[tuple[tuple[Word, ...], tuple[str, ...]]]:
    """As :func:`_word_cues`, with cues and lines that end where the text does.

    The cues are those whose costs add up to the least (dynamic programming over the words).
    """
    width = layout.max_line_width or NATURAL_LINE_WIDTH
    count = layout.max_line_count or NATURAL_LINE_COUNT
    words = [word for word, _ in _words(segments, len(segments) + 1)]
    texts = [_UNPRINTABLE.sub(" ", word.word) for word in words]
    costs = _break_costs(words)
    best = [0.0, *[float("inf")] * len(words)]
    begins = [0] * (len(words) + 1)
    for first in range(len(words)):
        lines, room = 1, width
        for last in range(first, len(words)):
            text = texts[last] if last > first else texts[last].lstrip()
            if len(text) > room and last > first:
                lines, room, text = lines + 1, width, text.strip()
            room -= len(text)
            seconds = words[last].end - words[first].start
            silent = last > first and words[last].start - words[last - 1].end > _LONG_PAUSE
            if last > first and (lines > count or seconds > _LONGEST_CUE or silent):
                break
            # Each cue costs something, and one that flashes by costs more.
            cost = best[first] + 1.0 + costs[last] + max(0.0, 1.0 - seconds)
            if cost < best[last + 1]:
                best[last + 1], begins[last + 1] = cost, first
    ends = [len(words)]
    while ends[-1]:
        ends.append(begins[ends[-1]])
    for end, begin in zip(ends[-2::-1], ends[:0:-1], strict=True):
        yield tuple(words[begin:end]), _balanced(texts[begin:end], costs[begin:end], width, count)


def _break_costs(words: list[Word]) -> list[float]:
    """What it costs to break behind each word: nothing at the end of a sentence, most inside a phrase."""
    costs = []
    for word, following in zip(words, [*words, None][1:], strict=True):
        text = word.word.strip().rstrip(_CLOSING)
        initial = len(text) == 2 and text[0].isalpha() and text[1] == "."
        if following is None or (text[-1:] in _SENTENCE_END and not initial):
            costs.append(0.0)
        elif text[-1:] in _CLAUSE_END or following.start - word.end >= _PAUSE:
            costs.append(1.0)
        else:
            costs.append(2.5 if following.word.strip().lower() in _LINKS else 4.0)
    return costs


def _balanced(texts: list[str], costs: list[float], width: int, count: int) -> tuple[str, ...]:
    """The words of one cue in at most ``count`` lines of ``width``: as few as do, alike in length, well broken."""
    total = len("".join(texts).strip())
    for n_lines in range(1, count + 1):
        breaks = _line_breaks(texts, costs, width, n_lines, total / n_lines)
        if breaks is not None:
            break
    else:
        breaks = ()
    return tuple(
        ("\n" if index in breaks else "") + (text.strip() if index in breaks or not index else text)
        for index, text in enumerate(texts)
    )


def _line_breaks(
    texts: list[str], costs: list[float], width: int, n_lines: int, target: float
) -> tuple[int, ...] | None:
    """Indices of the words that begin the second line and those after it; None where ``n_lines`` do not hold all."""
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *[None] * len(texts)]
    for line in range(n_lines):
        reached: list[tuple[float, tuple[int, ...]] | None] = [None] * (len(texts) + 1)
        for begin, before in enumerate(best):
            if before is None:
                continue
            for end in range(begin + 1, len(texts) + 1):
                length = len("".join(texts[begin:end]).strip())
                if length > width and end > begin + 1:
                    break
                cost = before[0] + ((length - target) / width) ** 2 * 8 + (costs[end - 1] if end < len(texts) else 0.0)
                breaks = (*before[1], begin) if line else ()
                known = reached[end]
                if known is None or (cost, breaks) < known:
                    reached[end] = (cost, breaks)
        best = reached
    return None if best[-1] is None else best[-1][1]


def _highlighted(words: tuple[Word, ...], pieces: tuple[str, ...]) -> Iterator[_Cue]:
    shown_until = _milliseconds(words[0].start)
    for index, word in enumerate(words):
        start, end = _milliseconds(word.start), _milliseconds(word.end)
        if start > shown_until:
            yield _Cue(shown_until, start, pieces)
        yield _Cue(start, max(end, start + 1), pieces, marked=index)
        shown_until = end


def _cue(start: float, end: float, pieces: tuple[str, ...]) -> _Cue:
    begin = _milliseconds(start)
    return _Cue(begin, max(_milliseconds(end), begin + 1), pieces)


def _cue_text(cue: _Cue, escape: Callable[[str], str]) -> str:
    pieces = [escape(piece) for piece in cue.pieces]
    if cue.marked is not None:
        piece = pieces[cue.marked]
        bare = piece.lstrip()
        pieces[cue.marked] = f"{piece[: len(piece) - len(bare)]}<u>{bare}</u>"
    return "".join(pieces)


def _escape_vtt(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _one_line(text: str) -> str:
    return _UNPRINTABLE.sub(" ", text).strip()


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000.0)


def _clock(milliseconds: int, decimal_mark: str, *, hours: bool) -> str:
    minutes, rest = divmod(milliseconds, 60_000)
    whole_hours, minutes = divmod(minutes, 60)
    prefix = f"{whole_hours:02d}:" if hours or whole_hours else ""
    return f"{prefix}{minutes:02d}:{rest // 1000:02d}{decimal_mark}{rest % 1000:03d}"
