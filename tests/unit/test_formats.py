"""formats.py against files that openai/whisper's own writers wrote, and against hostile text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import srt
import webvtt
from hypothesis import given
from hypothesis import strategies as st

from whisper_worker.errors import InvalidInput
from whisper_worker.formats import SubtitleLayout, write
from whisper_worker.types import FORMATS, Segment, Transcript, Word

GOLDEN = Path(__file__).parents[1] / "golden" / "formats"

LAYOUTS = {
    "plain": SubtitleLayout(),
    "words": SubtitleLayout(),
    "lines": SubtitleLayout(max_line_width=32, max_line_count=2),
    "width": SubtitleLayout(max_line_width=24),
    "count": SubtitleLayout(max_line_count=1),
    "per_line": SubtitleLayout(max_words_per_line=4),
    "highlight": SubtitleLayout(highlight_words=True),
    "highlight_lines": SubtitleLayout(highlight_words=True, max_line_width=20, max_line_count=1),
}
GOLDEN_FILES = sorted(path.name for path in GOLDEN.iterdir())


def recorded(name: str) -> Transcript:
    result = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    segments = []
    for entry in result["segments"]:
        words = entry.pop("words", None)
        segments.append(
            Segment(
                **{**entry, "tokens": tuple(entry["tokens"])},
                words=None if words is None else tuple(Word(**word) for word in words),
            )
        )
    return Transcript(
        text=result["text"],
        language=result["language"],
        language_probability=1.0,
        duration=80.0,
        segments=tuple(segments),
    )


def segment(text: str, start: float = 0.0, end: float = 1.0, words: tuple[Word, ...] | None = None) -> Segment:
    return Segment(
        id=0,
        start=start,
        end=end,
        text=text,
        avg_logprob=-0.1,
        no_speech_prob=0.0,
        compression_ratio=1.0,
        temperature=0.0,
        words=words,
    )


def transcript(*segments: Segment) -> Transcript:
    text = "".join(part.text for part in segments)
    return Transcript(text=text, language="en", language_probability=1.0, duration=9.0, segments=segments)


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_equals_what_openai_whisper_writes(name: str) -> None:
    stem, _, fmt = name.partition(".")
    source = recorded("plain" if stem == "plain" else "words")
    assert write(source, fmt, LAYOUTS[stem]) == (GOLDEN / name).read_text(encoding="utf-8")


def test_every_layout_has_a_golden_file() -> None:
    assert {name.partition(".")[0] for name in GOLDEN_FILES} == set(LAYOUTS)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_transcript_without_segments_can_be_written(fmt: str) -> None:
    empty = {"txt": "", "srt": "", "vtt": "WEBVTT\n\n", "tsv": "start\tend\ttext\n"}
    expected = empty.get(fmt, '{"text": "", "segments": [], "language": "en"}')
    assert write(transcript(), fmt) == expected


def test_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"'docx'.*txt, vtt, srt, tsv, json"):
        write(transcript(), "docx")


def test_hours_appear_in_vtt_only_when_needed_and_in_srt_always() -> None:
    late = transcript(segment("x", start=3599.9996, end=7322.5))
    assert "01:00:00.000 --> 02:02:02.500" in write(late, "vtt")
    assert "01:00:00,000 --> 02:02:02,500" in write(late, "srt")
    early = transcript(segment("x", start=1.0, end=2.0))
    assert "00:01.000 --> 00:02.000" in write(early, "vtt")
    assert "00:00:01,000 --> 00:00:02,000" in write(early, "srt")


def test_vtt_escapes_markup_and_srt_breaks_up_the_arrow() -> None:
    nasty = transcript(segment(" AT&T <b>says</b> 00:01 --> 00:02"))
    assert "AT&amp;T &lt;b&gt;says&lt;/b&gt; 00:01 --&gt; 00:02\n" in write(nasty, "vtt")
    assert "AT&T <b>says</b> 00:01 -> 00:02\n" in write(nasty, "srt")


def test_an_arrow_made_of_two_words_is_broken_up_too() -> None:
    words = (Word("--", 0.0, 0.5, 1.0), Word(">", 0.5, 1.0, 1.0))
    assert write(transcript(segment("-->", words=words)), "srt").count("-->") == 1
    assert write(transcript(segment("-->", words=words)), "vtt").count("-->") == 1


def test_segments_without_words_keep_their_text_among_segments_with_words() -> None:
    mixed = transcript(segment(" one", words=(Word(" one", 0.0, 1.0, 1.0),)), segment(" two three", 1.0, 2.0))
    assert (
        write(mixed, "srt")
        == "1\n00:00:00,000 --> 00:00:01,000\none\n\n2\n00:00:01,000 --> 00:00:02,000\ntwo three\n\n"
    )


def test_highlighting_escapes_the_words_and_not_its_own_marks() -> None:
    words = (Word(" <i>", 0.0, 0.5, 1.0), Word(" two", 0.5, 1.0, 1.0))
    written = write(transcript(segment(" <i> two", words=words)), "vtt", SubtitleLayout(highlight_words=True))
    assert "<u>&lt;i&gt;</u> two" in written
    assert "&lt;i&gt; <u>two</u>" in written


def parse_srt(text: str) -> list[tuple[int, int, str]]:
    """A strict reader: numbers that count up, one blank line between cues, times that move forward."""
    cues = []
    if not text:
        return cues
    assert text.endswith("\n\n")
    for expected, block in enumerate(text[:-2].split("\n\n"), start=1):
        number, times, *lines = block.split("\n")
        assert number == str(expected)
        match = re.fullmatch(r"(\d\d):(\d\d):(\d\d),(\d{3}) --> (\d\d):(\d\d):(\d\d),(\d{3})", times)
        assert match, times
        h1, m1, s1, ms1, h2, m2, s2, ms2 = map(int, match.groups())
        start, end = ((h1 * 60 + m1) * 60 + s1) * 1000 + ms1, ((h2 * 60 + m2) * 60 + s2) * 1000 + ms2
        assert lines and all(line.strip() and "-->" not in line for line in lines)
        cues.append((start, end, "\n".join(lines)))
    return cues


def parse_vtt(text: str) -> list[tuple[str, str]]:
    header, _, rest = text.partition("\n\n")
    assert header == "WEBVTT"
    cues = []
    for block in rest.removesuffix("\n\n").split("\n\n") if rest.strip() else []:
        times, *lines = block.split("\n")
        assert re.fullmatch(r"(\d\d:)?\d\d:\d\d\.\d{3} --> (\d\d:)?\d\d:\d\d\.\d{3}", times), times
        assert lines and all(
            "-->" not in line and not re.search(r"&(?!amp;|lt;|gt;)|<(?!/?u>)", line) for line in lines
        )
        cues.append((times, "\n".join(lines)))
    return cues


hostile_text = st.text(alphabet=st.sampled_from(list("ab ->&<\n\r\t\x00\x0b\x1c\x85\u2028é字")), max_size=20)


@given(
    texts=st.lists(hostile_text, max_size=4),
    with_words=st.booleans(),
    layout=st.builds(
        SubtitleLayout,
        max_line_width=st.sampled_from([None, 1, 6]),
        max_line_count=st.sampled_from([None, 1, 2]),
        max_words_per_line=st.sampled_from([None, 1, 2]),
        highlight_words=st.booleans(),
        natural_breaks=st.booleans(),
        max_chars_per_second=st.sampled_from([None, 2.0, 20.0]),
    ),
)
def test_no_text_breaks_a_strict_parser(texts: list[str], with_words: bool, layout: SubtitleLayout) -> None:
    segments = []
    for index, text in enumerate(texts):
        pieces = re.findall(r"\s*\S+", text)
        words = tuple(Word(piece, index + n / 10, index + n / 10, 1.0) for n, piece in enumerate(pieces))
        segments.append(segment(text, index, index + 1, words if with_words and words else None))
    whole = transcript(*segments)
    cues = parse_srt(write(whole, "srt", layout))
    assert all(start < end for start, end, _ in cues)
    vtt = write(whole, "vtt", layout)
    assert len(parse_vtt(vtt)) == len(cues)
    others = [(cue.start, cue.end, cue.content) for cue in srt.parse(write(whole, "srt", layout))]
    assert others == [(timedelta(milliseconds=start), timedelta(milliseconds=end), text) for start, end, text in cues]
    assert len(webvtt.from_string(vtt)) == len(cues)
    assert len(write(whole, "txt").split("\n")) == len(texts) + 1
    rows = write(whole, "tsv").split("\n")
    assert len(rows) == len(texts) + 2
    assert all(row.count("\t") == 2 for row in rows[:-1])


def test_json_keeps_the_keys_of_openai_whisper_and_nothing_else() -> None:
    flagged = replace(segment(" é"), language="fr", flags=("loop",))
    written = write(transcript(flagged), "json")
    assert "\\u00e9" in written
    assert set(json.loads(written)["segments"][0]) == {
        "id",
        "seek",
        "start",
        "end",
        "text",
        "tokens",
        "temperature",
        "avg_logprob",
        "compression_ratio",
        "no_speech_prob",
    }


def spoken(text: str, pace: float = 0.3, start: float = 0.0, pauses: dict[str, float] | None = None) -> Segment:
    """A segment whose words follow each other every ``pace`` seconds; ``pauses``: silence behind a word."""
    words = []
    at = start
    for word in text.split():
        words.append(Word(f" {word}", round(at, 3), round(at + pace, 3), 1.0))
        at += pace + (pauses or {}).get(word, 0.0)
    return segment(f" {text}", start, words[-1].end, tuple(words))


def natural(*segments: Segment, **options: Any) -> list[str]:
    whole = replace(transcript(*segments), duration=1000.0)
    return [text for _, _, text in parse_srt(write(whole, "srt", SubtitleLayout(natural_breaks=True, **options)))]


def test_natural_cues_end_with_sentences_across_segments() -> None:
    first = spoken("So that was the plan. And then it was time")
    second = spoken("to go home, where the others had waited all day.", start=3.0)
    assert natural(first, second) == [
        "So that was the plan.",
        "And then it was time to go home,\nwhere the others had waited all day.",
    ]


def test_natural_lines_break_at_clauses_and_are_alike_in_length() -> None:
    assert natural(spoken("Ask not what your country can do for you, but what you can do for it.")) == [
        "Ask not what your country can do for you,\nbut what you can do for it."
    ]
    assert natural(spoken("one two three four five six seven eight nine ten eleven")) == [
        "one two three four five six\nseven eight nine ten eleven"
    ]


def test_natural_cues_keep_to_the_width_the_lines_and_the_seconds() -> None:
    text = " ".join(f"word{n % 7}" for n in range(100))
    for width, count in ((42, 2), (20, 3), (12, 1)):
        cues = natural(spoken(text), max_line_width=width, max_line_count=count)
        assert all(len(line) <= width for cue in cues for line in cue.split("\n"))
        assert all(len(cue.split("\n")) <= count for cue in cues)
        assert " ".join(" ".join(cues).split()) == text
    slow = natural(spoken(text, pace=2.0))
    assert max(len(cue.split()) for cue in slow) == 3
    paused = natural(spoken("before it after it", pauses={"it": 4.0}))
    assert paused == ["before it", "after it"]


def test_a_word_longer_than_the_line_stands_alone() -> None:
    assert natural(spoken("a Donaudampfschifffahrt b"), max_line_width=8, max_line_count=1) == [
        "a",
        "Donaudampfschifffahrt",
        "b",
    ]


def test_natural_breaks_of_a_language_without_blanks() -> None:
    words = tuple(
        Word(sign, index / 5, index / 5 + 0.2, 1.0) for index, sign in enumerate("今日は晴れです。明日は雨です。")
    )
    whole = segment("今日は晴れです。明日は雨です。", 0.0, 3.0, words)
    assert natural(whole, max_line_width=9, max_line_count=1) == ["今日は晴れです。", "明日は雨です。"]


def test_a_reading_speed_lets_a_cue_stand_until_the_next_one() -> None:
    quick, late = segment(" twenty characters...", 0.0, 0.5), segment(" far away", 10.0, 10.1)
    whole = replace(transcript(quick, late), duration=10.3)

    def times(**options: Any) -> list[tuple[int, int]]:
        return [(start, end) for start, end, _ in parse_srt(write(whole, "srt", SubtitleLayout(**options)))]

    assert times() == [(0, 500), (10_000, 10_100)]
    assert times(max_chars_per_second=10.0) == [(0, 2000), (10_000, 10_300)], "the last one ends with the recording"
    assert times(max_chars_per_second=1.0) == [(0, 10_000), (10_000, 10_300)], "never into the next one"
    assert times(max_chars_per_second=100.0) == [(0, 500), (10_000, 10_100)], "never shorter"


def test_an_initial_ends_no_sentence() -> None:
    """Two names of the same length around the only good place to break."""
    cues = natural(spoken("It was written by J. Smith. He lives here."), max_line_width=30, max_line_count=1)
    assert cues == ["It was written by J. Smith.", "He lives here."]
