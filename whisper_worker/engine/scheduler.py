"""One owner of the model; jobs from any thread hand in windows and get them back.

As many workers as the recognizer serves at once (on a GPU one, on a CPU two) each take a turn: pick
the most urgent kind of work, fill a batch from all jobs that have such work, run it. Inside a
priority class the job that has been served least (in audio seconds) goes first, so a short file
behind a long one waits for a batch or two and not for the long one's end.

Errors stay with the window that caused them: a batch that fails is run again in halves,
after an out-of-memory error with a lower batch size from then on.
"""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from whisper_worker.engine.recognizer import DecodingOptions, DecodingRow, Recognizer
from whisper_worker.errors import Busy, Cancelled, EngineError, OutOfMemory, WhisperWorkerError
from whisper_worker.log import get_logger
from whisper_worker.types import CancelToken

if TYPE_CHECKING:
    import torch

_log = get_logger("scheduler")

_SEQUENCES_A_SLOT = 5
"""Beams or samples of a window that batches are sized for."""


class Priority(IntEnum):
    """Lower goes first: what a person is waiting to see as final never waits for drafts or bulk."""

    LIVE_FINAL = 0
    LIVE_PARTIAL = 1
    INTERACTIVE = 2
    BULK = 3


@dataclass(slots=True, eq=False)
class Work:
    """One window's turn at the model, of one of three kinds.

    ``options`` None: detect the language; the result is ``dict[str, float]``.
    ``tokens`` None: decode; the result is a :class:`DecodingResult`.
    Else: attention of the alignment heads for these text tokens, as
    :meth:`Recognizer.cross_attention` gives it.

    ``state`` is filled by the first kind of work that needs the encoder, and reused.
    """

    key: Any
    """The caller's own name for it."""
    mel: Callable[[], torch.Tensor]
    """Features, computed when the batch is formed: waiting windows cost no memory."""
    seconds: float
    options: DecodingOptions | None = None
    tokens: tuple[int, ...] | None = None
    language: str | None = None
    prompt: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    state: Any = None
    result: Any = None
    error: WhisperWorkerError | None = None

    def batch_key(self) -> tuple[object, ...]:
        """Work with equal keys may share a batch."""
        return (self.options, self.tokens is not None)

    def slots(self) -> int:
        """Places it takes in a batch: more than a few sequences of one window weigh like further windows."""
        options = self.options
        if options is None or self.tokens is not None:
            return 1
        sequences = (options.beam_size if options.temperature == 0 else options.best_of) or 1
        return math.ceil(sequences / _SEQUENCES_A_SLOT)

    def row(self) -> DecodingRow:
        return DecodingRow(self.state, self.language, self.prompt, self.prefix, self.seconds)


@dataclass(slots=True, eq=False)
class Job:
    """A caller's handle: submit work, get it back as it is done, close."""

    _scheduler: Scheduler
    priority: Priority
    cancel: CancelToken
    _waiting: deque[Work] = field(default_factory=deque)
    _done: queue.SimpleQueue[Work] = field(default_factory=queue.SimpleQueue)
    _served: float = 0.0

    def submit(self, work: Work, *, next_up: bool = False) -> None:
        """``next_up``: before the job's other work, which may be hours of it."""
        self._scheduler.submit(self, work, next_up=next_up)

    def next_done(self) -> Work:
        """Wait for the next finished work, in whatever order it finished.

        Raises :class:`Cancelled` soon after the job's token was cancelled, or the error that
        the work failed with.
        """
        while True:
            self.cancel.check()
            try:
                work = self._done.get(timeout=0.1)
            except queue.Empty:
                continue
            if work.error is not None:
                raise work.error
            return work

    def close(self) -> None:
        """Withdraw whatever still waits."""
        self._scheduler.forget(self)


class Scheduler:
    """See the module's text.

    ``batch_size`` 0 lets the recognizer size batches from free memory. ``threads``: of torch, which
    the workers that are busy share.
    """

    def __init__(self, recognizer: Recognizer, batch_size: int = 0, threads: int = 1) -> None:
        self._recognizer = recognizer
        self._threads = threads
        self._limit = batch_size or recognizer.default_batch_size()
        self._jobs: list[Job] = []
        self._level = dict.fromkeys(Priority, 0.0)
        """By priority: how much the job that was last given a turn had been served until then."""
        self._wake = threading.Condition()
        self._closed = False
        self._busy = 0
        self._workers = [
            threading.Thread(target=self._run, name=f"scheduler-{number}", daemon=True)
            for number in range(max(1, min(recognizer.max_workers, threads)))
        ]
        for worker in self._workers:
            worker.start()

    @property
    def batch_size(self) -> int:
        """Upper bound in force; out-of-memory errors lower it for good."""
        return self._limit

    def open(self, priority: Priority = Priority.BULK, cancel: CancelToken | None = None) -> Job:
        return Job(self, priority, cancel or CancelToken())

    def submit(self, job: Job, work: Work, *, next_up: bool = False) -> None:
        with self._wake:
            if self._closed:
                raise Busy("The worker is shutting down; send the job again.")
            # One that another thread cancelled and closed would come back for good, with its windows.
            job.cancel.check()
            if not job._waiting:
                # Who comes, or comes back, starts level with those at work, or would be owed all of the past.
                job._served = max(job._served, self._level[job.priority])
            if job not in self._jobs:
                self._jobs.append(job)
            if next_up:
                job._waiting.appendleft(work)
            else:
                job._waiting.append(work)
            self._wake.notify()

    def forget(self, job: Job) -> None:
        with self._wake:
            job._waiting.clear()
            if job in self._jobs:
                self._jobs.remove(job)

    def close(self) -> None:
        """Stop after the batches in hand. Work still waiting is failed as Busy."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for worker in self._workers:
            worker.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._closed and not any(job._waiting for job in self._jobs):
                    self._wake.wait()
                if self._closed:
                    for job in self._jobs:
                        while job._waiting:
                            self._fail(job, job._waiting.popleft(), Busy("The worker is shutting down; send it again."))
                    return
                batch = self._pick()
                if not batch:
                    continue
                self._busy += 1
            self._execute(batch)
            # Or what hangs on the last batch, whole recordings, would be held until there is another.
            del batch
            with self._wake:
                self._busy -= 1

    def _pick(self) -> list[tuple[Job, Work]]:
        """Fill a batch: most urgent class, least served job first, one window of a job at a time."""
        for job in self._jobs:
            if job.cancel.cancelled:
                while job._waiting:
                    self._fail(job, job._waiting.popleft(), Cancelled("The job was cancelled."))
        ready = [job for job in self._jobs if job._waiting]
        batch: list[tuple[Job, Work]] = []
        key: tuple[object, ...] | None = None
        taken = 0
        # What waits is shared between the workers: one idles while the other does it all otherwise.
        limit = min(self._limit, math.ceil(sum(len(job._waiting) for job in ready) / len(self._workers)))
        while ready and taken < limit:
            job = min(ready, key=lambda candidate: (candidate.priority, candidate._served))
            work = self._take(job, key)
            if work is None:
                ready.remove(job)
                continue
            if batch and taken + work.slots() > self._limit:
                job._waiting.appendleft(work)
                break
            key = work.batch_key()
            taken += work.slots()
            self._level[job.priority] = max(self._level[job.priority], job._served)
            job._served += work.seconds
            batch.append((job, work))
        return batch

    def _take(self, job: Job, key: tuple[object, ...] | None) -> Work | None:
        """The job's first waiting work that may join the batch; of a new batch, windows that are encoded already
        go first once they fill half of one: each holds megabytes, and behind hours of others they would add up."""
        waiting: Sequence[Work] = job._waiting
        if key is None:
            encoded = [work for work in waiting if work.state is not None]
            waiting = encoded if 2 * len(encoded) >= self._limit else waiting
        for work in waiting:
            if key is None or work.batch_key() == key:
                job._waiting.remove(work)
                return work
        return None

    @staticmethod
    def _fail(job: Job, work: Work, error: WhisperWorkerError) -> None:
        if work.result is None:
            work.error = error
            job._done.put(work)

    def _execute(self, batch: list[tuple[Job, Work]]) -> None:
        try:
            self._recognize(batch)
            return
        except Exception as error:
            full = isinstance(error, OutOfMemory)
            if len(batch) == 1:
                self._fail(*batch[0], _bare(error))
                return
        # Not in the handler: the error holds the frames that failed, and they the memory that the halves need.
        if full:
            self._limit = max(1, min(self._limit, sum(work.slots() for _, work in batch)) // 2)
            _log.warning("Out of memory; batch size lowered", extra={"fields": {"batch_size": self._limit}})
        self._halves(batch)

    def _halves(self, batch: list[tuple[Job, Work]]) -> None:
        left = [(job, work) for job, work in batch if work.result is None]
        middle = (len(left) + 1) // 2
        for half in (left[:middle], left[middle:]):
            if half:
                self._execute(half)

    def _recognize(self, batch: list[tuple[Job, Work]]) -> None:
        recognizer = self._recognizer
        works = [work for _, work in batch]
        missing = [work for work in works if work.state is None]
        if missing:
            _take_threads(self._threads // self._busy)
            for work, state in zip(missing, recognizer.encode([work.mel() for work in missing]), strict=True):
                work.state = state
        # A few sums differ in their last bits with the number of threads; what a job gives must not depend on
        # who else is there. The encoder's do not.
        _take_threads(self._threads // len(self._workers))
        options = works[0].options
        results: list[Any]

        def done(place: int, result: Any) -> None:
            job, work = batch[place]
            if work.result is None:
                work.result = result
                job._done.put(work)

        if options is None:
            results = list(recognizer.detect_language([work.state for work in works]))
        elif works[0].tokens is None:
            cancel = [job.cancel for job, _ in batch]
            # A short window does not wait for the long ones beside it.
            results = list(recognizer.decode([work.row() for work in works], options, cancel, done))
        else:
            tokens = [work.tokens or () for work in works]
            results = list(recognizer.cross_attention([work.row() for work in works], tokens, options))
        for place, result in enumerate(results):
            done(place, result)


def _take_threads(n: int) -> None:
    """Have torch use ``n`` threads, at least one, for the operations of the calling thread."""
    import torch

    # A thread's first look at the number overwrites its own with the process's, so it must look before it sets.
    torch.get_num_threads()
    torch.set_num_threads(max(1, n))


def _bare(error: Exception) -> WhisperWorkerError:
    """The typed error without the frames it came through, whose tensors would live as long as it does."""
    if not isinstance(error, WhisperWorkerError):
        _log.error("The forward pass failed", extra={"fields": {"error": type(error).__name__}})
        return EngineError("The model failed on this audio; try again, and report it if it fails again.")
    error.__cause__ = error.__context__ = error.__traceback__ = None
    return error
