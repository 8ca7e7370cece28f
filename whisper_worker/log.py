"""Log lines of the whole worker, as text or JSON, on standard error.

text: ``2025-01-18 12:00:00 | INFO | [job id] message``
json: ``{"timestamp": "2025-01-18T12:00:00.000Z", "level", "component", "message", "job_id", ...fields}``

Call ``logger.info("Downloaded", extra={"fields": {"bytes": n}})`` for structured fields.
Never pass transcript text, a query string, a path or a host name.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from pathlib import Path

_job_id: ContextVar[str | None] = ContextVar("job_id", default=None)

ROOT = "whisper_worker"


def get_logger(component: str) -> logging.Logger:
    """Logger of one component, e.g. ``get_logger("runpod")``."""
    return logging.getLogger(f"{ROOT}.{component}")


@contextmanager
def job_context(job_id: str) -> Iterator[None]:
    """Lines logged inside carry ``job_id``. ``asyncio.to_thread`` carries it along; plain threads do not."""
    token = _job_id.set(job_id)
    try:
        yield
    finally:
        _job_id.reset(token)


def _failure(record: logging.LogRecord) -> dict[str, str]:
    """Type of the logged exception and the functions it came through: no message, which may quote
    the request, and no file paths."""
    if not record.exc_info or record.exc_info[0] is None:
        return {}
    frames = traceback.extract_tb(record.exc_info[2])
    came = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return {"error": record.exc_info[0].__name__, "at": came}


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        job_id = _job_id.get()
        prefix = f"[{job_id}] " if job_id else ""
        fields = {**getattr(record, "fields", {}), **_failure(record)}
        suffix = "".join(f" {name}={value}" for name, value in fields.items())
        return f"{when} | {record.levelname} | {prefix}{record.getMessage()}{suffix}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, tz=timezone.utc)
        line: dict[str, object] = {
            "timestamp": when.strftime("%Y-%m-%dT%H:%M:%S.") + f"{when.microsecond // 1000:03d}Z",
            "level": record.levelname,
            "component": record.name.removeprefix(ROOT + "."),
            "message": record.getMessage(),
        }
        job_id = _job_id.get()
        if job_id:
            line["job_id"] = job_id
        line.update(getattr(record, "fields", {}))
        line.update(_failure(record))
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(log_format: str, level: str) -> None:
    """Install one handler on the package's root logger; calling it again replaces it."""
    root = logging.getLogger(ROOT)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False
