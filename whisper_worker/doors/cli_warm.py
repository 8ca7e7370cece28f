"""A model that stays loaded between calls: a local service on a Unix socket, started on demand.

There is one for each model, device (with the cards it may see), precision and version, in a directory that only this
user may enter. Whoever finds none starts it, under a lock, so that two who start at once get
one. It ends by itself after it was idle for long enough. Where it cannot be had, the work is
done in the calling process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_worker import __version__
from whisper_worker.doors.cli_client import Address, ServiceClient, Unreachable
from whisper_worker.doors.cli_inputs import Input
from whisper_worker.errors import Busy, WhisperWorkerError
from whisper_worker.settings import Settings
from whisper_worker.types import Progress, Segment, Transcript

if TYPE_CHECKING:
    from whisper_worker.doors.cli_run import Engine

_START_SECONDS = 300.0
"""Time for the service to load its model: large ones come from slow disks."""
_STARTS = 3
_LONGEST_SOCKET_PATH = 100
"""Bytes; the system's limit is a little above."""
_SEPARATES = ("model", "model_cache", "engine", "device", "compute_type", "threads", "batch_size", "api_keys")
_JOB_SECONDS = 24 * 3600.0
_JOB_RETRIES = 50

SERVE = (sys.executable, "-m", "whisper_worker", "serve")


class WarmEngine:
    """The local service; see :class:`whisper_worker.doors.cli_run.Engine`."""

    def __init__(
        self,
        payload: Mapping[str, object],
        settings: Settings,
        idle_seconds: float,
        fallback: Engine,
        say: Callable[[str], None],
        get_model: Callable[[], None] = lambda: None,
        serve: tuple[str, ...] = SERVE,
    ) -> None:
        """``get_model`` makes sure that the model is on this machine: a service does not fetch it.

        ``serve``: the command that takes ``--uds PATH --idle-timeout SECONDS``.
        """
        self._payload = payload
        self._settings = settings
        # The service reads the same environment: what it asks of the world it asks of us.
        self._key = next(iter(settings.api_keys), None)
        self._idle_seconds = idle_seconds
        self._fallback = fallback
        self._say = say
        self._get_model = get_model
        self._serve = serve
        self._gave_up = False

    def transcribe(
        self,
        item: Input,
        on_segment: Callable[[Segment], None],
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Transcript:
        """One recording. Raises typed errors only."""
        told = 0

        def once(segment: Segment) -> None:
            nonlocal told
            if segment.id >= told:
                told = segment.id + 1
                on_segment(segment)

        for _ in range(_STARTS):  # a service found at the end of its idle time is gone at the second look
            client = self._client()
            if client is None:
                break
            with contextlib.suppress(Unreachable):
                return client.transcribe(item, once, on_progress)
        return self._fallback.transcribe(item, once, on_progress)

    def prepare(self) -> None:
        """Start the service. Raises typed errors."""
        if self._client() is None:
            self._fallback.prepare()

    def _client(self) -> ServiceClient | None:
        """The running service, None where there is none to be had."""
        if self._gave_up:
            return None
        self._get_model()
        try:
            directory = runtime_directory(self._settings)
            path = directory / f"{service_key(self._settings)}.sock"
            client = ServiceClient(
                Address("localhost", socket=path),
                self._payload,
                key=self._key,
                timeout=_JOB_SECONDS,
                retries=_JOB_RETRIES,
                reconnects=False,
                say=self._say,
            )
            if not client.is_ready():
                with _lock(path.with_suffix(".lock")):
                    if not client.is_ready():
                        self._start(path, client)
            return client
        except (OSError, WhisperWorkerError) as error:
            self._gave_up = True
            reason = error.message if isinstance(error, WhisperWorkerError) else error.strerror
            self._say(f"warning: --keep-warm does not work here ({reason}); the model is loaded for this call alone")
            return None

    def _start(self, path: Path, client: ServiceClient) -> None:
        """Start the service and wait until it is ready. Raises typed errors."""
        deadline = time.monotonic() + _START_SECONDS
        for _ in range(_STARTS):
            process = self._spawn(path)
            try:
                while not client.is_ready():
                    # Ours ends at once where another still listens: one that loads, left by a killed call, or
                    # one that is about to stop. Either is waited for.
                    if process.poll() is not None and not _listens(path):
                        break
                    if time.monotonic() > deadline:
                        raise Busy("the local service was not ready in time; its log lies beside its socket")
                    time.sleep(0.05)
                else:
                    return
            except BaseException:  # an interrupt, too: nobody would know of it
                process.terminate()
                raise
        raise Busy("the local service ended while it started; its log lies beside its socket")

    def _spawn(self, path: Path) -> subprocess.Popen[bytes]:
        descriptor = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            return subprocess.Popen(
                [*self._serve, "--uds", str(path), "--idle-timeout", f"{self._idle_seconds:g}"],
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env=self._settings.for_child(),
                start_new_session=True,  # it outlives the terminal and its Ctrl-C
            )
        finally:
            os.close(descriptor)


def runtime_directory(settings: Settings) -> Path:
    """A directory for sockets that only this user may enter. Raises :class:`Busy` where it cannot be trusted."""
    places = [settings.runtime_dir / "whisper-worker"] if settings.runtime_dir is not None else []
    places.append(Path(tempfile.gettempdir()) / f"whisper-worker-{os.getuid()}")
    for directory in places:
        if len(os.fsencode(directory)) > _LONGEST_SOCKET_PATH - 24:
            continue
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:  # after su, XDG_RUNTIME_DIR still is the other user's
            if directory is places[-1]:
                raise
            continue
        status = directory.lstat()
        # In a shared place somebody else may have made it first, to listen in.
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise Busy("the directory for its socket does not belong to this user alone")
        return directory
    raise Busy("the path of the directory for its socket is too long")


def service_key(settings: Settings) -> str:
    """Names the service that these settings call for: 16 hexadecimal digits."""
    asked = {name: str(getattr(settings, name)) for name in _SEPARATES}
    for name in ("model", "model_cache"):
        if Path(asked[name]).is_dir():  # the same word means another model elsewhere
            asked[name] = str(Path(asked[name]).absolute())
    cards = os.environ.get("CUDA_VISIBLE_DEVICES")  # a service sees those that its first caller saw
    text = json.dumps({"version": __version__, "python": sys.executable, "cards": cards, **asked})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(str(path)) == 0


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
