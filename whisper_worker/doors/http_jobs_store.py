"""Long jobs on disk: SQLite for what is known of them, a spool directory for their audio.

A process that dies loses none: what it had begun is found again by the next one. The
directory belongs to one process at a time, which holds a lock on it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whisper_worker.errors import InternalError, InvalidInput, WhisperWorkerError
from whisper_worker.log import get_logger

_log = get_logger("jobs")

WAITING = ("queued", "running")
"""States of a job that has not ended; the others are completed, failed and cancelled."""

MAX_ATTEMPTS = 3
"""Runs of a job that ends its process each time, before it counts as the reason."""

STORE_PAUSE = 5.0
"""Seconds to leave the store alone after it failed, as it does on a full disk."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    request TEXT,
    upload TEXT,
    filename TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    stage TEXT NOT NULL DEFAULT 'queued',
    done_seconds REAL NOT NULL DEFAULT 0,
    total_seconds REAL NOT NULL DEFAULT 0,
    result TEXT,
    error TEXT,
    ended REAL,
    callback_url TEXT,
    callback_due REAL,
    callback_tries INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
CREATE TABLE IF NOT EXISTS events (
    job TEXT NOT NULL,
    id INTEGER NOT NULL,
    name TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job, id)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class StoredJob:
    """What it takes to run a job: the request's fields, and where its upload lies."""

    id: str
    fields: dict[str, Any]
    upload: Path | None
    filename: str
    attempts: int
    """Runs begun, this one included."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a job. Ids rise within a job."""

    id: int
    name: str
    data: Any

    @property
    def last(self) -> bool:
        return self.name in ("done", "error")


@dataclass(frozen=True, slots=True)
class Callback:
    """An ended job whose caller wants to hear of it."""

    job_id: str
    url: str
    tries: int
    due: float
    """Unix time."""


class JobStore:
    """All methods block, for a short while, and may be called from any thread."""

    def __init__(self, directory: Path) -> None:
        """Open or make the directory, and queue again what a dead process had begun.

        Raises :class:`InvalidInput` where it is in use or not this user's own.
        """
        self._spool = directory / "spool"
        self._lock = threading.RLock()
        self._held = _hold(directory)
        self._spool.mkdir(mode=0o700, exist_ok=True)
        database = directory / "jobs.sqlite"
        # Requests may hold keys, and the directory may be one that others can read.
        os.close(os.open(database, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600))
        self._database = sqlite3.connect(database, check_same_thread=False, isolation_level=None)
        self._database.row_factory = sqlite3.Row
        # A power cut may cost the last moments, a killed process nothing.
        self._database.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA secure_delete=ON;")
        self._database.executescript(_SCHEMA)
        self._recover()

    def close(self) -> None:
        with self._lock:
            self._database.close()
            os.close(self._held)

    # -- a job's way -------------------------------------------------------------------------

    @contextmanager
    def spool(self, job_id: str) -> Iterator[Path]:
        """A directory for the upload of a job that is just coming in; gone again if it is not added."""
        directory = self._spool / job_id
        directory.mkdir(mode=0o700)
        try:
            yield directory
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def add(
        self, job_id: str, fields: Mapping[str, Any], upload: Path | None, filename: str, callback_url: str | None
    ) -> None:
        """Queue a job. From here on it is not lost."""
        with self._transaction():
            self._database.execute(
                "INSERT INTO jobs (id, status, request, upload, filename, callback_url) "
                "VALUES (?, 'queued', ?, ?, ?, ?)",
                (job_id, json.dumps(fields), upload.name if upload else None, filename, callback_url),
            )
            self._add_event(job_id, "status", {"status": "queued", "attempt": 0})

    def claim(self) -> StoredJob | None:
        """The job that has waited longest, now running; None where none waits."""
        with self._transaction():
            row = self._one("SELECT * FROM jobs WHERE status = 'queued' ORDER BY number LIMIT 1")
            if row is None:
                return None
            attempts = row["attempts"] + 1
            self._database.execute(
                "UPDATE jobs SET status = 'running', attempts = ?, stage = 'fetch', done_seconds = 0 WHERE id = ?",
                (attempts, row["id"]),
            )
            self._add_event(row["id"], "status", {"status": "running", "attempt": attempts})
        upload = self._spool / row["id"] / row["upload"] if row["upload"] else None
        return StoredJob(row["id"], json.loads(row["request"]), upload, row["filename"], attempts)

    def progress(self, job_id: str, progress: Mapping[str, Any]) -> None:
        with self._transaction():
            changed = self._database.execute(
                "UPDATE jobs SET stage = ?, done_seconds = ?, total_seconds = ? WHERE id = ? AND status = 'running'",
                (progress["stage"], progress["done_seconds"], progress["total_seconds"], job_id),
            )
            if changed.rowcount:
                # The latest alone is of interest, and hours would leave thousands.
                self._database.execute("DELETE FROM events WHERE job = ? AND name = 'progress'", (job_id,))
                self._add_event(job_id, "progress", progress)

    def segment(self, job_id: str, segment: Mapping[str, Any]) -> None:
        with self._transaction():
            if self._status(job_id) == "running":
                self._add_event(job_id, "segment", segment)

    def put_back(self, job_id: str) -> None:
        """Queue a running job again that this process will not finish; the run does not count."""
        with self._transaction():
            changed = self._database.execute(
                "UPDATE jobs SET status = 'queued', stage = 'queued', attempts = attempts - 1 "
                "WHERE id = ? AND status = 'running'",
                (job_id,),
            )
            if changed.rowcount:
                self._add_event(job_id, "status", {"status": "queued", "attempt": 0})

    def complete(self, job_id: str, result: Mapping[str, Any]) -> None:
        self._end(job_id, "completed", json.dumps(result, ensure_ascii=False), None)

    def fail(self, job_id: str, error: WhisperWorkerError) -> None:
        status = "cancelled" if error.code == "CANCELLED" else "failed"
        self._end(job_id, status, None, json.dumps(error.to_dict()))

    def _end(self, job_id: str, status: str, result: str | None, error: str | None) -> None:
        """What is kept of an ended job is its outcome: the request, with whatever keys it holds, and the audio go."""
        with self._transaction():
            changed = self._database.execute(
                "UPDATE jobs SET status = ?, stage = ?, result = ?, error = ?, ended = ?, "
                "request = NULL, upload = NULL, "
                "done_seconds = CASE ? WHEN 'completed' THEN total_seconds ELSE done_seconds END, "
                "callback_due = CASE WHEN callback_url IS NULL THEN NULL ELSE ? END "
                "WHERE id = ? AND status IN ('queued', 'running')",
                (status, status, result, error, time.time(), status, time.time(), job_id),
            )
            if changed.rowcount:
                self._add_event(job_id, "status", {"status": status})
                # The result stands in the job already.
                self._add_event(job_id, "error" if error else "done", json.loads(error) if error else None)
        shutil.rmtree(self._spool / job_id, ignore_errors=True)

    def delete(self, job_id: str) -> bool:
        """Forget a job and all that belongs to it; whether there was one."""
        with self._transaction():
            found = self._database.execute("DELETE FROM jobs WHERE id = ?", (job_id,)).rowcount
            self._database.execute("DELETE FROM events WHERE job = ?", (job_id,))
        shutil.rmtree(self._spool / job_id, ignore_errors=True)
        return bool(found)

    def expire(self, ended_before: float) -> int:
        """Delete what ended before a Unix time; returns how many."""
        with self._lock:
            rows = self._database.execute(
                "SELECT id FROM jobs WHERE ended < ? AND callback_due IS NULL", (ended_before,)
            ).fetchall()
        return sum(self.delete(row["id"]) for row in rows)

    # -- questions ---------------------------------------------------------------------------

    def view(self, job_id: str) -> dict[str, Any] | None:
        """The job as its caller sees it; None where there is none."""
        with self._lock:
            row = self._one("SELECT * FROM jobs WHERE id = ?", (job_id,))
        if row is None:
            return None
        return {
            "id": row["id"],
            "status": row["status"],
            "progress": {
                "done_seconds": row["done_seconds"],
                "total_seconds": row["total_seconds"],
                "stage": row["stage"],
            },
            "result": json.loads(row["result"]) if row["result"] else None,
            "error": json.loads(row["error"]) if row["error"] else None,
        }

    def status(self, job_id: str) -> str | None:
        with self._lock:
            return self._status(job_id)

    def count(self, status: str) -> int:
        with self._lock:
            row = self._one("SELECT count(*) AS n FROM jobs WHERE status = ?", (status,))
        return int(row["n"]) if row is not None else 0

    def events_after(self, job_id: str, event_id: int) -> list[Event]:
        """What happened since the event of that number, in order."""
        with self._lock:
            rows = self._database.execute(
                "SELECT id, name, data FROM events WHERE job = ? AND id > ? ORDER BY id", (job_id, event_id)
            ).fetchall()
            events = [Event(row["id"], row["name"], json.loads(row["data"])) for row in rows]
            if events and events[-1].name == "done" and (view := self.view(job_id)) is not None:
                events[-1] = Event(events[-1].id, "done", view["result"])
        return events

    # -- callbacks ---------------------------------------------------------------------------

    def next_callback(self) -> Callback | None:
        """The one due first, be it now or later."""
        with self._lock:
            row = self._one("SELECT * FROM jobs WHERE callback_due IS NOT NULL ORDER BY callback_due LIMIT 1")
        if row is None:
            return None
        return Callback(row["id"], row["callback_url"], row["callback_tries"], row["callback_due"])

    def callback_tried(self, job_id: str, again_at: float | None) -> None:
        """Note a try: the next one's Unix time, or None where there is to be none."""
        with self._transaction():
            self._database.execute(
                "UPDATE jobs SET callback_due = ?, callback_tries = callback_tries + 1 WHERE id = ?", (again_at, job_id)
            )

    # -- inside ------------------------------------------------------------------------------

    def _recover(self) -> None:
        with self._lock:
            rows = self._database.execute("SELECT id, attempts FROM jobs WHERE status = 'running'").fetchall()
        for row in rows:
            if row["attempts"] >= MAX_ATTEMPTS:
                message = f"The job was cut off {MAX_ATTEMPTS} times, as if it ended its worker. It is not run again."
                self.fail(row["id"], InternalError(message, retryable=False))
                continue
            with self._transaction():
                self._database.execute("UPDATE jobs SET status = 'queued', stage = 'queued' WHERE id = ?", (row["id"],))
                self._add_event(row["id"], "status", {"status": "queued", "attempt": row["attempts"]})
        if rows:
            _log.info("Jobs that were cut off", extra={"fields": {"jobs": len(rows)}})
        with self._lock:
            known = {
                row["id"] for row in self._database.execute("SELECT id FROM jobs WHERE status IN ('queued', 'running')")
            }
        for directory in self._spool.iterdir():
            if directory.name not in known:
                shutil.rmtree(directory, ignore_errors=True)

    def _add_event(self, job_id: str, name: str, data: Any) -> None:
        self._database.execute(
            "INSERT INTO events SELECT ?, coalesce(max(id), 0) + 1, ?, ? FROM events WHERE job = ?",
            (job_id, name, json.dumps(data, ensure_ascii=False), job_id),
        )

    def _status(self, job_id: str) -> str | None:
        row = self._one("SELECT status FROM jobs WHERE id = ?", (job_id,))
        return None if row is None else str(row["status"])

    def _one(self, query: str, values: tuple[object, ...] = ()) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._database.execute(query, values).fetchone()
        return row

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


def _hold(directory: Path) -> int:
    """A lock on the directory, made where it is missing, for as long as the descriptor is open."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # In a temporary directory that all users share, another one may have been first.
        if directory.lstat().st_uid != os.getuid():
            raise InvalidInput("The directory for jobs is another user's; set WHISPER_JOBS_DIR to one of your own.")
        descriptor = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InvalidInput(f"The directory for jobs cannot be used ({error.strerror}); set WHISPER_JOBS_DIR.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InvalidInput(
            "Another service uses this directory for jobs; give each its own WHISPER_JOBS_DIR."
        ) from None
    except OSError:
        # A file system without locks: nothing tells whether another one is there.
        _log.warning("The directory for jobs cannot be locked: see to it that one service uses it")
    return descriptor
