"""The live door: speech over WebSocket, text back while it is spoken.

    /v1/realtime   OpenAI's realtime transcription sessions (``live_realtime.py``)
    any other path WhisperLive's protocol (``live_whisperlive.py``)

One event loop serves all clients; the model is shared through the scheduler. A client takes a
seat before anything is awaited and gives it back however it leaves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import http
import json
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from whisper_worker import log
from whisper_worker.doors import live_whisperlive as protocol
from whisper_worker.doors.live_health import HealthServer, Pages, Vitals
from whisper_worker.doors.live_realtime import Conversation
from whisper_worker.doors.live_recording import Recording
from whisper_worker.doors.live_session import Stream
from whisper_worker.errors import Busy, EngineError, InternalError, InvalidInput, WhisperWorkerError
from whisper_worker.log import get_logger, job_context
from whisper_worker.service import Service
from whisper_worker.settings import Settings
from whisper_worker.types import Segment, TranscribeOptions

if TYPE_CHECKING:
    from websockets.http11 import Request, Response
    from websockets.typing import Subprotocol

_log = get_logger("live")
_wire_log = get_logger("live.wire")
"""The WebSocket library's own: its tracebacks would stand between the log's lines, with paths."""
_wire_log.setLevel("WARNING")

CLOSE_CODES = {
    "INVALID_INPUT": 1003,
    "FORBIDDEN": 1008,
    "DOWNLOAD": 1011,
    "TOO_LARGE": 1009,
    "DECODE": 1003,
    "TIMEOUT": 1013,
    "MODEL": 1011,
    "OUT_OF_MEMORY": 1013,
    "ENGINE": 1011,
    "BUSY": 1013,
    "CANCELLED": 1001,
    "INTERNAL": 1011,
}
"""Error code to the status with which its client's connection is closed, after it was told in words."""

REALTIME_PATH = "/v1/realtime"
_PROBES = ("/health", "/ready")

_CONFIG_SECONDS = 10.0
"""For the first message of a client; until then it holds its seat for nothing."""
_FAREWELL_SECONDS = 5.0
"""For a client to close the connection itself: some hang when the server does so first."""
_FLUSH_SECONDS = 60.0
"""For the rest of the sound once no more is to come."""
_CANCEL_SECONDS = 1.0
"""Between two times that a task is told to end."""
_STANDING = 64
"""Connections beyond the seats that are told to wait; still further ones are refused."""
_MAX_FRAME_BYTES = 4 * 1024 * 1024
_PING_SECONDS, _PONG_SECONDS = 20.0, 60.0
_KEY_PROTOCOLS = ("bearer.", "openai-insecure-api-key.")
"""Where browsers, which cannot set headers, may put the key among the subprotocols."""
_PROTOCOLS = ("realtime", "whisper-live")


class LiveServer:
    """Listens once :meth:`open` is entered; the model is loaded by then."""

    def __init__(self, service: Service, settings: Settings, vitals: Vitals) -> None:
        self.settings = settings
        self.vitals = vitals
        self._pages = Pages(vitals)
        self._service = service
        self._seats: dict[ServerConnection, float] = {}
        self._standing = 0
        self._stopping = asyncio.Event()
        # A decode blocks its thread; a client has one at a time, and one that left may still hold its own.
        self._threads = ThreadPoolExecutor(2 * settings.max_clients + 2, thread_name_prefix="live")

    @contextlib.asynccontextmanager
    async def open(self, host: str, port: int) -> AsyncIterator[int]:
        """Load the model and listen; gives the port. On leaving, sessions are flushed and closed."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._service.load)
        try:
            async with serve(
                self._serve,
                host,
                port,
                process_request=self._admit,
                select_subprotocol=_select_subprotocol,
                compression=None,
                max_size=_MAX_FRAME_BYTES,
                max_queue=8,
                ping_interval=_PING_SECONDS,
                ping_timeout=_PONG_SECONDS,
                close_timeout=_FAREWELL_SECONDS,
                server_header=None,
                logger=_wire_log,
            ) as server:
                self.vitals.port = port = server.sockets[0].getsockname()[1]
                self.vitals.ready = True
                _log.info("Listening", extra={"fields": {"port": port, "max_clients": self.settings.max_clients}})
                try:
                    yield port
                finally:
                    self.vitals.ready = False
                    self._stopping.set()
                    while self._seats:
                        await asyncio.sleep(0.05)
        finally:
            self._threads.shutdown(wait=False)

    # -- the door --------------------------------------------------------------------------

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Refuse before the handshake whoever lacks the key, or would not even be told to wait.

        Probes are answered here as well: gateways that expose one port alone can ask no other.
        """
        path, query = _target(request)
        if path in _PROBES and (page := self._pages.get(path)) is not None:
            status, kind, body = page
            response = connection.respond(http.HTTPStatus(status), body)
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = kind
            return response
        if not self._has_key(request, query):
            response = connection.respond(http.HTTPStatus.UNAUTHORIZED, "This service wants a key.\n")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        full = len(self._seats) >= self.settings.max_clients and self._standing >= _STANDING
        if full or self._stopping.is_set():
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "No room; come again later.\n")
        return None

    def _has_key(self, request: Request, query: str) -> bool:
        if not self.settings.api_keys:
            return True
        shown = [value.strip() for value in parse_qs(query).get("token", [])]
        scheme, _, credential = (request.headers.get("Authorization") or "").partition(" ")
        if scheme.lower() == "bearer":
            shown.append(credential.strip())
        for offered in request.headers.get_all("Sec-WebSocket-Protocol"):
            for name in offered.split(","):
                shown += [
                    name.strip().removeprefix(start) for start in _KEY_PROTOCOLS if name.strip().startswith(start)
                ]
        return any(hmac.compare_digest(key.encode(), one.encode()) for key in self.settings.api_keys for one in shown)

    async def _serve(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        path, _ = _target(connection.request)
        with job_context(uuid.uuid4().hex[:12]):
            if len(self._seats) >= self.settings.max_clients:
                self._standing += 1
                try:
                    await self._turn_away(connection, realtime=path == REALTIME_PATH)
                finally:
                    self._standing -= 1
                return
            self._seats[connection] = time.monotonic()
            self.vitals.clients = len(self._seats)
            self.vitals.connections += 1
            try:
                client = _Realtime(self, connection) if path == REALTIME_PATH else _WhisperLive(self, connection)
                await client.serve()
            except ConnectionClosed:
                _log.info("Client left")
            finally:
                del self._seats[connection]
                self.vitals.clients = len(self._seats)

    async def _turn_away(self, connection: ServerConnection, *, realtime: bool) -> None:
        self.vitals.turned_away += 1
        oldest = min(self._seats.values(), default=time.monotonic())
        minutes = max(0.0, self.settings.max_connection_time - (time.monotonic() - oldest)) / 60
        _log.info("Client told to wait", extra={"fields": {"clients": len(self._seats)}})
        with contextlib.suppress(ConnectionClosed, asyncio.TimeoutError):
            if realtime:
                await connection.send(json.dumps(Conversation.failure(Busy("All seats are taken; come again later."))))
            else:
                first = await asyncio.wait_for(connection.recv(), _CONFIG_SECONDS)
                await connection.send(json.dumps(protocol.wait(protocol.uid_of(first), minutes)))
            await asyncio.wait_for(_overhear(connection), _FAREWELL_SECONDS)
        await connection.close(1013)


class _Client:
    """One seated connection; the protocol is its subclass's."""

    def __init__(self, server: LiveServer, connection: ServerConnection) -> None:
        self.server = server
        self.connection = connection
        self.begun = time.monotonic()
        self.stream: Stream | None = None
        self.recording: Recording | None = None
        self.outcome = "ok"

    async def serve(self) -> None:
        """The whole session. Raises ``ConnectionClosed`` where the client left before its end."""
        try:
            try:
                await self.talk()
            except WhisperWorkerError as error:
                await self._fail(error)
            except ConnectionClosed as closed:
                self.outcome = "left"
                if closed.sent is not None and closed.sent.code == CLOSE_CODES["TOO_LARGE"]:
                    # The library has told the client already, which limit included.
                    self.outcome = "TOO_LARGE"
                    self.server.vitals.errors += 1
                raise
            except asyncio.TimeoutError:
                self.outcome = "slow"
                await self.connection.close(1013, "too slow")
            except Exception:
                _log.exception("Unexpected failure")
                await self._fail(InternalError("The server failed on this session; connect again."))
        finally:
            self._end()

    async def talk(self) -> None:
        raise NotImplementedError

    async def tell_error(self, error: WhisperWorkerError) -> None:
        raise NotImplementedError

    def begin(self, options: TranscribeOptions) -> Stream:
        """Start transcribing. Raises :class:`InvalidInput` where the model cannot do what is asked."""
        server = self.server
        self.stream = Stream(server._service.pipeline(), options, server._threads, self.on_update)
        if server.settings.live_recordings is not None and self.recording is None:
            try:
                self.recording = Recording(server.settings.live_recordings)
            except OSError as error:
                _log.error("WHISPER_LIVE_RECORDINGS cannot be written to", extra={"fields": {"reason": error.strerror}})
                server.vitals.recordings_failed += 1
                raise InternalError("The server cannot keep recordings; tell its operator.") from error
        _log.info("Session started", extra={"fields": {"language": options.language or "auto", "task": options.task}})
        return self.stream

    def on_update(self) -> None:
        raise NotImplementedError

    def completed(self) -> Sequence[Segment]:
        """Segments completed since the last call, once they are counted and recorded."""
        assert self.stream is not None
        segments = self.stream.session.take_completed()
        self.server.vitals.segments += len(segments)
        if segments:
            self.server.vitals.engine_failures = 0
        if self.recording is not None:
            self.recording.text(segments)
        return segments

    async def until_over(
        self, reading: asyncio.Task[None], running: asyncio.Task[None], sending: asyncio.Task[None]
    ) -> bool:
        """Wait for the end of the session, flush it, and have all of it sent. Whether it ended by the clock.

        Raises what one of the tasks raised.
        """
        assert self.stream is not None
        left = self.server.settings.max_connection_time - (time.monotonic() - self.begun)
        gone = asyncio.create_task(self.connection.wait_closed())
        stopping = asyncio.create_task(self.server._stopping.wait())
        tasks = {reading, running, sending, gone, stopping}
        kept = self.recording is not None
        try:
            # What a client sent before it left is still to be read where it is kept: ``reading`` tells the end then.
            ends = {reading, running, stopping} if kept else tasks
            if kept:
                ends.add(asyncio.create_task(_troubled(sending)))
                tasks |= ends
            done, _ = await asyncio.wait(ends, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            _raise_first(done, but_for=ConnectionClosed if kept else None)
            over_time = not done or stopping in done
            reading.cancel()
            self.stream.finish()
            # What is recorded is transcribed to its end, whether or not somebody still listens.
            awaited = {running} if kept else {running, sending, gone}
            done, _ = await asyncio.wait(awaited, timeout=_FLUSH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            _raise_first(done)
            if gone.done():
                raise self.connection.protocol.close_exc
            if not done:
                raise Busy("The server is too slow to finish what was said; connect again and send the rest once more.")
            self.last_words()
            await sending
            return over_time
        finally:
            await _end(tasks)

    def last_words(self) -> None:
        """All is transcribed: let the sending task end when all is sent."""
        raise NotImplementedError

    async def _fail(self, error: WhisperWorkerError) -> None:
        self.outcome = error.code
        self.server.vitals.errors += 1
        self.server.vitals.engine_failures += isinstance(error, EngineError)
        _log.warning("%s", error.message, extra={"fields": {"code": error.code}})
        with contextlib.suppress(ConnectionClosed, asyncio.TimeoutError):
            await asyncio.wait_for(self.tell_error(error), protocol.SEND_SECONDS)
        await self.connection.close(CLOSE_CODES[error.code])

    def _end(self) -> None:
        facts: dict[str, Any] = {"status": self.outcome, "seconds": round(time.monotonic() - self.begun, 1)}
        language = None
        if self.stream is not None:
            stream, vitals = self.stream, self.server.vitals
            stream.close()
            language = stream.recognizer.language
            vitals.decodes += stream.n_decodes
            vitals.audio_seconds += stream.session.seconds
            vitals.decode_seconds += stream.decode_seconds
            vitals.worst_lag = max(vitals.worst_lag, stream.worst_lag)
            facts |= {
                "audio_seconds": round(stream.session.seconds, 1),
                "decodes": stream.n_decodes,
                "worst_lag": round(stream.worst_lag, 2),
            }
        if self.recording is not None:
            self.recording.close(language)
            self.server.vitals.recordings_failed += self.recording.failed
        _log.info("Session finished", extra={"fields": facts})


class _WhisperLive(_Client):
    uid: str | None = None
    outbox: protocol.Outbox

    async def talk(self) -> None:
        try:
            first = await asyncio.wait_for(self.connection.recv(), _CONFIG_SECONDS)
        except asyncio.TimeoutError:
            raise InvalidInput("No configuration came; the first message must be one JSON object.") from None
        self.uid = protocol.uid_of(first)
        config = protocol.read_config(first, self.server._service.pipeline().info.name)
        stream = self.begin(config.options)
        self.outbox = protocol.Outbox(self.connection, config, stream.session)
        for warning in config.warnings:
            await self._send(protocol.status(config.uid, "WARNING", warning))
        await self._send(protocol.ready(config.uid))
        reading = asyncio.create_task(self._read(config, stream))
        running = asyncio.create_task(stream.run())
        sending = asyncio.create_task(self.outbox.run())
        if await self.until_over(reading, running, sending):
            await self._send(protocol.disconnect(config.uid))
        await self.connection.close(1000)

    async def _read(self, config: protocol.Config, stream: Stream) -> None:
        """Take in sound until its end."""
        async for message in self.connection:
            data = message.encode() if isinstance(message, str) else message
            if data == protocol.END_OF_AUDIO.encode():
                return
            if isinstance(message, str):
                raise InvalidInput("After the configuration only sound is taken, in binary frames.")
            sound = protocol.samples(data, config.audio_format)
            if self.recording is not None:
                self.recording.sound(sound)
            await stream.feed(sound)

    def on_update(self) -> None:
        assert self.stream is not None
        recognizer = self.stream.recognizer
        if recognizer.language is not None and recognizer.language_probability is not None:
            self.outbox.detected(recognizer.language, recognizer.language_probability)
        self.outbox.update(self.completed())

    def last_words(self) -> None:
        self.outbox.close()

    async def tell_error(self, error: WhisperWorkerError) -> None:
        await self._send(protocol.status(self.uid, "ERROR", error.message))

    async def _send(self, message: dict[str, Any]) -> None:
        await self.connection.send(json.dumps(message))


class _Realtime(_Client):
    conversation: Conversation

    async def talk(self) -> None:
        self.conversation = Conversation(self.connection, self.server._service.pipeline().info.name)
        stream = self.begin(self.conversation.config.options)
        self.conversation.attach(stream, self.recording)
        reading = asyncio.create_task(self.conversation.read())
        running = asyncio.create_task(stream.run())
        sending = asyncio.create_task(self.conversation.write())
        if await self.until_over(reading, running, sending):
            await self.tell_error(Busy("The session has lasted as long as it may; connect again."))
        await self.connection.close(1000)

    def on_update(self) -> None:
        self.conversation.update(self.completed())

    def last_words(self) -> None:
        self.conversation.close()

    async def tell_error(self, error: WhisperWorkerError) -> None:
        await self.connection.send(json.dumps(Conversation.failure(error)))


def _target(request: Request) -> tuple[str, str]:
    """Path, without a slash at its end, and query. Not by ``urlsplit``: what a stranger sends need not be a URL."""
    path, _, query = request.path.partition("?")
    return path.rstrip("/"), query


async def _overhear(connection: ServerConnection) -> None:
    """Until it is closed. What still comes is thrown away: of all who stand it would add up to gigabytes."""
    async for _ in connection:
        pass


def _raise_first(done: set[asyncio.Task[Any]], but_for: type[Exception] | None = None) -> None:
    for task in done:
        error = None if task.cancelled() else task.exception()
        if error is not None and not (but_for and isinstance(error, but_for)):
            raise error


async def _end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel them, and wait until they have ended."""
    # Below Python 3.12 wait_for() loses a cancellation that comes together with what it waits for: say it again.
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_CANCEL_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)


async def _troubled(sending: asyncio.Task[None]) -> None:
    """Ends when sending fails for another reason than that the client left."""
    with contextlib.suppress(ConnectionClosed):
        await asyncio.shield(sending)
    await asyncio.Event().wait()


def _select_subprotocol(connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return next((name for name in offered if name in _PROTOCOLS), None)


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="whisper-worker live", description="Live transcription over WebSocket (settings: environment variables)"
    )
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all)")
    parser.add_argument("--port", type=_port, help="port instead of WHISPERLIVE_PORT")
    parser.add_argument("--health-port", type=_port, help="port instead of HEALTH_CHECK_PORT")
    given = parser.parse_args(arguments)
    try:
        settings = Settings.from_env()
    except InvalidInput as error:
        print(error.message, file=sys.stderr)
        return 2
    log.configure(settings.log_format, settings.log_level)
    port = settings.live_port if given.port is None else given.port
    health_port = settings.health_port if given.health_port is None else given.health_port
    try:
        asyncio.run(_run(settings, given.host, port, health_port))
    except WhisperWorkerError as error:
        _log.error("%s", error.message, extra={"fields": {"code": error.code}})
        return 1
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        fields = {"reason": reason, "port": port, "health_port": health_port}
        _log.error("Cannot listen; is one of the ports taken, or the host wrong?", extra={"fields": fields})
        return 1
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError("a port is a number from 0 to 65535")
    return int(text)


async def _run(settings: Settings, host: str, port: int, health_port: int) -> None:
    environment = {"WHISPER_MODEL": settings.model or "", "WHISPER_COMPUTE_TYPE": settings.compute_type}
    vitals = Vitals(port, settings.max_clients, environment)
    _log.info("Starting", extra={"fields": {"model": settings.model or "cached", **_cuda()}})
    if settings.live_recordings is not None:
        _try_recording(settings.live_recordings)
    health = HealthServer(host, health_port, vitals)
    _log.info("Health checks are answered", extra={"fields": {"port": health.port}})
    service = Service(settings)
    try:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with LiveServer(service, settings, vitals).open(host, port):
            await stop.wait()
            _log.info("Stopping; sessions are flushed")
    finally:
        service.close()
        health.close()


def _try_recording(directory: Path) -> None:
    """Raises :class:`InvalidInput` where it cannot be written to: every client would be refused, at a ready service."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise InvalidInput(
            f"WHISPER_LIVE_RECORDINGS is no directory that can be written to ({error.strerror}); name another, or none."
        ) from error


def _cuda() -> dict[str, object]:
    """What the startup line says of the GPU: whoever cannot log in reads it there."""
    import torch

    found = torch.cuda.is_available()
    return {"torch": torch.__version__, "cuda": found, **({"gpu": torch.cuda.get_device_name()} if found else {})}
