"""The requests that RunPod clients send, and the keys they look for in the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.runpod_fakes import transcript
from whisper_worker.doors.runpod_dialects import Order, Request, answer, read_request
from whisper_worker.errors import InvalidInput
from whisper_worker.settings import Settings

URL = "https://example.com/a.mp3"
EVERY_FIELD = {
    "audio": URL,
    "audio_base64": None,
    "model": "base",
    "transcription": "plain text",
    "translate": False,
    "translation": "plain_text",
    "language": None,
    "temperature": 0,
    "best_of": 5,
    "beam_size": 5,
    "patience": 1.0,
    "length_penalty": 0,
    "suppress_tokens": "-1",
    "initial_prompt": None,
    "condition_on_previous_text": True,
    "temperature_increment_on_fallback": 0.2,
    "compression_ratio_threshold": 2.4,
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
    "enable_vad": False,
    "word_timestamps": False,
}
"""worker-faster_whisper's schema with its defaults."""


def read(payload: object, **settings: Any) -> Request:
    return read_request(payload, Settings(**settings), lambda: "openai/whisper-base")


def only(payload: object, **settings: Any) -> Order:
    (order,) = read(payload, **settings).orders
    assert isinstance(order, Order)
    return order


def test_seed_request_takes_our_defaults() -> None:
    request = read({"audio_url": URL})
    assert not request.several
    order = only({"audio_url": URL})
    assert order.job.source.url == URL
    assert order.job.warnings == ()
    assert order.job.options.vad
    assert order.chunks and not order.translate


def test_every_field_of_worker_faster_whisper_is_understood() -> None:
    order = only(EVERY_FIELD)
    options = order.job.options
    assert order.job.source.url == URL
    assert (options.beam_size, options.best_of, options.patience, options.length_penalty) == (5, 5, 1.0, 0.0)
    assert options.vad is False
    assert options.condition_on_previous_text is True
    assert [said for said in order.job.warnings if "ignored" in said or "taken as" in said] == []


@pytest.mark.parametrize("name", [name for name in EVERY_FIELD if name not in ("audio", "audio_base64")])
def test_every_field_may_be_null(name: str) -> None:
    assert only({**EVERY_FIELD, name: None}).job.source.url == URL


def test_base64_is_a_source() -> None:
    assert only({"audio_base64": "UklGRg=="}).job.source.base64 == "UklGRg=="


@pytest.mark.parametrize("spelled", ["plain text", "Plain_Text", "formatted_text", "srt", "vtt"])
def test_text_formats_are_taken_in_every_spelling(spelled: str) -> None:
    order = only({"audio": URL, "transcription": spelled, "translation": spelled})
    assert order.transcription == order.translation == spelled.lower().replace(" ", "_")
    assert order.job.warnings == ()


@pytest.mark.parametrize("value", ["docx", 7])
def test_an_unknown_text_format_is_coerced_aloud_and_refused_in_strict_mode(value: object) -> None:
    order = only({"audio": URL, "transcription": value})
    assert order.transcription == "plain_text"
    assert any("transcription was taken as plain_text" in said for said in order.job.warnings)
    with pytest.raises(InvalidInput, match="transcription"):
        only({"audio": URL, "transcription": value, "strict": True})
    with pytest.raises(InvalidInput, match="transcription"):
        only({"audio": URL, "transcription": value}, strict=True)
    assert only({"audio": URL, "transcription": value, "strict": False}, strict=True).transcription == "plain_text"


@pytest.mark.parametrize("name", ["base", "openai/whisper-base", "Systran/faster-whisper-base"])
def test_naming_the_served_model_says_nothing(name: str) -> None:
    assert only({"audio": URL, "model": name}).job.warnings == ()


@pytest.mark.parametrize("name", ["large-v3", "no such model", 3, {}])
def test_naming_another_model_is_said(name: object) -> None:
    (said,) = only({"audio": URL, "model": name}).job.warnings
    assert "model was ignored" in said
    with pytest.raises(InvalidInput, match="model"):
        only({"audio": URL, "model": name, "strict": True})


def test_model_is_not_looked_for_unless_asked() -> None:
    def unknown() -> str:
        raise AssertionError("was asked")

    assert read_request({"audio": URL, "model": None}, Settings(), unknown).orders


@pytest.mark.parametrize("payload", [None, [], "https://example.com/a.mp3", 3, {}, {"audio_url": None}])
def test_a_request_without_audio_is_refused(payload: object) -> None:
    with pytest.raises(InvalidInput):
        read(payload)


def test_translate_must_be_a_truth_value() -> None:
    assert only({"audio": URL, "translate": "true"}).translate
    assert only({"audio": URL, "translate": " Yes"}).translate
    assert not only({"audio": URL, "return_chunks": "off"}).chunks
    with pytest.raises(InvalidInput, match="translate"):
        only({"audio": URL, "translate": "perhaps"})


@pytest.mark.parametrize("name", ["audio_urls", "audios", "audio_url", "audio"])
def test_several_inputs(name: str) -> None:
    request = read({name: [URL, {"audio_url": URL, "language": "fr"}, 3, {}], "language": "de", "return_chunks": False})
    assert request.several
    first, second, third, fourth = request.orders
    assert isinstance(first, Order) and isinstance(second, Order)
    assert (first.job.options.language, second.job.options.language) == ("de", "fr")
    assert not first.chunks and not second.chunks
    assert isinstance(third, InvalidInput) and isinstance(fourth, InvalidInput)


def test_one_address_under_the_name_for_several_is_a_list_of_one() -> None:
    request = read({"audio_urls": URL})
    assert request.several and len(request.orders) == 1


def test_lists_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(InvalidInput, match="empty"):
        read({"audio_urls": []})
    with pytest.raises(InvalidInput, match="audio_urls and audio"):
        read({"audio_urls": [URL], "audio": [URL]})
    (nested,) = read({"audio_urls": [{"audio_url": [URL]}]}).orders
    assert isinstance(nested, InvalidInput)
    with pytest.raises(InvalidInput, match="audio_urls must be a list"):
        read({"audio_urls": {"first": URL}})


@pytest.mark.parametrize("name", ["audio_url", "audio", "url", "audio_base64"])
def test_audio_beside_a_list_is_refused(name: str) -> None:
    """It was left out without a word."""
    with pytest.raises(InvalidInput, match=f"audio_urls or {name}, not both"):
        read({"audio_urls": [{"audio_url": URL}], name: URL})
    assert read({"audio_urls": [URL], name: None}).several


def test_a_null_list_counts_as_absent() -> None:
    assert only({"audio_url": URL, "audio_urls": None, "audios": None}, strict=True).job.warnings == ()


def test_three_kinds_of_client_find_their_keys() -> None:
    said = transcript(" hello,", " world", words=True)
    order = only({"audio_url": URL, "word_timestamps": True, "formats": ["srt", "txt"]})
    result = answer(order, said, None)
    assert result["text"] == "hello, world"
    assert result["chunks"] == [
        {"timestamp": [0.0, 1.0], "text": " hello,"},
        {"timestamp": [1.0, 2.0], "text": " world"},
    ]
    assert set(result["segments"][0]) >= {
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
    assert result["language"] == result["detected_language"] == "en"
    assert result["transcription"] == "hello, world"
    assert result["translation"] is None
    assert (result["device"], result["model"]) == ("cpu", "openai/whisper-base")
    assert result["word_timestamps"] == [
        {"word": " hello,", "start": 0.0, "end": 0.5},
        {"word": " world", "start": 1.0, "end": 1.5},
    ]
    assert set(result["formats"]) == {"srt", "txt"}
    assert result["formats"]["txt"] == "hello,\nworld\n"


def test_what_was_not_asked_for_is_left_out() -> None:
    result = answer(only({"audio_url": URL, "return_chunks": False}), transcript(" hello"), None)
    assert not {"chunks", "formats", "word_timestamps"} & set(result)


@pytest.mark.parametrize(
    ("text_format", "expected"),
    [
        ("plain_text", "one two"),
        ("formatted_text", "one\ntwo"),
        ("srt", "1\n00:00:00,000 --> 00:00:01,000\none\n\n2\n00:00:01,000 --> 00:00:02,000\ntwo\n\n"),
        ("vtt", "WEBVTT\n\n00:00.000 --> 00:01.000\none\n\n00:01.000 --> 00:02.000\ntwo\n\n"),
    ],
)
def test_transcription_and_translation_come_as_asked(text_format: str, expected: str) -> None:
    order = only({"audio": URL, "transcription": text_format, "translation": text_format, "translate": True})
    result = answer(order, transcript(" eins", " zwei", language="de"), transcript(" one", " two"))
    assert result["translation"] == expected
    assert "eins" in result["transcription"]
    assert result["detected_language"] == "de"


def test_the_receipt_counts_the_translating_pass() -> None:
    """It named the price of the first pass alone, about half of what the job had cost."""
    order = only({"audio": URL, "translate": True})
    one, other = transcript(" hallo", language="de"), transcript(" hello")
    assert one.receipt is not None
    first = replace(one.receipt, stages={"recognize": 0.5, "total": 1.0}, cost=0.002, batch_size=8, peak_memory_mb=5.0)
    second = replace(first, stages={"recognize": 0.75, "total": 1.5}, cost=0.003, batch_size=4, peak_memory_mb=7.0)
    receipt = answer(order, replace(one, receipt=first), replace(other, receipt=second))["receipt"]
    assert receipt["stages"] == {"recognize": 1.25, "total": 2.5}
    assert receipt["rtfx"] == round(first.audio_seconds / 2.5, 1)
    assert (receipt["cost"], receipt["windows"]) == (0.005, 2 * first.windows)
    assert (receipt["batch_size"], receipt["peak_memory_mb"]) == (4, 7.0)
    alone = answer(order, replace(one, receipt=first), None)["receipt"]
    same = replace(one, receipt=first)
    assert answer(order, same, same)["receipt"] == alone  # English was heard: there was no second pass
