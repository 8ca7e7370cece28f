"""One job from its source to its transcript: fetch, decode, recognize, receipt.

The engine is loaded once, under a lock, by whoever needs it first; while it loads the
first job's audio is already fetched and decoded.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_worker.errors import InternalError, WhisperWorkerError
from whisper_worker.log import get_logger
from whisper_worker.metrics import StageTimer, peak_memory_mb
from whisper_worker.settings import Settings
from whisper_worker.types import CancelToken, JobInput, Progress, Receipt, Segment, Transcript

if TYPE_CHECKING:
    from whisper_worker.audio.decode import DecodedAudio
    from whisper_worker.engine.pipeline import Pipeline, PipelineResult
    from whisper_worker.engine.recognizer import ModelInfo, Recognizer
    from whisper_worker.engine.scheduler import Priority, Scheduler

_log = get_logger("service")

_Decode = Callable[[Path, Settings, Path, CancelToken], "tuple[DecodedAudio, ...]"]


@dataclass(frozen=True, slots=True)
class _Engine:
    recognizer: Recognizer
    scheduler: Scheduler
    pipeline: Pipeline


class Service:
    """What every door calls. Cheap to make; thread-safe; many jobs at once share batches."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._engine: Future[_Engine] | None = None
        self._cleaned = False
        self._in_hand = 0

    def load(self) -> None:
        """Load the model and run it once. Raises :class:`ModelError` where there is none to load."""
        import numpy as np

        from whisper_worker.engine.scheduler import Priority
        from whisper_worker.types import SAMPLE_RATE, TranscribeOptions

        engine = self._start_loading().result()
        # One window of silence through every stage: the first real job finds everything touched. Jobs that a
        # restart left behind run already; whoever waits for the service to be ready does not wait for them.
        silence, options = np.zeros(SAMPLE_RATE, dtype=np.int16), TranscribeOptions(vad=False, language="en")
        engine.pipeline.transcribe(silence, options, priority=Priority.INTERACTIVE)

    def pipeline(self) -> Pipeline:
        """The loaded pipeline, for a door whose sound comes while it is spoken. Raises as :meth:`load` does."""
        return self._start_loading().result().pipeline

    @property
    def ready(self) -> bool:
        """Whether a model is loaded."""
        engine = self._engine
        return engine is not None and engine.done() and engine.exception() is None

    @property
    def info(self) -> ModelInfo | None:
        """The loaded model; None while there is none."""
        engine = self._engine
        if engine is None or not engine.done() or engine.exception() is not None:
            return None
        return engine.result().recognizer.info

    def _start_loading(self) -> Future[_Engine]:
        """The engine, loading in a thread of its own if nobody has begun. A failed load is tried anew."""
        with self._lock:
            failed = self._engine is not None and self._engine.done() and self._engine.exception() is not None
            if self._engine is None or failed:
                pool = ThreadPoolExecutor(1, thread_name_prefix="load")
                self._engine = pool.submit(_load, self.settings)
                pool.shutdown(wait=False)
            return self._engine

    def transcribe(
        self,
        job: JobInput,
        *,
        cancel: CancelToken | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_segment: Callable[[Segment], None] | None = None,
        priority: Priority | None = None,
    ) -> Transcript:
        """Run one job in the calling thread. Raises typed errors only."""
        with self._job():
            (transcript,) = self._transcribe(job, _decode_mix, cancel, on_progress, on_segment, priority)
            return transcript

    def transcribe_channels(
        self,
        job: JobInput,
        *,
        cancel: CancelToken | None = None,
        priority: Priority | None = None,
    ) -> tuple[Transcript, ...]:
        """A transcript for every channel that holds a speaker of its own, as telephone recordings have them.

        One, of the mix, where the channels are one or sound alike; a warning says which. A later
        transcript's receipt counts the earlier ones' seconds too. Raises typed errors only.
        """
        from whisper_worker.audio.channels import decode_channels

        with self._job():
            return self._transcribe(job, decode_channels, cancel, None, None, priority)

    def detect_language(
        self,
        job: JobInput,
        *,
        cancel: CancelToken | None = None,
        priority: Priority | None = None,
    ) -> tuple[str | None, float | None]:
        """Code and probability of the language spoken, None where nobody speaks; typed errors only."""
        with self._job():
            return self._detect_language(job, cancel or CancelToken(), priority)

    # Frames of their own: what these hold is let go of before memory is given back.

    def _transcribe(
        self,
        job: JobInput,
        decode: _Decode,
        cancel: CancelToken | None,
        on_progress: Callable[[Progress], None] | None,
        on_segment: Callable[[Segment], None] | None,
        priority: Priority | None,
    ) -> tuple[Transcript, ...]:
        timer, cancel = StageTimer(), cancel or CancelToken()
        engine, audios = self._prepare(job, cancel, timer, decode)
        return tuple(
            self._recognize(engine, job, audio, timer, cancel, on_progress, on_segment, priority) for audio in audios
        )

    def _detect_language(
        self, job: JobInput, cancel: CancelToken, priority: Priority | None
    ) -> tuple[str | None, float | None]:
        from whisper_worker.engine.scheduler import Priority

        engine, (audio,) = self._prepare(job, cancel, StageTimer(), _decode_mix)
        return engine.pipeline.detect_language(
            audio.waveform,
            job.options,
            cancel=cancel,
            priority=Priority.BULK if priority is None else priority,
        )

    def _prepare(
        self, job: JobInput, cancel: CancelToken, timer: StageTimer, decode: _Decode
    ) -> tuple[_Engine, tuple[DecodedAudio, ...]]:
        """The engine, and the job's audio as ``decode`` gives it."""
        from whisper_worker.audio.fetch import fetch
        from whisper_worker.audio.jobdir import clean_leftovers, job_directory

        if not self._cleaned:
            self._cleaned = True
            clean_leftovers(self.settings)
        loading = self._start_loading()
        with job_directory(self.settings) as directory:
            with timer.stage("fetch"):
                fetched = fetch(job.source, directory, self.settings, cancel)
            with timer.stage("decode"):
                audios = decode(fetched.path, self.settings, directory, cancel)
        with timer.stage("load"):
            engine = loading.result()
        return engine, audios

    def _recognize(
        self,
        engine: _Engine,
        job: JobInput,
        audio: DecodedAudio,
        timer: StageTimer,
        cancel: CancelToken,
        on_progress: Callable[[Progress], None] | None,
        on_segment: Callable[[Segment], None] | None,
        priority: Priority | None,
    ) -> Transcript:
        from whisper_worker.engine.scheduler import Priority

        def progressed(progress: Progress) -> None:
            # Hours of one recording leave holes like thousands of short ones.
            self._give_back()
            if on_progress is not None:
                on_progress(progress)

        _log.info("Starting transcription", extra={"fields": {"audio_seconds": round(audio.duration, 1)}})
        with timer.stage("recognize"):
            result = engine.pipeline.transcribe(
                audio.waveform,
                job.options,
                cancel=cancel,
                on_progress=progressed,
                on_segment=on_segment,
                priority=Priority.BULK if priority is None else priority,
            )
        _log.info("Transcription completed", extra={"fields": {"segments": len(result.segments)}})
        return Transcript(
            text="".join(segment.text for segment in result.segments).strip(),
            language=result.language,
            language_probability=result.language_probability,
            duration=round(audio.duration, 3),
            segments=result.segments,
            warnings=(*job.warnings, *audio.warnings, *result.warnings),
            receipt=self._receipt(engine, result, timer, audio.duration),
        )

    def _receipt(self, engine: _Engine, result: PipelineResult, timer: StageTimer, audio_seconds: float) -> Receipt:
        stages = timer.seconds()
        info = engine.recognizer.info
        price = self.settings.price_per_hour
        return Receipt(
            stages=stages,
            audio_seconds=round(audio_seconds, 3),
            speech_seconds=result.speech_seconds,
            transcribed_seconds=result.transcribed_seconds,
            gaps=result.gaps,
            rtfx=round(audio_seconds / max(stages["total"], 1e-3), 1),
            windows=result.windows,
            retried_windows=result.retried_windows,
            batch_size=engine.scheduler.batch_size,
            device=info.device,
            compute_type=info.compute_type,
            engine=info.engine,
            peak_memory_mb=round(peak_memory_mb(), 1),
            model=info.name,
            revision=info.revision,
            cost=round(stages["total"] / 3600 * price, 6) if price else None,
        )

    @contextmanager
    def _job(self) -> Iterator[None]:
        """What holds for every job: typed errors, and memory given back behind it."""
        with self._lock:
            self._in_hand += 1
        try:
            with _typed_errors():
                yield
        finally:
            with self._lock:
                self._in_hand -= 1
            self._give_back()

    def _give_back(self) -> None:
        from whisper_worker.engine.memory import give_back_unused

        give_back_unused(idle=not self._in_hand)

    def close(self) -> None:
        """Stop the engine after the batch in hand."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None and engine.exception() is None:
            engine.result().scheduler.close()


def _decode_mix(path: Path, settings: Settings, directory: Path, cancel: CancelToken) -> tuple[DecodedAudio, ...]:
    from whisper_worker.audio.decode import decode

    return (decode(path, settings, directory=directory, cancel=cancel),)


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except WhisperWorkerError:
        raise
    except Exception as error:
        _log.exception("Unexpected failure")
        raise InternalError("The worker failed on this job; try again, and report it if it fails again.") from error


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Imports leave a quarter of a million objects that stay. Going through them for garbage, again and again, takes a
    sixth of the time of importing torch: not done meanwhile, and not for these objects later."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def _load(settings: Settings) -> _Engine:
    from whisper_worker.cache.layout import find_model, verify

    files = find_model(settings)
    if settings.verify_model:
        _log.info("Model files checked", extra={"fields": {"files": verify(files)}})
    load: Callable[..., Recognizer]
    with _nothing_collected():
        import torch

        from whisper_worker.audio.vad import VoiceDetector
        from whisper_worker.engine.memory import bound_native_memory
        from whisper_worker.engine.pipeline import Pipeline
        from whisper_worker.engine.scheduler import Scheduler
        from whisper_worker.engine.tokenizer import Tokenizer

        if settings.engine == "transformers":
            from whisper_worker.engine.reference import ReferenceRecognizer

            load = ReferenceRecognizer.load
        else:
            from whisper_worker.engine.native import NativeRecognizer

            load = NativeRecognizer.load
    bound_native_memory()
    tokenizer = Tokenizer.load(files.processor_dir / "tokenizer.json", files.model_dir / "generation_config.json")
    recognizer = load(
        files.model_dir,
        tokenizer,
        files.name,
        files.revision,
        settings.compute_type,
        settings.device,
        settings.threads,
    )
    detector = VoiceDetector()
    scheduler = Scheduler(recognizer, settings.batch_size, torch.get_num_threads())
    pipeline = Pipeline(recognizer.info, tokenizer, scheduler, detector)
    _log.info(
        "Model loaded",
        extra={
            "fields": {
                "model": recognizer.info.name,
                "device": recognizer.info.device,
                "compute_type": recognizer.info.compute_type,
                "engine": recognizer.info.engine,
                "batch_size": scheduler.batch_size,
            }
        },
    )
    return _Engine(recognizer, scheduler, pipeline)
