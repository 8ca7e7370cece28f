"""formats.py against files that openai/whisper's own writers wrote, and against hostile text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
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
    assert len(parse_vtt(write(whole, "vtt", layout))) == len(cues)
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
