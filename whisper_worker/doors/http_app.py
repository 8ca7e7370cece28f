"""The application: routes, the gate in front of them, and their errors."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from whisper_worker import __version__
from whisper_worker.doors import http_jobs, http_status, http_transcribe
from whisper_worker.doors.http_common import Door
from whisper_worker.doors.http_desk import GONE, Desk
from whisper_worker.doors.http_docs import SCHEMAS, page
from whisper_worker.doors.http_errors import RETRY_AFTER, Refused, error_response, refusal
from whisper_worker.errors import InternalError, WhisperWorkerError
from whisper_worker.log import get_logger, job_context
from whisper_worker.service import Service
from whisper_worker.settings import Settings

_log = get_logger("http")

WEB = Path(__file__).resolve().parent.parent / "web"

_OPEN_PATHS = frozenset(("/", "/health", "/ready", "/ping", "/docs", "/openapi.json"))
"""What needs no key: probes, which cannot show one, and what holds nothing of anybody's."""

_ERROR_CODE = "whisper_worker.error_code"
_METHODS = frozenset(("GET", "HEAD", "POST", "DELETE", "OPTIONS"))
"""Methods counted by name: a label that callers choose freely would grow without end."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_DISCARDED_BYTES = 16 << 20
_DISCARD_SECONDS = 5.0


def create_app(service: Service, settings: Settings, jobs_dir: Path) -> FastAPI:
    """The application on one service, which stays the caller's to close.

    ``app.state`` has, for whoever runs the server, ``drain()`` and ``idle_seconds()``. Raises
    :class:`InvalidInput` where the directory for jobs cannot be used.
    """
    door = Door(service, settings, Desk(settings))
    jobs = http_jobs.Jobs(door, jobs_dir)

    def drain() -> None:
        if not door.draining:
            door.draining, door.told_to_stop = True, time.monotonic()
            jobs.drain()

    def idle_seconds() -> float:
        if door.under_way or jobs.waiting():
            door.last_active = time.monotonic()
        return time.monotonic() - door.last_active

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=_warm_up, args=(door,), name="warm-up", daemon=True).start()
        jobs.start()
        try:
            yield
        finally:
            drain()
            door.desk.close()
            spent = time.monotonic() - door.told_to_stop
            await asyncio.to_thread(jobs.stop, max(0.0, settings.drain_timeout - spent))
            spent = time.monotonic() - door.told_to_stop
            _log.info("Stopped", extra={"fields": {"seconds": round(spent, 1)}})

    app = FastAPI(
        title="whisper-worker",
        version=__version__,
        summary="Self-hosted Whisper transcription",
        description="Recordings in, text with honest times out.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.door, app.state.drain, app.state.idle_seconds = door, drain, idle_seconds
    for routes in (
        http_transcribe.router(door),
        http_jobs.router(jobs),
        http_status.router(door, jobs),
        _pages(app),
    ):
        app.include_router(routes)
    if WEB.is_dir():
        app.mount("/static", _Static(directory=WEB))
    for kind in (WhisperWorkerError, Refused, RequestValidationError, HTTPException, ClientDisconnect):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(Gate, door=door)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "X-Warnings", "Retry-After", "Location"],
        )
    _describe(app, needs_key=bool(settings.api_keys))
    return app


def _warm_up(door: Door) -> None:
    try:
        door.service.load()
    except WhisperWorkerError as error:
        door.load_failure = error.message
        _log.error("%s", error.message, extra={"fields": {"code": error.code}})
    except Exception:
        door.load_failure = "The model could not be loaded."
        _log.exception("The model could not be loaded")
    else:
        door.warm = True
        _log.info("Ready", extra={"fields": {"seconds": round(time.monotonic() - door.started, 1)}})


# An update must not meet half of the page that was there before; and no other site may put it in a frame of its own.
_PAGE_HEADERS = {"Cache-Control": "no-cache", "Content-Security-Policy": "frame-ancestors 'self'"}


class _Static(StaticFiles):
    """The page's files."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(_PAGE_HEADERS)
        return response


def _pages(app: FastAPI) -> APIRouter:
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def index() -> Response:
        if not (WEB / "index.html").is_file():
            raise Refused(404, "NOT_FOUND", "This installation has no page; /docs describes the service.")
        return FileResponse(WEB / "index.html", headers=_PAGE_HEADERS)

    @routes.get("/docs")
    async def docs() -> Response:
        return HTMLResponse(page(app.openapi()))

    return routes


def _describe(app: FastAPI, *, needs_key: bool) -> None:
    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                routes=app.routes,
            )
            components = described.setdefault("components", {})
            components["schemas"] = {**components.get("schemas", {}), **SCHEMAS}
            if needs_key:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, operations in described["paths"].items():
                    for operation in operations.values():
                        operation["security"] = [] if path in _OPEN_PATHS else [{"key": []}]
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way the framework documents


async def _answer_error(request: Request, error: Exception) -> Response:
    refused = _as_refusal(error, request.url.path)
    request.scope[_ERROR_CODE] = refused.code
    return error_response(refused, request.url.path)


def _as_refusal(error: Exception, path: str) -> Refused:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        name = str(first["loc"][-1])
        message = f"The field {name} is wrong: {first['msg'][:1].lower()}{first['msg'][1:]}."
        return Refused(422, "INVALID_INPUT", message, param=name)
    if isinstance(error, ClientDisconnect):
        return Refused(GONE, "CANCELLED", "The client broke off the upload.")
    if isinstance(error, HTTPException):
        codes = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}
        messages = {
            404: "There is nothing at this address; /docs lists what there is.",
            405: "This address has no such method; /docs lists what it has.",
        }
        return Refused(
            error.status_code,
            codes.get(error.status_code, "INVALID_INPUT"),
            messages.get(error.status_code, "The request cannot be answered."),
            headers=error.headers,
        )
    return refusal(error, path)


class Gate:
    """Stands before every route: names the request, asks for the key, counts, and writes the one log line."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door
        self._keys = [hashlib.sha256(key.encode()).digest() for key in door.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        visit = _Exchange(scope, receive, send, given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, headers)
        door = self._door
        door.under_way += 1
        with job_context(visit.request_id):
            try:
                await self._pass(visit)
            finally:
                door.under_way -= 1
                door.last_active = time.monotonic()
                self._note(visit)

    async def _pass(self, visit: _Exchange) -> None:
        path = visit.scope["path"]
        try:
            if not self._admits(visit.scope, visit.headers):
                raise Refused(
                    401,
                    "invalid_api_key" if path.startswith("/v1/") else "UNAUTHORIZED",
                    "Show one of the service's keys: Authorization: Bearer KEY.",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            if visit.scope["method"] == "HEAD" and path in _OPEN_PATHS:
                # Monitors ask for no more of a probe or a page; the server leaves out the body.
                visit.scope = {**visit.scope, "method": "GET"}
            await self._app(visit.scope, visit.receive, visit.send)
        except asyncio.CancelledError:
            # The time for stopping is over; the client is to try again elsewhere, not to give up.
            if visit.status is None:
                message = "The service is stopping and could not finish this request; send it again."
                stopping = Refused(503, "BUSY", message, retryable=True, headers={"Retry-After": str(RETRY_AFTER)})
                await error_response(stopping, path)(visit.scope, visit.receive, visit.send)
            raise
        except Exception as error:
            if not isinstance(error, Refused):
                # Its text may hold anything; the log gets its type and its way.
                _log.exception("Unexpected failure")
                error = InternalError("The service failed on this request; report its X-Request-ID if it fails again.")
            visit.scope[_ERROR_CODE] = error.code
            if visit.status is None:
                await error_response(error, path)(visit.scope, visit.receive, visit.send)

    def _admits(self, scope: Scope, headers: dict[bytes, str]) -> bool:
        path: str = scope["path"]
        if not self._keys or path in _OPEN_PATHS or path.startswith("/static/"):
            return True
        kind, _, key = headers.get(b"authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # All keys are compared, so that the time tells nothing of which one was nearly right.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        return kind.lower() == "bearer" and any(matches)

    def _note(self, visit: _Exchange) -> None:
        # The template of the path, not the path: it may hold what a caller typed.
        route = getattr(visit.scope.get("route"), "path", None) or "unknown"
        status = visit.status or GONE
        seconds = time.perf_counter() - visit.begun
        method = visit.method
        if route == "unknown" or method not in _METHODS:
            method = "any"
        self._door.metrics.add("whisper_http_requests_total", route=route, method=method, status=str(status))
        self._door.metrics.observe("whisper_http_request_seconds", seconds, route=route)
        code = visit.scope.get(_ERROR_CODE)
        if code is not None:
            self._door.metrics.add("whisper_errors_total", code=code)
        probe = route in ("/health", "/ready", "/ping", "/metrics") and status < 500
        fields: dict[str, object] = {"route": route, "method": method, "status": status, "seconds": round(seconds, 3)}
        if code is not None:
            fields["code"] = code
        _log.log(logging.DEBUG if probe else logging.INFO, "Request finished", extra={"fields": fields})


class _Exchange:
    """One request and its answer, as they pass the gate."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str, headers: dict[bytes, str]) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.headers = headers
        self.request_id = request_id
        self.begun = time.perf_counter()
        self.status: int | None = None
        self._receive = receive
        self._send = send
        self._body_read = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._body_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400 and not self._body_read:
                await self._discard_body()
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    async def _discard_body(self) -> None:
        """Take some of a refused upload: a client still sending when the connection closes may never see why."""
        if b"expect" in self.headers:
            return
        n_bytes = 0

        async def discard() -> None:
            nonlocal n_bytes
            while not self._body_read and n_bytes < _DISCARDED_BYTES:
                n_bytes += len((await self.receive()).get("body", b""))

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(discard(), _DISCARD_SECONDS)
