"""Runs the long jobs that are stored, a few at a time, and tells their callers how it ended.

:class:`Dispatch` is the seam: this process' threads stand behind it, and a message broker
can, that hands the same stored jobs to workers elsewhere and notes their outcome.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from whisper_worker.doors.http_body import Body
from whisper_worker.doors.http_callback import Sender
from whisper_worker.doors.http_common import Door, answer, progress_to_dict, read_job
from whisper_worker.doors.http_jobs_store import STORE_PAUSE, JobStore, StoredJob
from whisper_worker.errors import Busy, Cancelled, InternalError, WhisperWorkerError
from whisper_worker.log import get_logger, job_context
from whisper_worker.schema import segment_to_dict
from whisper_worker.types import CancelToken, Progress, Segment

_log = get_logger("jobs")

_PROGRESS_INTERVAL = 0.5
"""Least seconds between two updates of a job."""

_SWEEP_INTERVAL = 60.0


class Dispatch(Protocol):
    """Has stored jobs run, somewhere."""

    def start(self) -> None: ...

    def wake(self) -> None:
        """A job was stored."""
        ...

    def cancel(self, job_id: str) -> None:
        """Stop a job that is running; one that is not is left alone."""
        ...

    def drain(self) -> None:
        """Begin no further jobs."""
        ...

    def stop(self, timeout: float) -> None:
        """Wait that many seconds for the jobs in hand, then put them back."""
        ...


class LocalDispatch:
    """Runs jobs in threads of this process, oldest first."""

    def __init__(self, store: JobStore, door: Door, on_change: Callable[[str], None], sender: Sender | None) -> None:
        """``on_change`` is told, in any thread, of each job that something happened to."""
        self._store = store
        self._door = door
        self._on_change = on_change
        self._sender = sender
        self._changed = threading.Condition()
        self._draining = False
        self._running: dict[str, CancelToken] = {}
        self._withdrawn: set[str] = set()
        self._threads = [
            threading.Thread(target=self._work, name=f"job-{number}") for number in range(door.settings.concurrency)
        ]
        self._sweeper = threading.Thread(target=self._sweep, name="job-sweeper")

    def start(self) -> None:
        for thread in (*self._threads, self._sweeper):
            thread.start()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def cancel(self, job_id: str) -> None:
        with self._changed:
            if job_id in self._running:
                self._withdrawn.add(job_id)
                self._running[job_id].cancel()

    def drain(self) -> None:
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def stop(self, timeout: float) -> None:
        self.drain()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            for token in self._running.values():
                token.cancel()
        for thread in (*self._threads, self._sweeper):
            thread.join()

    def _work(self) -> None:
        while not self._draining:
            try:
                if (claimed := self._claim()) is not None:
                    job, token = claimed
                    with job_context(job.id):
                        self._run(job, token)
            except Exception:
                # The outcome is lost, the job is not: the next process runs it again.
                _log.exception("The store of jobs failed")
                self._pause(STORE_PAUSE)

    def _claim(self) -> tuple[StoredJob, CancelToken] | None:
        """Wait for a job; None when there are to be no more."""
        with self._changed:
            while not self._draining:
                job = self._store.claim()
                if job is not None:
                    token = self._running[job.id] = CancelToken()
                    return job, token
                self._changed.wait()
        return None

    def _run(self, job: StoredJob, token: CancelToken) -> None:
        _log.info("Job started", extra={"fields": {"attempt": job.attempts}})
        begun = time.perf_counter()
        outcome = "completed"
        self._on_change(job.id)
        try:
            self._store.complete(job.id, self._result(job, token))
        except Exception as error:
            # A withdrawn job's audio is gone at once, and what its run makes of that is no failure.
            withdrawn = job.id in self._withdrawn
            typed = (
                Cancelled("The job was cancelled.")
                if withdrawn
                else error
                if isinstance(error, WhisperWorkerError)
                else _unexpected()
            )
            if self._draining and isinstance(typed, (Cancelled, Busy)) and not withdrawn:
                outcome = "put back"
                self._store.put_back(job.id)
            else:
                outcome = "cancelled" if isinstance(typed, Cancelled) else "failed"
                self._store.fail(job.id, typed)
                if outcome == "failed":
                    self._door.metrics.add("whisper_errors_total", code=typed.code)
                    _log.warning("%s", typed.message, extra={"fields": {"code": typed.code}})
        finally:
            with self._changed:
                del self._running[job.id]
                self._withdrawn.discard(job.id)
        self._door.metrics.add("whisper_jobs_total", status=outcome)
        seconds = round(time.perf_counter() - begun, 3)
        _log.info("Job finished", extra={"fields": {"status": outcome, "seconds": seconds}})
        self._on_change(job.id)
        if self._sender is not None:
            self._sender.wake()

    def _result(self, job: StoredJob, token: CancelToken) -> dict[str, Any]:
        from whisper_worker.engine.scheduler import Priority

        order = read_job(Body(job.fields, job.upload, job.filename), self._door)
        last_update = 0.0

        def on_progress(progress: Progress) -> None:
            nonlocal last_update
            now = time.monotonic()
            if now - last_update >= _PROGRESS_INTERVAL or progress.done_seconds >= progress.total_seconds:
                last_update = now
                self._store.progress(job.id, progress_to_dict(progress))
                self._on_change(job.id)

        def on_segment(segment: Segment) -> None:
            self._store.segment(job.id, segment_to_dict(segment))
            self._on_change(job.id)

        return answer(order, self._door.transcribe(order, token, on_progress, on_segment, Priority.BULK))

    def _sweep(self) -> None:
        ttl = self._door.settings.job_ttl
        while not self._draining:
            try:
                self._store.expire(time.time() - ttl)
            except Exception:
                _log.exception("The store of jobs failed")
            self._pause(min(_SWEEP_INTERVAL, ttl / 2))

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._draining, seconds)


def _unexpected() -> InternalError:
    _log.exception("Unexpected failure")
    return InternalError("The service failed on this job; send it again, and report its id if it fails again.")
