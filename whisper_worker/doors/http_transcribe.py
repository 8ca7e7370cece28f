"""Routes that answer in the same request: the common one, OpenAI's, and whisper-asr-webservice's."""

from __future__ import annotations

import asyncio
import time
import wave
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from whisper_worker import formats
from whisper_worker.audio.jobdir import job_directory
from whisper_worker.doors import http_openai as openai
from whisper_worker.doors.http_body import Body, read_body
from whisper_worker.doors.http_common import Door, answer, progress_to_dict, read_job, strict, warning_headers
from whisper_worker.doors.http_desk import KEEP_ALIVE, Emit, EventStream, begun, sse
from whisper_worker.doors.http_docs import (
    SSE_RESPONSE,
    TRANSCRIPT_EXAMPLE,
    errors,
    json_response,
    speech_body,
)
from whisper_worker.doors.http_errors import Refused, error_body, refusal
from whisper_worker.errors import InvalidInput, TooLarge
from whisper_worker.languages import LANGUAGES
from whisper_worker.schema import segment_to_dict
from whisper_worker.types import (
    FORMATS,
    SAMPLE_RATE,
    CancelToken,
    JobInput,
    Segment,
    Task,
    TranscribeOptions,
    Transcript,
)


class _Visit:
    """A request with audio: its place at the desk and its directory, for as long as it is answered."""

    def __init__(self, door: Door, request: Request) -> None:
        self.door = door
        self.request = request
        self._stack = AsyncExitStack()
        self._handed_over = False

    async def __aenter__(self) -> _Visit:
        self._stack.enter_context(self.door.desk.place())
        try:
            self.directory = self._stack.enter_context(job_directory(self.door.settings))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._handed_over:
            await self._stack.aclose()

    async def body(self) -> Body:
        return await read_body(self.request, self.directory, self.door.settings)

    async def stream(self, work: Callable[[CancelToken, Emit], Any], as_piece: Callable[[str, Any], bytes]) -> Response:
        """Answer with the work's events; the visit ends with the stream."""
        self._handed_over = True
        stack = self._stack

        async def pieces() -> AsyncGenerator[bytes, None]:
            async with stack:
                events = self.door.desk.events(work)
                try:
                    async for name, data in events:
                        yield as_piece(name, data) if name else KEEP_ALIVE
                finally:
                    await events.aclose()

        def as_event(error: Exception) -> bytes:
            path = self.request.url.path
            refused = refusal(error, path)
            self.door.metrics.add("whisper_errors_total", code=refused.code)
            body = error_body(refused, path)
            return sse(body) if path.startswith("/v1/") else sse(body["error"], "error")

        return EventStream(await begun(pieces(), as_event))


def router(door: Door) -> APIRouter:
    routes = APIRouter()
    _add_common(routes, door)
    _add_openai(routes, door)
    _add_asr(routes, door)
    return routes


# -- the common route --------------------------------------------------------------------


def _add_common(routes: APIRouter, door: Door) -> None:
    @routes.post(
        "/transcribe",
        tags=["Transcription"],
        summary="A recording in, its transcript out",
        description="The audio as `audio` or `file` of a form, or JSON with `audio_url`. With `stream=true` or "
        "`Accept: text/event-stream` the answer is server-sent events: `progress`, `segment`, and `done` with the "
        "whole transcript, or `error`.",
        responses={
            200: {
                **json_response("The transcript", TRANSCRIPT_EXAMPLE, "Transcript"),
                "content": {
                    **json_response("", TRANSCRIPT_EXAMPLE, "Transcript")["content"],
                    **SSE_RESPONSE["content"],
                },
            },
            **errors(401, 403, 413, 415, 422, 424, 429, 500, 503, 504),
        },
        openapi_extra=speech_body("common"),
    )
    async def transcribe(request: Request) -> Response:
        async with _Visit(door, request) as visit:
            body = await visit.body()
            wanted = body.fields.pop("stream", None)
            if wanted is None:
                wanted = "text/event-stream" in request.headers.get("accept", "")
            stream = openai.flag(wanted, "stream")
            job = await asyncio.to_thread(read_job, body, door)
            if stream:
                return await visit.stream(lambda cancel, emit: _tell(door, job, cancel, emit), _common_piece)
            result = await door.desk.run(request, lambda cancel: answer(job, door.transcribe(job, cancel)))
            return JSONResponse(result)


def _tell(door: Door, job: JobInput, cancel: CancelToken, emit: Emit) -> dict[str, Any]:
    return answer(
        job,
        door.transcribe(
            job,
            cancel,
            on_progress=lambda progress: emit("progress", progress_to_dict(progress)),
            on_segment=lambda segment: emit("segment", segment_to_dict(segment)),
        ),
    )


def _common_piece(name: str, data: Any) -> bytes:
    return sse(data, "done" if name == "result" else name)


# -- OpenAI ------------------------------------------------------------------------------

_OPENAI_ERRORS = errors(400, 401, 404, 413, 415, 429, 500, 503, 504, schema="OpenAIError")
_OPENAI_ANSWER: dict[str, Any] = {
    "description": "In the form that response_format names",
    "content": {
        "application/json": {
            "schema": {"type": "object"},
            "example": {"text": "And so my fellow Americans ...", "usage": {"type": "duration", "seconds": 11.0}},
        },
        "text/plain": {"schema": {"type": "string"}},
        "application/x-subrip": {"schema": {"type": "string"}},
        "text/vtt": {"schema": {"type": "string"}},
        **SSE_RESPONSE["content"],
    },
}


def _add_openai(routes: APIRouter, door: Door) -> None:
    @routes.post(
        "/v1/audio/transcriptions",
        tags=["OpenAI"],
        summary="OpenAI's transcription",
        responses={200: _OPENAI_ANSWER, **_OPENAI_ERRORS},
        openapi_extra=speech_body("openai"),
    )
    async def transcriptions(request: Request) -> Response:
        return await _openai(door, request, "transcribe")

    @routes.post(
        "/v1/audio/translations",
        tags=["OpenAI"],
        summary="OpenAI's translation into English",
        responses={200: _OPENAI_ANSWER, **_OPENAI_ERRORS},
        openapi_extra=speech_body("openai", translation=True),
    )
    async def translations(request: Request) -> Response:
        return await _openai(door, request, "translate")

    created = int(time.time())

    @routes.get(
        "/v1/models",
        tags=["OpenAI"],
        summary="The loaded model, by its own name and OpenAI's",
        responses={
            200: json_response("Models", {"object": "list", "data": [openai.model_to_dict("whisper-1", created)]}),
            **errors(401, 503, schema="OpenAIError"),
        },
    )
    async def models() -> Response:
        names = (await asyncio.to_thread(door.served_model), *openai.OPENAI_MODELS)
        data = [openai.model_to_dict(name, created) for name in names]
        return JSONResponse({"object": "list", "data": data})

    @routes.get(
        "/v1/models/{model_id:path}",
        tags=["OpenAI"],
        summary="One of them",
        responses={
            200: json_response("The model", openai.model_to_dict("whisper-1", created)),
            **errors(401, 404, 503, schema="OpenAIError"),
        },
    )
    async def model(model_id: str) -> Response:
        if model_id not in (await asyncio.to_thread(door.served_model), *openai.OPENAI_MODELS):
            raise openai.model_not_found()
        return JSONResponse(openai.model_to_dict(model_id, created))


async def _openai(door: Door, request: Request, task: Task) -> Response:
    async with _Visit(door, request) as visit:
        order = await asyncio.to_thread(openai.read_order, await visit.body(), door, task)
        if order.response_format == "diarized_json":
            return await _diarized(door, visit, order)
        if order.stream:
            return await visit.stream(
                lambda cancel, emit: openai.done_event(_deltas(door, order.job, cancel, emit)),
                lambda _, data: sse(data),
            )
        transcript = await door.desk.run(request, lambda cancel: door.transcribe(order.job, cancel))
        result = openai.render(order, transcript)
        if isinstance(result, dict):
            return JSONResponse(result)
        return Response(result, headers=warning_headers(transcript.warnings), media_type=openai.media_type(order))


def _deltas(door: Door, job: JobInput, cancel: CancelToken, emit: Emit) -> Transcript:
    first = True

    def on_segment(segment: Segment) -> None:
        nonlocal first
        emit("delta", openai.delta_event(segment, first=first))
        first = False

    return door.transcribe(job, cancel, on_segment=on_segment)


async def _diarized(door: Door, visit: _Visit, order: openai.SpeechOrder) -> Response:
    from whisper_worker.engine.scheduler import Priority

    def work(cancel: CancelToken) -> dict[str, Any]:
        channels = door.service.transcribe_channels(order.job, cancel=cancel, priority=Priority.INTERACTIVE)
        door.metrics.add("whisper_audio_seconds_total", sum(transcript.duration for transcript in channels))
        return openai.render_diarized(order, channels)

    if not order.stream:
        return JSONResponse(await door.desk.run(visit.request, work))

    def tell(cancel: CancelToken, emit: Emit) -> dict[str, Any]:
        # Who speaks when is known only when all channels have been heard.
        result = work(cancel)
        for segment in result["segments"]:
            emit("segment", segment)
        done = {"type": "transcript.text.done", "text": result["text"], "usage": result["usage"]}
        return {**done, "warnings": result["warnings"]} if "warnings" in result else done

    return await visit.stream(tell, lambda _, data: sse(data))


# -- whisper-asr-webservice --------------------------------------------------------------


def _add_asr(routes: APIRouter, door: Door) -> None:
    @routes.post(
        "/asr",
        tags=["whisper-asr-webservice"],
        summary="Transcription as whisper-asr-webservice has it",
        response_class=PlainTextResponse,
        responses={
            200: {"description": "The transcript in the form that `output` names"},
            **errors(401, 413, 415, 422, 429, 500, 503, 504),
        },
        openapi_extra=speech_body("asr"),
    )
    async def asr(
        request: Request,
        encode: bool = Query(True, description="false: the upload is raw PCM, 16-bit little-endian, 16 kHz, mono"),
        task: str | None = Query(None, description="transcribe or translate"),
        language: str | None = Query(None, description="Code or name; left out, it is detected"),
        initial_prompt: str | None = Query(None),
        vad_filter: bool | None = Query(None, description="Left out: on"),
        word_timestamps: bool = Query(False),
        diarize: bool = Query(False, description="Has no effect here; a warning says so"),
        min_speakers: int | None = Query(None, description="Has no effect here; a warning says so"),
        max_speakers: int | None = Query(None, description="Has no effect here; a warning says so"),
        output: str = Query("txt", description=f"One of {', '.join(FORMATS)}"),
    ) -> Response:
        if output not in FORMATS:
            raise InvalidInput(f"The field output must be one of {', '.join(FORMATS)}.")
        async with _Visit(door, request) as visit:
            body = await _asr_body(visit, encode=encode)
            _drop_read(body, request, "encode", "output", "vad_filter", "diarize", "min_speakers", "max_speakers")
            if vad_filter is not None:
                body.fields["vad"] = vad_filter
            job = await asyncio.to_thread(read_job, body, door)
            without_effect = (("diarize", diarize), ("min_speakers", min_speakers), ("max_speakers", max_speakers))
            said = tuple(
                f"{name} was ignored: /v1/audio/transcriptions with diarized_json tells speakers apart by channel."
                for name, value in without_effect
                if value
            )
            if said and strict(body.fields, door.settings):
                raise InvalidInput(" ".join(said) + " Remove it, or send strict=false.")
            job = replace(job, warnings=(*job.warnings, *said))
            transcript = await door.desk.run(request, lambda cancel: door.transcribe(job, cancel))
            return PlainTextResponse(
                formats.write(transcript, output),
                headers={
                    "Asr-Engine": transcript.receipt.engine if transcript.receipt else door.settings.engine,
                    "Content-Disposition": f"attachment; filename*=UTF-8''{quote(body.filename, safe='')}.{output}",
                    **warning_headers(transcript.warnings),
                },
            )

    @routes.post(
        "/detect-language",
        tags=["whisper-asr-webservice"],
        summary="The language spoken, heard at several places of the recording",
        responses={
            200: json_response(
                "The language", {"detected_language": "english", "language_code": "en", "confidence": 0.98}
            ),
            **errors(401, 413, 415, 422, 429, 500, 503, 504),
        },
        openapi_extra=speech_body("asr"),
    )
    async def detect_language(request: Request, encode: bool = Query(True)) -> Response:
        from whisper_worker.engine.scheduler import Priority

        async with _Visit(door, request) as visit:
            body = await _asr_body(visit, encode=encode)
            _drop_read(body, request, "encode")
            job = _detection(await asyncio.to_thread(read_job, body, door))
            code, probability = await door.desk.run(
                request,
                lambda cancel: door.service.detect_language(job, cancel=cancel, priority=Priority.INTERACTIVE),
            )
            return JSONResponse(
                {
                    # "und" is ISO 639's code for a language that could not be determined.
                    "detected_language": LANGUAGES.get(code or "", "undetermined"),
                    "language_code": code or "und",
                    "confidence": probability or 0.0,
                },
                headers=warning_headers(job.warnings),
            )


_DETECTION_FIELDS = frozenset(("languages", "multilingual", "vad", "vad_threshold", "clip_timestamps", "strict"))
"""Options that change what is listened to, or what may be heard."""


def _detection(job: JobInput) -> JobInput:
    """``job`` with what has no part in detecting a language taken out and named."""
    plain = TranscribeOptions()
    names = [
        field.name
        for field in fields(plain)
        if field.name not in _DETECTION_FIELDS and getattr(job.options, field.name) != getattr(plain, field.name)
    ]
    said = tuple(f"{name} has no effect on detecting the language and was ignored." for name in names)
    if said and job.options.strict:
        raise InvalidInput(" ".join(said) + " Remove it, or send strict=false.")
    return replace(job, options=replace(job.options, language=None), warnings=(*job.warnings, *said))


def _drop_read(body: Body, request: Request, *names: str) -> None:
    """Take out what the route has read from the address. In a form it counts as any other field."""
    for name in names:
        if name in request.query_params:
            body.fields.pop(name, None)


async def _asr_body(visit: _Visit, *, encode: bool) -> Body:
    body = await visit.body()
    if body.upload is None:
        raise Refused(422, "INVALID_INPUT", "The field audio_file is missing: send the recording as a file.")
    if encode:
        return body
    return replace(body, upload=await asyncio.to_thread(_with_header, body.upload))


def _with_header(raw: Path) -> Path:
    """Raw PCM as a WAV file: nothing has to guess then what the bytes are."""
    if raw.stat().st_size >= 1 << 32:
        raise TooLarge("Raw audio may hold 4 GiB; send it encoded.")
    path = raw.with_name("raw.wav")
    with raw.open("rb") as source, wave.open(str(path), "wb") as target:
        target.setnchannels(1)
        target.setsampwidth(2)
        target.setframerate(SAMPLE_RATE)
        while block := source.read(1 << 20):
            target.writeframesraw(block)
    return path
