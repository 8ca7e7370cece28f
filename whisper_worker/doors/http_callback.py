"""Tells the callers of long jobs how they ended: a signed POST, tried again with growing pauses.

    X-Whisper-Job: ID
    X-Whisper-Timestamp: Unix seconds
    X-Whisper-Signature: sha256=HEX

The signature is the HMAC-SHA256, under WHISPER_CALLBACK_SECRET, of the timestamp, a full
stop and the body. The receiver computes it too, compares in constant time, and turns away
timestamps that are old. Addresses are held to the rule for downloads, and redirects are
not followed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import socket
import threading
import time
from contextlib import closing, suppress
from typing import Any

from whisper_worker.audio.address import AddressGuard, HttpUrl, parse_http_url
from whisper_worker.audio.fetch import tls_context
from whisper_worker.doors.http_jobs_store import STORE_PAUSE, Callback, JobStore
from whisper_worker.errors import Forbidden, InvalidInput, WhisperWorkerError
from whisper_worker.log import get_logger, job_context
from whisper_worker.settings import Settings

_log = get_logger("callback")

PAUSES = (1.0, 5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0)
"""Seconds before each further try."""

_TIMEOUT = 10.0
"""Seconds for one try, all of it."""


def check_callback(url: object, settings: Settings) -> str:
    """A callback address that may be called. Blocks on a look-up of its name.

    Raises :class:`InvalidInput` and :class:`Forbidden`, or :class:`DownloadError` where the name is unknown.
    """
    if not isinstance(url, str):
        raise InvalidInput("The field callback_url must be a string.")
    if settings.callback_secret is None:
        raise InvalidInput(
            "The field callback_url cannot be honoured: callbacks are signed, and this service has no "
            "WHISPER_CALLBACK_SECRET. Ask for the job's state instead."
        )
    if not url.strip().lower().startswith(("http://", "https://")):
        raise Forbidden("The field callback_url is refused: it must begin with http:// or https://.")
    try:
        parsed = parse_http_url(url)
        _guard(settings).addresses(parsed.host, parsed.port)
    except Forbidden as error:
        raise Forbidden(f"The field callback_url is refused. {error.message}") from None
    return url


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """Value of the ``X-Whisper-Signature`` header."""
    return "sha256=" + hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()


class Sender:
    """One thread that sends what the store says is due."""

    def __init__(self, store: JobStore, settings: Settings, pauses: tuple[float, ...] = PAUSES) -> None:
        self._store = store
        self._settings = settings
        self._pauses = pauses
        self._changed = threading.Condition()
        self._woken = False
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="callbacks")

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify()

    def stop(self) -> None:
        """End after the try in hand; what is still due is sent by the next process."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopping:
            try:
                wait = self._send_due()
            except Exception:
                _log.exception("Callbacks cannot be sent for now")
                wait = STORE_PAUSE
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._woken, wait)
                self._woken = False

    def _send_due(self) -> float | None:
        """Send what is due; gives the seconds until the next is, None where there is none."""
        while not self._stopping and (callback := self._store.next_callback()) is not None:
            wait = callback.due - time.time()
            if wait > 0:
                return wait
            with job_context(callback.job_id):
                self._try(callback)
        return None

    def _try(self, callback: Callback) -> None:
        view = self._store.view(callback.job_id)
        if view is None:  # deleted a moment ago
            return
        failure = None
        try:
            status = self._post(callback.url, callback.job_id, view)
            if not 200 <= status < 300:
                failure = f"HTTP {status}"
        except (WhisperWorkerError, OSError, http.client.HTTPException) as error:
            failure = type(error).__name__
        again_at = None
        if failure is not None and callback.tries < len(self._pauses):
            again_at = time.time() + self._pauses[callback.tries]
        self._store.callback_tried(callback.job_id, again_at)
        fields: dict[str, object] = {"try": callback.tries + 1}
        if failure is None:
            _log.info("Callback delivered", extra={"fields": fields})
        else:
            fields |= {"reason": failure, "again": again_at is not None}
            _log.warning("Callback not delivered", extra={"fields": fields})

    def _post(self, url: str, job_id: str, view: dict[str, Any]) -> int:
        body = json.dumps(view, ensure_ascii=False).encode()
        timestamp = str(int(time.time()))
        parsed = parse_http_url(url)
        headers = {
            "Host": parsed.host_header,
            "Content-Type": "application/json",
            "User-Agent": "whisper-worker",
            "Connection": "close",
            "X-Whisper-Job": job_id,
            "X-Whisper-Timestamp": timestamp,
            "X-Whisper-Signature": signature(self._settings.callback_secret or "", timestamp, body),
        }
        if parsed.credentials is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(parsed.credentials.encode()).decode()
        with closing(_connect(parsed, self._settings)) as connection:
            # Each step has its own time limit, and a server that trickles never reaches it.
            watch = threading.Timer(_TIMEOUT, _hang_up, [connection])
            watch.start()
            try:
                connection.request("POST", parsed.target, body, headers)
                with closing(connection.getresponse()) as response:
                    return response.status
            finally:
                watch.cancel()


def _guard(settings: Settings) -> AddressGuard:
    return AddressGuard(allow_private=settings.allow_private_urls)


def _connect(url: HttpUrl, settings: Settings) -> http.client.HTTPConnection:
    """A connection to an address that was checked: a name may lead elsewhere than when the job came in."""
    failure: OSError | None = None
    for address in _guard(settings).addresses(url.host, url.port):
        connection = http.client.HTTPConnection(url.host, url.port)
        try:
            connection.sock = socket.create_connection((str(address), url.port), _TIMEOUT)
            if url.scheme == "https":
                connection.sock = tls_context().wrap_socket(connection.sock, server_hostname=url.host)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    assert failure is not None
    raise failure


def _hang_up(connection: http.client.HTTPConnection) -> None:
    with suppress(OSError):
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)
