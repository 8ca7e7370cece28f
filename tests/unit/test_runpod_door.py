"""The RunPod door over a scripted service: answers, errors, cancelling, several inputs, logs."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError as FutureCancelled
from typing import Any

import pytest

from tests.unit.runpod_fakes import FakeService, Script, transcript
from whisper_worker import errors, log
from whisper_worker.doors.runpod import OUTCOMES, Platform, RunPodDoor, spoken_lines
from whisper_worker.settings import Settings
from whisper_worker.types import CancelToken, JobInput, Transcript

URL = "https://example.com/a.mp3?token=secret"
SECRETS = "/srv/secret/path host.internal token=secret spoken words"


@pytest.fixture
async def make_door() -> AsyncIterator[Callable[..., RunPodDoor]]:
    doors: list[RunPodDoor] = []

    def make(script: Script | None = None, platform: Platform | None = None, **options: Any) -> RunPodDoor:
        service = FakeService(script) if script else FakeService()
        settings = Settings(**options.pop("settings", {}))
        options.setdefault("served_model", lambda: "openai/whisper-base")
        doors.append(RunPodDoor(service, settings, platform, **options))
        return doors[-1]

    yield make
    for door in doors:
        door.close()


def job(job_id: str = "job-1", **payload: Any) -> dict[str, Any]:
    return {"id": job_id, "input": payload or {"audio_url": URL}}


def failing(error: BaseException) -> Script:
    def script(job: JobInput, cancel: CancelToken) -> Transcript:
        raise error

    return script


def error_of(result: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(result["error"], str)
    return dict(json.loads(result["error"]))


async def collect(door: RunPodDoor, one: dict[str, Any]) -> list[dict[str, Any]]:
    return [piece async for piece in door.stream(one)]


def test_the_sdk_takes_stream_for_a_generator_and_run_for_none() -> None:
    door = RunPodDoor(FakeService(), Settings())
    assert inspect.isasyncgenfunction(door.stream)
    assert inspect.iscoroutinefunction(door.run)
    door.close()


async def test_a_job_is_answered(make_door: Callable[..., RunPodDoor]) -> None:
    result = await make_door().run(job())
    assert result["text"] == "hello world"
    assert [chunk["text"] for chunk in result["chunks"]] == [" hello", " world"]
    assert result["receipt"]["model"] == result["model"] == "openai/whisper-base"
    assert "error" not in result
    json.dumps(result)


def test_every_code_has_an_outcome() -> None:
    assert set(OUTCOMES) == errors.ERROR_CODES


ERROR_CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type)
    and issubclass(value, errors.WhisperWorkerError)
    and value is not errors.WhisperWorkerError
]


@pytest.mark.parametrize("cls", ERROR_CLASSES, ids=lambda cls: str(cls.__name__))
@pytest.mark.parametrize("streamed", [False, True])
async def test_typed_errors_reach_the_caller_as_json_text(
    make_door: Callable[..., RunPodDoor], cls: type[errors.WhisperWorkerError], streamed: bool
) -> None:
    door = make_door(failing(cls("Say what to do.")), on_gpu=lambda: False)
    result = (await collect(door, job()))[-1] if streamed else await door.run(job())
    assert set(result) == {"error"}
    assert error_of(result) == {
        "code": cls.code,
        "message": "Say what to do.",
        "retryable": cls.default_retryable,
    }


@pytest.mark.parametrize(
    "error",
    [
        ValueError(SECRETS),
        KeyError(SECRETS),
        MemoryError(SECRETS),
        OSError(2, SECRETS),
        UnicodeDecodeError("utf-8", b"x", 0, 1, SECRETS),
        RecursionError(SECRETS),
        StopIteration(SECRETS),
        SystemExit(SECRETS),
        KeyboardInterrupt(SECRETS),
        asyncio.CancelledError(SECRETS),
        FutureCancelled(SECRETS),
        GeneratorExit(SECRETS),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_whatever_is_raised_the_caller_gets_an_answer_without_inside_knowledge(
    make_door: Callable[..., RunPodDoor], error: BaseException, streamed: bool
) -> None:
    written = listen()
    door = make_door(failing(error))
    result = (await collect(door, job()))[-1] if streamed else await door.run(job())
    told = error_of(result)
    assert (told["code"], told["retryable"]) == ("INTERNAL", True)
    for secret in (*SECRETS.split(), "Traceback", "runpod_fakes", type(error).__name__):
        assert secret not in result["error"]
    assert type(error).__name__ in written.getvalue()
    assert "secret" not in written.getvalue()


async def test_a_defect_before_the_service_is_an_answer_too(make_door: Callable[..., RunPodDoor]) -> None:
    def broken() -> str:
        raise RuntimeError(SECRETS)

    result = await make_door(served_model=broken).run(job(audio_url=URL, model="base"))
    assert error_of(result)["code"] == "INTERNAL"


@pytest.mark.parametrize("payload", [None, [], "text", {}, {"audio_url": 5}])
async def test_a_request_that_cannot_be_read_is_refused(make_door: Callable[..., RunPodDoor], payload: object) -> None:
    assert error_of(await make_door().run({"id": "x", "input": payload}))["code"] == "INVALID_INPUT"
    assert error_of(await make_door().run({}))["code"] == "INVALID_INPUT"


@pytest.mark.parametrize(
    ("gpu", "error", "expected"),
    [
        (True, errors.EngineError("x"), True),
        (False, errors.EngineError("x"), False),
        (True, errors.InvalidInput("x"), False),
        (True, errors.OutOfMemory("x"), False),
    ],
)
async def test_a_fault_on_the_gpu_asks_for_a_fresh_worker(
    make_door: Callable[..., RunPodDoor], gpu: bool, error: Exception, expected: bool
) -> None:
    asked: list[bool] = []
    platform = Platform(ask_for_refresh=lambda: asked.append(True))
    door = make_door(failing(error), platform, on_gpu=lambda: gpu)
    result = await door.run(job())
    assert result.pop("refresh_worker", False) is expected
    assert bool(asked) is expected
    asked.clear()
    result = await door.run(job(audio_urls=[URL]))
    assert result.pop("refresh_worker", False) is expected
    assert bool(asked) is expected
    asked.clear()
    assert "refresh_worker" not in (await collect(door, job()))[-1]
    assert bool(asked) is expected


async def test_cancelling_stops_the_job_and_no_other(make_door: Callable[..., RunPodDoor]) -> None:
    seen: dict[str, threading.Event] = {"begun": threading.Event(), "stopped": threading.Event()}

    def script(one: JobInput, cancel: CancelToken) -> Transcript:
        if one.options.initial_prompt != "wait":
            return transcript(" done")
        seen["begun"].set()
        while not cancel.cancelled:
            time.sleep(0.005)
        seen["stopped"].set()
        raise errors.Cancelled("cancelled")

    door = make_door(script)
    task = asyncio.create_task(door.run(job("slow", audio_url=URL, initial_prompt="wait")))
    await asyncio.to_thread(seen["begun"].wait, 5)
    assert (await door.run(job("other")))["text"] == "done"
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(seen["stopped"].wait, 5)
    assert (await door.run(job("after")))["text"] == "done"


@pytest.mark.parametrize("how", ["task", "aclose"])
async def test_a_stream_that_is_given_up_stops_its_job(make_door: Callable[..., RunPodDoor], how: str) -> None:
    stopped = threading.Event()

    def script(one: JobInput, cancel: CancelToken) -> Transcript:
        while not cancel.cancelled:
            time.sleep(0.005)
        stopped.set()
        raise errors.Cancelled("cancelled")

    door = make_door(script)
    stream = door.stream(job())
    task = asyncio.ensure_future(anext(aiter(stream)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if how == "aclose":
        await stream.aclose()
    assert await asyncio.to_thread(stopped.wait, 5)


async def test_several_inputs_have_each_their_result_or_error(make_door: Callable[..., RunPodDoor]) -> None:
    def script(one: JobInput, cancel: CancelToken) -> Transcript:
        if one.options.initial_prompt == "fail":
            raise errors.DownloadError("Could not be fetched.")
        return transcript(f" {one.source.url}")

    urls: list[Any] = [f"https://example.com/{n}" for n in range(5)]
    urls[2] = {"audio_url": urls[2], "initial_prompt": "fail"}
    urls[3] = {"language": "klingon", "audio_url": urls[3]}
    result = await make_door(script).run(job(audio_urls=urls))
    assert set(result) == {"results"}
    assert [one["index"] for one in result["results"]] == [0, 1, 2, 3, 4]
    assert [one.get("text") for one in result["results"]] == [urls[0], urls[1], None, None, urls[4]]
    assert result["results"][2]["error"] == {
        "code": "DOWNLOAD",
        "message": "Could not be fetched.",
        "retryable": True,
    }
    assert result["results"][3]["error"]["code"] == "INVALID_INPUT"


async def test_inputs_of_one_job_do_not_take_all_threads(make_door: Callable[..., RunPodDoor]) -> None:
    def script(one: JobInput, cancel: CancelToken) -> Transcript:
        time.sleep(0.01)
        return transcript(" x")

    door = make_door(script)
    await door.run(job(audio_urls=[URL] * 8))
    service: Any = door._service
    assert service.most_running == 2
    assert len(service.jobs) == 8


async def test_jobs_run_side_by_side(make_door: Callable[..., RunPodDoor]) -> None:
    meeting = threading.Barrier(8, timeout=5)

    def script(one: JobInput, cancel: CancelToken) -> Transcript:
        meeting.wait()
        return transcript(" x")

    door = make_door(script, settings={"concurrency": 8})
    results = await asyncio.gather(*(door.run(job(f"job-{n}")) for n in range(8)))
    assert all(result["text"] == "x" for result in results)


async def test_translation_is_a_second_pass_in_the_language_heard(make_door: Callable[..., RunPodDoor]) -> None:
    def script(one: JobInput, cancel: CancelToken) -> Transcript:
        if one.options.task == "translate":
            return transcript(" hello")
        return transcript(" hallo", language="de")

    door = make_door(script)
    result = await door.run(job(audio=URL, translate=True, enable_vad=False))
    assert (result["transcription"], result["translation"]) == ("hallo", "hello")
    assert (result["text"], result["detected_language"]) == ("hallo", "de")
    service: Any = door._service
    assert [(one.options.task, one.options.language, one.options.vad) for one in service.jobs] == [
        ("transcribe", None, False),
        ("translate", "de", False),
    ]


async def test_english_is_not_translated_into_english(make_door: Callable[..., RunPodDoor]) -> None:
    door = make_door()
    result = await door.run(job(audio=URL, translate=True))
    assert result["translation"] == result["transcription"] == "hello world"
    service: Any = door._service
    assert len(service.jobs) == 1


async def test_streamed_pieces_make_up_the_answer(make_door: Callable[..., RunPodDoor]) -> None:
    door = make_door()
    whole = await door.run(job(audio_url=URL, formats="srt", return_chunks=False))
    merged: dict[str, Any] = {"segments": []}
    for piece in await collect(door, job(audio_url=URL, formats="srt")):
        merged["segments"] += piece.pop("segments", [])
        merged |= piece
    assert merged == whole


async def test_segments_are_streamed_before_the_job_is_done(make_door: Callable[..., RunPodDoor]) -> None:
    door = make_door()
    go_on = threading.Event()
    service: Any = door._service
    first, *others = transcript(" one", " two").segments

    def transcribe(one: JobInput, *, on_segment: Any, **_: Any) -> Transcript:
        on_segment(first)
        assert go_on.wait(5)
        for other in others:
            on_segment(other)
        return transcript(" one", " two")

    service.transcribe = transcribe
    stream = door.stream(job())
    assert [part["text"] for part in (await anext(aiter(stream)))["segments"]] == [" one"]
    go_on.set()
    rest = [piece async for piece in stream]
    assert [part["text"] for part in rest[0]["segments"]] == [" two"]
    assert rest[-1]["text"] == "one two"


async def test_streams_of_several_inputs_say_whose_segments_they_are(make_door: Callable[..., RunPodDoor]) -> None:
    pieces = await collect(make_door(), job(audio_urls=[URL, {"audio_url": 3}, URL]))
    streamed = {index: [] for index in (0, 2)}
    for piece in pieces[:-1]:
        streamed[piece["index"]] += [part["text"] for part in piece["segments"]]
    assert streamed == {0: [" hello", " world"], 2: [" hello", " world"]}
    results = pieces[-1]["results"]
    assert [one["index"] for one in results] == [0, 1, 2]
    assert results[1]["error"]["code"] == "INVALID_INPUT"
    assert "segments" not in results[0] and results[0]["text"] == "hello world"


class Posts:
    """Remembers progress updates; each takes a while to send."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.updates: list[dict[str, Any]] = []
        self.seconds = seconds
        self.under_way = 0

    async def __call__(self, job: Any, update: dict[str, Any]) -> None:
        assert self.under_way == 0, "two updates of one job at a time"
        self.under_way += 1
        await asyncio.sleep(self.seconds)
        self.under_way -= 1
        self.updates.append(update)


async def test_progress_is_posted_and_none_after_the_result(make_door: Callable[..., RunPodDoor]) -> None:
    posts = Posts(0.02)

    def script(one: JobInput, cancel: CancelToken) -> Transcript:
        return transcript(*(f" {n}" for n in range(20)))

    door = make_door(script, Platform(post_progress=posts), progress_interval=0.01)
    service: Any = door._service
    original = service.transcribe

    def slowly(one: JobInput, *, on_progress: Any, **options: Any) -> Transcript:
        def progress(update: Any) -> None:
            on_progress(update)
            time.sleep(0.005)

        return original(one, on_progress=progress, **options)

    service.transcribe = slowly
    await door.run(job())
    sent = len(posts.updates)
    assert posts.under_way == 0
    assert 1 <= sent < 20
    percents = [update["percent"] for update in posts.updates]
    assert percents == sorted(percents)
    assert posts.updates[-1]["stage"] == "recognize"
    await asyncio.sleep(0.1)
    assert len(posts.updates) == sent


async def test_progress_that_cannot_be_posted_costs_nothing(make_door: Callable[..., RunPodDoor]) -> None:
    async def post(job: Any, update: dict[str, Any]) -> None:
        raise OSError("no network")

    door = make_door(None, Platform(post_progress=post), progress_interval=0.0)
    assert (await door.run(job()))["text"] == "hello world"


def listen(log_format: str = "text") -> io.StringIO:
    written = io.StringIO()
    log.configure(log_format, "DEBUG")
    handler = logging.getLogger("whisper_worker").handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(written)
    return written


async def test_each_job_has_one_line_at_its_end_and_no_text_in_the_log(make_door: Callable[..., RunPodDoor]) -> None:
    written = listen("json")
    door = make_door()
    await door.run(job("good"))
    await door.run(job("several", audio_urls=[URL, {"audio_url": 4}]))
    await collect(door, job("streamed"))
    await make_door(failing(errors.DownloadError("Could not be fetched."))).run(job("bad"))
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    ends = {line["job_id"]: line for line in lines if line["message"] == "Job finished"}
    assert len([line for line in lines if line["message"] == "Job started"]) == len(ends) == 4
    assert ends["good"]["status"] == ends["streamed"]["status"] == "ok"
    assert ends["good"]["audio_seconds"] == 2.0
    assert ends["good"]["result_bytes"] > 100
    assert (ends["several"]["status"], ends["several"]["inputs"]) == ("partial", 2)
    assert ends["several"]["codes"] == "INVALID_INPUT"
    assert (ends["bad"]["status"], ends["bad"]["codes"]) == ("failed", "DOWNLOAD")
    assert "hello" not in written.getvalue()
    assert "secret" not in written.getvalue()


async def test_a_cancelled_job_is_logged_as_such(make_door: Callable[..., RunPodDoor]) -> None:
    written = listen("json")

    def script(one: JobInput, cancel: CancelToken) -> Transcript:
        while not cancel.cancelled:
            time.sleep(0.005)
        raise errors.Cancelled("cancelled")

    task = asyncio.create_task(make_door(script).run(job()))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    last = json.loads(written.getvalue().splitlines()[-1])
    assert (last["message"], last["status"], last["job_id"]) == ("Job finished", "cancelled", "job-1")


async def test_spoken_lines_are_what_a_person_reads(make_door: Callable[..., RunPodDoor]) -> None:
    door = make_door()
    assert list(spoken_lines(await door.run(job()))) == [
        "[00:00.000 --> 00:01.000] hello",
        "[00:01.000 --> 00:02.000] world",
    ]
    assert len(list(spoken_lines(await door.run(job(audio_urls=[URL, URL]))))) == 4
    assert list(spoken_lines({"error": "{}"})) == []
