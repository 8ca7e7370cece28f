"""A long file by several ffmpeg processes at once.

Each process seeks to its piece and starts two seconds before it: one for the decoder and the
resampler to forget that they began in the middle, one that the piece before holds as well. Only
where those are the same sample for sample are two pieces joined; else the caller decodes the
file in one go, as it would have without this module.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from whisper_worker.audio import ffmpeg_child
from whisper_worker.types import SAMPLE_RATE, CancelToken

LEAST_SECONDS = 900.0
"""Shorter files take about as long by one process as several take to start."""
PIECE_SECONDS = 300
"""Whole seconds, so that every piece begins on a sample of both rates; what waits to be joined is held in memory."""
FORMATS = ("wav", "flac", "mp3")
"""Formats in which a seek lands on the very sample; in MP4, Ogg and WebM it was found not to."""

_LEAST_CORES = 4
_MOST_WORKERS = 8
_LEAD = 2
_TAIL = 1
_POLL = 0.1


class Disagreement(Exception):
    """Two pieces do not fit together."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """PCM of ``start`` to ``end`` seconds (None: to the file's end) with what surrounds it."""

    start: int
    end: int | None
    output: bytearray
    header: ffmpeg_child.WavHeader

    def samples(self, start: int, end: int | None) -> bytes:
        """Frames between two times, which must all be there. Raises :class:`Disagreement`."""
        second = SAMPLE_RATE * 2 * self.header.n_channels
        origin = max(0, self.start - _LEAD)
        first = self.header.size + (start - origin) * second
        last = len(self.output) if end is None else self.header.size + (end - origin) * second
        if first > len(self.output) or last > len(self.output):
            raise Disagreement
        return bytes(self.output[first:last])


def n_workers() -> int:
    """Processes to run side by side, one for each core that this process may use; 1 where pieces do not pay.

    Two cores are kept busy by one ffmpeg and the mixing of its output.
    """
    n_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    return min(_MOST_WORKERS, n_cores) if n_cores >= _LEAST_CORES else 1


def run_pieces(
    descriptor: int,
    n_seconds: float,
    *,
    directory: Path | None,
    deadline: float,
    cancel: CancelToken | None,
    on_output: Callable[[bytes], None],
) -> None:
    """Hand over the output that one process would give for the file of ``n_seconds``, in order.

    Raises :class:`Disagreement` where the pieces do not fit, and what :func:`ffmpeg_child.run` raises.
    """
    stop = CancelToken()

    def decode_piece(start: int, end: int | None) -> _Piece:
        report, output = ffmpeg_child.Report(), bytearray()
        origin = max(0, start - _LEAD)
        # The last piece may have a second more than the header says, not as much as the file likes.
        most = int((n_seconds if end is None else end) + _TAIL - origin)
        # A seek to 0 is none to some versions and skips an MP3's first frame in others.
        options: dict[str, object] = {"t": most, **({"ss": origin} if origin else {})}
        status = ffmpeg_child.run(
            ffmpeg_child.decode_command(descriptor, stream=None, options=options),
            descriptor,
            directory=directory,
            deadline=deadline,
            cancel=stop,
            on_log=report.feed,
            on_output=output.extend,
        )
        header = ffmpeg_child.read_wav_header(output)
        if header is None or status or report.n_errors or report.jumps[:1] != [(0.0, 0.0)]:
            raise Disagreement
        seconds = (len(output) - header.size) / (SAMPLE_RATE * 2 * header.n_channels)
        # What the decoder holds back at the end may carry any time stamp.
        if any(position < seconds - 1 for _, position in report.jumps[1:]) or (end is None and seconds >= most):
            raise Disagreement
        return _Piece(start, end, output, header)

    starts = [start for start in range(0, int(n_seconds), PIECE_SECONDS) if start + 2 * _LEAD < n_seconds]
    todo = deque(pairwise([*starts, None]))
    running: deque[Future[_Piece]] = deque()
    before: _Piece | None = None
    with ThreadPoolExecutor(n_workers(), "decode") as pool:
        try:
            while todo or running:
                while todo and len(running) <= n_workers():
                    start, end = todo.popleft()
                    assert start is not None
                    running.append(pool.submit(decode_piece, start, end))
                piece = _wait(running.popleft(), cancel)
                _check_seam(before, piece)
                if before is None:
                    on_output(bytes(piece.output[: piece.header.size]))
                on_output(piece.samples(piece.start, piece.end))
                before = piece
        finally:
            stop.cancel()
            for future in running:
                future.cancel()


def _wait(future: Future[_Piece], cancel: CancelToken | None) -> _Piece:
    while True:
        try:
            return future.result(_POLL)
        except NotYet:
            if cancel is not None:
                cancel.check()


def _check_seam(before: _Piece | None, piece: _Piece) -> None:
    """Compare the second before a seam as both sides decoded it; a difference of one step is rounding."""
    if before is None:
        return
    seam = piece.start
    one = np.frombuffer(before.samples(seam - 1, seam), "<i2").astype(np.int32)
    two = np.frombuffer(piece.samples(seam - 1, seam), "<i2").astype(np.int32)
    if before.header != piece.header or np.abs(one - two).max() > 1:
        raise Disagreement
