"""A model of many languages behind the HTTP routes: what is spoken is found out, and translated where asked for.

The German recording says "Der hinter diesem Portal liegende Raum wurde als Leichenhalle genutzt."
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from tests.contract.http_kit import GERMAN, JFK, SILENCE, serving, waveform, write_wav
from whisper_worker.types import SAMPLE_RATE

HEARD = "Portal"


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(tmp_path_factory.mktemp("jobs"), model="base") as client:
        yield client


@pytest.fixture(scope="module")
def client(http: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def in_english(text: str) -> bool:
    words = text.lower().split()
    return HEARD.lower() in text.lower() and "the" in words and not {"der", "wurde", "als"} & set(words)


def test_the_language_is_found_out(http: httpx.Client) -> None:
    answer = http.post("/transcribe", files={"audio": GERMAN.read_bytes()}).json()
    assert answer["language"] == "de" and answer["language_probability"] > 0.9
    assert HEARD in answer["text"] and "wurde" in answer["text"]
    english = http.post("/transcribe", files={"audio": JFK.read_bytes()}).json()
    assert english["language"] == "en" and english["language_probability"] > 0.9


def test_a_sentence_that_is_said_twice_is_written_twice(http: httpx.Client, tmp_path: Path) -> None:
    """The model writes it once, with times that cover both."""
    once = waveform(GERMAN)
    twice = write_wav(tmp_path / "twice.wav", np.concatenate([once, np.zeros(6400, dtype=np.int16), once]))
    answer = http.post("/transcribe", files={"audio": twice.read_bytes()}, data={"language": "de"}).json()
    assert answer["text"].count(HEARD) == 2, answer["text"]
    assert answer["segments"][-1]["start"] == pytest.approx(len(once) / SAMPLE_RATE + 0.4, abs=1.0)


def test_only_among_the_languages_that_are_allowed(http: httpx.Client) -> None:
    answer = http.post("/transcribe", files={"audio": GERMAN.read_bytes()}, data={"languages": "en,fr"}).json()
    assert answer["language"] in ("en", "fr")


def test_detection_alone(http: httpx.Client) -> None:
    answer = http.post("/detect-language", files={"audio_file": GERMAN.read_bytes()}).json()
    assert (answer["detected_language"], answer["language_code"]) == ("german", "de")
    assert 0.9 < answer["confidence"] < 1
    # Not the one that it is told.
    told = http.post("/detect-language", params={"language": "en"}, files={"audio_file": GERMAN.read_bytes()})
    assert told.json()["language_code"] == "de"
    assert http.post("/detect-language", files={"audio_file": SILENCE.read_bytes()}).json()["language_code"] == "und"


def test_openai_calls_the_language_by_its_name(client: openai.OpenAI) -> None:
    answer = client.audio.transcriptions.create(file=GERMAN, model="whisper-1", response_format="verbose_json")
    assert answer.language == "german" and HEARD in answer.text
    given = client.audio.transcriptions.create(
        file=GERMAN, model="whisper-1", response_format="verbose_json", language="de"
    )
    assert given.text == answer.text


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_openais_translation(client: openai.OpenAI) -> None:
    plain = client.audio.translations.create(file=GERMAN, model="whisper-1")
    assert in_english(plain.text), plain.text
    full = client.audio.translations.create(file=GERMAN, model="whisper-1", response_format="verbose_json")
    assert (full.text, full.language) == (plain.text, "english"), "the language of the text, as OpenAI's API has it"
    assert full.segments and 0 <= full.segments[0].start < full.segments[-1].end <= full.duration
    subtitles = client.audio.translations.create(file=GERMAN, model="whisper-1", response_format="srt")
    assert str(subtitles).startswith("1\n00:00:0") and in_english(str(subtitles))


def test_a_translation_streams_as_well(http: httpx.Client) -> None:
    text = http.post(
        "/v1/audio/translations", files={"file": GERMAN.read_bytes()}, data={"model": "whisper-1", "stream": "true"}
    ).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1]["type"] == "transcript.text.done" and in_english(events[-1]["text"])
    assert "".join(event["delta"] for event in events[:-1]) == events[-1]["text"]


@pytest.mark.parametrize(("route", "params"), [("/transcribe", {}), ("/asr", {"output": "json"})])
def test_translation_at_the_other_routes(http: httpx.Client, route: str, params: dict[str, str]) -> None:
    files = {"audio_file": GERMAN.read_bytes()}
    answer = http.post(route, params={"task": "translate", **params}, files=files)
    assert in_english(answer.json()["text"]) and answer.json()["language"] == "de"
