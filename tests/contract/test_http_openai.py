"""OpenAI's own client against OpenAI's routes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.contract.http_kit import JFK, PRINTING, SILENCE, STEW, long_speech, serving, waveform, write_wav

SAID = "ask what you can do for your country"


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(tmp_path_factory.mktemp("jobs")) as client:
        yield client


@pytest.fixture(scope="module")
def client(http: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_json_is_the_default(client: openai.OpenAI) -> None:
    answer = client.audio.transcriptions.create(file=JFK, model="whisper-1")
    assert SAID in answer.text.lower()
    assert answer.usage is not None and answer.usage.type == "duration" and answer.usage.seconds == 11.0
    assert answer.model_extra is not None and "warnings" not in answer.model_extra


@pytest.mark.parametrize(
    ("response_format", "begins"), [("text", "And so"), ("srt", "1\n00:00:00,"), ("vtt", "WEBVTT\n\n00:00.")]
)
def test_texts(client: openai.OpenAI, response_format: Any, begins: str) -> None:
    text = str(client.audio.transcriptions.create(file=JFK, model="whisper-1", response_format=response_format))
    assert text.startswith(begins)
    assert "fellow Americans" in text


def test_verbose_json(client: openai.OpenAI) -> None:
    answer = client.audio.transcriptions.create(file=JFK, model="whisper-1", response_format="verbose_json")
    assert (answer.language, answer.duration) == ("english", 11.0)
    assert answer.segments and answer.words is None
    for segment in answer.segments:
        assert 0 <= segment.start < segment.end <= 11.0
        assert segment.tokens and segment.avg_logprob < 0 and segment.compression_ratio > 0
    assert "".join(segment.text for segment in answer.segments).strip() == answer.text


@pytest.mark.parametrize(
    ("granularities", "words", "segments"),
    [(["word"], True, False), (["segment"], False, True), (["word", "segment"], True, True)],
)
def test_granularities(client: openai.OpenAI, granularities: Any, words: bool, segments: bool) -> None:
    answer = client.audio.transcriptions.create(
        file=JFK, model="whisper-1", response_format="verbose_json", timestamp_granularities=granularities
    )
    assert bool(answer.words) is words
    assert bool(answer.segments) is segments
    if answer.words:
        assert [word.word for word in answer.words][-1] == "country."
        starts = [word.start for word in answer.words]
        assert starts == sorted(starts)


def test_every_other_option(client: openai.OpenAI) -> None:
    answer = client.audio.transcriptions.create(
        file=("speech.flac", JFK.read_bytes()),
        model="gpt-4o-transcribe",
        language="en",
        prompt="A speech of 1961.",
        temperature=0.0,
        chunking_strategy={"type": "server_vad", "threshold": 0.4, "prefix_padding_ms": 300},
        include=["logprobs"],
        keywords=["Americans"],
        languages=["en", "de"],
        extra_body={"beam_size": 2, "nonsense": 1},
    )
    assert SAID in answer.text.lower()
    assert answer.model_extra is not None
    warnings = " ".join(answer.model_extra["warnings"])
    for name in ("prefix_padding_ms", "logprobs", "nonsense", "languages"):
        assert name in warnings
    for name in ("threshold,", "beam_size", "keywords", "prompt"):
        assert name not in warnings


def test_words_asked_for_by_the_common_name_are_given_or_named(client: openai.OpenAI) -> None:
    """They were timed, and left out."""
    asked = {"word_timestamps": True}
    answer = client.audio.transcriptions.create(
        file=JFK, model="whisper-1", response_format="verbose_json", extra_body=asked
    )
    assert answer.words and answer.words[-1].word == "country." and answer.segments
    plain = client.audio.transcriptions.create(file=JFK, model="whisper-1", extra_body=asked)
    assert plain.model_extra is not None and "word_timestamps" in plain.model_extra["warnings"][0]


def test_keywords_beside_hotwords_are_named(client: openai.OpenAI) -> None:
    answer = client.audio.transcriptions.create(
        file=JFK, model="whisper-1", keywords=["Americans"], extra_body={"hotwords": "country"}
    )
    assert answer.model_extra is not None and "keywords" in answer.model_extra["warnings"][0]


def test_warnings_of_a_text_are_in_a_header(client: openai.OpenAI) -> None:
    raw = client.audio.transcriptions.with_raw_response.create(
        file=JFK, model="large-v3", response_format="text", timestamp_granularities=["word"]
    )
    warnings = json.loads(raw.headers["x-warnings"])
    assert any("tiny.en" in warning for warning in warnings)
    assert any("timestamp_granularities" in warning for warning in warnings)


def test_a_stream_says_what_it_cannot_carry(client: openai.OpenAI) -> None:
    stream = client.audio.transcriptions.create(
        file=JFK,
        model="whisper-1",
        stream=True,
        response_format="verbose_json",
        timestamp_granularities=["word"],
    )
    *_, done = stream
    warnings = done.model_dump()["warnings"]
    assert [warning.split()[0] for warning in warnings] == ["response_format", "timestamp_granularities"]


def test_a_stream_brings_windows_as_they_finish(
    client: openai.OpenAI, tmp_path_factory: pytest.TempPathFactory
) -> None:
    speech = long_speech(tmp_path_factory.mktemp("speech") / "long.wav", 1)
    with client.audio.transcriptions.create(file=speech, model="whisper-1", stream=True) as stream:
        events = list(stream)
    *deltas, done = events
    assert len(deltas) > 3
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas if event.type == "transcript.text.delta").strip() == done.text
    whole = client.audio.transcriptions.create(file=speech, model="whisper-1")
    assert done.text == whole.text


def test_speakers_by_channel(client: openai.OpenAI) -> None:
    left, right = waveform(PRINTING), waveform(STEW)
    n = max(len(left), len(right))
    both = np.zeros((2 * n, 2), np.int16)
    both[: len(left), 0] = left
    both[n : n + len(right), 1] = right
    for names, expected in (([], ["A", "B"]), (["caller"], ["caller", "B"])):
        answer = client.audio.transcriptions.create(
            file=_wav(both),
            model="gpt-4o-transcribe-diarize",
            response_format="diarized_json",
            extra_body={"known_speaker_names": names},
        )
        assert [segment.speaker for segment in answer.segments] == sorted(
            (segment.speaker for segment in answer.segments), key=expected.index
        )
        assert {segment.speaker for segment in answer.segments} == set(expected)
        said = {name: "".join(s.text for s in answer.segments if s.speaker == name).lower() for name in expected}
        assert "printing" in said[expected[0]] and "stew" in said[expected[1]]
        assert "stew" not in said[expected[0]] and "printing" not in said[expected[1]]


def test_one_channel_is_one_speaker_and_says_so(client: openai.OpenAI) -> None:
    with client.audio.transcriptions.create(
        file=PRINTING, model="whisper-1", response_format="diarized_json", stream=True
    ) as stream:
        *segments, done = list(stream)
    assert {event.speaker for event in segments if event.type == "transcript.text.segment"} == {"A"}
    assert done.model_extra is not None and "one channel" in done.model_extra["warnings"][0]


def _wav(samples: np.ndarray[Any, Any]) -> tuple[str, bytes]:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        return "both.wav", write_wav(Path(directory) / "both.wav", samples).read_bytes()


def test_silence_gives_no_words(client: openai.OpenAI) -> None:
    answer = client.audio.transcriptions.create(file=SILENCE, model="whisper-1", response_format="verbose_json")
    assert answer.text == "" and answer.segments == []


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[:2] == ["openai/whisper-tiny.en", "whisper-1"]
    assert client.models.retrieve("openai/whisper-tiny.en").owned_by == "whisper-worker"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-5")
    assert refused.value.code == "model_not_found"


def test_a_model_nobody_knows_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.audio.transcriptions.create(file=JFK, model="gpt-5")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_audio_is_a_bad_request(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="not audio") as refused:
        client.audio.transcriptions.create(file=("a.mp3", b"<!doctype html><p>"), model="whisper-1", stream=stream)
    assert (refused.value.code, refused.value.type) == ("DECODE", "invalid_request_error")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "doc"}, "response_format"),
        ({"temperature": 7}, "temperature"),
        ({"language": "klingon"}, "language"),
        ({"timestamp_granularities": ["letter"], "response_format": "verbose_json"}, "timestamp_granularities"),
        ({"extra_body": {"chunking_strategy": "manual"}}, "chunking_strategy"),
        ({"extra_body": {"task": "translate"}}, "task"),
        ({"extra_body": {"strict": True, "nonsense": 1}}, "nonsense"),
    ],
)
def test_a_wrong_field_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.audio.transcriptions.create(file=JFK, model="whisper-1", **fields)
    assert refused.value.param == param
    assert refused.value.code == "INVALID_INPUT"


def test_translation_needs_a_multilingual_model(client: openai.OpenAI) -> None:
    # The client warns of its own method; the route stays.
    with pytest.deprecated_call(), pytest.raises(openai.BadRequestError, match="English-only"):
        client.audio.translations.create(file=JFK, model="whisper-1")


def test_a_missing_file_is_named(http: httpx.Client) -> None:
    for more in ({}, {"file": (None, "talk.mp3")}):
        answer = http.post("/v1/audio/transcriptions", files={"model": (None, "whisper-1"), **more})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "file"
        assert ("file=@" in answer.json()["error"]["message"]) == bool(more)


def test_keys(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("jobs"), api_keys=("first", "second")) as http:
        for key in ("second", "first"):
            with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=key, max_retries=0) as client:
                assert client.models.list().data
        with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="third", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                client.audio.transcriptions.create(file=io.BytesIO(b"x" * 200_000), model="whisper-1")
            assert refused.value.code == "invalid_api_key"
