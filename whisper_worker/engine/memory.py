"""Memory, as both engines see it: how many windows fit, what "full" looks like, and what keeps it from growing."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from whisper_worker.errors import OutOfMemory
from whisper_worker.metrics import available_memory_bytes

if TYPE_CHECKING:
    import torch

_CPU_BATCH = (4, 8)
"""On a CPU more windows make a step hardly cheaper by window; they cost memory, and others wait longer. Steps of the
smallest models are so short that calling them counts: these take up to twice as many, within ``_CPU_BATCH_BYTES``."""
_CPU_BATCH_BYTES = 100e6

_KERNEL_CACHES = {"LRU_CACHE_CAPACITY": 32, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": 256}
"""Kernels that torch's CPU library keeps, for each thread and in all, by the variables it reads. It makes one
for every shape of every operation and would keep 1,024 of either, tenths of a megabyte each."""

_M_ARENA_MAX = -8
"""GNU's name for how many heaps threads share. It makes eight for each core; each keeps holes of its own."""

GIVE_BACK_SECONDS = 10.0
GIVE_BACK_IDLE_SECONDS = 1.0
"""Least time between two looks for memory to give back: what is given back must be asked for again, less of it
where there is no work."""

_giving_back = threading.Lock()
_given_back = time.monotonic()


def bound_native_memory() -> None:
    """Limit what torch's CPU library and the C library keep; a limit that is set in the environment stays.

    To be called before the first operation.
    """
    for variable, kernels in _KERNEL_CACHES.items():
        os.environ.setdefault(variable, str(kernels))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, max(2, len(os.sched_getaffinity(0))))


def give_back_unused(*, idle: bool = False) -> None:
    """Let the system have the pages that the C library's allocator holds and nobody uses, unless that was done a
    moment ago. ``idle``: no work is left.

    Waveforms, features and batches of all sizes, from many threads, leave holes; the allocator gives back only
    what lies at the end. Takes some 10 ms; does nothing where the C library is not GNU's.
    """
    global _given_back
    with _giving_back:
        now = time.monotonic()
        if now - _given_back < (GIVE_BACK_IDLE_SECONDS if idle else GIVE_BACK_SECONDS):
            return
        _given_back = now
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def batch_size(row_bytes: int, device: torch.device) -> int:
    """Windows of ``row_bytes`` each that may be decoded side by side in the memory now free, at least 1."""
    import torch

    if device.type == "cuda":
        return max(1, int(0.9 * torch.cuda.mem_get_info(device)[0] / row_bytes))
    least, most = _CPU_BATCH
    wanted = min(most, max(least, int(_CPU_BATCH_BYTES / row_bytes)))
    # Two batches may be in hand at a time.
    return max(1, min(wanted, int(0.25 * available_memory_bytes() / row_bytes)))


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turn a full device into :class:`OutOfMemory`: torch tells a full card by a type of its own, a full
    machine by MemoryError or a RuntimeError."""
    import torch

    message = "There is not enough memory for this batch; lower MODEL_BATCH_SIZE."
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(message) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            raise OutOfMemory(message) from error
        raise
