"""The RunPod door: a job's dict comes in, a dict that RunPod's SDK understands goes out.

Nothing here imports the SDK; what touches it is in ``runpod_sdk.py`` and is handed in as
:class:`Platform`. Audio is worked on in threads, so that the event loop goes on taking
jobs and hearing of cancelled ones. Jobs share nothing here but those threads.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from whisper_worker.cache.layout import find_model
from whisper_worker.doors.runpod_delivery import Delivery, Stream, Upload, Whole
from whisper_worker.doors.runpod_dialects import Order, answer, read_request
from whisper_worker.doors.runpod_progress import ProgressReport
from whisper_worker.errors import InternalError, WhisperWorkerError
from whisper_worker.formats import timestamp
from whisper_worker.log import get_logger, job_context
from whisper_worker.settings import Settings
from whisper_worker.types import CancelToken, JobInput, Progress, Segment, Transcript

_log = get_logger("runpod")

_T = TypeVar("_T")

_SIDE_BY_SIDE = 2
"""Inputs of one job worked on at a time: one is fetched while another is recognized, and no job takes all threads."""

_LEAST_THREADS = 32
"""A cancelled job's thread may hang in a download for a while: the jobs after it must find another."""


class Transcriber(Protocol):
    """The service as this door calls it."""

    def transcribe(
        self,
        job: JobInput,
        *,
        cancel: CancelToken | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_segment: Callable[[Segment], None] | None = None,
    ) -> Transcript: ...


@dataclass(frozen=True, slots=True)
class Platform:
    """What the door asks of the platform; the defaults are those of a worker on its own."""

    post_progress: Callable[[Mapping[str, Any], dict[str, Any]], Awaitable[None]] | None = None
    """Sends one progress update of a job and returns when it has arrived."""
    upload: Upload | None = None
    ask_for_refresh: Callable[[], None] = lambda: None
    """Called when the worker's process is no longer fit for work."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an error means to this door, beyond its text in ``error``."""

    log_level: int
    refresh_on_gpu: bool = False
    """A CUDA context does not recover from a fault: every later job of the process would fail too."""


OUTCOMES: Mapping[str, Outcome] = {
    "INVALID_INPUT": Outcome(logging.INFO),
    "FORBIDDEN": Outcome(logging.WARNING),
    "DOWNLOAD": Outcome(logging.INFO),
    "TOO_LARGE": Outcome(logging.INFO),
    "DECODE": Outcome(logging.INFO),
    "TIMEOUT": Outcome(logging.WARNING),
    "MODEL": Outcome(logging.ERROR),
    "OUT_OF_MEMORY": Outcome(logging.ERROR),
    "ENGINE": Outcome(logging.ERROR, refresh_on_gpu=True),
    "BUSY": Outcome(logging.WARNING),
    "CANCELLED": Outcome(logging.INFO),
    "INTERNAL": Outcome(logging.ERROR),
}


@dataclass(slots=True)
class _Run:
    """One job on its way."""

    job_id: str
    delivery: Delivery
    progress: ProgressReport
    cancel: CancelToken = field(default_factory=CancelToken)
    begun: float = field(default_factory=time.perf_counter)
    refresh: bool = False
    codes: list[str] = field(default_factory=list)
    """Codes of the errors that the answer holds."""
    audio_seconds: list[float] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    """Further fields of the job's last log line."""


class RunPodDoor:
    """``run`` and ``stream`` are the two handlers; which one serves is chosen at the start."""

    def __init__(
        self,
        service: Transcriber,
        settings: Settings,
        platform: Platform | None = None,
        *,
        progress_interval: float = 2.0,
        served_model: Callable[[], str] | None = None,
        on_gpu: Callable[[], bool] | None = None,
    ) -> None:
        """``progress_interval``: least seconds between two updates of a job."""
        self.settings = settings
        self._service = service
        self._platform = platform or Platform()
        self._progress_interval = progress_interval
        self._served_model = served_model or (lambda: find_model(settings).name)
        self._on_gpu = on_gpu or partial(_on_gpu, settings)
        self._threads = ThreadPoolExecutor(max(_LEAST_THREADS, 4 * settings.concurrency), thread_name_prefix="job")

    def close(self) -> None:
        """Wait for the threads of jobs that were cancelled."""
        self._threads.shutdown()

    async def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Run one job and give its answer, or ``{"error": JSON text of code, message, retryable}``.

        Raises nothing but ``CancelledError``: when the job is cancelled, its threads are told to stop.
        """
        delivery = Whole(_job_id(job), self.settings, self._platform.upload)
        (result,) = await self._execute(job, delivery)
        return result

    async def stream(self, job: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Run one job and yield ``{"segments": [...]}`` as they come, the rest of the answer at last.

        Appending the lists and merging the other keys of all that is yielded gives what
        :meth:`run` gives, without ``chunks`` and ``word_timestamps``, which repeat the segments.
        With several inputs ``index`` says whose segments they are.
        """
        delivery = Stream(_job_id(job), self.settings, self._platform.upload, asyncio.get_running_loop())
        task = asyncio.create_task(self._execute(job, delivery))
        task.add_done_callback(lambda _: delivery.end())
        try:
            async for piece in delivery.pieces():
                yield piece
            for piece in task.result():
                # The SDK reads this key in results alone; a stream's worker is refreshed by ask_for_refresh.
                piece.pop("refresh_worker", None)
                yield piece
        finally:
            task.cancel()

    async def _execute(self, job: Mapping[str, Any], delivery: Delivery) -> list[dict[str, Any]]:
        """The job from its first log line to its last; gives what is left to hand over."""
        post = self._platform.post_progress if delivery.wants_progress else None
        progress = ProgressReport(partial(post, job) if post else None, self._progress_interval)
        run = _Run(_job_id(job), delivery, progress)
        with job_context(run.job_id):
            _log.info("Job started")
            try:
                pieces = await self._in_thread(delivery.finish, await self._answer(job, run))
                status = "partial" if run.codes else "ok"
                run.facts["result_bytes"] = delivery.n_bytes
            except asyncio.CancelledError:
                run.cancel.cancel()
                progress.abandon()
                self._finished(run, "cancelled")
                raise
            except Exception as error:
                pieces = [self._failure(error, run)]
                status = "failed"
            await progress.close()
            if run.refresh:
                self._platform.ask_for_refresh()
                pieces[-1]["refresh_worker"] = True
            self._finished(run, status)
            return pieces

    async def _answer(self, job: Mapping[str, Any], run: _Run) -> dict[str, Any]:
        request = read_request(job.get("input"), self.settings, self._served_model)
        run.facts["inputs"] = len(request.orders)
        run.progress.expect(len(request.orders))
        if not request.several:
            (order,) = request.orders
            assert isinstance(order, Order)
            return await self._in_thread(self._fulfil, order, run, None)
        gate = asyncio.Semaphore(_SIDE_BY_SIDE)

        async def one(index: int, order: Order | WhisperWorkerError) -> dict[str, Any]:
            try:
                if isinstance(order, WhisperWorkerError):
                    raise order
                async with gate:
                    return {"index": index, **await self._in_thread(self._fulfil, order, run, index)}
            except WhisperWorkerError as error:
                return {"index": index, "error": self._noted(error, run).to_dict()}

        return {"results": await asyncio.gather(*(one(index, order) for index, order in enumerate(request.orders)))}

    def _fulfil(self, order: Order, run: _Run, index: int | None) -> dict[str, Any]:
        """One input from its address to its answer; runs in a thread."""
        steps = 2 if order.translate else 1
        transcript = self._service.transcribe(
            order.job,
            cancel=run.cancel,
            on_progress=partial(run.progress.update, index, 0, steps),
            on_segment=run.delivery.on_segment(index),
        )
        run.audio_seconds.append(transcript.duration)
        translation = None
        if order.translate:
            translation = transcript
            if transcript.language not in (None, "en") and order.job.options.task != "translate":
                # The recording is fetched again: the service keeps no audio of a finished job.
                options = replace(order.job.options, task="translate", language=transcript.language)
                translation = self._service.transcribe(
                    replace(order.job, options=options),
                    cancel=run.cancel,
                    on_progress=partial(run.progress.update, index, 1, steps),
                )
        return answer(order, transcript, translation)

    async def _in_thread(self, function: Callable[..., _T], *args: object) -> _T:
        """Call a blocking function off the event loop. Raises typed errors, or ``CancelledError`` from outside."""
        guarded = partial(contextvars.copy_context().run, _guarded, function, *args)
        return await asyncio.get_running_loop().run_in_executor(self._threads, guarded)

    def _failure(self, error: Exception, run: _Run) -> dict[str, Any]:
        typed = error if isinstance(error, WhisperWorkerError) else _unexpected(error)
        # The SDK carries strings alone under this key; a dict there arrives as a job without output.
        return {"error": json.dumps(self._noted(typed, run).to_dict())}

    def _noted(self, error: WhisperWorkerError, run: _Run) -> WhisperWorkerError:
        outcome = OUTCOMES[error.code]
        run.codes.append(error.code)
        run.refresh = run.refresh or (outcome.refresh_on_gpu and self._on_gpu())
        _log.log(outcome.log_level, "%s", error.message, extra={"fields": {"code": error.code}})
        return error

    def _finished(self, run: _Run, status: str) -> None:
        seconds = time.perf_counter() - run.begun
        audio_seconds = sum(run.audio_seconds)
        facts: dict[str, object] = {"status": status, "seconds": round(seconds, 3), **run.facts}
        if run.codes:
            facts["codes"] = ",".join(sorted(set(run.codes)))
        if audio_seconds:
            facts |= {"audio_seconds": round(audio_seconds, 3), "rtfx": round(audio_seconds / max(seconds, 1e-3), 1)}
        _log.info("Job finished", extra={"fields": facts})


def spoken_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The segments of an answer as lines to read, for a worker started by hand."""
    for one in result.get("results", [result]):
        for segment in one.get("segments", []):
            yield f"[{timestamp(segment['start'])} --> {timestamp(segment['end'])}] {segment['text'].strip()}"


def _job_id(job: Mapping[str, Any]) -> str:
    return str(job.get("id", "unknown"))


def _guarded(function: Callable[..., _T], *args: object) -> _T:
    try:
        return function(*args)
    except WhisperWorkerError:
        raise
    except BaseException as error:
        # Of these a SystemExit would end the worker, and concurrent.futures' CancelledError would look like ours.
        raise _unexpected(error) from None


def _unexpected(error: BaseException) -> InternalError:
    """What the caller hears of a defect. The log says where it was; the error's own text may hold anything."""
    frames = [f"{frame.f_globals.get('__name__')}:{line}" for frame, line in traceback.walk_tb(error.__traceback__)]
    fields = {"error": type(error).__name__, "where": " > ".join(frames[-6:])}
    _log.error("Unexpected failure", extra={"fields": fields})
    return InternalError("The worker failed on this job. Send it again; report its id if it fails again.")


def _on_gpu(settings: Settings) -> bool:
    """Whether the model runs on a GPU. Asked after a failure of the engine, when torch is long loaded."""
    torch = sys.modules.get("torch")
    return settings.device != "cpu" and torch is not None and bool(torch.cuda.is_available())
