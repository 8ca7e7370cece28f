"""What a session leaves behind where WHISPER_LIVE_RECORDINGS is set: NAME.wav, NAME.srt, NAME.json.

The sound is written as it comes, the text when the session ends, however it ends. A disk that fills up meanwhile
ends the recording and not the session: somebody is speaking.
"""

from __future__ import annotations

import contextlib
import time
import uuid
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_worker.formats import write
from whisper_worker.log import get_logger
from whisper_worker.types import SAMPLE_RATE, Segment, Transcript

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


_log = get_logger("live")


class Recording:
    """One session's files. Names are time and chance: nothing that a client sent."""

    failed = False
    """Not all of it could be written; what could is there."""

    def __init__(self, directory: Path) -> None:
        """Raises ``OSError`` where the directory cannot be written to."""
        directory.mkdir(parents=True, exist_ok=True)
        self._stem = directory / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:8]}"
        # Unbuffered: what a full disk did not take would be written again, and fail again, before the header is mended.
        self._file = self._stem.with_suffix(".wav").open("xb", buffering=0)
        self._stem.with_suffix(".wav").chmod(0o600)
        self._wave = wave.open(self._file, "wb")  # noqa: SIM115 - closed in close()
        self._wave.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        self._segments: list[Segment] = []
        self._n_samples = 0

    def sound(self, samples: npt.NDArray[np.int16]) -> None:
        self._n_samples += len(samples)
        if not self.failed:
            with self._noted():
                self._wave.writeframes(samples.astype("<i2").tobytes())

    def text(self, segments: Sequence[Segment]) -> None:
        self._segments.extend(segments)

    def close(self, language: str | None) -> None:
        """Write the transcript of all completed segments."""
        with self._noted():
            self._wave.close()
        self._file.close()
        transcript = Transcript(
            text="".join(segment.text for segment in self._segments).strip(),
            language=language,
            language_probability=None,
            duration=round(self._n_samples / SAMPLE_RATE, 3),
            segments=tuple(self._segments),
        )
        for fmt in ("srt", "json"):
            path = self._stem.with_suffix(f".{fmt}")
            with self._noted():
                path.touch(mode=0o600)
                path.write_text(write(transcript, fmt), encoding="utf-8")

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.failed:
                fields = {"reason": error.strerror, "written_seconds": round(self._n_samples / SAMPLE_RATE, 1)}
                _log.error("The recording breaks off: it cannot be written to its end", extra={"fields": fields})
            self.failed = True
