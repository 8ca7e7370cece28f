"""The HTTP door: ``whisper-worker serve``. Its routes are put together in ``http_app.py``.

One process, one event loop, one model. Requests share the model's batches, so there is
nothing to gain from several processes on one device.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from whisper_worker.errors import InvalidInput, WhisperWorkerError
from whisper_worker.log import configure, get_logger
from whisper_worker.service import Service
from whisper_worker.settings import Settings

_log = get_logger("http")

DEFAULT_PORT = 5000
_BACKLOG = 2048


def main(argv: list[str]) -> int:
    """Serve until told to stop or idle for long enough; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        settings = Settings.from_env()
        configure(settings.log_format, settings.log_level)
        return _serve(arguments, settings)
    except WhisperWorkerError as error:
        print(f"whisper-worker serve: {error.message}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="whisper-worker serve",
        description="Transcription over HTTP: POST /transcribe, OpenAI's routes, /asr, /jobs. GET /docs lists them.",
        epilog="Everything else is set by environment variables; README.md has their table.",
    )
    parser.add_argument("--host", default="0.0.0.0", help="address to listen at (default: all)")
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help=f"default {DEFAULT_PORT}; 0 takes a free one")
    parser.add_argument(
        "--uds", type=Path, metavar="PATH", help="listen on a Unix socket, for this user alone, instead"
    )
    parser.add_argument(
        "--idle-timeout", type=_seconds, metavar="SECONDS", help="exit when no request was under way for that long"
    )
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError("expected a number from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError("expected seconds above 0")
    return seconds


def _serve(arguments: argparse.Namespace, settings: Settings) -> int:
    from whisper_worker.doors.http_app import create_app
    from whisper_worker.doors.http_server import run

    with _listening(arguments) as listener:
        service = Service(settings)
        app = create_app(service, settings, settings.jobs_dir or _own_jobs_dir(listener, settings))
        _say_where(listener, settings)
        try:
            run(app, listener, settings, arguments.idle_timeout)
        finally:
            service.close()
    return 0


@contextlib.contextmanager
def _listening(arguments: argparse.Namespace) -> Iterator[socket.socket]:
    """The socket to serve on. Raises :class:`InvalidInput` where it cannot be had."""
    if arguments.uds is not None:
        with _unix_socket(arguments.uds) as listener:
            yield listener
        return
    try:
        family, _, _, _, address = socket.getaddrinfo(
            arguments.host, arguments.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InvalidInput(
            f"The service cannot listen there: {error.strerror}. Give another --host or --port."
        ) from None
    with listener:
        yield listener


@contextlib.contextmanager
def _unix_socket(path: Path) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        # Bound under a mask, so that there is no moment at which others could connect.
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        inode = path.stat().st_ino
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidInput(f"The service cannot listen on that socket: {error.strerror}. Give another --uds.") from None
    try:
        with listener:
            yield listener
    finally:
        with contextlib.suppress(OSError):
            # Another service may have put its own there since.
            if path.stat().st_ino == inode:
                path.unlink()


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more. Raises :class:`InvalidInput` where somebody does."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise InvalidInput("A service listens on that socket already.")


def _own_jobs_dir(listener: socket.socket, settings: Settings) -> Path:
    """A directory that no other service of this machine takes: no two listen at one place."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return Path(name).resolve().with_name(Path(name).name + ".jobs")
    return (settings.tmp_dir or Path(tempfile.gettempdir())) / f"whisper-jobs-{os.getuid()}-{name[1]}"


def _say_where(listener: socket.socket, settings: Settings) -> None:
    if listener.family == socket.AF_UNIX:
        _log.info("Listening on a Unix socket")
        return
    address, port = listener.getsockname()[:2]
    _log.info("Listening", extra={"fields": {"port": port}})
    if not settings.api_keys and address not in ("127.0.0.1", "::1"):
        _log.warning("Anybody who reaches this port may use the service: WHISPER_API_KEYS is not set")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
