"""OpenAI's audio API: what its clients send, and what they expect.

The loaded model answers under OpenAI's names (``whisper-1``, ``gpt-4o-transcribe``, ...), so
that clients need no change but their base address. Beyond OpenAI's parameters these routes
take every option of the common request, and name in ``warnings`` what had no effect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from whisper_worker import formats
from whisper_worker.cache.names import known_short, same_model
from whisper_worker.doors.http_body import Body
from whisper_worker.doors.http_common import Door, check_file_fields, read_job, strict
from whisper_worker.doors.http_errors import Refused
from whisper_worker.errors import InvalidInput
from whisper_worker.languages import LANGUAGES
from whisper_worker.schema import segment_to_dict
from whisper_worker.types import JobInput, Segment, Task, Transcript

OPENAI_MODELS = (
    "whisper-1",
    "gpt-4o-transcribe",
    "gpt-4o-mini-transcribe",
    "gpt-4o-mini-transcribe-2025-12-15",
    "gpt-4o-transcribe-diarize",
    "gpt-transcribe",
)
"""OpenAI's names, each an alias of the loaded model."""

RESPONSE_FORMATS = ("json", "text", "srt", "verbose_json", "vtt", "diarized_json")
_TRANSLATION_FORMATS = RESPONSE_FORMATS[:-1]

_PLAIN = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}


@dataclass(frozen=True, slots=True)
class SpeechOrder:
    """One request: the job that all doors know, and how its answer is to look."""

    job: JobInput
    response_format: str = "json"
    words: bool = False
    segments: bool = True
    stream: bool = False
    speakers: tuple[str, ...] = ()
    """Names for the channels of ``diarized_json``, in their order."""


def read_order(body: Body, door: Door, task: Task) -> SpeechOrder:
    """Read a request of ``/v1/audio/*``. Raises :class:`InvalidInput` and :class:`Refused` (an unknown model)."""
    if body.upload is None:
        check_file_fields(body.fields)
    if body.upload is None and not any(body.fields.get(name) for name in ("audio_url", "audio_base64", "url")):
        raise Refused(400, "INVALID_INPUT", "There is no audio: send it as the field file.", param="file")
    fields = dict(body.fields)
    stream = flag(fields.pop("stream", None), "stream")
    said = _check_model(fields.pop("model", None), door)
    response_format = _choice(
        fields.pop("response_format", None) or "json",
        "response_format",
        RESPONSE_FORMATS if task == "transcribe" else _TRANSLATION_FORMATS,
    )
    if stream and response_format not in ("json", "diarized_json"):
        said.append("response_format was ignored: a stream's events carry the text alone.")
        response_format = "json"
    granularities = [
        _choice(value, "timestamp_granularities", ("word", "segment"))
        for value in _list(fields.pop("timestamp_granularities", None))
    ]
    if granularities and response_format != "verbose_json":
        said.append("timestamp_granularities has an effect with verbose_json only and was ignored.")
        granularities = []
    for value in _list(fields.pop("include", None)):
        _choice(value, "include", ("logprobs",))
        said.append(
            "include: logprobs of single tokens are not kept and were left out; avg_logprob of verbose_json "
            "is their mean over a segment."
        )
    speakers = tuple(str(name) for name in _list(fields.pop("known_speaker_names", None)))
    if speakers and response_format != "diarized_json":
        said.append("known_speaker_names has an effect with diarized_json only and was ignored.")
    if fields.pop("known_speaker_references", None) is not None:
        said.append("known_speaker_references was ignored: speakers are told apart by channel.")
    _chunking(fields.pop("chunking_strategy", None), fields, said)
    if keywords := _list(fields.pop("keywords", None)):
        if fields.get("hotwords"):
            said.append("keywords was ignored: hotwords, which is the same, was given too.")
        else:
            fields["hotwords"] = ", ".join(str(word) for word in keywords)
    if fields.pop("formats", None):
        said.append("formats was ignored: response_format says how the answer looks.")
    if fields.setdefault("task", task) != task:
        raise InvalidInput("The field task is the route's: use the other route, or leave it out.")
    if "word" in granularities:
        fields["word_timestamps"] = True
    job = read_job(replace(body, fields=fields), door)
    words = job.options.word_timestamps
    if words and response_format in ("json", "text"):
        said.append("word_timestamps was ignored: verbose_json has the words' times, this answer the text alone.")
    if said and strict(fields, door.settings):
        raise InvalidInput(" ".join(said) + " Correct or remove it, or send strict=false.")
    return SpeechOrder(
        job=replace(job, warnings=(*job.warnings, *said)),
        response_format=response_format,
        words=words,
        segments="segment" in granularities or not granularities,
        stream=stream,
        speakers=speakers,
    )


def _check_model(name: object, door: Door) -> list[str]:
    served = door.served_model()
    if name is None or name in OPENAI_MODELS or (isinstance(name, str) and same_model(name, served)):
        return []
    if isinstance(name, str) and known_short(name) is not None:
        return [f"The field model was ignored: this service has {served} loaded."]
    raise model_not_found()


def model_not_found() -> Refused:
    message = "There is no such model here: send whisper-1, or a name that /v1/models lists."
    return Refused(404, "model_not_found", message, param="model")


def _chunking(value: object, fields: dict[str, Any], said: list[str]) -> None:
    """``auto``, or a voice detector's settings, of which this one has the threshold."""
    if value is None or value == "auto":
        return
    try:
        wanted = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        wanted = None
    if not isinstance(wanted, Mapping) or wanted.get("type") != "server_vad":
        raise InvalidInput("The field chunking_strategy must be auto, or an object of type server_vad.")
    if wanted.get("threshold") is not None:
        fields.setdefault("vad_threshold", wanted["threshold"])
    said.extend(
        f"chunking_strategy: {name} was ignored; recordings are cut in their pauses."
        for name in ("prefix_padding_ms", "silence_duration_ms")
        if wanted.get(name) is not None
    )


def _choice(value: object, name: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise InvalidInput(f"The field {name} must be one of {', '.join(choices)}.")
    return str(value)


def flag(value: object, name: str) -> bool:
    """A form's true or false; nothing is false. Raises :class:`InvalidInput`."""
    taken = {"true": True, "1": True, "false": False, "0": False, "none": False, "": False}
    known = taken.get(str(value).strip().lower())
    if known is None:
        raise InvalidInput(f"The field {name} must be true or false.")
    return known


def _list(value: object) -> list[object]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# -- answers -----------------------------------------------------------------------------


def media_type(order: SpeechOrder) -> str:
    return _PLAIN.get(order.response_format, "application/json")


def render(order: SpeechOrder, transcript: Transcript) -> str | dict[str, Any]:
    """The transcript as ``response_format`` wants it: text, or a dict for JSON."""
    if order.response_format == "text":
        return transcript.text + "\n"
    if order.response_format in ("srt", "vtt"):
        return formats.write(transcript, order.response_format)
    result: dict[str, Any] = {"text": transcript.text, "usage": _usage(transcript)}
    if order.response_format == "verbose_json":
        task = order.job.options.task
        result |= {
            "task": task,
            # The full name of the text's language, as OpenAI's API gives it; an empty one where nobody speaks.
            "language": LANGUAGES.get("en" if task == "translate" else transcript.language or "", ""),
            "duration": transcript.duration,
        }
        if order.segments:
            result["segments"] = [_segment(segment) for segment in transcript.segments]
        if order.words:
            result["words"] = [
                {"word": word.word.strip(), "start": word.start, "end": word.end}
                for segment in transcript.segments
                for word in segment.words or ()
            ]
    if transcript.warnings:
        result["warnings"] = list(transcript.warnings)
    return result


def render_diarized(order: SpeechOrder, channels: tuple[Transcript, ...]) -> dict[str, Any]:
    """One speaker a channel, in the order in which they speak."""
    names = order.speakers + tuple(chr(ord("A") + index) for index in range(len(order.speakers), len(channels)))
    spoken = sorted(
        ((segment, names[index]) for index, transcript in enumerate(channels) for segment in transcript.segments),
        key=lambda pair: (pair[0].start, pair[0].end),
    )
    result: dict[str, Any] = {
        "task": order.job.options.task,
        "duration": max(transcript.duration for transcript in channels),
        "text": " ".join(segment.text.strip() for segment, _ in spoken),
        "segments": [
            {
                "type": "transcript.text.segment",
                "id": f"seg_{number}",
                "start": segment.start,
                "end": segment.end,
                "text": segment.text,
                "speaker": speaker,
            }
            for number, (segment, speaker) in enumerate(spoken)
        ],
        "usage": _usage(channels[0]),
    }
    warnings = dict.fromkeys(warning for transcript in channels for warning in transcript.warnings)
    if warnings:
        result["warnings"] = list(warnings)
    return result


def delta_event(segment: Segment, *, first: bool) -> dict[str, Any]:
    """A segment's text; all deltas together are the text of the last event."""
    return {"type": "transcript.text.delta", "delta": segment.text.lstrip() if first else segment.text}


def done_event(transcript: Transcript) -> dict[str, Any]:
    done: dict[str, Any] = {
        "type": "transcript.text.done",
        "text": transcript.text,
        "usage": _usage(transcript),
    }
    if transcript.warnings:
        done["warnings"] = list(transcript.warnings)
    return done


def model_to_dict(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "whisper-worker"}


def _segment(segment: Segment) -> dict[str, Any]:
    data = segment_to_dict(segment)
    data.pop("words", None)
    return data


def _usage(transcript: Transcript) -> dict[str, Any]:
    return {"type": "duration", "seconds": transcript.duration}
