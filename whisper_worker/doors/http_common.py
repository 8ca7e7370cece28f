"""What the routes share: the door itself, a request read into a job, a transcript written as an answer."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from whisper_worker import formats
from whisper_worker.cache.layout import find_model
from whisper_worker.cache.names import same_model
from whisper_worker.doors.http_body import FILE_FIELDS, Body
from whisper_worker.doors.http_desk import Desk
from whisper_worker.doors.http_metrics import Metrics
from whisper_worker.errors import InvalidInput
from whisper_worker.schema import SOURCE_KEYS, job_input_from_dict, transcript_to_dict
from whisper_worker.service import Service
from whisper_worker.settings import Settings
from whisper_worker.types import AudioSource, CancelToken, JobInput, Progress, Segment, Transcript

if TYPE_CHECKING:
    from whisper_worker.engine.scheduler import Priority

_TEXTS = ("initial_prompt", "prompt", "hotwords", "prefix")
_SOURCES = (*SOURCE_KEYS, "audio", "url")
_WARNINGS_BYTES = 4000


@dataclass(slots=True)
class Door:
    """One service behind HTTP, and what its routes have to remember."""

    service: Service
    settings: Settings
    desk: Desk
    metrics: Metrics = field(default_factory=Metrics)
    started: float = field(default_factory=time.monotonic)
    warm: bool = False
    """Whether the model was loaded and run once."""
    load_failure: str | None = None
    """Why it could not be, in words for the caller."""
    draining: bool = False
    """Told to stop: what is in hand is finished, nobody should be sent here any more."""
    told_to_stop: float = 0.0
    under_way: int = 0
    """Requests of any kind being answered."""
    last_active: float = field(default_factory=time.monotonic)

    @property
    def ready(self) -> bool:
        # After a failed start a request may have loaded the model all the same.
        return (self.warm or (self.load_failure is not None and self.service.ready)) and not self.draining

    def served_model(self) -> str:
        """Name of the one model that answers. Raises :class:`ModelError` where there is none."""
        info = self.service.info
        return info.name if info is not None else find_model(self.settings).name

    def transcribe(
        self,
        job: JobInput,
        cancel: CancelToken,
        on_progress: Callable[[Progress], None] | None = None,
        on_segment: Callable[[Segment], None] | None = None,
        priority: Priority | None = None,
    ) -> Transcript:
        """Run a job in the calling thread and count it; a request of its own goes before bulk jobs."""
        from whisper_worker.engine.scheduler import Priority

        begun = time.perf_counter()
        transcript = self.service.transcribe(
            job,
            cancel=cancel,
            on_progress=on_progress,
            on_segment=on_segment,
            priority=Priority.INTERACTIVE if priority is None else priority,
        )
        self.metrics.add("whisper_audio_seconds_total", transcript.duration)
        self.metrics.add("whisper_transcribe_seconds_total", time.perf_counter() - begun)
        return transcript


def read_job(body: Body, door: Door) -> JobInput:
    """The common request, with the upload as its audio where there is one. Raises :class:`InvalidInput`."""
    fields = {name: None if _says_none(name, value) else value for name, value in body.fields.items()}
    said = []
    model = fields.pop("model", None)
    if model is not None and not (isinstance(model, str) and same_model(model, door.served_model())):
        said.append("The field model was ignored: this service has the one model named in the receipt.")
    if isinstance(written := fields.get("headers"), str):
        try:
            fields["headers"] = json.loads(written)
        except (ValueError, RecursionError):
            raise InvalidInput("The field headers must be an object of strings, as JSON.") from None
    job = job_input_from_dict(fields, door.settings, _uploaded(body, fields))
    if said and strict(fields, door.settings):
        raise InvalidInput(" ".join(said) + " Remove it, or send strict=false.")
    return replace(job, warnings=(*job.warnings, *said))


def strict(fields: dict[str, Any], settings: Settings) -> bool:
    """Whether a request that the schema has taken wants to be refused rather than warned."""
    given = fields.get("strict")
    return settings.strict if given is None else str(given).strip().lower() in ("true", "1", "yes", "on")


def _says_none(name: str, value: object) -> bool:
    """A form has no null: the option's default, or "off" where openai/whisper's None means that, is written out."""
    return value in ("null", "None") and name not in _TEXTS


def check_file_fields(fields: dict[str, Any]) -> None:
    """Raises :class:`InvalidInput` where a file's name stands for the file: curl's ``@`` is easily forgotten."""
    for name in FILE_FIELDS:
        text = fields.get(name)
        if isinstance(text, str) and text and not re.match("[A-Za-z][A-Za-z0-9+.-]+:", text):
            raise InvalidInput(f"The field {name} holds text: send the file itself (curl: -F {name}=@talk.mp3).")


def _uploaded(body: Body, fields: dict[str, Any]) -> AudioSource | None:
    if body.upload is None:
        check_file_fields(fields)
        if not any(fields.get(name) for name in _SOURCES):
            if fields.get("audio_urls"):
                raise InvalidInput("The field audio_urls is the RunPod worker's: here send one audio_url a request.")
            if isinstance(fields.get("input"), dict):
                raise InvalidInput(
                    "The field input is the RunPod worker's: send what it holds without input around it."
                )
            raise InvalidInput("There is no audio: send it as the file audio, or its address as audio_url.")
        return None
    if any(fields.get(name) for name in _SOURCES):
        raise InvalidInput("Send the audio once: as a file, or as audio_url, or as audio_base64.")
    for name in _SOURCES:
        fields.pop(name, None)
    digest = fields.pop("sha256", None)
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-fA-F]{64}", digest)):
        raise InvalidInput("The field sha256 must be 64 hexadecimal digits.")
    return AudioSource(path=body.upload, sha256=digest and digest.lower())


def answer(job: JobInput, transcript: Transcript) -> dict[str, Any]:
    """The common answer, with ``formats`` where the request named some."""
    result = transcript_to_dict(transcript)
    if job.formats:
        result["formats"] = {name: formats.write(transcript, name) for name in job.formats}
    return result


def progress_to_dict(progress: Progress) -> dict[str, Any]:
    return {
        "done_seconds": progress.done_seconds,
        "total_seconds": progress.total_seconds,
        "stage": progress.stage,
    }


def warning_headers(warnings: tuple[str, ...]) -> dict[str, str]:
    """Warnings for answers that are no JSON object: a JSON list in ASCII, short enough for a header."""
    kept: list[str] = []
    for warning in warnings:
        if len(json.dumps([*kept, warning])) > _WARNINGS_BYTES:
            kept.append("There are further warnings, too long for a header: /transcribe tells them.")
            break
        kept.append(warning)
    return {"X-Warnings": json.dumps(kept)} if kept else {}
