"""All that touches RunPod's SDK, which nothing else imports.

The SDK's worker loop is used as it is, but for two things it does not do: hand over what a
stopping worker had still been given, and send progress in order. Both reach into parts of
it that are not its public interface, so they are done only with versions they were tested
with; with others the SDK keeps its own ways and a line in the log says so.

Like :mod:`whisper_worker.settings` this module reads the environment, but only variables
that belong to the platform.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import platform as machine
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.util import find_spec
from typing import Any

from whisper_worker.cache.layout import find_model
from whisper_worker.doors.runpod import Platform, RunPodDoor, Transcriber, spoken_lines
from whisper_worker.doors.runpod_delivery import Upload
from whisper_worker.log import get_logger
from whisper_worker.settings import Settings

_log = get_logger("runpod")

TESTED_VERSIONS = ("1.12.",)
"""Beginnings of the SDK versions whose inner parts are known to be what is expected here."""

LINGER_SECONDS = 5.0
"""How long a worker that was told to stop leaves its last request for jobs open. A job that the platform
was just handing out still arrives; an idle worker is gone well before a container's usual ten seconds."""

_FULL_PAUSE = 0.5
"""Seconds between two looks for a free place while all are taken."""

_BUCKET_VARIABLES = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")


def serve(service: Transcriber, settings: Settings) -> None:
    """Run the worker: on the platform until it is told to stop, elsewhere test_input.json or what the SDK's
    own command line asks for."""
    runpod = _import_sdk()
    deployed = "RUNPOD_WEBHOOK_GET_JOB" in os.environ and not _asked_for("--test_input")
    tested = str(runpod.__version__).startswith(TESTED_VERSIONS)
    config: dict[str, Any] = {}
    door = RunPodDoor(
        service,
        settings,
        Platform(
            post_progress=_post_progress if deployed and tested else None,
            upload=_upload(),
            ask_for_refresh=partial(config.update, refresh_worker=True),
        ),
    )
    config["handler"] = _handler(door, deployed)
    config["concurrency_modifier"] = lambda _: settings.concurrency
    config["return_aggregate_stream"] = True
    if deployed:

        def model_is_there() -> None:
            find_model(settings)

        runpod.serverless.register_fitness_check(model_is_there)
        if tested:
            install_draining_scaler()
        else:
            _log.warning("This version of RunPod's SDK is not a tested one: no progress, and its own way to stop")
    try:
        runpod.serverless.start(config)
    finally:
        door.close()


def _import_sdk() -> Any:
    """The SDK, without the second it takes to look the processor up and without transcripts in its log."""
    # At its default level, DEBUG, it logs what handlers return.
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    with suppress(ImportError):
        # Its debugger wants the processor's name at import; nothing else does.
        cpuinfo: Any = importlib.import_module("cpuinfo")
        cpuinfo.get_cpu_info = lambda: {"brand_raw": machine.processor() or "unknown"}
    return importlib.import_module("runpod")


def _asked_for(flag: str) -> bool:
    return any(argument == flag or argument.startswith(flag + "=") for argument in sys.argv[1:])


def _handler(door: RunPodDoor, deployed: bool) -> Any:
    """The handler for the way the worker was started.

    The SDK never iterates a generator handler in a run by hand, nor for its realtime
    address: these get the plain handler whatever the settings say.
    """
    realtime = os.environ.get("RUNPOD_REALTIME_PORT", "0") not in ("", "0")
    serving = deployed or realtime or _asked_for("--rp_serve_api")
    if serving:
        return door.stream if door.settings.stream and not realtime else door.run

    async def run_and_show(job: Mapping[str, Any]) -> dict[str, Any]:
        result = await door.run(job)
        for line in spoken_lines(result):
            print(line, flush=True)
        return result

    return run_and_show


async def _post_progress(job: Mapping[str, Any], update: dict[str, Any]) -> None:
    from runpod.http_client import AsyncClientSession
    from runpod.serverless.modules.rp_http import send_result

    async with AsyncClientSession() as session:
        await send_result(session, {"status": "IN_PROGRESS", "output": update}, job)


def _upload() -> Upload | None:
    """The SDK's way into the bucket; None where it would write to the local disk instead."""
    if not all(os.environ.get(name) for name in _BUCKET_VARIABLES) or find_spec("boto3") is None:
        return None

    def upload(name: str, data: bytes) -> str:
        from runpod.serverless.utils.rp_upload import upload_in_memory_object

        return str(upload_in_memory_object(name, data))

    return upload


def install_draining_scaler() -> None:
    """Put a worker loop in the SDK's place that loses no job when it is told to stop.

    The SDK's own stops running jobs when it has finished those it knows of, while its
    request for further jobs stays open for up to 90 seconds: a job that arrives there is
    taken and never run, and the process waits for that request to end. Here the request is
    ended first and the running of jobs last.
    """
    from runpod.http_client import AsyncClientSession, TooManyRequests
    from runpod.serverless.modules import rp_scale

    class DrainingScaler(rp_scale.JobScaler):  # type: ignore[misc]  # the SDK has no types
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config)
            self._told_to_stop = asyncio.Event()

        def kill_worker(self) -> None:
            """Called by the signal handlers, and when a job asked for the worker to be refreshed."""
            self._told_to_stop.set()

        async def run(self) -> None:
            async with AsyncClientSession() as session:
                listening = asyncio.create_task(self.monitor_stop_signals(session))
                try:
                    await asyncio.gather(self.get_jobs(session), self.run_jobs(session))
                finally:
                    listening.cancel()
                    await asyncio.gather(listening, return_exceptions=True)

        async def get_jobs(self, session: Any) -> None:
            while not self._told_to_stop.is_set():
                try:
                    await self.set_scale()
                    free = self.current_concurrency - self.job_progress.get_job_count()
                    if free <= 0:
                        await self._pause(_FULL_PAUSE)
                        continue
                    for job in await self._poll(session, free):
                        await self._take(job)
                except TooManyRequests:
                    await self._pause(5)
                except Exception as error:  # whatever the network does, the worker goes on asking
                    _log.warning("No jobs could be had", extra={"fields": {"error": type(error).__name__}})
                    await self._pause(1)
            _log.info("Told to stop: finishing the jobs in hand", extra={"fields": {"jobs": len(self.job_progress)}})
            super().kill_worker()

        async def _poll(self, session: Any, free: int) -> list[Any]:
            """One request for jobs; empty when it ran out, or was ended because the worker is to stop."""
            watched = _WatchedSession(session)
            poll = asyncio.ensure_future(self.jobs_fetcher(watched, free))
            told = asyncio.ensure_future(self._told_to_stop.wait())
            try:
                await asyncio.wait({poll, told}, timeout=self.jobs_fetcher_timeout, return_when=asyncio.FIRST_COMPLETED)
                if told.done() and not self.config.get("refresh_worker"):
                    await asyncio.wait({poll}, timeout=LINGER_SECONDS)
                if poll.done() or watched.answered:
                    return await poll or []
                return []
            finally:
                told.cancel()
                poll.cancel()

        async def _take(self, job: Any) -> None:
            if not isinstance(job, dict) or not isinstance(job.get("id"), str):
                _log.error("A job without an id was handed out and cannot be answered")
                return
            self.job_progress.add(job)
            await self.jobs_queue.put(job)

        async def _pause(self, seconds: float) -> None:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._told_to_stop.wait(), seconds)

    rp_scale.JobScaler = DrainingScaler


class _WatchedSession:
    """A session that remembers whether an answer has begun: from then on its request must not be ended."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.answered = False

    @asynccontextmanager
    async def get(self, url: str) -> AsyncIterator[Any]:
        async with self._session.get(url) as response:
            self.answered = True
            yield response
