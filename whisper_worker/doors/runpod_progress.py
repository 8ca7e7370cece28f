"""Progress of one RunPod job, in order, not too often, and never after its result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from whisper_worker.log import get_logger
from whisper_worker.types import Progress

_log = get_logger("runpod")

_LAST_UPDATE_SECONDS = 5.0
"""Longest wait, when the result is there, for an update that is just being sent."""


class ProgressReport:
    """Sends the latest state of a job, one update at a time.

    The SDK's ``progress_update`` starts a thread for each update and forgets it: two may
    overtake each other, and one may arrive after the result and overwrite it. Here one task
    sends all updates of a job, and :meth:`close` returns when nothing is under way any more.
    """

    def __init__(self, post: Callable[[dict[str, Any]], Awaitable[None]] | None, interval: float) -> None:
        """``post`` sends one update (None: nobody listens); ``interval`` is the least time between two, in seconds."""
        self._post = post
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()
        self._latest: dict[str, Any] = {}
        self._parts: dict[int, float] = {}
        self._expected = 1
        self._percent = 0.0
        self._task = asyncio.create_task(self._send()) if post else None

    def expect(self, inputs: int) -> None:
        """How many inputs make up the job."""
        self._expected = inputs

    def update(self, index: int | None, step: int, steps: int, progress: Progress) -> None:
        """Take note of an input's progress, from any thread: ``step`` of ``steps`` passes over it, from 0."""
        if self._task is None or self._closing.is_set():
            return
        share = progress.done_seconds / progress.total_seconds if progress.total_seconds > 0 else 0.0
        with suppress(RuntimeError):  # the loop of a cancelled job may be gone before its thread has noticed
            self._loop.call_soon_threadsafe(self._take, index, (step + min(share, 1.0)) / steps, progress)

    def _take(self, index: int | None, share: float, progress: Progress) -> None:
        self._parts[index or 0] = share
        # What is done never shrinks, even where a window was read in part and the total grew.
        self._percent = max(self._percent, round(100 * sum(self._parts.values()) / self._expected, 1))
        self._latest = {
            "percent": self._percent,
            "stage": progress.stage,
            "done_seconds": progress.done_seconds,
            "total_seconds": progress.total_seconds,
        }
        if index is not None:
            self._latest["index"] = index
        self._changed.set()

    async def _send(self) -> None:
        assert self._post is not None
        while True:
            await self._changed.wait()
            if self._closing.is_set():
                return
            self._changed.clear()
            try:
                await self._post(self._latest)
            except Exception as error:  # an update that is lost must not cost the job
                _log.warning("A progress update was not sent", extra={"fields": {"error": type(error).__name__}})
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._interval)

    async def close(self) -> None:
        """Send no more; return when the update that was being sent has arrived or was given up."""
        self._closing.set()
        self._changed.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=_LAST_UPDATE_SECONDS)
            self.abandon()

    def abandon(self) -> None:
        """Send no more and drop the update under way."""
        self._closing.set()
        if self._task is not None:
            self._task.cancel()
