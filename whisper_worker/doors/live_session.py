"""One client's sound on its way through the engine, whatever protocol it came by.

The session's state belongs to the event loop; only the decode itself runs in a thread. Sound
waits in the session up to its limit, then whoever feeds it waits, then the socket fills and
the sender waits: nothing is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from whisper_worker.errors import WhisperWorkerError
from whisper_worker.log import get_logger
from whisper_worker.types import SAMPLE_RATE, CancelToken, TranscribeOptions

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from whisper_worker.engine.live import Hypothesis, Request
    from whisper_worker.engine.live_recognizer import LiveRecognizer
    from whisper_worker.engine.pipeline import Pipeline

_log = get_logger("live")

_ATTEMPTS = 3
_RETRY_SECONDS = 0.2
_STEP_SAMPLES = 4 * SAMPLE_RATE
"""Taken in at a stretch; then it is the others' turn."""
_DOUBT_THRESHOLD = 0.15
"""Detection threshold of clients who ask for no voice detection: only what is surely silent is left out."""


class Stream:
    """Feed it, run it, read its session whenever ``on_update`` was called."""

    def __init__(
        self,
        pipeline: Pipeline,
        options: TranscribeOptions,
        threads: ThreadPoolExecutor,
        on_update: Callable[[], None],
    ) -> None:
        """Raises :class:`InvalidInput` where the model cannot do what the options ask."""
        from whisper_worker.audio.vad import VoiceStream
        from whisper_worker.engine.live import LiveSession
        from whisper_worker.engine.live_recognizer import LiveRecognizer

        self._pipeline = pipeline
        self._cancel = CancelToken()
        self.recognizer = LiveRecognizer(pipeline, options, self._cancel)
        threshold = options.vad_threshold if options.vad else _DOUBT_THRESHOLD
        self.session = LiveSession(VoiceStream(pipeline.detector), time.monotonic, threshold=threshold)
        self._next: LiveRecognizer | None = None
        self._threads = threads
        self._on_update = on_update
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self.n_decodes = 0
        self.decode_seconds = 0.0
        self.worst_lag = 0.0
        """Longest time from asking for a decode to having it."""

    async def feed(self, samples: npt.NDArray[np.int16]) -> None:
        """Hand in sound; returns once there was room for all of it."""
        while True:
            # Silence makes its own room, and a socket that holds more does not wait: whoever sends without
            # pause would have the event loop to itself.
            await asyncio.sleep(0)
            if not len(samples):
                return
            room = min(self.session.room, _STEP_SAMPLES)
            if room:
                self.session.feed(samples[:room])
                samples = samples[room:]
                self._wake.set()
            else:
                self._room.clear()
                await self._room.wait()

    def configure(self, options: TranscribeOptions) -> None:
        """Use these options from the next decode on. Raises as the constructor does."""
        from whisper_worker.engine.live_recognizer import LiveRecognizer

        if self._next is not None:
            self._next.close()
        self._next = LiveRecognizer(self._pipeline, options, self._cancel)
        self.session.threshold = options.vad_threshold

    def finish(self) -> None:
        """No more sound will come: :meth:`run` ends when all of it is transcribed."""
        self.session.finish()
        self._wake.set()

    def flush(self) -> None:
        """Settle what was said so far, as a pause would."""
        self.session.flush()
        self._wake.set()

    async def run(self) -> None:
        """Decode until the end. Raises a typed error when the engine fails again and again."""
        session = self.session
        while not session.done:
            if self._next is not None:
                self.recognizer.close()
                self.recognizer, self._next = self._next, None
            request = session.request()
            if request is None:
                self._on_update()
                self._room.set()
                if not session.done:
                    await self._rest()
                continue
            begun = time.monotonic()
            hypothesis = await self._recognize(request)
            self.n_decodes += 1
            self.decode_seconds += time.monotonic() - begun
            self.worst_lag = max(self.worst_lag, time.monotonic() - begun)
            session.apply(request, hypothesis)
            self._on_update()
            self._room.set()
        self._on_update()

    def close(self) -> None:
        """Withdraw what is still being decoded."""
        self._cancel.cancel()
        for recognizer in (self.recognizer, self._next):
            if recognizer is not None:
                recognizer.close()

    async def _rest(self) -> None:
        """Until there is sound, or until its absence means something."""
        wake_at = self.session.wake_at()
        timeout = None if wake_at is None else max(0.01, wake_at - time.monotonic())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), timeout)
        self._wake.clear()

    async def _recognize(self, request: Request) -> Hypothesis:
        loop = asyncio.get_running_loop()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await loop.run_in_executor(self._threads, self.recognizer.recognize, request)
            except WhisperWorkerError as error:
                if attempt == _ATTEMPTS or not error.retryable:
                    raise
                _log.warning("A decode failed and is tried again", extra={"fields": {"code": error.code}})
                await asyncio.sleep(_RETRY_SECONDS * attempt)
        raise AssertionError("unreachable")
