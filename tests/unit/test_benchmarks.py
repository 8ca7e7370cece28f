"""The measuring tools' own arithmetic: a wrong yardstick would bless a wrong engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import awkward  # noqa: E402
import common  # noqa: E402
import times  # noqa: E402
import vary  # noqa: E402
from common import Entry, Span  # noqa: E402


def entry(
    *,
    text: str = "alpha bravo charlie delta echo foxtrot",
    expect: str | None = None,
    note: str = "",
    language: str | None = "en",
    duration: float = 10.0,
    segments: tuple[Span, ...] = (),
    words: tuple[Span, ...] = (),
) -> Entry:
    return Entry("a.wav", Path("/somewhere/a.wav"), text, language, duration, "c", expect, note, segments, words)


def reply(text: str, start: float = 0.0, end: float = 2.0, **more: object) -> common.Reply:
    segments = [{"start": start, "end": end, "text": text}] if text else []
    return {"text": text, "segments": segments, "duration": 10.0, "warnings": [], **more}


# -- scores


def test_errors_are_counted_after_whispers_normalisation() -> None:
    assert common.score("mister brown's 20 dogs", "Mr. Brown's twenty dogs!", "en").errors == 0
    counted = common.score("a quick brown fox jumps", "a quick fox jumps over", "en")
    assert (counted.reference, counted.substitutions, counted.deletions, counted.insertions) == (5, 0, 1, 1)
    assert counted.error_rate == 40.0


def test_languages_without_word_breaks_are_scored_by_character() -> None:
    counted = common.score("今日は 晴れです。", "今日は雨です", "ja")
    assert counted.reference == 7
    assert counted.errors == 2


def test_scores_add_up_over_files() -> None:
    total = common.score("alpha bravo", "alpha", "en") + common.score(
        "charlie delta", "charlie delta echo foxtrot", "en"
    )
    assert total.error_rate == 75.0
    assert total.percent(total.deletions) == 25.0


def test_a_lost_file_has_all_its_words_missing() -> None:
    counted = common.score("alpha bravo charlie", "", "en")
    assert (counted.deletions, counted.error_rate) == (3, 100.0)


def test_bracketed_sounds_are_no_words() -> None:
    assert common.count_words("[Music] (wind blowing)") == 0
    assert common.count_words(" Thank you.") == 2


# -- manifests


def test_the_sample_manifest_names_files_that_are_there() -> None:
    entries = common.read_manifest(ROOT / "tests/data/speech.jsonl")
    assert all(item.path.is_file() for item in entries)
    assert sum(item.silent for item in entries) == 1
    assert sum(item.scored for item in entries) == len(entries) - 1


def test_a_text_file_stands_in_for_a_missing_text(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("all of it", encoding="utf-8")
    line = {"file": "a.wav", "text_file": "long.txt", "language": "en", "category": "x", "duration_s": 1}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert common.read_manifest(tmp_path / "manifest.jsonl")[0].text == "all of it"


@pytest.mark.parametrize(
    ("expect", "text", "language", "scored", "silent"),
    [
        (None, "words", "en", True, False),
        ("ok", "words", "en", True, False),
        ("ok_partial", "words", "en", False, False),
        ("no_crash", "words", "multi", False, False),
        ("empty", "", None, False, True),
        ("error", "", None, False, False),
        (None, "", None, False, True),
    ],
)
def test_which_entries_are_scored(
    expect: str | None, text: str, language: str | None, scored: bool, silent: bool
) -> None:
    item = entry(expect=expect, text=text, language=language)
    assert (item.scored, item.silent) == (scored, silent)


# -- awkward files


@pytest.mark.parametrize(
    ("expect", "answer", "fine"),
    [
        ("ok", reply("alpha bravo charlie delta echo foxtrot"), True),
        ("ok", reply("alpha bravo charlie delta hotel hotel"), True),
        ("ok", reply("alpha bravo charlie hotel hotel hotel"), False),
        ("ok", reply(""), False),
        ("ok", {"error": {"code": "DECODE", "message": "Not audio."}}, False),
        ("ok_partial", reply("alpha bravo charlie"), True),
        ("ok_partial", reply("alpha"), False),
        ("ok_partial", reply("alfa brava charlie"), True),
        ("ok_partial", reply("alpha bravo bla bla bla bla"), False),
        ("ok_partial", reply("thank you for watching this video"), False),
        ("ok_or_documented", reply("", warnings=["Only alpha channel was heard."]), True),
        ("ok_or_documented", reply(""), False),
        ("ok_or_clean_error", {"error": {"code": "DECODE", "message": "Not audio."}}, True),
        ("ok_or_clean_error", {"error": {"code": "INTERNAL", "message": "A defect."}}, False),
        ("empty", reply(""), True),
        ("empty", reply("[Music]"), True),
        ("empty", reply("Thank you."), False),
        ("empty", {"error": {"code": "DECODE", "message": "Not audio."}}, False),
        ("empty_or_error", {"error": {"code": "DECODE", "message": "Not audio."}}, True),
        ("error", {"error": {"code": "DECODE", "message": "Not audio."}}, True),
        ("error", {"error": {"code": "DECODE", "message": "a.wav is no audio."}}, False),
        ("error", reply(""), False),
        ("no_crash", reply("anything at all"), True),
        ("no_crash", {"crash": "ValueError: oh"}, False),
        ("no_crash", {"error": {"code": "INTERNAL", "message": "A defect."}}, False),
    ],
)
def test_what_counts_as_expected(expect: str, answer: common.Reply, fine: bool) -> None:
    assert (awkward.complaint(entry(expect=expect), answer) is None) is fine


def test_a_note_may_tolerate_more_errors() -> None:
    answer = reply("alpha bravo charlie hotel hotel hotel")
    assert awkward.complaint(entry(expect="ok", note="noise; a few extra errors tolerable"), answer) is None


def test_speech_must_be_where_it_is_in_the_recording() -> None:
    item = entry(expect="ok", segments=(Span(5.0, 7.0, "alpha bravo charlie delta echo foxtrot"),))
    assert awkward.complaint(item, reply(item.text, start=4.5, end=7.2)) is None
    assert "starts" in str(awkward.complaint(item, reply(item.text, start=0.0, end=7.0)))
    assert "ends" in str(awkward.complaint(item, reply(item.text, start=5.0, end=9.5)))


def test_times_must_lie_inside_the_recording() -> None:
    item = entry(expect="ok")
    assert "recording" in str(awkward.complaint(item, reply(item.text, end=10.5)))
    assert "rise" in str(awkward.complaint(item, reply(item.text, start=3.0, end=2.0)))


# -- times


def test_words_are_matched_by_place_not_by_spelling_alone() -> None:
    reference = [times.Mark(word, number, number + 0.5) for number, word in enumerate("the cat and the dog".split())]
    heard = [times.Mark(word, number, number + 0.5) for number, word in enumerate("cat and The dog.".split())]
    pairs = [(true.start, found.start) for true, found in times.matched(reference, heard, "en")]
    assert pairs == [(1, 0), (2, 1), (3, 2), (4, 3)]


def test_words_that_normalise_to_several_tokens_stay_whole() -> None:
    reference = [times.Mark("don't", 0.0, 0.4), times.Mark("go", 0.4, 0.8)]
    heard = [times.Mark(" Do", 0.1, 0.2), times.Mark(" not", 0.2, 0.4), times.Mark(" go.", 0.5, 0.9)]
    assert [found.text for _, found in times.matched(reference, heard, "en")] == [" go."]


def test_errors_are_taken_at_words_and_at_edges_of_segments() -> None:
    words = (Span(1.0, 1.4, "hello"), Span(1.5, 2.0, "world"))
    item = entry(text="hello world", segments=(Span(0.9, 2.1, "hello world", words),))
    heard = {"start": 1.2, "end": 2.0, "text": " Hello world."}
    heard["words"] = [{"word": " Hello", "start": 1.1, "end": 1.4}, {"word": " world.", "start": 1.5, "end": 1.8}]
    errors = times.Errors()
    times.add_errors(errors, item, {"segments": [heard]})
    assert errors.seconds["word_start"] == pytest.approx([0.1, 0.0])
    assert errors.seconds["word_end"] == pytest.approx([0.0, 0.2])
    assert errors.seconds["segment_start"] == pytest.approx([0.3])
    assert errors.seconds["segment_end"] == pytest.approx([0.1])
    assert errors.to_dict()["word_end"] == {"median": 0.1, "p95": 0.19, "n": 2}


def test_times_that_run_backwards_or_outside_are_counted() -> None:
    spans = [{"start": 0.0, "end": 2.0}, {"start": 1.0, "end": 3.0}, {"start": 4.0, "end": 3.5}, {"start": 5, "end": 9}]
    assert times.violations(spans, 8.0) == 3
    assert times.violations([{"start": 0.0, "end": 2.0}, {"start": 2.0, "end": 8.03}], 8.0) == 0


# -- versions of recordings ----------------------------------------------------------------


def test_the_first_version_is_the_recording_itself_and_the_others_are_hardly_different() -> None:
    rng = np.random.default_rng(1)
    recording = rng.integers(-32768, 32768, 16000).astype(np.int16)
    first, *others = (version.of(recording, seed=3) for version in vary.VERSIONS)
    assert np.array_equal(first, recording)
    for version, heard in zip(vary.VERSIONS[1:], others, strict=True):
        lead = len(heard) - len(recording)
        assert lead == round(version.lead_s * 16000) > 0
        likeness = np.corrcoef(heard[lead:].astype(float), recording.astype(float))[0, 1]
        assert 0.95 < likeness < 1  # another level alone rounds otherwise; peaks are clipped
        assert np.array_equal(heard, version.of(recording, seed=3))
        silent = not heard[:lead].any()
        assert silent is (version.noise_dbfs is None)
