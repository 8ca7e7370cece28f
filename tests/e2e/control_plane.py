"""RunPod's side of a worker, on loopback: jobs to take, results, streams, pings, stop signals, a bucket.

It speaks what the SDK asks for and writes down all it is told, in order. ``environment``
is what a worker's process needs to find it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

POD = "pod-1"


@dataclass
class Record:
    """What the platform heard of one job."""

    taken: int = 0
    progress: list[dict[str, Any]] = field(default_factory=list)
    streamed: list[Any] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    late_progress: int = 0
    """Updates that came after a result."""

    @property
    def output(self) -> Any:
        (result,) = self.results
        assert "error" not in result, result
        return result["output"]

    @property
    def error(self) -> dict[str, Any]:
        (result,) = self.results
        assert isinstance(result["error"], str)
        return dict(json.loads(result["error"]))


class ControlPlane:
    """Start with ``async with``; ``files`` are served under ``/audio/``."""

    def __init__(self, files: dict[str, Path] | None = None, *, hold_seconds: float = 60.0) -> None:
        """``hold_seconds``: how long a request for jobs or stop signals is kept open without an answer."""
        self.jobs: dict[str, Record] = {}
        self.pings: list[str] = []
        """The ``job_id`` parameter of each ping."""
        self.unhealthy: list[dict[str, str]] = []
        """What a worker said that would not start."""
        self.bucket: dict[str, bytes] = {}
        self.body_delay = 0.0
        """Seconds between the head and the body of an answer with jobs."""
        self.open_polls = 0
        self.slow_requests = 0
        """Downloads of ``/slow`` that are going on."""
        self.process: asyncio.subprocess.Process | None = None
        """The worker that :meth:`until` waits for something from."""
        self.port = 0
        self._files = files or {}
        self._hold_seconds = hold_seconds
        self._queue: list[dict[str, Any]] = []
        self._stops: asyncio.Queue[str] = asyncio.Queue()
        self._changed = asyncio.Condition()
        self._uploads: dict[str, dict[int, bytes]] = {}

    async def __aenter__(self) -> ControlPlane:
        app = web.Application(client_max_size=64 * 1024**2)
        app.router.add_get("/v2/ep/job-take/{pod}", self._take_one)
        app.router.add_get("/v2/ep/job-take-batch/{pod}", self._take_many)
        app.router.add_get("/v2/ep/job-stop/{pod}", self._stop_signals)
        app.router.add_post("/v2/ep/job-done/{pod}/{job}", self._done)
        app.router.add_post("/v2/ep/job-stream/{pod}/{job}", self._stream)
        app.router.add_get("/v2/ep/ping/{pod}", self._ping)
        app.router.add_get("/audio/{name}", self._audio)
        app.router.add_get("/slow", self._slow)
        app.router.add_route("*", "/bucket/{key:.+}", self._bucket)
        # A worker that ends its request must end the handler too, as a real server's context does.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        server = site._server
        assert isinstance(server, asyncio.Server)
        self.port = int(server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        base = f"{self.url}/v2/ep"
        return {
            "RUNPOD_POD_ID": POD,
            "RUNPOD_AI_API_KEY": "key",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
        }

    @property
    def bucket_environment(self) -> dict[str, str]:
        return {
            "BUCKET_ENDPOINT_URL": f"{self.url}/bucket",
            "BUCKET_ACCESS_KEY_ID": "id",
            "BUCKET_SECRET_ACCESS_KEY": "secret",
        }

    @property
    def waiting(self) -> list[str]:
        """Ids of jobs that nobody has taken."""
        return [job["id"] for job in self._queue]

    async def submit(self, job_id: str, **payload: Any) -> None:
        self.jobs[job_id] = Record()
        async with self._changed:
            self._queue.append({"id": job_id, "input": payload})
            self._changed.notify_all()

    def stop(self, job_id: str) -> None:
        """Cancel a job, as a caller's ``/cancel`` does."""
        self._stops.put_nowait(job_id)

    async def until(self, condition: Any, seconds: float = 60.0) -> None:
        """Wait until ``condition()`` holds; fails when the time is up or the worker is gone."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not condition():
            assert self.process is None or self.process.returncode is None, "the worker has gone"
            assert asyncio.get_running_loop().time() < deadline, f"waited {seconds} s in vain; {self.jobs}"
            await asyncio.sleep(0.05)

    async def _hand_out(self, most: int) -> list[dict[str, Any]]:
        self.open_polls += 1
        try:
            async with self._changed:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait_for(lambda: bool(self._queue)), self._hold_seconds)
                taken, self._queue[:] = self._queue[:most], self._queue[most:]
        finally:
            self.open_polls -= 1
        for job in taken:
            self.jobs[job["id"]].taken += 1
        return taken

    async def _take_one(self, request: web.Request) -> web.StreamResponse:
        jobs = await self._hand_out(1)
        return await self._jobs(request, jobs[0] if jobs else None)

    async def _take_many(self, request: web.Request) -> web.StreamResponse:
        return await self._jobs(request, await self._hand_out(int(request.query["batch_size"])) or None)

    async def _jobs(self, request: web.Request, jobs: object) -> web.StreamResponse:
        if jobs is None:
            return web.Response(status=204)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await asyncio.sleep(self.body_delay)
        await response.write(json.dumps(jobs).encode())
        return response

    async def _stop_signals(self, request: web.Request) -> web.Response:
        with contextlib.suppress(asyncio.TimeoutError):
            return web.json_response({"jobsToStop": [await asyncio.wait_for(self._stops.get(), self._hold_seconds)]})
        return web.Response(status=204)

    async def _done(self, request: web.Request) -> web.Response:
        told = json.loads(await request.read())
        record = self.jobs[request.match_info["job"]]
        if told.get("status") == "IN_PROGRESS":
            record.progress.append(told["output"])
            record.late_progress += bool(record.results)
        else:
            record.results.append(told)
        return web.Response()

    async def _stream(self, request: web.Request) -> web.Response:
        self.jobs[request.match_info["job"]].streamed.append(json.loads(await request.read())["output"])
        return web.Response()

    async def _ping(self, request: web.Request) -> web.Response:
        if request.query.get("status") == "unhealthy":
            self.unhealthy.append(dict(request.query))
        else:
            self.pings.append(request.query.get("job_id", ""))
        return web.Response()

    async def _audio(self, request: web.Request) -> web.StreamResponse:
        path = self._files.get(request.match_info["name"])
        return web.FileResponse(path) if path else web.Response(status=404)

    async def _slow(self, request: web.Request) -> web.StreamResponse:
        """A download that never ends."""
        response = web.StreamResponse(headers={"Content-Type": "audio/mpeg"})
        self.slow_requests += 1
        try:
            await response.prepare(request)
            while True:
                await response.write(b"\0")
                await asyncio.sleep(0.05)
        finally:
            self.slow_requests -= 1

    async def _bucket(self, request: web.Request) -> web.Response:
        """As much of S3 as an upload in one piece or in several needs."""
        key = request.match_info["key"]
        if request.method == "POST" and "uploads" in request.query:
            self._uploads[key] = {}
            return _xml(f"<InitiateMultipartUploadResult><UploadId>{len(self._uploads)}</UploadId>", key)
        if request.method == "PUT":
            body = _unchunked(await request.read(), request.headers.get("Content-Encoding", ""))
            if "partNumber" in request.query:
                self._uploads[key][int(request.query["partNumber"])] = body
            else:
                self.bucket[key] = body
            return web.Response(headers={"ETag": '"tag"'})
        if request.method == "POST":
            parts = self._uploads.pop(key)
            self.bucket[key] = b"".join(parts[number] for number in sorted(parts))
            return _xml("<CompleteMultipartUploadResult><ETag>tag</ETag>", key)
        return web.Response(body=self.bucket[key]) if key in self.bucket else web.Response(status=404)


def _xml(opening: str, key: str) -> web.Response:
    name = opening[1 : opening.index(">")]
    return web.Response(text=f"{opening}<Key>{key}</Key></{name}>", content_type="application/xml")


def _unchunked(body: bytes, encoding: str) -> bytes:
    """The content of an upload in AWS's own chunks, each ``hex length;...\\r\\n bytes \\r\\n``."""
    if "aws-chunked" not in encoding:
        return body
    content = b""
    while body:
        header, _, body = body.partition(b"\r\n")
        size = int(header.split(b";")[0], 16)
        if size == 0:
            break
        content, body = content + body[:size], body[size + 2 :]
    return content


@contextlib.asynccontextmanager
async def worker(
    command: list[str], environment: dict[str, str], cwd: Path, output: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process whose output goes to a file; it and its children are gone at the end."""
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, cwd=cwd, stdout=file, stderr=asyncio.subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
