"""What RunPod clients send and expect, beyond the payload that all doors share.

Three kinds of client find what they were written for in one answer: this worker's own
(``text``, ``segments``, ``language``, ...), those of the Hugging Face pipeline's shape
(``chunks``), and those of worker-faster_whisper (``transcription``, ``translation``,
``detected_language``, ``device``, ``model``, ``word_timestamps``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from whisper_worker import formats
from whisper_worker.cache.names import same_model
from whisper_worker.errors import InvalidInput, WhisperWorkerError
from whisper_worker.schema import ALIASES, SOURCE_KEYS, flag, job_input_from_dict, parse_field, transcript_to_dict
from whisper_worker.settings import Settings
from whisper_worker.types import JobInput, Receipt, Transcript

_LISTS = ("audio_urls", "audios", "audio_url", "audio")
"""Fields that may hold a list of inputs."""

_ONLY_LISTS = ("audio_urls", "audios")
_SOURCES = (*SOURCE_KEYS, *(alias for alias, name in ALIASES.items() if name in SOURCE_KEYS))

_TEXT_FORMATS = ("plain_text", "formatted_text", "srt", "vtt")
"""Values of ``transcription`` and ``translation``."""


@dataclass(frozen=True, slots=True)
class Order:
    """One audio input: the job that all doors know, and what this door adds to the answer."""

    job: JobInput
    transcription: str = "plain_text"
    translation: str = "plain_text"
    translate: bool = False
    """Also give the English translation, for which speech in another language is decoded twice."""
    chunks: bool = True


@dataclass(frozen=True, slots=True)
class Request:
    """A job's inputs; a faulty one among several is kept as its error."""

    orders: tuple[Order | WhisperWorkerError, ...]
    several: bool
    """Whether the caller sent a list, and gets a list."""


def read_request(payload: object, settings: Settings, served_model: Callable[[], str]) -> Request:
    """Read a job's ``input``. Raises :class:`InvalidInput` where nothing in it can be run.

    An input of a list is an address, or an object whose fields stand over the common ones.
    ``served_model`` names the model that answers; it is asked only where the request names one.
    """
    if not isinstance(payload, Mapping):
        raise InvalidInput('The input must be an object, such as {"audio_url": "https://..."}.')
    payload = {name: value for name, value in payload.items() if value is not None or name not in _LISTS}
    lists = [name for name in _LISTS if isinstance(payload.get(name), list)]
    if isinstance(payload.get("audio_urls"), str):
        lists.append("audio_urls")
    if not lists:
        wrong = [name for name in _ONLY_LISTS if name in payload]
        if wrong:
            raise InvalidInput(f"The field {wrong[0]} must be a list of addresses, or of objects with audio_url.")
        return Request((_order(payload, settings, served_model),), several=False)
    if len(lists) > 1:
        raise InvalidInput(f"Send one list of inputs, not {' and '.join(lists)}.")
    entries = payload[lists[0]]
    common = {name: value for name, value in payload.items() if name != lists[0]}
    beside = [name for name in _SOURCES if common.get(name)]
    if beside:
        raise InvalidInput(f"Send {lists[0]} or {beside[0]}, not both.")
    orders: list[Order | WhisperWorkerError] = []
    for entry in [entries] if isinstance(entries, str) else entries:
        try:
            orders.append(_order({**common, **_entry(entry)}, settings, served_model))
        except WhisperWorkerError as error:
            orders.append(error)
    if not orders:
        raise InvalidInput(f"The field {lists[0]} is empty: send at least one address.")
    return Request(tuple(orders), several=True)


def answer(order: Order, transcript: Transcript, translation: Transcript | None) -> dict[str, Any]:
    """One input's answer, ready for JSON; ``translation`` is the English transcript where one was wanted."""
    receipt = transcript.receipt
    if receipt and translation and translation is not transcript and translation.receipt:
        receipt = _both(receipt, translation.receipt)
    result = transcript_to_dict(replace(transcript, receipt=receipt))
    if order.job.formats:
        result["formats"] = {name: formats.write(transcript, name) for name in order.job.formats}
    if order.chunks:
        result["chunks"] = [
            {"timestamp": [segment.start, segment.end], "text": segment.text} for segment in transcript.segments
        ]
    if order.job.options.word_timestamps:
        result["word_timestamps"] = [
            {"word": word.word, "start": word.start, "end": word.end}
            for segment in transcript.segments
            for word in segment.words or ()
        ]
    result["transcription"] = _as_text(transcript, order.transcription)
    result["translation"] = _as_text(translation, order.translation) if translation is not None else None
    result["detected_language"] = transcript.language
    if receipt is not None:
        result["device"] = receipt.device
        result["model"] = receipt.model
    return result


def _both(first: Receipt, second: Receipt) -> Receipt:
    """What the two passes over a recording cost together; what was found in it is the first one's."""
    stages = {name: round(first.stages.get(name, 0) + second.stages.get(name, 0), 3) for name in first.stages}
    return replace(
        first,
        stages=stages,
        rtfx=round(first.audio_seconds / max(stages["total"], 1e-3), 1),
        windows=first.windows + second.windows,
        retried_windows=first.retried_windows + second.retried_windows,
        batch_size=min(first.batch_size, second.batch_size),
        peak_memory_mb=max(first.peak_memory_mb, second.peak_memory_mb),
        cost=None if first.cost is None or second.cost is None else round(first.cost + second.cost, 6),
    )


def _entry(entry: object) -> Mapping[str, object]:
    if isinstance(entry, str):
        return {"audio_url": entry}
    if isinstance(entry, Mapping) and not any(isinstance(entry.get(name), list) for name in _LISTS):
        return entry
    raise InvalidInput("An input of a list must be an address, or an object with audio_url.")


def _order(payload: Mapping[str, object], settings: Settings, served_model: Callable[[], str]) -> Order:
    values = dict(payload)
    said: list[str] = []
    transcription = _text_format(values.pop("transcription", None), "transcription", said)
    translation = _text_format(values.pop("translation", None), "translation", said)
    translate = parse_field("translate", values.pop("translate", None), flag, False)
    chunks = [parse_field(name, values.pop(name, None), flag, True) for name in ("return_chunks", "chunks")]
    model = values.pop("model", None)
    job = job_input_from_dict(values, settings)
    if model is not None and not (isinstance(model, str) and same_model(model, served_model())):
        said.append("The field model was ignored: this worker serves the one model named in the answer.")
    if said and parse_field("strict", values.get("strict"), flag, settings.strict):
        raise InvalidInput(" ".join(said) + " Correct or remove it, or send strict=false.")
    return Order(
        job=replace(job, warnings=(*job.warnings, *said)),
        transcription=transcription,
        translation=translation,
        translate=translate,
        chunks=all(chunks),
    )


def _text_format(value: object, name: str, said: list[str]) -> str:
    if value is None:
        return "plain_text"
    # worker-faster_whisper's own examples send "plain text".
    spelled = value.strip().lower().replace(" ", "_") if isinstance(value, str) else ""
    if spelled in _TEXT_FORMATS:
        return spelled
    said.append(f"The field {name} was taken as plain_text: it must be one of {', '.join(_TEXT_FORMATS)}.")
    return "plain_text"


def _as_text(transcript: Transcript, text_format: str) -> str:
    if text_format == "plain_text":
        return transcript.text
    if text_format == "formatted_text":
        return formats.write(transcript, "txt").removesuffix("\n")
    return formats.write(transcript, text_format)
