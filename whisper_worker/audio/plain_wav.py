"""A WAV file that is already what the engine hears: 16 kHz, one channel, 16 bits.

It is read as it is. To start ffmpeg for it takes longer than to read minutes of it. Whatever is not
just as expected, from the header's sizes to an unknown chunk, is left to ffmpeg and its forgiveness.
"""

from __future__ import annotations

import struct
from typing import IO

import numpy as np
import numpy.typing as npt

from whisper_worker.types import SAMPLE_RATE

_FORMAT = struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
_SKIPPED = (b"LIST", b"fact")
_MAX_CHUNKS = 16


def find_samples(file: IO[bytes], n_bytes: int) -> tuple[int, int] | None:
    """Where the samples of the file of ``n_bytes`` begin, and how many there are; None where ffmpeg has to see."""
    file.seek(0)
    if file.read(12) != struct.pack("<4sI4s", b"RIFF", (n_bytes - 8) & 0xFFFF_FFFF, b"WAVE"):
        return None
    position, known, found = 12, False, None
    for _ in range(_MAX_CHUNKS):
        if position == n_bytes:
            return found
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return None
        name, size = struct.unpack("<4sI", header)
        if name == b"fmt " and not known and found is None:
            if size != len(_FORMAT) or file.read(size) != _FORMAT:
                return None
            known = True
        elif name == b"data" and known and found is None and size and size % 2 == 0:
            found = position + 8, size // 2
        elif name not in _SKIPPED:
            return None
        # Chunks begin at even places.
        position += 8 + size + size % 2
    return None


def read_samples(file: IO[bytes], place: tuple[int, int]) -> npt.NDArray[np.int16] | None:
    """int16, shape (n,), of what :func:`find_samples` gave; None where the file has become shorter meanwhile."""
    start, n_samples = place
    file.seek(start)
    samples = np.fromfile(file, "<i2", n_samples)
    return samples.astype(np.int16, copy=False) if len(samples) == n_samples else None
