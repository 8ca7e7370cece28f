"""A scripted service for the tests of the RunPod door."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from whisper_worker.types import CancelToken, JobInput, Progress, Receipt, Segment, Transcript, Word

RECEIPT = Receipt(
    stages={"total": 0.1},
    audio_seconds=2.0,
    speech_seconds=2.0,
    transcribed_seconds=2.0,
    gaps=(),
    rtfx=20.0,
    windows=1,
    retried_windows=0,
    batch_size=4,
    device="cpu",
    compute_type="float32",
    engine="native",
    peak_memory_mb=1.0,
    model="openai/whisper-base",
    revision=None,
)


def segment(number: int, text: str, *, words: bool = False) -> Segment:
    return Segment(
        id=number,
        start=float(number),
        end=number + 1.0,
        text=text,
        avg_logprob=-0.25,
        no_speech_prob=0.01,
        compression_ratio=1.1,
        temperature=0.0,
        tokens=(50364, 2425, 50414),
        words=(Word(text, float(number), number + 0.5, 0.9),) if words else None,
    )


def transcript(*texts: str, language: str = "en", words: bool = False, warnings: tuple[str, ...] = ()) -> Transcript:
    return Transcript(
        text="".join(texts).strip(),
        language=language,
        language_probability=0.9,
        duration=float(len(texts)),
        segments=tuple(segment(number, text, words=words) for number, text in enumerate(texts)),
        warnings=warnings,
        receipt=RECEIPT,
    )


Script = Callable[[JobInput, CancelToken], Transcript]


@dataclass
class FakeService:
    """Answers every job with ``script``, and remembers the jobs it was given."""

    script: Script = lambda job, cancel: transcript(" hello", " world", warnings=job.warnings)
    jobs: list[JobInput] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def transcribe(
        self,
        job: JobInput,
        *,
        cancel: CancelToken | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_segment: Callable[[Segment], None] | None = None,
    ) -> Transcript:
        with self.lock:
            self.jobs.append(job)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            result = self.script(job, cancel or CancelToken())
            for number, one in enumerate(result.segments, start=1):
                if on_segment:
                    on_segment(one)
                if on_progress:
                    on_progress(Progress("recognize", float(number), float(len(result.segments))))
            return result
        finally:
            with self.lock:
                self.running -= 1
