"""The service as scripts, browsers, probes and other services' clients see it."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.contract.http_kit import JFK, PRINTING, SILENCE, long_speech, metric, serving, until, waveform
from whisper_worker.doors import http_desk
from whisper_worker.doors.http_docs import OPTIONS
from whisper_worker.doors.http_errors import STATUSES, error_body, refusal
from whisper_worker.errors import ERROR_CODES, Busy, InvalidInput
from whisper_worker.settings import Settings
from whisper_worker.types import CancelToken, TranscribeOptions

SAID = "ask what you can do for your country"


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(tmp_path_factory.mktemp("jobs"), max_download_bytes=100 << 20) as client:
        yield client


def events_of(text: str) -> list[tuple[str, Any]]:
    blocks = [block.splitlines() for block in text.split("\n\n") if "data: " in block]
    return [(block[-2].removeprefix("event: "), json.loads(block[-1].removeprefix("data: "))) for block in blocks]


# -- the common route --------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_curl_of_the_readme(http: httpx.Client, tmp_path: Path) -> None:
    """The command that a caller of the earlier service has in a script, but for the host."""
    shutil.copy(JFK, tmp_path / "test-audio.wav")
    command = ["curl", "-s", "-X", "POST", f"{http.base_url}/transcribe", "-F", "audio=@test-audio.wav"]
    done = subprocess.run([*command, "-F", "language=en"], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    answer = json.loads(done.stdout)
    assert SAID in answer["text"]
    assert answer["language"] == "en" and answer["duration"] == 11.0 and answer["warnings"] == []
    assert answer["receipt"]["model"] == "openai/whisper-tiny.en"


def test_the_other_field_and_a_model_that_is_not_here(http: httpx.Client) -> None:
    """The wrapper script of a call recorder sends ``file`` and ``model``."""
    answer = http.post("/transcribe", files={"file": ("a.wav", JFK.read_bytes())}, data={"model": "base"}).json()
    assert SAID in answer["text"]
    assert "model was ignored" in answer["warnings"][0]


def test_options_formats_and_lists(http: httpx.Client) -> None:
    answer = http.post(
        "/transcribe",
        files={"audio": JFK.read_bytes()},
        data={"word_timestamps": "true", "formats": ["srt", "vtt"], "hotwords": "country", "logprob_threshold": "None"},
    ).json()
    assert set(answer["formats"]) == {"srt", "vtt"}
    assert answer["segments"][0]["words"][0]["word"] == " And"
    assert answer["warnings"] == []


def test_json_with_an_address(http: httpx.Client) -> None:
    url = "data:audio/flac;base64," + base64.b64encode(JFK.read_bytes()).decode()
    answer = http.post("/transcribe", json={"audio_url": url, "formats": ["txt"]}).json()
    assert SAID in answer["formats"]["txt"]


@pytest.mark.parametrize("asked", ["query", "field", "header"])
def test_a_stream_of_events(http: httpx.Client, asked: str) -> None:
    request: dict[str, Any] = {"files": {"audio": PRINTING.read_bytes()}}
    if asked == "query":
        request["params"] = {"stream": "true"}
    elif asked == "field":
        request["data"] = {"stream": "true"}
    else:
        request["headers"] = {"Accept": "text/event-stream"}
    answer = http.post("/transcribe", **request)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert events[-1][0] == "done" and "printing" in events[-1][1]["text"].lower()
    segments = [data for name, data in events if name == "segment"]
    assert segments == events[-1][1]["segments"]
    progress = [data for name, data in events if name == "progress"]
    assert progress[-1]["done_seconds"] == progress[-1]["total_seconds"] > 5


def test_silence_gives_no_words(http: httpx.Client) -> None:
    answer = http.post("/transcribe", files={"audio": SILENCE.read_bytes()}).json()
    assert answer["text"] == "" and answer["segments"] == []


@pytest.mark.parametrize(
    ("request_", "status", "code", "says"),
    [
        ({"data": {"language": "en"}, "files": {"x": (None, "")}}, 422, "INVALID_INPUT", "no audio"),
        ({"files": {"sound": b"abc"}}, 422, "INVALID_INPUT", "audio, file"),
        ({"files": {"audio": (None, "talk.mp3")}}, 422, "INVALID_INPUT", "audio=@"),
        ({"files": {"file": (None, "talk.mp3")}}, 422, "INVALID_INPUT", "file=@"),
        ({"json": {"audio_urls": ["https://a.b/c"]}}, 422, "INVALID_INPUT", "one audio_url"),
        ({"json": {"input": {"audio_url": "https://a.b/c"}}}, 422, "INVALID_INPUT", "without input"),
        ({"files": [("audio", b"abc"), ("file", b"abc")]}, 422, "INVALID_INPUT", "one audio file"),
        ({"files": {"audio": b"abc"}, "data": {"audio_url": "https://a.b/c"}}, 422, "INVALID_INPUT", "audio once"),
        ({"files": {"audio": b"abc"}, "data": {"beam_size": "x"}}, 422, "INVALID_INPUT", "beam_size"),
        ({"files": {"audio": b"abc"}, "data": {"sha256": "x"}}, 422, "INVALID_INPUT", "sha256"),
        ({"files": {"audio": b"abc"}, "data": {"stream": "often"}}, 422, "INVALID_INPUT", "stream"),
        ({"files": {"audio": b"abc"}, "params": {"vad": "1"}, "data": {"vad": "1"}}, 422, "INVALID_INPUT", "vad"),
        ({"files": {"audio": b"%PDF-1.7"}}, 415, "DECODE", "PDF"),
        ({"files": {"audio": b"%PDF-1.7"}, "params": {"stream": "1"}}, 415, "DECODE", "PDF"),
        ({"files": {"audio": b""}}, 415, "DECODE", "empty"),
        ({"json": {"audio_url": "http://127.0.0.1/a.mp3"}}, 403, "FORBIDDEN", "private"),
        ({"json": {"audio_url": "file:///etc/passwd"}}, 403, "FORBIDDEN", "https"),
        ({"content": rb'{"\ud800": 1}', "headers": {"Content-Type": "application/json"}}, 422, "INVALID_INPUT", "JSON"),
        ({"json": {"audio_url": "x", "temperature": 10**400}}, 422, "INVALID_INPUT", "temperature"),
        ({"json": [1]}, 422, "INVALID_INPUT", "object"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 422, "INVALID_INPUT", "JSON"),
        ({"content": b"abc", "headers": {"Content-Type": "audio/wav"}}, 415, "INVALID_INPUT", "multipart"),
        (
            {"content": b"--x\r\nContent-", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
            422,
            "INVALID_INPUT",
            "cut",
        ),
        ({"content": b"", "headers": {"Content-Type": "multipart/form-data"}}, 422, "INVALID_INPUT", "boundary"),
    ],
)
def test_what_is_refused_and_why(
    http: httpx.Client, request_: dict[str, Any], status: int, code: str, says: str
) -> None:
    answer = http.post("/transcribe", **request_)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["retryable"]) == (status, code, False)
    assert says in error["message"]


def test_every_error_has_a_status_and_both_shapes() -> None:
    assert set(STATUSES) == ERROR_CODES
    assert refusal(Busy("x"), "/transcribe").headers == {"Retry-After": "5"}
    assert refusal(InvalidInput("x"), "/v1/audio/transcriptions").status == 400
    told = error_body(refusal(RuntimeError("secret"), "/jobs"), "/jobs")
    assert told["error"]["code"] == "INTERNAL" and "secret" not in told["error"]["message"]


# -- limits ------------------------------------------------------------------------------


def test_uploads_over_the_limit(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("jobs"), max_download_bytes=1 << 20) as http:
        for request in (
            {"files": {"audio": b"\0" * (8 << 20)}},
            {"files": {"audio": b"\0" * (2 << 20)}},
            {
                "content": iter(
                    [b'--x\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n', bytes(4 << 20)]
                ),
                "headers": {"Content-Type": "multipart/form-data; boundary=x"},
            },
        ):
            answer = http.post("/transcribe", **request)  # type: ignore[arg-type]
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "TOO_LARGE")
        assert http.post("/transcribe", files={"audio": PRINTING.read_bytes()}).status_code == 200


def test_a_full_desk_says_when_to_come_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("jobs"), max_requests=1) as http:
        with _connection(http) as upload:
            upload.sendall(_head("/transcribe", 1 << 20) + b"--x\r\n")
            until(lambda: metric(http, "whisper_requests_in_hand") == 1)
            for path in ("/transcribe", "/v1/audio/transcriptions", "/jobs"):
                answer = http.post(path, files={"file": JFK.read_bytes()})
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["retryable"] is True
        until(lambda: metric(http, "whisper_requests_in_hand") == 0)
        assert http.post("/transcribe", files={"file": JFK.read_bytes()}).status_code == 200


def test_keys_and_what_needs_none(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("jobs"), api_keys=("k-one", "k-two"), callback_secret="k-three") as http:
        for path in ("/health", "/ready", "/ping", "/docs", "/openapi.json"):
            assert http.get(path).status_code == 200
        for authorization in ("", "Bearer wrong", "Basic k-one", "Bearer", "k-one"):
            answer = http.get("/status", headers={"Authorization": authorization})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "UNAUTHORIZED"
        assert http.post("/transcribe", files={"audio": bytes(2 << 20)}).status_code == 401
        status = http.get("/status", headers={"Authorization": "Bearer k-two"})
        assert status.json()["settings"]["WHISPER_API_KEYS"] == "set"
        assert not any(secret in status.text for secret in ("k-one", "k-two", "k-three"))
        described = http.get("/openapi.json").json()
        assert described["paths"]["/jobs"]["post"]["security"] == [{"key": []}]


def test_pages_of_other_origins(tmp_path_factory: pytest.TempPathFactory, http: httpx.Client) -> None:
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    with serving(tmp_path_factory.mktemp("jobs"), cors_origins=("https://app.example",), api_keys=("k",)) as allowing:
        assert allowing.options("/jobs", headers=asked).headers["access-control-allow-origin"] == asked["Origin"]
        # Without it a page could not even read why it was turned away.
        refused = allowing.get("/status", headers={"Origin": asked["Origin"]})
        assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
        other = allowing.options("/jobs", headers={**asked, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in http.options("/jobs", headers=asked).headers


def test_requests_carry_their_id(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    assert http.get("/health", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    for odd in ("", "a b", "x" * 200):
        made = http.get("/nowhere", headers={"X-Request-ID": odd}).headers["x-request-id"]
        assert len(made) == 32 and made != odd


def test_a_client_that_goes_takes_its_work_along(http: httpx.Client, tmp_path: Path) -> None:
    speech = long_speech(tmp_path / "long.wav", 12).read_bytes()
    before = metric(http, "whisper_audio_seconds_total")
    with http.stream("POST", "/transcribe?stream=true", files={"audio": speech}) as answer:
        assert any(line == "event: segment" for line in answer.iter_lines())
    until(lambda: metric(http, "whisper_requests_in_hand") == 0)
    with _connection(http) as upload:
        part = (
            b'--x\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n\r\n' + speech + b"\r\n--x--\r\n"
        )
        upload.sendall(_head("/transcribe", len(part)) + part)
        until(lambda: metric(http, "whisper_requests_in_hand") == 1)
    until(lambda: metric(http, "whisper_requests_in_hand") == 0)
    # Neither was transcribed to its end.
    assert metric(http, "whisper_audio_seconds_total") == before


@pytest.mark.parametrize("heard", [False, True])
def test_a_listener_that_goes_is_let_go_of_when_its_work_has_ended(
    heard: bool, http: httpx.Client, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second cancellation came between: the seat was free and the directory gone while the thread still worked."""
    monkeypatch.setattr(http_desk, "FIRST_EVENT", 0.01)
    stopped, too_early = http_desk._stop, []

    async def watched(running: Future[Any], done: asyncio.Future[Any], cancel: CancelToken) -> None:
        try:
            await stopped(running, done, cancel)
        finally:
            too_early.append(not running.done())

    monkeypatch.setattr(http_desk, "_stop", watched)
    speech = long_speech(tmp_path / "long.wav", 12).read_bytes()
    with http.stream("POST", "/transcribe?stream=true", files={"audio": speech}) as answer:
        assert not heard or any(line == "event: segment" for line in answer.iter_lines())
    until(lambda: too_early and metric(http, "whisper_requests_in_hand") == 0)
    assert too_early == [False]
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def _connection(http: httpx.Client) -> socket.socket:
    return socket.create_connection((http.base_url.host, http.base_url.port or 80), 30)


def _head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    ).encode()


# -- whisper-asr-webservice --------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "begins"), [("txt", "Printing"), ("vtt", "WEBVTT"), ("srt", "1\n00:00:0"), ("tsv", "start\tend\ttext")]
)
def test_asr_texts(http: httpx.Client, output: str, begins: str) -> None:
    answer = http.post(
        "/asr",
        params={"output": output, "task": "transcribe"},
        files={"audio_file": ("talk.flac", PRINTING.read_bytes())},
    )
    assert answer.text.startswith(begins)
    assert answer.headers["content-type"].startswith("text/plain")
    assert f"talk.flac.{output}" in answer.headers["content-disposition"]
    assert answer.headers["asr-engine"] == "native"


def test_asr_json_of_raw_samples(http: httpx.Client) -> None:
    """What Bazarr and Home Assistant send: samples without a header, and ``encode=false``."""
    answer = http.post(
        "/asr",
        params={
            "output": "json",
            "encode": "false",
            "word_timestamps": "true",
            "vad_filter": "true",
            "diarize": "true",
        },
        files={"audio_file": waveform(PRINTING).tobytes()},
    )
    result = answer.json()
    assert "printing" in result["text"].lower() and result["language"] == "en"
    assert result["segments"][0]["words"]
    assert "diarize was ignored" in json.loads(answer.headers["x-warnings"])[0]


def test_asr_swallows_nothing(http: httpx.Client) -> None:
    """A form's ``output`` was dropped without a word, and ``strict`` did not see what has no effect there."""
    file = {"audio_file": JFK.read_bytes()}
    answer = http.post("/asr", data={"output": "json"}, files=file)
    assert "output" in json.loads(answer.headers["x-warnings"])[0]
    answer = http.post("/asr", params={"diarize": "true", "strict": "true"}, files=file)
    assert answer.status_code == 422 and "diarize" in answer.json()["error"]["message"]
    answer = http.post("/detect-language", params={"colour": "blue"}, files=file)
    assert answer.json()["language_code"] == "en"
    assert "colour" in json.loads(answer.headers["x-warnings"])[0]
    answer = http.post("/detect-language", params={"language": "de", "beam_size": 2, "vad": "false"}, files=file)
    assert answer.json()["language_code"] == "en"
    assert [warning.split()[0] for warning in json.loads(answer.headers["x-warnings"])] == ["language", "beam_size"]
    answer = http.post("/detect-language", params={"beam_size": 2, "strict": "true"}, files=file)
    assert answer.status_code == 422 and "beam_size" in answer.json()["error"]["message"]


def test_warnings_too_long_for_a_header_leave_a_list(http: httpx.Client) -> None:
    """The list was cut in the middle of a string."""
    params = {"colour": "blue", "x" * 5000: "1"}
    answer = http.post("/asr", params=params, files={"audio_file": JFK.read_bytes()})
    first, last = json.loads(answer.headers["x-warnings"])
    assert "colour" in first and "further warnings" in last


def test_the_language_is_detected(http: httpx.Client) -> None:
    answer = http.post("/detect-language", files={"audio_file": PRINTING.read_bytes()})
    assert answer.json() == {"detected_language": "english", "language_code": "en", "confidence": 1.0}
    silent = http.post(
        "/detect-language", params={"encode": "false"}, files={"audio_file": np.zeros(16_000, "<i2").tobytes()}
    )
    assert silent.json()["language_code"] == "und"


@pytest.mark.parametrize(
    ("params", "says"), [({"output": "doc"}, "output"), ({"encode": "perhaps"}, "encode"), ({"task": "sing"}, "task")]
)
def test_asr_names_the_wrong_field(http: httpx.Client, params: dict[str, str], says: str) -> None:
    answer = http.post("/asr", params=params, files={"audio_file": PRINTING.read_bytes()})
    assert answer.status_code == 422
    assert says in answer.json()["error"]["message"]


# -- state and pages ---------------------------------------------------------------------


def test_probes_and_status(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert (http.get("/ready").status_code, http.get("/ping").status_code) == (200, 200)
    status = http.get("/status").json()
    assert status["model"]["name"] == "openai/whisper-tiny.en" and status["model"]["device"] == "cpu"
    assert status["uptime_seconds"] > 0 and status["queue"]["requests_in_hand"] == 0
    assert status["settings"]["WHISPER_MAX_REQUESTS"] == 64
    assert status["settings"]["WHISPER_MODEL_CACHE"] == "set", "a path is nobody's business"


def test_probes_and_pages_can_be_asked_for_their_head(http: httpx.Client) -> None:
    for path in ("/", "/health", "/ready", "/ping", "/docs", "/openapi.json"):
        answer, whole = http.head(path), http.get(path)
        assert (answer.status_code, answer.content) == (200, b""), path
        assert answer.headers["content-length"] == whole.headers["content-length"]
    assert http.head("/transcribe").status_code == 405
    assert 'route="/health",method="HEAD",status="200"' in http.get("/metrics").text


def test_counters(http: httpx.Client) -> None:
    before = metric(http, "whisper_audio_seconds_total")
    http.post("/transcribe", files={"audio": JFK.read_bytes()})
    http.post("/transcribe", files={"audio": b"%PDF"})
    text = http.get("/metrics").text
    assert metric(http, "whisper_audio_seconds_total") - before == pytest.approx(11.0)
    assert 'whisper_http_requests_total{route="/transcribe",method="POST",status="200"}' in text
    assert 'whisper_errors_total{code="DECODE"}' in text
    assert 'whisper_http_request_seconds_bucket{route="/transcribe",le="+Inf"}' in text
    http.get("/some/secret/path")
    assert "secret" not in http.get("/metrics").text


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    from whisper_worker.doors.http_app import create_app
    from whisper_worker.service import Service

    settings = Settings(model_cache=tmp_path / "nothing")
    app = create_app(Service(settings), settings, tmp_path / "jobs")
    transport = httpx.ASGITransport(app)

    async def ask() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as client,
        ):
            while (ready := await client.get("/ready")).json()["status"] == "loading":
                assert (await client.get("/ping")).status_code in (204, 503)
            return ready, await client.get("/ping"), await client.post("/transcribe", files={"audio": JFK.read_bytes()})

    import asyncio

    ready, ping, answer = asyncio.run(ask())
    assert ready.status_code == 503 and "save_pipeline" in ready.json()["message"]
    assert ping.status_code == 503
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "MODEL")


def test_the_description_is_whole_and_needs_no_network(http: httpx.Client) -> None:
    assert set(OPTIONS) == {spec.name for spec in fields(TranscribeOptions)}
    described = http.get("/openapi.json").json()
    text = json.dumps(described)
    for name in described["components"]["schemas"]:
        assert text.count(f'"#/components/schemas/{name}"') or name in ("Transcript", "Job"), name
    page = http.get("/docs").text
    assert "//" not in page.replace("http://localhost:5000", "").replace("https://example.com", "")
    for path, operations in described["paths"].items():
        assert path.replace("{", "").isprintable() and path in page
        for operation in operations.values():
            assert operation["summary"] and operation["responses"]


def test_where_there_is_nothing(http: httpx.Client) -> None:
    for path in ("/nowhere", "/static/nothing.js", "/static/../settings.py", "/jobs/nobody"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "NOT_FOUND")
    assert http.get("/transcribe").status_code == 405
    page = http.get("/")
    assert (page.status_code == 200 and "<html" in page.text) or page.json()["error"]["code"] == "NOT_FOUND"


def test_a_body_of_many_values_is_refused_before_it_is_parsed(http: httpx.Client) -> None:
    body = b'{"audio_url": [' + b"[]," * 20_000 + b"[]]}"
    answer = http.post("/transcribe", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "INVALID_INPUT")
    assert "values" in answer.json()["error"]["message"]


def test_a_form_without_a_file_is_told_what_to_send(http: httpx.Client) -> None:
    answer = http.post("/transcribe", files={"language": (None, "en")})
    assert answer.status_code == 422
    assert "file audio" in answer.json()["error"]["message"]
