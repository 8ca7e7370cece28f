"""A second thread that encodes while the first decodes.

The encoder keeps a core busy with arithmetic; a step of the decoder is many small operations that wait
for memory and for Python. More threads for either bring little; one thread for each does.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from whisper_worker.engine.recognizer import Recognizer
from whisper_worker.log import get_logger

if TYPE_CHECKING:
    from whisper_worker.engine.scheduler import Work

_log = get_logger("encode_ahead")


class EncodeAhead:
    """Fills ``state`` of work, in a thread of its own and in the caller's.

    Only one thread may call it. ``threads``: of torch, that both share; with one, or where the recognizer
    cannot encode aside, everything happens in the caller's thread.
    """

    def __init__(self, recognizer: Recognizer, threads: int) -> None:
        self._recognizer = recognizer
        self._threads = threads
        self._wanted: deque[Work] = deque()
        self._in_hand: Work | None = None
        self._closed = False
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        if threads > 1 and recognizer.encodes_aside:
            self._thread = threading.Thread(target=self._run, name="encode-ahead", daemon=True)
            self._thread.start()

    def request(self, works: Sequence[Work]) -> None:
        """Encode these in the background, in this order, and nothing that was requested before."""
        if self._thread is None:
            return
        with self._change:
            self._wanted = deque(work for work in works if work.state is None and work is not self._in_hand)
            self._change.notify_all()
            busy = bool(self._wanted) or self._in_hand is not None
        self._take_threads(alone=not busy)

    def encode(self, works: Sequence[Work]) -> None:
        """Return once all of these are encoded. Raises what :meth:`Recognizer.encode` raises."""
        missing = [work for work in works if work.state is None]
        if self._thread is not None and missing:
            missing = self._encode_together(missing)
        self._encode(missing)

    def close(self) -> None:
        """Stop after the window in hand."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _encode_together(self, works: Sequence[Work]) -> list[Work]:
        """Both threads take one window after another. Gives those that failed in the other thread."""
        with self._change:
            self._wanted = deque(work for work in works if work is not self._in_hand)
            alone = len(self._wanted) == 1 and self._in_hand is None
            if not alone:
                self._change.notify_all()
        self._take_threads(alone=alone)
        while True:
            with self._change:
                if not self._wanted:
                    break
                work = self._wanted.popleft()
            self._encode([work])
        with self._change:
            while self._in_hand in works:
                self._change.wait()
        return [work for work in works if work.state is None]

    def _encode(self, works: Sequence[Work]) -> None:
        if works:
            states = self._recognizer.encode([work.mel() for work in works])
            for work, state in zip(works, states, strict=True):
                work.state = state

    def _take_threads(self, *, alone: bool) -> None:
        import torch

        # A thread's first look at the number overwrites its own with the process's, so it must look before it sets.
        torch.get_num_threads()
        torch.set_num_threads(self._threads if alone else max(1, self._threads // 2))

    def _run(self) -> None:
        self._take_threads(alone=False)
        while True:
            with self._change:
                self._in_hand = None
                self._change.notify_all()
                while not self._wanted and not self._closed:
                    self._change.wait()
                if self._closed:
                    return
                self._in_hand = self._wanted.popleft()
            try:
                self._encode([self._in_hand])
            except Exception as error:
                # It fails again in the caller's thread when its turn comes, and there it counts.
                _log.debug("Encoding ahead failed", extra={"fields": {"error": type(error).__name__}})
