"""The wire's dicts on one side, frozen dataclasses on the other.

Every door puts its request into the common payload and calls :func:`job_input_from_dict`;
what a key means, how it is checked and what is said about one that is not understood is
therefore the same behind every door.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any, TypeVar

from whisper_worker.errors import InvalidInput
from whisper_worker.languages import language_code
from whisper_worker.settings import Settings
from whisper_worker.types import FORMATS, AudioSource, JobInput, Receipt, Segment, TranscribeOptions, Transcript, Word

_T = TypeVar("_T")

SOURCE_KEYS = ("audio_url", "audio_base64")
ALIASES = {
    "audio": "audio_url",
    "url": "audio_url",
    "prompt": "initial_prompt",
    "enable_vad": "vad",
    "vad_filter": "vad",
    "log_prob_threshold": "logprob_threshold",
}
"""Names that other services use for the same thing."""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell it; the tokenizer would fail on it
        raise ValueError("holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    return value


def flag(value: object) -> bool:
    """A truth value in any of its spellings. Raises ValueError."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0", "yes", "no", "on", "off"):
        return value.strip().lower() in ("true", "1", "yes", "on")
    if value in (0, 1):
        return bool(value)
    raise ValueError("must be true or false")


def _float(low: float, high: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError("must be a number")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise ValueError("must be a number") from None
        if not (math.isfinite(number) and low <= number <= high):
            raise ValueError(f"must be between {low:g} and {high:g}")
        return number

    return parse


def _int(low: int, high: int) -> Callable[[object], int]:
    parse_float = _float(low, high)

    def parse(value: object) -> int:
        with suppress(ValueError):  # not by way of a float, which has no room for every seed
            value = int(value) if isinstance(value, str) else value
        if type(value) is int and low <= value <= high:
            return value
        number = parse_float(value)
        if number != int(number):
            raise ValueError("must be a whole number")
        return int(number)

    return parse


def _list(value: object) -> list[object]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value]


_MAX_TEMPERATURES = 20
"""Attempts at one window that a request may ask for."""


def _increment(value: object) -> float:
    number = _float(0.0, 2.0)(value)
    if 0 < number < 1 / _MAX_TEMPERATURES:
        raise ValueError(f"must be 0 (no further attempt) or at least {1 / _MAX_TEMPERATURES:g}")
    return number


def _temperature(value: object) -> float | tuple[float, ...]:
    parse = _float(0.0, 2.0)
    values = tuple(parse(part) for part in _list(value))
    if not 1 <= len(values) <= _MAX_TEMPERATURES:
        raise ValueError(f"must be a number or a list of up to {_MAX_TEMPERATURES} numbers")
    return values if isinstance(value, (list, tuple)) or len(values) > 1 else values[0]


def _tokens(value: object) -> str:
    parse = _int(-1, 1_000_000)
    return ",".join(str(parse(part)) for part in _list(value))


def _times(value: object) -> tuple[float, ...]:
    parse = _float(0.0, 1e7)
    times = tuple(parse(part) for part in _list(value))
    # openai/whisper's default, "0", asks for all of it.
    return () if times == (0.0,) else times


def _languages(value: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(language_code(_text(part)) for part in _list(value)))


def _language(value: object) -> str | None:
    text = _text(value).strip()
    return None if text.lower() in ("", "auto") else language_code(text)


def _task(value: object) -> str:
    task = _text(value).strip().lower()
    if task not in ("transcribe", "translate"):
        raise ValueError("must be transcribe or translate")
    return task


def _formats(value: object) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(_text(part).strip().lower() for part in _list(value)))
    if names == ("all",):
        return FORMATS
    for name in names:
        if name not in FORMATS:
            raise ValueError("must be among " + ", ".join(FORMATS))
    return names


_OPTIONS: dict[str, Callable[[object], Any]] = {
    "language": _language,
    "task": _task,
    "temperature": _temperature,
    "best_of": _int(1, 100),
    "beam_size": _int(1, 100),
    "patience": _float(0.01, 100.0),
    "length_penalty": _float(0.0, 1.0),
    "suppress_tokens": _tokens,
    "initial_prompt": _text,
    "condition_on_previous_text": flag,
    "temperature_increment_on_fallback": _increment,
    "compression_ratio_threshold": _float(0.0, 1e6),
    "logprob_threshold": _float(-1e6, 0.0),
    "no_speech_threshold": _float(0.0, 1.0),
    "word_timestamps": flag,
    "prepend_punctuations": _text,
    "append_punctuations": _text,
    "clip_timestamps": _times,
    "hallucination_silence_threshold": _float(0.0, 1e6),
    "vad": flag,
    "vad_threshold": _float(0.0, 1.0),
    "hotwords": _text,
    "languages": _languages,
    "multilingual": flag,
    "prefix": _text,
    "without_timestamps": flag,
    "seed": _int(0, 2**63 - 1),
}

_NULL_MEANS_OFF = frozenset(
    {
        "temperature_increment_on_fallback",
        "compression_ratio_threshold",
        "logprob_threshold",
        "no_speech_threshold",
    }
)
"""Options for which openai/whisper takes None as "off"; any other null counts as absent."""


def job_input_from_dict(
    payload: Mapping[str, object], settings: Settings, source: AudioSource | None = None
) -> JobInput:
    """Check a request. Raises :class:`InvalidInput` naming the field.

    ``source`` is audio that did not come in the payload (an upload, a local file); then the payload names none.
    A key that is not understood, or that cannot have an effect beside the others, is named
    in ``warnings``; with ``strict`` (in the payload, or WHISPER_STRICT) it is refused.
    """
    values = _rename(payload)
    strict = parse_field("strict", values.pop("strict", None), flag, settings.strict)
    formats = parse_field("formats", values.pop("formats", None), _formats, ())
    source = source or _source(values)
    given: dict[str, Any] = {}
    for name, parse in _OPTIONS.items():
        if name not in values:
            continue
        value = values.pop(name)
        if value is None:
            if name in _NULL_MEANS_OFF:
                given[name] = None
            continue
        given[name] = parse_field(name, value, parse, None)
    options = TranscribeOptions(**given, strict=strict)
    ignored = [f"The field {name} is not known and was ignored." for name in sorted(values)]
    if source.headers and not source.over_http:
        ignored.append("headers have an effect only where the audio is fetched over http, and were ignored.")
    ignored += _without_effect(given, options)
    if ignored and strict:
        raise InvalidInput(" ".join(ignored) + " Remove it, or send strict=false.")
    return JobInput(source=source, options=options, formats=formats, warnings=(*ignored, *_costs(given)))


def _rename(payload: Mapping[str, object]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in payload.items():
        name = ALIASES.get(key, key)
        if name in SOURCE_KEYS and value == "":  # what a client sends that fills in one of its two fields
            value = None
        if value is not None and values.get(name) is not None:
            raise InvalidInput(f"The field {name} is given twice, under two of its names.")
        if value is not None or name not in values:
            values[name] = value
    return values


def parse_field(name: str, value: object, parse: Callable[[object], Any], default: Any) -> Any:
    """``value`` as ``parse`` reads it, ``default`` for a null. Raises :class:`InvalidInput` naming the field."""
    if value is None:
        return default
    try:
        return parse(value)
    except ValueError as error:
        raise InvalidInput(f"The field {name} {error}.") from None


def _source(values: dict[str, object]) -> AudioSource:
    url = parse_field("audio_url", values.pop("audio_url", None), _text, None)
    encoded = parse_field("audio_base64", values.pop("audio_base64", None), _text, None)
    headers = values.pop("headers", None)
    digest = parse_field("sha256", values.pop("sha256", None), _text, None)
    if not url and not encoded:
        raise InvalidInput("There is no audio: send audio_url (an http, https or data URL) or audio_base64.")
    if url and encoded:
        raise InvalidInput("Send one of audio_url and audio_base64, not both.")
    if headers is None:
        headers = {}
    if not isinstance(headers, Mapping) or not all(isinstance(v, str) for pair in headers.items() for v in pair):
        raise InvalidInput("The field headers must be an object of strings.")
    if any(c in text for pair in headers.items() for text in pair for c in "\r\n"):
        raise InvalidInput("The field headers holds a line break.")
    if digest is not None and (len(digest) != 64 or any(c not in "0123456789abcdefABCDEF" for c in digest)):
        raise InvalidInput("The field sha256 must be 64 hexadecimal digits.")
    return AudioSource(url=url, base64=encoded, headers=tuple(headers.items()), sha256=digest and digest.lower())


def _without_effect(given: Mapping[str, object], options: TranscribeOptions) -> list[str]:
    """Options that were given but cannot do anything beside the others."""
    said: list[str] = []
    listed = isinstance(options.temperature, tuple)
    first = options.temperature if isinstance(options.temperature, tuple) else (options.temperature,)
    rises = not listed and bool(options.temperature_increment_on_fallback)
    if listed and given.get("temperature_increment_on_fallback"):
        said.append("temperature_increment_on_fallback has an effect with a single temperature only and was ignored.")
    if 0.0 not in first:
        said.extend(
            f"{name} has an effect at temperature 0 only and was ignored."
            for name in ("beam_size", "patience")
            if name in given
        )
    if not any(first) and not rises:
        said.extend(
            f"{name} has an effect at temperatures above 0 only and was ignored."
            for name in ("best_of", "seed")
            if name in given
        )
    if options.patience is not None and options.beam_size == 1:
        said.append("patience has an effect with two beams or more and was ignored.")
    if not options.word_timestamps:
        said.extend(
            f"{name} has an effect with word_timestamps only and was ignored."
            for name in ("prepend_punctuations", "append_punctuations")
            if name in given
        )
    if options.languages and options.language and not options.multilingual:
        said.append("languages has an effect only where language is not given, and was ignored.")
    if options.language and options.multilingual:
        said.append("language has an effect only without multilingual, which detects it, and was ignored.")
    if "vad_threshold" in given and not options.vad:
        said.append("vad_threshold has an effect with vad only and was ignored.")
    return said


def _costs(given: Mapping[str, object]) -> list[str]:
    if given.get("condition_on_previous_text"):
        return ["condition_on_previous_text decodes one window at a time: expect several times the usual duration."]
    return []


def segment_to_dict(segment: Segment) -> dict[str, Any]:
    """One segment, with openai/whisper's keys first; ``words`` and ``language`` only where known."""
    data: dict[str, Any] = {
        "id": segment.id,
        "seek": segment.seek,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    }
    if segment.words is not None:
        data["words"] = [asdict(word) for word in segment.words]
    if segment.language is not None:
        data["language"] = segment.language
    if segment.flags:
        data["flags"] = list(segment.flags)
    return data


def transcript_to_dict(transcript: Transcript) -> dict[str, Any]:
    """The common answer, ready for JSON."""
    return {
        "text": transcript.text,
        "language": transcript.language,
        "language_probability": transcript.language_probability,
        "duration": transcript.duration,
        "segments": [segment_to_dict(segment) for segment in transcript.segments],
        "warnings": list(transcript.warnings),
        "receipt": _receipt(transcript.receipt) if transcript.receipt else None,
    }


def _receipt(receipt: Receipt) -> dict[str, Any]:
    data = {spec.name: getattr(receipt, spec.name) for spec in fields(receipt)}
    data["gaps"] = [list(gap) for gap in receipt.gaps]
    if receipt.cost is None:
        del data["cost"]
    return data


def transcript_from_dict(data: Mapping[str, Any]) -> Transcript:
    """What :func:`transcript_to_dict` wrote, as another process answered it; unknown keys are passed over.

    Raises :class:`InvalidInput` where it is not a transcript.
    """
    try:
        receipt = data.get("receipt")
        return Transcript(
            text=_text(data["text"]),
            language=data["language"],
            language_probability=data.get("language_probability"),
            duration=float(data["duration"]),
            segments=tuple(segment_from_dict(segment) for segment in data["segments"]),
            warnings=tuple(_text(warning) for warning in data.get("warnings", ())),
            receipt=None if receipt is None else _known(Receipt, receipt, gaps=tuple(map(tuple, receipt["gaps"]))),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InvalidInput("The answer is not a transcript: is it a service of this kind and version?") from None


def segment_from_dict(data: Mapping[str, Any]) -> Segment:
    """What :func:`segment_to_dict` wrote. Raises KeyError, TypeError or ValueError where it is not one."""
    words = data.get("words")
    return _known(
        Segment,
        data,
        start=float(data["start"]),
        end=float(data["end"]),
        text=_text(data["text"]),
        tokens=tuple(data.get("tokens", ())),
        words=None if words is None else tuple(_known(Word, word) for word in words),
        flags=tuple(data.get("flags", ())),
    )


def _known(kind: Callable[..., _T], data: Mapping[str, Any], **converted: object) -> _T:
    names = {spec.name for spec in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in data.items() if name in names} | converted)
