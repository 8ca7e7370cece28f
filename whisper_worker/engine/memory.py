"""Memory, as both engines see it: how many windows fit, and what "full" looks like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from whisper_worker.errors import OutOfMemory
from whisper_worker.metrics import available_memory_bytes

if TYPE_CHECKING:
    import torch

_CPU_BATCH = 8
"""On a CPU more windows no longer make a step cheaper by window; they cost memory, and others wait longer."""


def batch_size(row_bytes: int, device: torch.device) -> int:
    """Windows of ``row_bytes`` each that may be decoded side by side in the memory now free, at least 1."""
    import torch

    if device.type == "cuda":
        return max(1, int(0.9 * torch.cuda.mem_get_info(device)[0] / row_bytes))
    # Two batches may be in hand at a time.
    return max(1, min(_CPU_BATCH, int(0.25 * available_memory_bytes() / row_bytes)))


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
