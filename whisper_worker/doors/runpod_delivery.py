"""How a RunPod answer leaves the worker: whole, in pieces, or by way of a bucket.

The platform takes 10 MB for a job of ``/run`` and 20 MB for one of ``/runsync``; a result
over that is lost after the work was done. The SDK's own check measures the outermost dict
alone, so the encoded JSON is measured here.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from whisper_worker.errors import TooLarge
from whisper_worker.log import get_logger
from whisper_worker.schema import segment_to_dict
from whisper_worker.settings import Settings
from whisper_worker.types import Segment

_log = get_logger("runpod")

RUN_BYTES = 10_000_000
RUNSYNC_BYTES = 20_000_000
PIECE_BYTES = 1_000_000
"""Largest piece of a stream."""

_WRAPPING_BYTES = 100
"""What the SDK puts around an answer."""

_KEPT_BESIDE_URL = (
    "language",
    "language_probability",
    "duration",
    "detected_language",
    "device",
    "model",
    "warnings",
    "receipt",
)
_SAID_BY_SEGMENTS = ("segments", "chunks", "word_timestamps")

Upload = Callable[[str, bytes], str]
"""Stores bytes under a file name and gives the address they can be fetched from."""


class Delivery(Protocol):
    """One job's way out."""

    n_bytes: int
    """Size of the whole answer as JSON, once :meth:`finish` has run."""
    wants_progress: bool

    def on_segment(self, index: int | None) -> Callable[[Segment], None] | None:
        """Takes an input's segments as they come; None where nobody wants them early."""
        ...

    def finish(self, result: dict[str, Any]) -> list[dict[str, Any]]:
        """What is left to hand over. Blocks on an upload. Raises :class:`TooLarge`."""
        ...


class Whole:
    """The answer in one dict."""

    wants_progress = True

    def __init__(self, job_id: str, settings: Settings, upload: Upload | None) -> None:
        self.n_bytes = 0
        self._job_id = job_id
        self._limit = _limit(job_id, settings)
        self._upload = upload

    def on_segment(self, index: int | None) -> None:
        return None

    def finish(self, result: dict[str, Any]) -> list[dict[str, Any]]:
        encoded, result = encode(result)
        self.n_bytes = len(encoded)
        if self.n_bytes + _WRAPPING_BYTES > self._limit:
            result = _by_bucket(result, encoded, self._job_id, self._limit, self._upload)
        return [result]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A segment that was not picked up yet."""

    index: int | None
    data: dict[str, Any]
    n_bytes: int


class Stream:
    """Segments in pieces as they come, then the rest; all of it together stays within the platform's limit.

    The SDK keeps what was streamed and posts it as the job's result, so that the limit on
    results holds for the sum. Segments that would break it are held back, and the whole
    answer goes to the bucket in the end.
    """

    wants_progress = False  # the segments are the progress

    def __init__(self, job_id: str, settings: Settings, upload: Upload | None, loop: asyncio.AbstractEventLoop) -> None:
        self.n_bytes = 0
        self._job_id = job_id
        self._limit = _limit(job_id, settings)
        self._upload = upload
        self._loop = loop
        self._waiting: deque[_Waiting] = deque()
        self._arrival = asyncio.Event()
        self._ended = False
        self._lock = threading.Lock()
        self._sent = _WRAPPING_BYTES
        self._overflown = False

    def on_segment(self, index: int | None) -> Callable[[Segment], None]:
        reserve = min(PIECE_BYTES, self._limit // 4)

        def take(segment: Segment) -> None:
            encoded, data = encode(segment_to_dict(segment))
            n_bytes = len(encoded) + _WRAPPING_BYTES
            with self._lock:
                self._overflown = self._overflown or self._sent + n_bytes > self._limit - reserve
                if self._overflown:
                    return
                self._sent += n_bytes
            with suppress(RuntimeError):  # the loop of a cancelled job may be gone before its thread has noticed
                self._loop.call_soon_threadsafe(self._put, _Waiting(index, data, n_bytes))

        return take

    def _put(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        self._arrival.set()

    def end(self) -> None:
        """No more segments will come."""
        self._ended = True
        self._arrival.set()

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """Segments as they come, those that wait together in one piece, until :meth:`end`."""
        while True:
            while self._waiting:
                first = self._waiting.popleft()
                segments, n_bytes = [first.data], first.n_bytes
                while self._waiting and self._waiting[0].index == first.index:
                    n_bytes += self._waiting[0].n_bytes
                    if n_bytes > PIECE_BYTES:
                        break
                    segments.append(self._waiting.popleft().data)
                yield {"segments": segments} if first.index is None else {"index": first.index, "segments": segments}
            if self._ended:
                return
            await self._arrival.wait()
            self._arrival.clear()

    def finish(self, result: dict[str, Any]) -> list[dict[str, Any]]:
        encoded, result = encode(result)
        self.n_bytes = len(encoded)
        pieces = _rest(result)
        sizes = [len(encode(piece)[0]) + _WRAPPING_BYTES for piece in pieces]
        if self._overflown or max(sizes) > PIECE_BYTES or self._sent + sum(sizes) > self._limit:
            pieces = [_by_bucket(result, encoded, self._job_id, self._limit, self._upload)]
        return pieces


def encode(value: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The value as the SDK will send it, and the value itself with whatever would break that sending mended.

    Halves of surrogate pairs (a request may smuggle one into a warning) and numbers that are
    none would make the SDK drop the result without a word.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode(), value
    except ValueError:
        sendable = json.dumps(value, ensure_ascii=False).encode(errors="replace")
        mended: dict[str, Any] = json.loads(sendable, parse_constant=lambda _: None)
        return json.dumps(mended, ensure_ascii=False).encode(), mended


def _limit(job_id: str, settings: Settings) -> int:
    # The platform marks the jobs of /runsync in their ids.
    return settings.max_result_bytes or (RUNSYNC_BYTES if job_id.startswith("sync-") else RUN_BYTES)


def _rest(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A streamed job's answer less what its segments said, cut where it is long."""
    if "results" in result:
        rest = {**result, "results": [_less_segments(one) for one in result["results"]]}
        cut = [{"results": [one]} for one in rest["results"]]
    else:
        rest = _less_segments(result)
        by_format: list[dict[str, Any]] = [{"formats": {name: text}} for name, text in rest.get("formats", {}).items()]
        long: list[dict[str, Any]] = [
            {name: rest[name]} for name in ("text", "transcription", "translation") if rest.get(name)
        ]
        taken = {"formats", *(name for one in long for name in one)}
        cut = [{name: value for name, value in rest.items() if name not in taken}, *long, *by_format]
    return [rest] if len(encode(rest)[0]) + _WRAPPING_BYTES <= PIECE_BYTES else cut


def _less_segments(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in _SAID_BY_SEGMENTS}


def _by_bucket(
    result: dict[str, Any], encoded: bytes, job_id: str, limit: int, upload: Upload | None
) -> dict[str, Any]:
    """What stands for an answer that is too large: where it lies. Raises :class:`TooLarge` without a bucket."""
    size = f"The result has {len(encoded) / 1e6:.1f} MB, more than the {limit / 1e6:g} MB that can be sent back"
    advice = (
        "Ask for less (fewer formats, return_chunks=false, no word_timestamps), or for a part of the recording "
        "with clip_timestamps"
    )
    if upload is None:
        raise TooLarge(f"{size}. {advice}, or give the worker a bucket (BUCKET_ENDPOINT_URL and its keys).")
    try:
        url = upload(re.sub(r"[^\w.-]", "_", job_id) + ".json", encoded)
    except Exception as error:  # any of the storage client's many errors; its text names hosts
        _log.error("The result could not be stored", extra={"fields": {"error": type(error).__name__}})
        raise TooLarge(f"{size}, and the bucket did not take it. Try again, or: {advice}.", retryable=True) from None
    kept = {name: result[name] for name in _KEPT_BESIDE_URL if name in result}
    return {"result_url": url, "result_bytes": len(encoded), **kept}
