"""Tensors as they lie in a file, and the float arrays that go into a checkpoint.

Numpy alone: numpy has no bfloat16, so such tensors are kept as the upper halves of their
float32 and widened when asked for.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from whisper_worker.errors import ModelError

FloatType = Literal["float16", "float32"]
Array = NDArray[Any]

_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("<i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}

_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a mapped file. ``dtype`` is safetensors' name of its type; BF16 data are uint16."""

    dtype: str
    data: Array

    def to_float(self) -> Array:
        """Its values as float16 (where that is what is stored) or float32."""
        if self.dtype == "BF16":
            widened: Array = (self.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
            return widened
        if self.dtype in ("F16", "F32"):
            return self.data
        raise ModelError(f"The weights hold a tensor of type {self.dtype} where numbers with a fraction belong.")


def view(buffer: mmap.mmap, offset: int, n_bytes: int, dtype: str, shape: tuple[int, ...]) -> Stored:
    """A tensor out of a file's bytes, without a copy. Raises :class:`ModelError` where it does not fit."""
    numpy_type = _NUMPY_TYPES.get(dtype)
    if numpy_type is None:
        raise ModelError(f"The weights hold a tensor of type {dtype}, which is not handled.")
    n_values = int(np.prod(shape, dtype=np.int64))
    if n_values * numpy_type.itemsize != n_bytes or offset + n_bytes > len(buffer):
        raise ModelError("The weights file is damaged: a tensor does not fit into it. Get it again.")
    data = np.frombuffer(buffer, dtype=numpy_type, count=n_values, offset=offset)
    return Stored(dtype, data.reshape(shape))


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes, mapped."""
    if path.stat().st_size == 0:
        raise ModelError("The weights file is empty. Get it again.")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_safetensors(path: Path) -> dict[str, Stored]:
    """All tensors of a safetensors file, mapped. Raises :class:`ModelError` where it is damaged."""
    buffer = map_file(path)
    try:
        (header_bytes,) = struct.unpack_from("<Q", buffer)
        if header_bytes > min(_MAX_HEADER_BYTES, len(buffer) - 8):
            raise ValueError("header longer than the file")
        header = json.loads(buffer[8 : 8 + header_bytes])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            tensors[name] = view(buffer, 8 + header_bytes + begin, end - begin, entry["dtype"], shape)
        return tensors
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("The safetensors file is damaged or something else. Get it again.") from error


def cast(tensors: Iterable[tuple[str, Array]], dtype: FloatType) -> dict[str, Array]:
    """Each tensor as ``dtype``, one after the other; what has that type already stays where it lies.

    Raises :class:`ModelError` where a value is not finite, or too large for float16.
    """
    from tqdm import tqdm

    shown = tqdm(tensors, desc="Importing", unit=" tensors", leave=False, disable=None)  # on a terminal only
    return {name: _cast(name, value, dtype) for name, value in shown}


def write_safetensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write what :func:`cast` gave. Raises :class:`ModelError` where the disk does not take it."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ModelError("The weights could not be written: is the disk full?") from error
    path.chmod(0o644)  # the library makes files that only their owner may read


def _cast(name: str, value: Array, dtype: FloatType) -> Array:
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(value, dtype=dtype)
    if not np.isfinite(converted).all():
        if np.isfinite(value).all():
            raise ModelError(f"The tensor {name} has values too large for float16. Take --dtype float32.")
        raise ModelError(f"The tensor {name} has values that are not numbers: the weights are damaged.")
    return converted
