"""pipeline_config.pkl, read without executing anything.

A pickle is a program: it may name any importable thing and call it. This reader gives it
plain values, ``torch.<dtype>`` and ``torch.device(...)`` - the latter two as
:class:`TorchValue`, so that torch itself is not needed - and refuses the rest by name.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whisper_worker.errors import ModelError

RUNTIME_KEYS = ("torch_dtype", "dtype", "device", "device_map", "batch_size")
"""What the worker decides when it starts; in a saved configuration these only conflict."""

_ANEW = "Make it anew: python save_pipeline.py --model NAME, with the model that is there."
_MAX_BYTES = 64 * 1024
_MAX_VALUES = 4096
_MAX_DEPTH = 16
_PLAIN = (str, bytes, bool, int, float, type(None))

_DTYPES = frozenset(
    "float16 bfloat16 float32 float64 half float double int8 int16 int32 int64 uint8 bool "
    "float8_e4m3fn float8_e5m2".split()
)


@dataclass(frozen=True, slots=True, repr=False)
class TorchValue:
    """A torch dtype or device by its name, e.g. ``TorchValue("dtype", "float16")``."""

    kind: str
    name: str

    def __repr__(self) -> str:
        return f"torch.{self.name}" if self.kind == "dtype" else f"torch.device({self.name!r})"


class _Device:
    """Stands for ``torch.device``. Without a ``__dict__`` a pickle cannot set anything on it."""

    __slots__ = ()

    def __call__(self, kind: object, index: object = None) -> TorchValue:
        if not isinstance(kind, str) or not (index is None or isinstance(index, int)):
            raise ModelError("pipeline_config.pkl holds a torch.device of a wrong kind; refused.")
        return TorchValue("device", kind if index is None else f"{kind}:{index}")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return TorchValue("dtype", name)
        if (module, name) == ("torch", "device"):
            return _Device()
        if (module, name) in (("builtins", "set"), ("__builtin__", "set")):
            return set
        if (module, name) in (("builtins", "frozenset"), ("__builtin__", "frozenset")):
            return frozenset
        raise _refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _refused("a persistent object")


def read_config(path: Path) -> dict[str, object]:
    """The configuration as a dict of plain values and :class:`TorchValue`.

    Raises :class:`ModelError` where it is damaged, too large, no dict, or asks for
    anything else; the message names what it asked for.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ModelError(f"pipeline_config.pkl is larger than {_MAX_BYTES} bytes: no configuration; refused. {_ANEW}")
    try:
        _check_program(data)
        content = _Unpickler(io.BytesIO(data)).load()
    except ModelError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ModelError(f"pipeline_config.pkl is damaged: it cannot be read as a pickle. {_ANEW}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ModelError(f"pipeline_config.pkl holds no dict of named values; refused. {_ANEW}")
    _count(content, 0, 0)
    return content


def write_config(path: Path, config: Mapping[str, object]) -> None:
    """Write plain values in one step. Raises :class:`ModelError` for what :func:`read_config` would refuse."""
    _count(dict(config), 0, 0)
    if _holds_torch(config):
        raise ModelError("A torch value cannot be written into pipeline_config.pkl; remove it.")
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(pickle.dumps(dict(config), protocol=4))
    fresh.replace(path)


def without_runtime_keys(config: Mapping[str, object]) -> tuple[dict[str, object], tuple[str, ...]]:
    """The configuration without :data:`RUNTIME_KEYS` and torch values at any depth, and what was taken out.

    Names of nested keys are joined with dots, e.g. ``model_kwargs.torch_dtype``.
    """
    kept: dict[str, object] = {}
    removed: list[str] = []
    for key, value in config.items():
        if key in RUNTIME_KEYS or (not isinstance(value, Mapping) and _holds_torch(value)):
            removed.append(key)
        elif isinstance(value, Mapping):
            inner, names = without_runtime_keys(value)
            kept[key] = inner
            removed.extend(f"{key}.{name}" for name in names)
        else:
            kept[key] = value
    return kept, tuple(removed)


def _check_program(data: bytes) -> None:
    """Bound what loading may cost: a memo index reserves memory up to itself, whatever the file's size."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in ("EXT1", "EXT2", "EXT4"):
            raise _refused(f"extension {argument}")
        if isinstance(argument, int) and opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise ModelError("pipeline_config.pkl reserves memory that it does not use; refused.")


def _count(value: object, seen: int, depth: int) -> int:
    """Count values as often as they are reached, so that shared ones cannot unfold without end."""
    seen += 1
    if seen > _MAX_VALUES or depth > _MAX_DEPTH:
        raise ModelError("pipeline_config.pkl holds too many or too deeply nested values; refused.")
    if type(value) in _PLAIN or (isinstance(value, TorchValue) and type(value.kind) is type(value.name) is str):
        return seen
    if type(value) is dict:
        for key, inner in value.items():
            seen = _count(inner, _count(key, seen, depth + 1), depth + 1)
        return seen
    if type(value) in (list, tuple, set, frozenset):
        for inner in value:  # type: ignore[attr-defined]
            seen = _count(inner, seen, depth + 1)
        return seen
    raise _refused(f"a value of type {type(value).__name__}")


def _holds_torch(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_torch(inner) for inner in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_holds_torch(inner) for inner in value)
    return isinstance(value, TorchValue)


def _refused(what: str) -> ModelError:
    return ModelError(
        f"pipeline_config.pkl asks for {what[:200]}, which no configuration needs; refused, nothing was executed. "
        f"{_ANEW}"
    )
