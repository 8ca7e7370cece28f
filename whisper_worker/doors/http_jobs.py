"""The routes of long jobs: hand in, ask, follow, withdraw."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from whisper_worker.doors.http_body import read_body
from whisper_worker.doors.http_callback import Sender, check_callback
from whisper_worker.doors.http_common import Door, read_job
from whisper_worker.doors.http_desk import HEARTBEAT, KEEP_ALIVE, EventStream, sse
from whisper_worker.doors.http_docs import JOB_EXAMPLE, SSE_RESPONSE, errors, json_response, speech_body
from whisper_worker.doors.http_errors import Refused
from whisper_worker.doors.http_jobs_run import Dispatch, LocalDispatch
from whisper_worker.doors.http_jobs_store import WAITING, JobStore
from whisper_worker.errors import Busy, Cancelled
from whisper_worker.log import get_logger

_log = get_logger("jobs")


class Jobs:
    """The stored jobs, what runs them, and who follows them."""

    def __init__(self, door: Door, directory: Path) -> None:
        self.door = door
        self.store = JobStore(directory)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._followers: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._sender = Sender(self.store, door.settings) if door.settings.callback_secret else None
        self.dispatch: Dispatch = LocalDispatch(self.store, door, self.changed, self._sender)

    def start(self) -> None:
        """To be called on the event loop that serves the followers."""
        self._loop = asyncio.get_running_loop()
        if self._sender is not None:
            self._sender.start()
        self.dispatch.start()

    def stop(self, timeout: float) -> None:
        """Blocks until nothing of this touches the store any more, and closes it."""
        self.dispatch.stop(timeout)
        if self._sender is not None:
            self._sender.stop()
        self.store.close()

    def drain(self) -> None:
        """Begin nothing, and let go of the followers: they find their place again by Last-Event-ID."""
        self.dispatch.drain()
        for job_id in list(self._followers):
            self.changed(job_id)

    def changed(self, job_id: str) -> None:
        """Wake those who follow a job; from any thread."""
        assert self._loop is not None
        with suppress(RuntimeError):  # a loop that was closed has no followers left
            self._loop.call_soon_threadsafe(self._wake, job_id)

    def _wake(self, job_id: str) -> None:
        for event in self._followers.get(job_id, ()):
            event.set()

    def waiting(self) -> bool:
        """Whether any job has not ended."""
        return any(self.store.count(status) for status in WAITING)

    async def hand_in(self, request: Request) -> dict[str, Any]:
        """Store a job. Raises typed errors and :class:`Refused`; then nothing is left of it."""
        job_id = uuid.uuid4().hex
        with self.door.desk.place():
            await self._check_room()
            with self.store.spool(job_id) as directory:
                body = await read_body(request, directory, self.door.settings)
                callback_url = body.fields.pop("callback_url", None)
                if callback_url is not None:
                    callback_url = await asyncio.to_thread(check_callback, callback_url, self.door.settings)
                await asyncio.to_thread(read_job, body, self.door)
                await self._check_room()
                # Not in a thread: an await here could be cancelled with the job half added.
                self.store.add(job_id, body.fields, body.upload, body.filename, callback_url)
        _log.info("Job queued", extra={"fields": {"job": job_id}})
        self.dispatch.wake()
        return {"id": job_id, "status": "queued"}

    async def _check_room(self) -> None:
        if await asyncio.to_thread(self.store.count, "queued") >= self.door.settings.max_jobs:
            raise Busy("The queue is full; send the job again later.")

    async def view(self, job_id: str) -> dict[str, Any]:
        view = await asyncio.to_thread(self.store.view, job_id)
        if view is None:
            raise _no_such_job()
        return view

    async def cancel(self, job_id: str) -> dict[str, Any]:
        await self.view(job_id)
        withdrawn = Cancelled("The job was cancelled; send it again if it is still wanted.")
        await asyncio.to_thread(self.store.fail, job_id, withdrawn)
        self.dispatch.cancel(job_id)
        self.changed(job_id)
        return await self.view(job_id)

    async def delete(self, job_id: str) -> None:
        if not await asyncio.to_thread(self.store.delete, job_id):
            raise _no_such_job()
        self.dispatch.cancel(job_id)
        self.changed(job_id)

    async def follow(self, job_id: str, last_id: int) -> AsyncGenerator[bytes, None]:
        """Events after ``last_id`` as they happen, up to the job's end or this process'."""
        news = asyncio.Event()
        self._followers[job_id].add(news)
        try:
            while True:
                news.clear()
                events = await asyncio.to_thread(self.store.events_after, job_id, last_id)
                for event in events:
                    last_id = event.id
                    yield sse(event.data, event.name, event.id)
                if (events and events[-1].last) or self.door.draining:
                    return
                if not events and await asyncio.to_thread(self.store.status, job_id) not in WAITING:
                    # It may have ended between the two questions; its last event is there by now.
                    for event in await asyncio.to_thread(self.store.events_after, job_id, last_id):
                        yield sse(event.data, event.name, event.id)
                    return
                try:
                    await asyncio.wait_for(news.wait(), HEARTBEAT)
                except asyncio.TimeoutError:
                    yield KEEP_ALIVE
        finally:
            self._followers[job_id].discard(news)
            if not self._followers[job_id]:
                del self._followers[job_id]


def _no_such_job() -> Refused:
    return Refused(404, "NOT_FOUND", "There is no such job, or its result was kept for its time and is gone.")


def router(jobs: Jobs) -> APIRouter:
    routes = APIRouter(tags=["Long jobs"])

    @routes.post(
        "/jobs",
        status_code=202,
        summary="Hand in a long recording and come back for the result",
        responses={
            202: json_response("Stored; a restart does not lose it", {"id": "5f0c", "status": "queued"}, "JobReceipt"),
            **errors(401, 403, 413, 415, 422, 429, 503),
        },
        openapi_extra=speech_body("common", callback=True),
    )
    async def hand_in(request: Request) -> Response:
        job = await jobs.hand_in(request)
        return JSONResponse(job, 202, {"Location": f"/jobs/{job['id']}"})

    @routes.get(
        "/jobs/{job_id}",
        summary="State, progress and result of a job",
        responses={200: json_response("The job", JOB_EXAMPLE, "Job"), **errors(401, 404, 422)},
    )
    async def view(job_id: str) -> Response:
        return JSONResponse(await jobs.view(job_id))

    @routes.post(
        "/jobs/{job_id}/cancel",
        summary="Stop a job; one that has ended stays as it is",
        responses={200: json_response("The job", JOB_EXAMPLE, "Job"), **errors(401, 404, 422)},
    )
    async def cancel(job_id: str) -> Response:
        return JSONResponse(await jobs.cancel(job_id))

    @routes.delete(
        "/jobs/{job_id}",
        status_code=204,
        summary="Stop a job and forget it with its result",
        responses={204: {"description": "Gone"}, **errors(401, 404, 422)},
    )
    async def delete(job_id: str) -> Response:
        await jobs.delete(job_id)
        return Response(status_code=204)

    @routes.get(
        "/jobs/{job_id}/events",
        summary="Follow a job",
        description="Server-sent events `status`, `progress`, `segment`, and at last `done` (the result) or `error`. "
        "`Last-Event-ID` resumes. A job cut off by a restart says `running` again with a higher `attempt`: "
        "its segments begin anew.",
        responses={
            200: SSE_RESPONSE,
            204: {"description": "The job has ended and nothing is left to tell"},
            **errors(401, 404, 422),
        },
        openapi_extra={
            "parameters": [
                {
                    "name": "Last-Event-ID",
                    "in": "header",
                    "required": False,
                    "schema": {"type": "integer", "minimum": 0},
                    "description": "Number of the last event that the client has seen.",
                }
            ]
        },
    )
    async def follow(job_id: str, request: Request) -> Response:
        last_id = _event_id(request.headers.get("last-event-id"))
        view = await jobs.view(job_id)
        if view["status"] not in WAITING and not await asyncio.to_thread(jobs.store.events_after, job_id, last_id):
            # What tells a browser not to come back.
            return Response(status_code=204)
        return EventStream(jobs.follow(job_id, last_id))

    return routes


def _event_id(value: str | None) -> int:
    if not value:
        return 0
    if not (value.isascii() and value.isdigit() and len(value) < 16):
        raise Refused(422, "INVALID_INPUT", "The header Last-Event-ID must be the number of an event.")
    return int(value)
