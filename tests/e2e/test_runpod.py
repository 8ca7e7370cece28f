"""RunPod's unmodified SDK and our worker against a control plane on loopback."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.control_plane import ControlPlane, worker
from tests.models import model_cache
from whisper_worker.doors.runpod_sdk import LINGER_SECONDS

ROOT = Path(__file__).parents[2]
AUDIO = Path(__file__).parent / "audio"
JFK_URL = json.loads((ROOT / "test_input.json").read_text())["input"]["audio_url"]

SAID = {
    "jfk.ogg": ("fellow americans", "your country"),
    "letters.opus": ("first importance", "letter used"),
    "printing.mp3": ("movable metal letters", "art of printing"),
}
"""What must be heard in each file."""


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    jfk = tmp_path / "jfk.ogg"
    jfk.write_bytes(base64.b64decode(JFK_URL.partition(",")[2]))
    files = {"jfk.ogg": jfk, "letters.opus": AUDIO / "letters.opus", "printing.mp3": AUDIO / "printing.mp3"}
    async with ControlPlane(files) as plane:
        yield plane


class Workers:
    """Starts workers with their own temporary directory, and keeps what they print."""

    def __init__(self, plane: ControlPlane, tmp_path: Path) -> None:
        self.plane = plane
        self.temporary = tmp_path / "temporary"
        self.temporary.mkdir()
        self.output = tmp_path / "output"
        self.log = ""

    @contextlib.asynccontextmanager
    async def start(self, *command: str, **variables: str) -> AsyncIterator[asyncio.subprocess.Process]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.temporary.parent),
            "WHISPER_ALLOW_PRIVATE_URLS": "true",
            "WHISPER_MODEL_CACHE": str(model_cache("tiny.en")),
            "WHISPER_TMPDIR": str(self.temporary),
            "PYTHONUNBUFFERED": "1",
            **self.plane.environment,
            **variables,
        }
        try:
            async with worker([sys.executable, *command], environment, ROOT, self.output) as process:
                self.plane.process = process
                yield process
        finally:
            self.log += self.output.read_text()

    def real(self, **variables: str) -> Any:
        return self.start("handler.py", WHISPER_THREADS="2", **variables)

    def scripted(self, **variables: str) -> Any:
        return self.start("-m", "tests.e2e.scripted_worker", **variables)


@pytest.fixture
def workers(plane: ControlPlane, tmp_path: Path) -> Workers:
    return Workers(plane, tmp_path)


async def leaves(process: asyncio.subprocess.Process, seconds: float) -> None:
    assert await asyncio.wait_for(process.wait(), seconds) == 0


def submitted_as(prompt: str) -> dict[str, str]:
    return {"audio_url": "https://example.com/a.mp3", "initial_prompt": prompt}


async def test_twenty_jobs(plane: ControlPlane, workers: Workers) -> None:
    heard: dict[str, str] = {}

    async def submit(job_id: str, name: str, field: str = "audio_url", **options: Any) -> None:
        heard[job_id] = name
        await plane.submit(job_id, **{field: f"{plane.url}/audio/{name}"}, **options)

    names = list(SAID)
    await plane.submit("cancelled", audio_url=f"{plane.url}/slow")
    await plane.submit("missing", audio_url=f"{plane.url}/audio/none.mp3")
    await submit("oversized", "jfk.ogg", word_timestamps=True, formats="all")
    await submit("faster", "letters.opus", "audio", transcription="srt", word_timestamps=True, model="tiny.en")
    await plane.submit("invalid", audio_url=f"{plane.url}/audio/jfk.ogg", beam_size="many")
    await plane.submit("data", audio_url=JFK_URL)
    await plane.submit("base64", audio_base64=JFK_URL.partition(",")[2])
    heard |= {"data": "jfk.ogg", "base64": "jfk.ogg"}
    await plane.submit("several", audio_urls=[f"{plane.url}/audio/{name}" for name in (names[1], "none.mp3")])
    for number in range(12):
        await submit(f"plain-{number}", names[number % 3])
    assert len(plane.jobs) == 20
    variables = {"WHISPER_CONCURRENCY": "4", "WHISPER_MAX_RESULT_BYTES": "6000", "LOG_FORMAT": "json"}

    def done() -> list[str]:
        return [job_id for job_id, record in plane.jobs.items() if record.results]

    async with workers.real(**variables) as process:
        await plane.until(lambda: plane.slow_requests == 1 and any("cancelled" in ids for ids in plane.pings))
        plane.stop("cancelled")
        await plane.until(lambda: plane.slow_requests == 0)
        await plane.until(lambda: len(done()) >= 9)
        process.send_signal(signal.SIGTERM)
        await leaves(process, 30)
        taken = {job_id for job_id, record in plane.jobs.items() if record.taken}
        assert taken == {*done(), "cancelled"}, "what was taken was run to its end"
        assert set(plane.waiting) == set(plane.jobs) - taken, "what was not taken waits for the next worker"
        assert plane.waiting, "the worker stopped in the middle"
    async with workers.real(**variables) as process:
        await plane.until(lambda: len(done()) == 19)
        process.send_signal(signal.SIGTERM)
        await leaves(process, 30)

    assert all(record.taken == 1 for record in plane.jobs.values())
    assert plane.jobs["cancelled"].results == []
    for job_id, name in heard.items():
        if job_id == "oversized":
            continue
        output = plane.jobs[job_id].output
        for phrase in SAID[name]:
            assert phrase in output["text"].lower(), (job_id, output["text"])
        assert output["segments"][0]["start"] < output["segments"][-1]["end"] <= output["duration"]
        assert output["receipt"]["model"] == output["model"] == "openai/whisper-tiny.en"
    faster = plane.jobs["faster"].output
    assert "00:00:00" in faster["transcription"] and "-->" in faster["transcription"]
    assert faster["word_timestamps"] and faster["warnings"] == []
    assert plane.jobs["missing"].error["code"] == "DOWNLOAD"
    assert plane.jobs["invalid"].error["code"] == "INVALID_INPUT"
    assert plane.jobs["oversized"].error["code"] == "TOO_LARGE"
    good, bad = plane.jobs["several"].output["results"]
    assert "importance" in good["text"] and bad["error"]["code"] == "DOWNLOAD"

    assert any(record.progress for record in plane.jobs.values())
    assert not any(record.late_progress for record in plane.jobs.values())
    pinged = {job_id for ids in plane.pings for job_id in ids.split(",") if job_id}
    assert pinged <= set(plane.jobs)
    assert [path.name for path in workers.temporary.rglob("*") if path.is_file()] == []
    ends = [json.loads(line) for line in workers.log.splitlines() if '"Job finished"' in line]
    assert sorted(line["job_id"] for line in ends) == sorted(plane.jobs)
    assert "americans" not in workers.log.lower() and "importance" not in workers.log.lower()
    for secret in (str(workers.temporary), "Traceback"):
        assert not any(secret in json.dumps(record.results) for record in plane.jobs.values())


async def test_a_job_handed_out_after_sigterm_is_run(plane: ControlPlane, workers: Workers) -> None:
    async with workers.scripted(WHISPER_CONCURRENCY="4") as process:
        await plane.submit("before", **submitted_as("sleep 3"))
        await plane.until(lambda: plane.jobs["before"].taken and plane.open_polls)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(1)
        # Its answer has begun when the worker would end the request, and is complete only later.
        plane.body_delay = LINGER_SECONDS
        await plane.submit("after", **submitted_as("sleep 1"))
        await plane.until(lambda: plane.jobs["after"].taken, 2)
        await plane.submit("too late", **submitted_as(""))
        await leaves(process, 15)
    assert plane.jobs["before"].output["text"] == plane.jobs["after"].output["text"] == "spoken 0 spoken 1"
    assert plane.waiting == ["too late"], "a stopping worker asks for no more"


async def test_an_idle_worker_leaves_promptly(plane: ControlPlane, workers: Workers) -> None:
    async with workers.scripted() as process:
        await plane.until(lambda: plane.open_polls)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        await leaves(process, LINGER_SECONDS + 3)
        assert time.monotonic() - begun < LINGER_SECONDS + 3
        await plane.submit("too late", **submitted_as(""))
        assert plane.waiting == ["too late"]


async def test_a_full_worker_finishes_what_it_has(plane: ControlPlane, workers: Workers) -> None:
    async with workers.scripted(WHISPER_CONCURRENCY="2") as process:
        for number in range(3):
            await plane.submit(f"job-{number}", **submitted_as("sleep 2"))
        await plane.until(lambda: len(plane.waiting) == 1)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        await leaves(process, 8)
        assert time.monotonic() - begun < 4, "with no request open there is nothing to linger for"
    assert plane.waiting == ["job-2"]
    assert [bool(record.results) for record in plane.jobs.values()] == [True, True, False]


async def test_a_worker_with_a_broken_gpu_asks_to_be_replaced_and_goes(plane: ControlPlane, workers: Workers) -> None:
    async with workers.scripted() as process:
        await plane.submit("neighbour", **submitted_as("sleep 2"))
        await plane.submit("broken", **submitted_as("fault"))
        await leaves(process, 20)
    assert plane.jobs["broken"].error["code"] == "ENGINE"
    assert plane.jobs["broken"].results[0]["stopPod"] is True
    assert plane.jobs["neighbour"].output["text"] == "spoken 0 spoken 1"


async def test_streaming_keeps_the_aggregate(plane: ControlPlane, workers: Workers) -> None:
    async with workers.scripted(WHISPER_STREAM="true") as process:
        await plane.submit("good", **submitted_as("long 3"))
        await plane.submit("bad", **submitted_as("fault"))
        await leaves(process, 20)
    good, bad = plane.jobs["good"], plane.jobs["bad"]
    assert good.output == good.streamed
    assert [segment["text"] for piece in good.streamed for segment in piece.get("segments", [])] == [
        " spoken 0",
        " spoken 1",
        " spoken 2",
    ]
    assert good.streamed[-1]["text"] == "spoken 0 spoken 1 spoken 2"
    assert bad.error["code"] == "ENGINE" and bad.results[0]["stopPod"] is True


async def test_a_cancelled_stream_stops(plane: ControlPlane, workers: Workers) -> None:
    async with workers.scripted(WHISPER_STREAM="true", WHISPER_CONCURRENCY="1"):
        await plane.submit("endless", **submitted_as("sleep 600"))
        await plane.until(lambda: "endless" in plane.pings)
        plane.stop("endless")
        await plane.submit("next", **submitted_as(""))
        await plane.until(lambda: plane.jobs["next"].results)
    assert plane.jobs["endless"].results == []


async def test_what_is_too_large_goes_to_the_bucket(plane: ControlPlane, workers: Workers) -> None:
    async with workers.scripted(WHISPER_MAX_RESULT_BYTES="50000", **plane.bucket_environment):
        await plane.submit("large", **submitted_as("long 500"))
        await plane.until(lambda: plane.jobs["large"].results)
    output = plane.jobs["large"].output
    ((key, stored),) = plane.bucket.items()
    assert key in output["result_url"]
    assert len(stored) == output["result_bytes"]
    assert len(json.loads(stored)["segments"]) == 500


async def test_a_worker_without_a_model_says_so_and_takes_no_job(plane: ControlPlane, workers: Workers) -> None:
    await plane.submit("waits", **submitted_as(""))
    async with workers.scripted(WHISPER_MODEL_CACHE=str(workers.temporary)) as process:
        assert await asyncio.wait_for(process.wait(), 20) == 1
    assert plane.waiting == ["waits"]
    (report,) = plane.unhealthy
    assert report["check"] == "model_is_there" and "save_pipeline.py" in report["reason"]
    assert str(workers.temporary) not in report["reason"]


def by_hand(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "WHISPER_MODEL_CACHE": str(model_cache("tiny.en")),
        **variables,
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "handler.py"), *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_by_hand_the_segments_appear_whatever_the_mode(tmp_path: Path) -> None:
    (tmp_path / "test_input.json").write_bytes((ROOT / "test_input.json").read_bytes())
    ran = by_hand(tmp_path, WHISPER_STREAM="true")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = [line for line in ran.stdout.splitlines() if line.startswith("[00:")]
    assert "ask what you can do for your country" in " ".join(lines).lower()
    assert "americans" not in ran.stderr.lower(), "the log holds no transcript"


async def test_by_hand_with_the_request_of_the_first_document(plane: ControlPlane, tmp_path: Path) -> None:
    request = json.dumps({"input": {"audio_url": f"{plane.url}/audio/letters.opus"}})
    (tmp_path / "test_input.json").write_text(request)
    ran = await asyncio.to_thread(by_hand, tmp_path, WHISPER_ALLOW_PRIVATE_URLS="true")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "importance" in ran.stdout and "importance" not in ran.stderr
    for step in ("Job started", "Processing audio from URL", "Downloaded", "Starting transcription", "Job finished"):
        assert step in ran.stderr


def test_by_hand_a_failure_has_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "test_input.json").write_text(json.dumps({"input": {"audio_url": "ftp://example.com/a.mp3"}}))
    ran = by_hand(tmp_path)
    assert ran.returncode == 1
    assert '"code"' in ran.stdout
    assert by_hand(tmp_path, WHISPER_CONCURRENCY="none").returncode == 1


def test_importing_the_handler_starts_and_loads_nothing() -> None:
    code = (
        "import sys, threading, handler; "
        "print(sorted({'torch', 'runpod', 'transformers'} & set(sys.modules)), threading.active_count())"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["[]", "1"]
    assert ran.stderr == ""
