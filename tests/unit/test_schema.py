"""The common payload: what is taken, what is warned of, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_worker.doors.http_docs import OPTIONS as DESCRIBED
from whisper_worker.errors import InvalidInput
from whisper_worker.schema import job_input_from_dict, segment_to_dict, transcript_from_dict, transcript_to_dict
from whisper_worker.settings import Settings
from whisper_worker.types import AudioSource, Receipt, Segment, TranscribeOptions, Transcript, Word

URL = {"audio_url": "https://example.com/a.mp3"}
SETTINGS = Settings()


def parse(**fields: object) -> TranscribeOptions:
    return job_input_from_dict({**URL, **fields}, SETTINGS).options


def test_a_bare_url_gets_the_defaults() -> None:
    job = job_input_from_dict(URL, SETTINGS)
    assert job.source.url == "https://example.com/a.mp3"
    assert job.options == TranscribeOptions()
    assert job.warnings == ()


def test_nulls_count_as_absent_but_turn_thresholds_off() -> None:
    options = parse(language=None, beam_size=None, compression_ratio_threshold=None, logprob_threshold=None)
    assert options.beam_size is None
    assert options.compression_ratio_threshold is None
    assert options.logprob_threshold is None
    assert options.no_speech_threshold == 0.6


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [("en", "en"), ("English", "en"), ("pt-BR", "pt"), ("auto", None), ("", None), ("Castilian", "es")],
)
def test_languages_by_code_and_name(given_value: str, expected: str | None) -> None:
    assert parse(language=given_value).language == expected


def test_forms_send_strings() -> None:
    options = parse(
        beam_size="5", temperature="0.2", word_timestamps="true", clip_timestamps="1.5,4", languages="en,de"
    )
    assert options.beam_size == 5
    assert options.temperature == 0.2
    assert options.word_timestamps is True
    assert options.clip_timestamps == (1.5, 4.0)
    assert options.languages == ("en", "de")


@pytest.mark.parametrize("seed", [2**63 - 1, 2**53 + 1, "9007199254740993", 7.0, "7"])
def test_a_seed_is_taken_to_the_last_digit(seed: int | float | str) -> None:
    assert parse(seed=seed, temperature=1.0).seed == int(seed)


@pytest.mark.parametrize("name", [name for name, spec in DESCRIBED.items() if "maximum" in spec])
def test_the_description_names_the_limits_that_hold(name: str) -> None:
    """The largest seed was described as a thousandth of what is taken."""
    low, high = DESCRIBED[name]["minimum"], DESCRIBED[name]["maximum"]
    parse(**{name: low})
    parse(**{name: high})
    for beyond in (low - 1, high + 1):
        with pytest.raises(InvalidInput, match=name):
            parse(**{name: beyond})


def test_temperature_ladders_and_token_lists() -> None:
    assert parse(temperature=[0.0, 0.4]).temperature == (0.0, 0.4)
    assert parse(suppress_tokens=[-1, 50]).suppress_tokens == "-1,50"
    assert parse(suppress_tokens="").suppress_tokens == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beam_size", 0),
        ("beam_size", 2.5),
        ("beam_size", True),
        ("temperature", float("nan")),
        ("temperature", "warm"),
        ("language", "klingon"),
        ("language", 5),
        ("task", "summarise"),
        ("word_timestamps", "perhaps"),
        ("formats", ["srt", "docx"]),
        ("headers", {"A": "b\r\nC: d"}),
        ("headers", ["A"]),
        ("sha256", "abc"),
        ("no_speech_threshold", 2),
        ("initial_prompt", "half a \ud83d pair"),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidInput, match="language" if field == "language" else field):
        job_input_from_dict({**URL, field: value}, SETTINGS)


def test_no_audio_and_two_audios_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no audio"):
        job_input_from_dict({}, SETTINGS)
    with pytest.raises(InvalidInput, match="not both"):
        job_input_from_dict({**URL, "audio_base64": "AAAA"}, SETTINGS)
    with pytest.raises(InvalidInput, match="given twice"):
        job_input_from_dict({**URL, "url": "https://example.com/b.mp3"}, SETTINGS)


def test_unknown_and_ineffective_options_are_named_or_refused() -> None:
    payload = {**URL, "colour": "blue", "patience": 2.0, "beam_size": 1}
    job = job_input_from_dict(payload, SETTINGS)
    assert any("colour" in warning for warning in job.warnings)
    assert any("patience" in warning for warning in job.warnings)
    assert not job_input_from_dict({**URL, "patience": 2.0}, SETTINGS).warnings
    with pytest.raises(InvalidInput, match="colour"):
        job_input_from_dict({**payload, "strict": True}, SETTINGS)
    with pytest.raises(InvalidInput, match="patience"):
        job_input_from_dict(payload, Settings(strict=True))


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"temperature": [0.0, 0.4], "temperature_increment_on_fallback": 0.2}, "temperature_increment_on_fallback"),
        ({"temperature": [0.0], "best_of": 3}, "best_of"),
        ({"language": "de", "multilingual": True}, "language"),
    ],
)
def test_options_that_another_one_overrides_are_named_or_refused(options: dict[str, object], idle: str) -> None:
    """They were swallowed."""
    (warning,) = job_input_from_dict({**URL, **options}, SETTINGS).warnings
    assert warning.startswith(f"{idle} has an effect ")
    with pytest.raises(InvalidInput, match=idle):
        job_input_from_dict({**URL, **options, "strict": True}, SETTINGS)
    used = {name: value for name, value in options.items() if name not in ("temperature", "multilingual")}
    assert not job_input_from_dict({**URL, **used}, SETTINGS).warnings


@pytest.mark.parametrize("source", [{"audio_base64": "AAAA"}, {"audio_url": " DATA:,abc"}])
def test_headers_that_are_sent_to_nobody_are_named_or_refused(source: dict[str, str]) -> None:
    """Only the fetching noticed, when strict had been asked already."""
    payload = {**source, "headers": {"X-Key": "k"}}
    (warning,) = job_input_from_dict(payload, SETTINGS).warnings
    assert warning.startswith("headers have an effect only")
    with pytest.raises(InvalidInput, match="headers"):
        job_input_from_dict(payload, Settings(strict=True))
    assert not job_input_from_dict({**URL, "headers": {"X-Key": "k"}}, Settings(strict=True)).warnings


def test_an_empty_address_counts_as_absent() -> None:
    """Beside another spelling of the same field it was called a second address."""
    job = job_input_from_dict({"audio": "", **URL, "audio_base64": ""}, Settings(strict=True))
    assert job.source.url == URL["audio_url"] and job.warnings == ()


def test_no_request_can_name_a_local_file() -> None:
    job = job_input_from_dict({**URL, "path": "x"}, SETTINGS)
    assert job.source.path is None


def test_secrets_do_not_show_in_reprs() -> None:
    job = job_input_from_dict({**URL, "headers": {"Authorization": "Bearer abc"}}, SETTINGS)
    assert "Bearer" not in repr(job)


@given(st.dictionaries(st.text(max_size=8), st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=5))))
def test_whatever_comes_is_a_job_or_a_typed_refusal(payload: dict[str, object]) -> None:
    try:
        job_input_from_dict({**payload, **URL}, SETTINGS)
    except InvalidInput as error:
        assert error.message


def test_segments_carry_optional_keys_only_where_known() -> None:
    segment = Segment(0, 0.0, 1.0, " Hi.", -0.1, 0.01, 1.0, 0.0, tokens=(1, 2))
    assert "words" not in segment_to_dict(segment)
    worded = Segment(0, 0.0, 1.0, " Hi.", -0.1, 0.01, 1.0, 0.0, words=(Word(" Hi.", 0.1, 0.9, 0.8),), flags=("loop",))
    data = segment_to_dict(worded)
    assert data["words"] == [{"word": " Hi.", "start": 0.1, "end": 0.9, "probability": 0.8}]
    assert data["flags"] == ["loop"]
    answer = transcript_to_dict(Transcript("Hi.", "en", 1.0, 1.0, (worded,)))
    assert answer["segments"] == [data]
    assert answer["receipt"] is None


def test_audio_beside_the_payload_is_taken_and_a_second_one_is_named() -> None:
    source = AudioSource(path=Path("call.wav"))
    assert job_input_from_dict({"language": "de"}, SETTINGS, source).source is source
    job = job_input_from_dict({"audio_url": "https://example.com/a"}, SETTINGS, source)
    assert job.source is source
    assert "audio_url" in job.warnings[0]


def test_an_answer_reads_back_as_the_transcript_it_was() -> None:
    receipt = Receipt(
        stages={"total": 1.0},
        audio_seconds=2.0,
        speech_seconds=1.5,
        transcribed_seconds=1.5,
        gaps=((0.5, 1.75),),
        rtfx=2.0,
        windows=1,
        retried_windows=0,
        batch_size=4,
        device="cpu",
        compute_type="float32",
        engine="native",
        peak_memory_mb=100.0,
        model="openai/whisper-tiny.en",
        revision=None,
    )
    words = (Word(" Hi.", 0.0, 0.5, 0.9),)
    segment = Segment(0, 0.0, 0.5, " Hi.", -0.1, 0.0, 1.0, 0.0, (1, 2), 0, "en", words, ("loop",))
    transcript = Transcript("Hi.", "en", 1.0, 2.0, (segment,), ("a warning",), receipt)
    over_the_wire = json.loads(json.dumps(transcript_to_dict(transcript)))
    assert transcript_from_dict({**over_the_wire, "formats": {"txt": "Hi."}}) == transcript
    bare = Transcript("", None, None, 0.0, ())
    assert transcript_from_dict(transcript_to_dict(bare)) == bare


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"text": None, "language": None, "duration": 1, "segments": []},
        {"text": "x", "language": "en", "duration": 1.0, "segments": [{"start": 0}]},
        {"text": "x", "language": "en", "duration": 1.0, "segments": "none"},
    ],
)
def test_an_answer_that_is_no_transcript_is_refused(answer: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="not a transcript"):
        transcript_from_dict(answer)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature_increment_on_fallback": 1e-12},
        {"temperature": [0.1] * 21},
        {"temperature": []},
    ],
)
def test_attempts_without_end_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(options))):
        job_input_from_dict({**URL, **options}, SETTINGS)


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"temperature": 0.5, "beam_size": 4}, "beam_size"),
        ({"temperature": 0.5, "patience": 2.0}, "patience"),
        ({"temperature_increment_on_fallback": 0, "best_of": 3}, "best_of"),
        ({"temperature": [0.0], "seed": 3, "temperature_increment_on_fallback": None}, "seed"),
    ],
)
def test_a_search_that_the_temperature_rules_out_is_named(options: dict[str, object], idle: str) -> None:
    (warning,) = job_input_from_dict({**URL, **options}, SETTINGS).warnings
    assert warning.startswith(idle)
    assert not job_input_from_dict({**URL, "beam_size": 4, "best_of": 3, "seed": 1}, SETTINGS).warnings
