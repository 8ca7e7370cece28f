"""Every error that may leave the worker.

    WhisperWorkerError
    ├── InvalidInput      the request itself is wrong                      not retryable
    ├── Forbidden         the address is one the worker must not touch     not retryable
    ├── DownloadError     the audio could not be fetched                   retryable unless told otherwise
    ├── TooLarge          bytes, seconds or result over a limit            not retryable
    ├── AudioDecodeError  the bytes are not audio that ffmpeg can read     not retryable
    ├── DeadlineExceeded  a step took longer than its limit                retryable
    ├── ModelError        the model cache is missing, damaged or foreign   not retryable
    ├── OutOfMemory       the device has no room even for a batch of one   retryable
    ├── EngineError       the forward pass failed                          retryable
    ├── Busy              the queue is full                                retryable
    ├── Cancelled         the caller withdrew the job                      not retryable
    └── InternalError     a defect of ours, told without its details       retryable

A message says what was wrong and what to do. It never holds a path, a host name,
a query string, a secret or transcript text: callers see it, and logs keep it.
Foreign exceptions are turned into one of these where the foreign call is made.
"""

from __future__ import annotations

from typing import ClassVar


class WhisperWorkerError(Exception):
    """Base of all typed errors: a stable ``code``, a ``message`` for the caller, ``retryable``."""

    code: ClassVar[str] = "INTERNAL"
    default_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retryable = self.default_retryable if retryable is None else retryable

    def to_dict(self) -> dict[str, object]:
        """The shape every door puts on its wire: ``{"code", "message", "retryable"}``."""
        return {"code": self.code, "message": self.message, "retryable": self.retryable}


class InvalidInput(WhisperWorkerError):
    code = "INVALID_INPUT"


class Forbidden(WhisperWorkerError):
    code = "FORBIDDEN"


class DownloadError(WhisperWorkerError):
    code = "DOWNLOAD"
    default_retryable = True


class TooLarge(WhisperWorkerError):
    code = "TOO_LARGE"


class AudioDecodeError(WhisperWorkerError):
    code = "DECODE"


class DeadlineExceeded(WhisperWorkerError):
    code = "TIMEOUT"
    default_retryable = True


class ModelError(WhisperWorkerError):
    code = "MODEL"


class OutOfMemory(WhisperWorkerError):
    code = "OUT_OF_MEMORY"
    default_retryable = True


class EngineError(WhisperWorkerError):
    code = "ENGINE"
    default_retryable = True


class Busy(WhisperWorkerError):
    code = "BUSY"
    default_retryable = True


class Cancelled(WhisperWorkerError):
    code = "CANCELLED"


class InternalError(WhisperWorkerError):
    code = "INTERNAL"
    default_retryable = True


ERROR_CODES: frozenset[str] = frozenset(
    cls.code
    for cls in (
        InvalidInput,
        Forbidden,
        DownloadError,
        TooLarge,
        AudioDecodeError,
        DeadlineExceeded,
        ModelError,
        OutOfMemory,
        EngineError,
        Busy,
        Cancelled,
        InternalError,
    )
)
