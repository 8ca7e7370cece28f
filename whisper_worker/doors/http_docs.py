"""The service's description of itself: OpenAPI's parts, and a page of them that needs no network.

Bodies are read as streams (``http_body.py``), so the framework cannot derive what they hold;
it is written down here. A test holds the options against the schema's.
"""

from __future__ import annotations

import html
import json
from typing import Any

from whisper_worker.doors.http_openai import RESPONSE_FORMATS
from whisper_worker.types import FORMATS

Schema = dict[str, Any]

ERROR_MEANINGS = {
    400: "The request is wrong, or the file is no audio; the message says how",
    401: "No key, or not one of the service's",
    403: "The address is one that must not be fetched from",
    404: "There is no such thing here",
    413: "The audio is larger or longer than the service takes",
    415: "The file is no audio, or the body is neither a form nor JSON",
    422: "A field is missing or wrong; the message names it",
    424: "The audio could not be fetched from its address",
    429: "All places are taken; `Retry-After` says when to come again",
    500: "A defect of the service",
    503: "The model is not loaded or has no memory; `Retry-After` says when to come again",
    504: "A step took longer than its limit",
}


def _number(meaning: str, low: float, high: float, default: float | None = None) -> Schema:
    return _with(default, {"type": "number", "minimum": low, "maximum": high, "description": meaning})


def _integer(meaning: str, low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high, "description": meaning}


def _flag(meaning: str, default: bool = False) -> Schema:
    return {"type": "boolean", "default": default, "description": meaning}


def _text(meaning: str, *examples: str) -> Schema:
    schema: Schema = {"type": "string", "description": meaning}
    return {**schema, "examples": list(examples)} if examples else schema


def _with(default: object, schema: Schema) -> Schema:
    return schema if default is None else {**schema, "default": default}


OPTIONS: dict[str, Schema] = {
    "language": _text("Code or English name; left out, it is detected.", "en", "german"),
    "task": {"type": "string", "enum": ["transcribe", "translate"], "default": "transcribe"},
    "temperature": _number("0 takes the likeliest tokens; raised by itself where a window fails.", 0, 2, 0),
    "best_of": _integer("Samples compared at temperatures above 0.", 1, 100),
    "beam_size": _integer("Beams of the search at temperature 0; 1 is greedy; left out, the engine chooses.", 1, 100),
    "patience": _number("Of the beam search.", 0.01, 100),
    "length_penalty": _number("Left out: the mean log probability.", 0, 1),
    "suppress_tokens": _text("Token ids, separated by commas; -1 stands for symbols that nobody speaks.", "-1"),
    "initial_prompt": _text("Text in the recording's style, with its rare names."),
    "condition_on_previous_text": _flag("Decode windows one after another, each prompted with the text before it."),
    "temperature_increment_on_fallback": _number("Step of the temperature where a window fails.", 0, 2, 0.2),
    "compression_ratio_threshold": _number("A text that compresses better repeats itself: it failed.", 0, 1e6, 2.4),
    "logprob_threshold": _number("A mean log probability below it failed.", -1e6, 0, -1.0),
    "no_speech_threshold": _number("Silence, if the window failed and its no-speech probability is higher.", 0, 1, 0.6),
    "word_timestamps": _flag("Times and probabilities of words."),
    "prepend_punctuations": _text("Marks that go with the word behind them."),
    "append_punctuations": _text("Marks that go with the word before them."),
    "clip_timestamps": _text("start,end,start,end,... in seconds: what to transcribe.", "0,30"),
    "hallucination_silence_threshold": _number("Skip silence longer than this around doubtful text.", 0, 1e6),
    "vad": _flag("Decode only what the voice detector takes for speech.", True),
    "vad_threshold": _number("Probability from which sound is speech.", 0, 1, 0.5),
    "hotwords": _text("Words to listen for, in every window."),
    "languages": _text("Codes, separated by commas, that detection may choose from.", "en,de"),
    "multilingual": _flag("Detect the language again in every window."),
    "prefix": _text("Text that the first window begins with."),
    "without_timestamps": _flag("Decode without times inside a window."),
    "seed": _integer("Of sampling at temperatures above 0.", 0, 2**63 - 1),
    "strict": _flag("Refuse the request where a field would be ignored, rather than warn."),
}
"""Every option of the common request."""

_AUDIO_URL = _text("http, https or data URL of the audio.", "https://example.com/talk.mp3")
_COMMON: dict[str, Schema] = {
    **OPTIONS,
    "formats": _text(f"Texts to add to the answer, separated by commas: {', '.join(FORMATS)} or all.", "srt,vtt"),
    "sha256": {"type": "string", "pattern": "^[0-9a-fA-F]{64}$", "description": "Digest that the audio must have."},
    "model": _text("Accepted for other services' clients; the loaded model answers."),
}
_FILE: Schema = {"type": "string", "format": "binary", "description": "Anything that ffmpeg reads."}
_CALLBACK: Schema = _text("Where to POST the job when it has ended, signed.", "https://example.com/done")
_OPENAI: dict[str, Schema] = {
    "model": _text("whisper-1, another of OpenAI's names, or the loaded model's.", "whisper-1"),
    "prompt": _text("OpenAI's name for initial_prompt."),
    "response_format": {"type": "string", "enum": list(RESPONSE_FORMATS), "default": "json"},
    "temperature": _number("As OpenAI's.", 0, 1, 0),
    "language": OPTIONS["language"],
    "timestamp_granularities[]": {
        "type": "array",
        "items": {"type": "string", "enum": ["word", "segment"]},
        "description": "Of verbose_json.",
    },
    "include[]": {"type": "array", "items": {"type": "string", "enum": ["logprobs"]}},
    "stream": _flag("Server-sent events `transcript.text.delta` and `transcript.text.done`."),
    "chunking_strategy": _text("auto, or an object of type server_vad, as JSON.", "auto"),
    "known_speaker_names[]": {
        "type": "array",
        "items": {"type": "string"},
        "description": "Names for the channels of diarized_json.",
    },
}

_WORD: Schema = {
    "type": "object",
    "required": ["word", "start", "end"],
    "properties": {name: {"type": "number"} for name in ("start", "end", "probability")} | {"word": {"type": "string"}},
}
_SEGMENT: Schema = {
    "type": "object",
    "required": ["id", "start", "end", "text"],
    "properties": {
        "id": {"type": "integer"},
        "seek": {"type": "integer"},
        "start": {"type": "number", "description": "Seconds from the recording's start."},
        "end": {"type": "number"},
        "text": {"type": "string"},
        "tokens": {"type": "array", "items": {"type": "integer"}},
        "temperature": {"type": "number"},
        "avg_logprob": {"type": "number"},
        "compression_ratio": {"type": "number"},
        "no_speech_prob": {"type": "number"},
        "words": {"type": "array", "items": {"$ref": "#/components/schemas/Word"}},
        "language": {"type": "string"},
        "flags": {"type": "array", "items": {"type": "string"}, "description": "Doubts that were not settled."},
    },
}
_TRANSCRIPT: Schema = {
    "type": "object",
    "required": ["text", "language", "language_probability", "duration", "segments", "warnings", "receipt"],
    "properties": {
        "text": {"type": "string"},
        "language": {"type": ["string", "null"]},
        "language_probability": {"type": ["number", "null"]},
        "duration": {"type": "number", "description": "Seconds."},
        "segments": {"type": "array", "items": {"$ref": "#/components/schemas/Segment"}},
        "formats": {"type": "object", "additionalProperties": {"type": "string"}},
        "warnings": {"type": "array", "items": {"type": "string"}},
        "receipt": {"type": ["object", "null"], "description": "Stage seconds, device, model and more."},
    },
}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "retryable"],
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "retryable": {"type": "boolean"},
            },
        }
    },
}
_OPENAI_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_JOB: Schema = {
    "type": "object",
    "required": ["id", "status", "progress", "result", "error"],
    "properties": {
        "id": {"type": "string"},
        "status": {"type": "string", "enum": ["queued", "running", "completed", "failed", "cancelled"]},
        "progress": {
            "type": "object",
            "properties": {
                "done_seconds": {"type": "number"},
                "total_seconds": {"type": "number"},
                "stage": {"type": "string"},
            },
        },
        "result": {"anyOf": [{"$ref": "#/components/schemas/Transcript"}, {"type": "null"}]},
        "error": {"anyOf": [_ERROR["properties"]["error"], {"type": "null"}]},
    },
}
SCHEMAS: dict[str, Schema] = {
    "Word": _WORD,
    "Segment": _SEGMENT,
    "Transcript": _TRANSCRIPT,
    "Error": _ERROR,
    "OpenAIError": _OPENAI_ERROR,
    "Job": _JOB,
    "JobReceipt": {
        "type": "object",
        "required": ["id", "status"],
        "properties": {"id": {"type": "string"}, "status": {"type": "string"}},
    },
}

TRANSCRIPT_EXAMPLE: dict[str, Any] = {
    "text": "And so my fellow Americans ask not what your country can do for you ...",
    "language": "en",
    "language_probability": 1.0,
    "duration": 11.0,
    "segments": [{"id": 0, "start": 0.35, "end": 10.4, "text": " And so my fellow Americans ..."}],
    "warnings": [],
    "receipt": {"model": "tiny.en", "device": "cpu", "rtfx": 13.7},
}
JOB_EXAMPLE: dict[str, Any] = {
    "id": "5f0c4d1e",
    "status": "running",
    "progress": {"done_seconds": 620.5, "total_seconds": 3600.0, "stage": "recognize"},
    "result": None,
    "error": None,
}
SSE_RESPONSE: dict[str, Any] = {
    "description": "Server-sent events",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


def json_response(meaning: str, example: object, schema: str | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {"example": example}
    content["schema"] = {"$ref": f"#/components/schemas/{schema}"} if schema else {"type": "object"}
    return {"description": meaning, "content": {"application/json": content}}


def errors(*statuses: int, schema: str = "Error") -> dict[int | str, dict[str, Any]]:
    """Responses for these statuses, each with the body that errors have."""
    message = ERROR_MEANINGS[422]
    example: dict[str, Any] = {"code": "INVALID_INPUT", "message": message, "retryable": False}
    if schema == "OpenAIError":
        example = {"message": message, "type": "invalid_request_error", "param": "language", "code": "INVALID_INPUT"}
    return {status: json_response(ERROR_MEANINGS[status], {"error": example}, schema) for status in statuses}


def speech_body(dialect: str, *, callback: bool = False, translation: bool = False) -> dict[str, Any]:
    """The ``requestBody`` of a route: ``common``, ``openai`` or ``asr``."""
    if dialect == "asr":
        return _body({"audio_file": _FILE}, ["audio_file"], None)
    if dialect == "openai":
        fields = dict(_OPENAI)
        if translation:
            for name in ("language", "timestamp_granularities[]", "known_speaker_names[]"):
                del fields[name]
            fields["response_format"] = {**fields["response_format"], "enum": list(RESPONSE_FORMATS[:-1])}
        return _body({"file": _FILE, **fields}, ["file", "model"], None)
    fields = {**_COMMON, **({"callback_url": _CALLBACK} if callback else {})}
    headers: Schema = {
        "type": ["object", "null"],
        "additionalProperties": {"type": "string"},
        "description": "Sent along to audio_url's host alone.",
    }
    by_url = {"audio_url": _AUDIO_URL, **fields, "headers": headers}
    return _body({"audio": _FILE, **fields}, ["audio"], by_url)


def _body(form: dict[str, Schema], required: list[str], as_json: dict[str, Schema] | None) -> dict[str, Any]:
    content: dict[str, Any] = {
        "multipart/form-data": {"schema": {"type": "object", "required": required, "properties": form}}
    }
    if as_json is not None:
        content["application/json"] = {
            "schema": {"type": "object", "required": ["audio_url"], "properties": as_json},
            "example": {"audio_url": "https://example.com/talk.mp3", "language": "en", "formats": "srt"},
        }
    return {"requestBody": {"required": True, "content": content}}


def page(openapi: dict[str, Any]) -> str:
    """The description as one HTML page: no scripts, nothing fetched from anywhere."""
    info = openapi["info"]
    parts = [
        _HEAD.format(title=_escaped(info["title"])),
        f"<h1>{_escaped(info['title'])} {_escaped(info['version'])}</h1>",
    ]
    parts.append(f"<p>{_escaped(info['description'])} <a href='openapi.json'>openapi.json</a></p>")
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation(method.upper(), path, operation))
    return "\n".join([*parts, "</main>"])


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    lines = [
        f"<details><summary><b>{method}</b> <code>{_escaped(path)}</code> {_escaped(operation['summary'])}</summary>",
        f"<p>{_escaped(operation.get('description', ''))}</p>",
    ]
    fields = [
        (f"{one['name']} ({one['in']})", one["schema"] | {"description": one.get("description", "")})
        for one in operation.get("parameters", [])
    ]
    bodies = operation.get("requestBody", {}).get("content", {})
    for media_type, body in bodies.items():
        required = body["schema"].get("required", [])
        lines.append(f"<h3>{media_type}</h3>" + _table(list(body["schema"]["properties"].items()), required))
    if fields:
        lines.append("<h3>Parameters</h3>" + _table(fields, []))
    if "multipart/form-data" in bodies:
        name = bodies["multipart/form-data"]["schema"]["required"][0]
        command = f"curl -X {method} http://localhost:5000{path} -F {name}=@talk.mp3"
        lines.append(f"<pre>{_escaped(command)}</pre>")
    for status, response in operation["responses"].items():
        lines.append(f"<h3>{status}</h3><p>{_escaped(response['description'])}</p>")
        for content in response.get("content", {}).values():
            if "example" in content and status[0] == "2":
                lines.append(f"<pre>{_escaped(json.dumps(content['example'], indent=1, ensure_ascii=False))}</pre>")
    return "\n".join([*lines, "</details>"])


def _table(fields: list[tuple[str, Schema]], required: list[str]) -> str:
    rows = []
    for name, schema in fields:
        choices = ", ".join(map(str, schema.get("enum", []))) or schema.get("type", "")
        default = f"; default {schema['default']}" if "default" in schema else ""
        needed = " (required)" if name in required else ""
        rows.append(
            f"<tr><td><code>{_escaped(name)}</code>{needed}</td><td>{_escaped(str(choices))}{_escaped(default)}</td>"
            f"<td>{_escaped(schema.get('description', ''))}</td></tr>"
        )
    return "<table>" + "".join(rows) + "</table>"


def _escaped(text: str) -> str:
    return html.escape(str(text))


_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
main {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
details {{ border-top: 1px solid #8886; padding: .4rem 0 }}
summary {{ cursor: pointer }}
td {{ padding: .1rem .8rem .1rem 0; vertical-align: top }}
pre {{ overflow-x: auto; background: #8882; padding: .6rem }}
h3 {{ font-size: 1rem; margin: .8rem 0 .2rem }}
</style><main>"""
