"""Requests that carry audio: how many may be in hand, and how their work runs off the event loop.

A request's work blocks a thread and shares batches with all others. It is told to stop as
soon as its client has gone.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from whisper_worker.doors.http_errors import Refused
from whisper_worker.errors import Busy
from whisper_worker.settings import Settings
from whisper_worker.types import CancelToken

_T = TypeVar("_T")

HEARTBEAT = 15.0
"""Seconds of silence after which a stream of events shows that it lives: proxies cut idle connections."""

FIRST_EVENT = 5.0
"""Seconds that a stream waits for its first event before it answers 200: most errors come sooner."""

GONE = 499
"""Status, in the log alone, of a request whose client did not wait for the answer."""


class Emit(Protocol):
    """Hands an event to the stream of a request, from any thread."""

    def __call__(self, name: str, data: Any) -> None: ...


class Desk:
    """Counts the requests in hand and owns the threads that they are worked on in."""

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.max_requests
        self._threads = ThreadPoolExecutor(settings.request_threads, thread_name_prefix="request")
        self.in_hand = 0
        """Requests with audio between their first byte and the last one of their answer."""

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place at the desk, taken before the body is read. Raises :class:`Busy` where all are taken."""
        if self.in_hand >= self._limit:
            raise Busy("The service has as many requests in hand as it takes; send this one again later.")
        self.in_hand += 1
        try:
            yield
        finally:
            self.in_hand -= 1

    async def run(self, request: Request, work: Callable[[CancelToken], _T]) -> _T:
        """Run blocking work, and have it cancelled when the client goes. To be called when the body was read.

        Raises what ``work`` raises, or :class:`Refused` with status :data:`GONE`.
        """
        cancel = CancelToken()
        running = self._submit(partial(work, cancel))
        done = asyncio.wrap_future(running)
        going = asyncio.create_task(_client_gone(request))
        try:
            both: set[asyncio.Future[Any]] = {done, going}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                return done.result()
            raise Refused(GONE, "CANCELLED", "The client did not wait for the answer.")
        finally:
            going.cancel()
            await _stop(running, done, cancel)

    async def events(self, work: Callable[[CancelToken, Emit], Any]) -> AsyncGenerator[tuple[str, Any], None]:
        """Run blocking work and yield the events that it emits, the last of them ``("result", its value)``.

        Yields ``("", None)`` after each :data:`HEARTBEAT` without an event. Raises what ``work``
        raises. Closing the generator cancels the work.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        cancel = CancelToken()

        def emit(name: str, data: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (name, data))

        running = self._submit(partial(work, cancel, emit))
        done = asyncio.wrap_future(running)
        # The loop comes to this after all that the thread has emitted.
        done.add_done_callback(lambda _: queue.put_nowait(("result", None)))
        try:
            while True:
                try:
                    name, data = await asyncio.wait_for(queue.get(), HEARTBEAT)
                except asyncio.TimeoutError:
                    yield "", None
                    continue
                if name == "result":
                    yield name, done.result()
                    return
                yield name, data
        finally:
            await _stop(running, done, cancel)

    def _submit(self, work: Callable[[], _T]) -> Future[_T]:
        # The log's job id goes along.
        return self._threads.submit(contextvars.copy_context().run, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


async def _stop(running: Future[_T], done: asyncio.Future[_T], cancel: CancelToken) -> None:
    """Cancel work that nobody waits for, and return when it has ended: it reads files of the request."""
    cancel.cancel()
    if not running.cancel():
        await asyncio.wait({done})
    if done.done() and not done.cancelled():
        done.exception()  # asked for, so that nobody complains of one that never was


async def _client_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; their source is closed whatever becomes of the connection."""

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        # Proxies that collect answers (nginx does) would hold events back.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(self._pieces(), headers=headers, media_type="text/event-stream")
        self._source = source
        self._next: asyncio.Future[bytes] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._next is not None:
                self._next.cancel()
                await asyncio.wait({self._next})
                if not self._next.cancelled():
                    self._next.exception()  # asked for, so that nobody complains of one that never was
            await self._source.aclose()

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        # Each in a task of its own: where the client goes, the framework cancels again and again until all has ended,
        # and the source has to wait for its thread.
        while True:
            self._next = asyncio.ensure_future(anext(self._source))
            await asyncio.wait({self._next})
            try:
                piece = self._next.result()
            except StopAsyncIteration:
                return
            yield piece


async def begun(
    source: AsyncGenerator[bytes, None], as_event: Callable[[Exception], bytes]
) -> AsyncGenerator[bytes, None]:
    """``source``, once its first piece is there or :data:`FIRST_EVENT` seconds have passed.

    An error before that is raised, for the request to be answered with; later ones are turned
    into the stream's last piece by ``as_event``.
    """
    first = asyncio.ensure_future(anext(source))

    async def pieces() -> AsyncGenerator[bytes, None]:
        try:
            yield b""
            yield await first
            async for piece in source:
                yield piece
        except Exception as error:
            yield as_event(error)
        finally:
            first.cancel()
            await asyncio.wait({first})
            await source.aclose()

    stream = pieces()
    # A generator that nobody has begun would skip its last lines when it is closed.
    await anext(stream)
    try:
        await asyncio.wait({first}, timeout=FIRST_EVENT)
        if first.done():
            first.result()
    except BaseException:
        await stream.aclose()
        raise
    return stream


def sse(data: Any, event: str | None = None, event_id: int | None = None) -> bytes:
    """One server-sent event; ``data`` as JSON, which holds no line breaks."""
    lines = [f"id: {event_id}"] if event_id is not None else []
    if event is not None:
        lines.append(f"event: {event}")
    lines.append("data: " + json.dumps(data, ensure_ascii=False))
    return ("\n".join(lines) + "\n\n").encode()


KEEP_ALIVE = b": still here\n\n"
