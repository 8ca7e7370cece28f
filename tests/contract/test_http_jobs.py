"""Long jobs: handed in, followed, withdrawn, and kept through restarts."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import json
import signal
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract.http_kit import JFK, PRINTING, STEW, Process, long_speech, metric, serving, until
from whisper_worker.doors import http_callback
from whisper_worker.doors.http_jobs_store import MAX_ATTEMPTS, JobStore
from whisper_worker.errors import InvalidInput

SECRET = "only we two know"


@pytest.fixture(scope="module")
def jobs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served") / "jobs"


@pytest.fixture(scope="module")
def http_(jobs_dir: Path) -> Iterator[httpx.Client]:
    with serving(jobs_dir, concurrency=1, max_jobs=2) as client:
        yield client


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_speech(tmp_path_factory.mktemp("speech") / "long.wav", 5)


def ended(client: httpx.Client, job_id: str) -> dict[str, Any]:
    def view() -> dict[str, Any] | None:
        job: dict[str, Any] = client.get(f"/jobs/{job_id}").json()
        return job if job["status"] not in ("queued", "running") else None

    return until(view, 60)


def followed(client: httpx.Client, job_id: str, after: int | None = None) -> list[tuple[int, str, Any]]:
    """Number, name and data of each event until the stream ends."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        events, found = [], {}
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if line:
                found[name] = value
            elif "data" in found:
                events.append((int(found["id"]), found["event"], json.loads(found["data"])))
                found = {}
    return events


def test_a_job_from_its_upload_to_its_result(http_: httpx.Client, jobs_dir: Path) -> None:
    handed = http_.post("/jobs", files={"audio": JFK.read_bytes()}, data={"formats": "srt"})
    assert handed.status_code == 202
    job_id = handed.json()["id"]
    assert handed.headers["location"] == f"/jobs/{job_id}"
    events = followed(http_, job_id)
    names = [name for _, name, _ in events]
    assert names[0] == "status" and names[-1] == "done" and {"segment", "progress"} <= set(names)
    assert [number for number, _, _ in events] == sorted({number for number, _, _ in events})
    job = ended(http_, job_id)
    assert job["status"] == "completed" and job["error"] is None
    assert job["progress"]["done_seconds"] == job["progress"]["total_seconds"] > 5
    assert "fellow Americans" in job["result"]["text"] and job["result"]["formats"]["srt"].startswith("1\n")
    assert events[-1][2] == job["result"]
    assert [data for _, name, data in events if name == "segment"] == job["result"]["segments"]
    whole = http_.post("/transcribe", files={"audio": JFK.read_bytes()}).json()
    assert job["result"]["segments"] == whole["segments"]
    middle = events[len(events) // 2][0]
    assert followed(http_, job_id, after=middle) == [event for event in events if event[0] > middle]
    gone = http_.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": str(events[-1][0])})
    assert gone.status_code == 204
    assert not list((jobs_dir / "spool").iterdir()), "its audio is gone"


def test_a_job_by_address(http_: httpx.Client) -> None:
    url = "data:audio/flac;base64," + base64.b64encode(PRINTING.read_bytes()).decode()
    job = ended(http_, http_.post("/jobs", json={"audio_url": url, "language": "en"}).json()["id"])
    assert "printing" in job["result"]["text"].lower()


def test_a_job_that_fails_says_why(http_: httpx.Client) -> None:
    job_id = http_.post("/jobs", files={"audio": b"%PDF-1.7"}).json()["id"]
    job = ended(http_, job_id)
    assert job["status"] == "failed" and job["result"] is None
    assert job["error"]["code"] == "DECODE" and job["error"]["retryable"] is False
    assert followed(http_, job_id)[-1][1:] == ("error", job["error"])


def test_what_is_wrong_is_said_at_once(http_: httpx.Client, jobs_dir: Path) -> None:
    for fields, status, says in (
        ({"beam_size": "many"}, 422, "beam_size"),
        ({"callback_url": "https://example.com/"}, 422, "WHISPER_CALLBACK_SECRET"),
    ):
        answer = http_.post("/jobs", files={"audio": JFK.read_bytes()}, data=fields)
        assert answer.status_code == status and says in answer.json()["error"]["message"]
    assert http_.get("/jobs/none/events").status_code == 404
    assert http_.post("/jobs/none/cancel").status_code == 404
    assert http_.delete("/jobs/none").status_code == 404
    assert not list((jobs_dir / "spool").iterdir())


def test_withdrawing_and_a_full_queue(http_: httpx.Client, speech: Path) -> None:
    """One job runs, two wait, a fourth is turned away; all three are withdrawn in their own ways."""
    before = metric(http_, "whisper_audio_seconds_total")

    def hand_in() -> httpx.Response:
        with speech.open("rb") as file:
            return http_.post("/jobs", files={"audio": file})

    running = hand_in().json()["id"]
    until(lambda: http_.get(f"/jobs/{running}").json()["progress"]["done_seconds"] > 0)
    waiting, last = hand_in().json()["id"], hand_in().json()["id"]
    refused = hand_in()
    assert refused.status_code == 429 and "retry-after" in refused.headers

    cancelled = http_.post(f"/jobs/{waiting}/cancel").json()
    assert cancelled["status"] == "cancelled" and cancelled["error"]["code"] == "CANCELLED"
    assert http_.delete(f"/jobs/{last}").status_code == 204
    assert http_.get(f"/jobs/{last}").status_code == 404
    assert http_.post(f"/jobs/{running}/cancel").json()["status"] == "cancelled"
    assert followed(http_, running)[-1][1] == "error"
    # The one thread is free again, and nothing was transcribed to its end.
    done = ended(http_, http_.post("/jobs", files={"audio": STEW.read_bytes()}).json()["id"])
    assert "stew" in done["result"]["text"].lower()
    assert metric(http_, "whisper_audio_seconds_total") - before < 60
    assert http_.post(f"/jobs/{done['id']}/cancel").json()["status"] == "completed"


def test_results_expire(tmp_path: Path) -> None:
    with serving(tmp_path, job_ttl=1.0) as client:
        job_id = client.post("/jobs", files={"audio": PRINTING.read_bytes()}).json()["id"]
        assert ended(client, job_id)["status"] == "completed"
        until(lambda: client.get(f"/jobs/{job_id}").status_code == 404, 10)


# -- callbacks ---------------------------------------------------------------------------


class Receiver(http.server.BaseHTTPRequestHandler):
    """Fails at first, as receivers do."""

    calls: list[tuple[dict[str, str], bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.calls.append((dict(self.headers), body))
        self.send_response(503 if len(self.calls) == 1 else 204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    calls: list[tuple[dict[str, str], bytes]] = []
    handler = type("Handler", (Receiver,), {"calls": calls})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/done?token=abc", calls
        server.shutdown()
        thread.join()


def test_a_callback_is_signed_and_tried_again(
    tmp_path: Path, receiver: tuple[str, list[tuple[dict[str, str], bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_callback.Sender.__init__, "__defaults__", ((0.2, 0.2),))
    url, calls = receiver
    with serving(tmp_path, callback_secret=SECRET, allow_private_urls=True) as client:
        data = {"callback_url": url.replace("//", "//user:p%40ss@")}
        job_id = client.post("/jobs", files={"audio": PRINTING.read_bytes()}, data=data).json()["id"]
        view = ended(client, job_id)
        until(lambda: len(calls) == 2)
    for headers, body in calls:
        assert json.loads(body) == view
        assert headers["X-Whisper-Job"] == job_id
        assert abs(time.time() - int(headers["X-Whisper-Timestamp"])) < 60
        signed = headers["X-Whisper-Timestamp"].encode() + b"." + body
        expected = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
        assert headers["X-Whisper-Signature"] == f"sha256={expected}"
        assert headers["Authorization"] == "Basic " + base64.b64encode(b"user:p@ss").decode(), "they were left out"


def test_callbacks_go_to_public_addresses_only(tmp_path: Path) -> None:
    with serving(tmp_path, callback_secret=SECRET) as client:
        for url in ("http://127.0.0.1:1/", "http://169.254.169.254/", "ftp://example.com/", "http://localhost/"):
            answer = client.post("/jobs", files={"audio": PRINTING.read_bytes()}, data={"callback_url": url})
            assert answer.status_code == 403
            message = answer.json()["error"]["message"]
            assert "callback_url" in message and "data" not in message


# -- restarts ----------------------------------------------------------------------------


def test_killed_among_three_jobs(tmp_path: Path) -> None:
    """Killed while the first of three runs: the next process runs all three, each to one end."""
    speech = long_speech(tmp_path / "long.wav", 4).read_bytes()
    files = [speech, PRINTING.read_bytes(), STEW.read_bytes()]
    with Process(tmp_path, WHISPER_CONCURRENCY="1") as first:
        with first.client() as client:
            ids = [client.post("/jobs", files={"audio": content}).json()["id"] for content in files]
            until(lambda: client.get(f"/jobs/{ids[0]}").json()["progress"]["done_seconds"] > 0, 60)
        first.process.kill()
        first.process.wait()
    (tmp_path / "jobs" / "spool" / "half-an-upload").mkdir()
    with Process(tmp_path, WHISPER_CONCURRENCY="1") as second, second.client() as client:
        views = [ended(client, job_id) for job_id in ids]
        assert [view["status"] for view in views] == ["completed"] * 3
        assert views[0]["result"]["duration"] == pytest.approx(240)
        assert "stew" in views[2]["result"]["text"].lower()
        for job_id in ids:
            names = [name for _, name, _ in followed(client, job_id)]
            assert names.count("done") == 1 and names[-1] == "done"
        attempts = [data["attempt"] for _, name, data in followed(client, ids[0]) if "attempt" in (data or {})]
        assert attempts[-1] == 2
        assert not list((tmp_path / "jobs" / "spool").iterdir())


def test_told_to_stop(tmp_path: Path) -> None:
    """The request in hand is answered, the long job is kept for the next process, the exit is in order."""
    with Process(tmp_path, WHISPER_DRAIN_TIMEOUT="5", WHISPER_CONCURRENCY="1", MODEL_BATCH_SIZE="2") as served:
        with served.client() as client:
            job_id = client.post("/jobs", files={"audio": long_speech(tmp_path / "long.wav", 15).read_bytes()}).json()[
                "id"
            ]
            until(lambda: client.get(f"/jobs/{job_id}").json()["progress"]["done_seconds"] > 0, 60)
            answers: list[httpx.Response] = []
            ask = threading.Thread(
                target=lambda: answers.append(client.post("/transcribe", files={"audio": JFK.read_bytes()}))
            )
            ask.start()
            until(lambda: metric(client, "whisper_requests_in_hand") == 1)
            served.process.send_signal(signal.SIGTERM)
            ask.join(30)
            assert "fellow Americans" in answers[0].json()["text"]
        assert served.process.wait(15) == 0
        log = served.log.read_text()
    assert "Traceback" not in log and "put back" in log
    database = sqlite3.connect(tmp_path / "jobs" / "jobs.sqlite")
    assert database.execute("SELECT id, status, attempts FROM jobs").fetchall() == [(job_id, "queued", 0)]
    database.close()


def test_a_unix_socket_and_an_end_when_idle(tmp_path: Path) -> None:
    path = tmp_path / "service.sock"
    with Process(tmp_path, "--uds", str(path), "--idle-timeout", "1.5", WHISPER_JOBS_DIR="") as served:
        transport = httpx.HTTPTransport(uds=str(path))
        until(path.exists)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with httpx.Client(transport=transport, base_url="http://service", timeout=60) as client:
            until(lambda: client.get("/health").status_code == 200)
            assert client.post("/transcribe", files={"audio": JFK.read_bytes()}).json()["language"] == "en"
            with Process(tmp_path, "--uds", str(path), WHISPER_JOBS_DIR="") as twice:
                assert twice.process.wait(20) == 2
                assert "already" in twice.log.read_text()
        assert served.process.wait(20) == 0
        assert not path.exists()


def test_a_job_that_ends_its_process_is_given_up(tmp_path: Path) -> None:
    for attempt in range(MAX_ATTEMPTS):
        store = JobStore(tmp_path)
        if attempt == 0:
            with store.spool("job") as spool:
                (spool / "upload.wav").write_bytes(b"x")
                store.add("job", {}, spool / "upload.wav", "a.wav", None)
        claimed = store.claim()
        assert claimed is not None and claimed.attempts == attempt + 1
        store.close()  # without an outcome, as a killed process leaves it
    store = JobStore(tmp_path)
    view = store.view("job")
    assert view is not None and view["status"] == "failed" and "cut off" in view["error"]["message"]
    assert store.claim() is None
    assert not (tmp_path / "spool" / "job").exists()
    store.close()


def test_one_process_a_directory(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs")
    with pytest.raises(InvalidInput, match="WHISPER_JOBS_DIR"):
        JobStore(tmp_path / "jobs")
    assert stat.S_IMODE((tmp_path / "jobs" / "jobs.sqlite").stat().st_mode) == 0o600
    store.close()
    JobStore(tmp_path / "jobs").close()
