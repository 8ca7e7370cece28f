"""How the service is: alive, ready, on what hardware, and what it has counted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from whisper_worker import __version__
from whisper_worker.doors.http_common import Door
from whisper_worker.doors.http_docs import errors, json_response
from whisper_worker.doors.http_errors import RETRY_AFTER
from whisper_worker.doors.http_jobs import Jobs
from whisper_worker.log import get_logger
from whisper_worker.metrics import peak_memory_mb
from whisper_worker.settings import Settings

_log = get_logger("http")


def router(door: Door, jobs: Jobs) -> APIRouter:
    routes = APIRouter(tags=["Service"])

    @routes.get(
        "/health",
        summary="Whether the process is alive",
        responses={200: json_response("It is", {"status": "ok"})},
    )
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @routes.get(
        "/ready",
        summary="Whether requests are answered at once",
        responses={
            200: json_response("The model is loaded and warm", {"status": "ready"}),
            503: json_response("It loads, could not be loaded, or the service is stopping", {"status": "loading"}),
        },
    )
    async def ready() -> Response:
        if door.ready:
            return JSONResponse({"status": "ready"})
        status: dict[str, Any] = {"status": "stopping" if door.draining else "loading"}
        if door.load_failure is not None and not door.draining:
            status = {"status": "failed", "message": door.load_failure}
        return JSONResponse(status, 503, {"Retry-After": str(RETRY_AFTER)})

    @routes.get(
        "/ping",
        status_code=204,
        summary="The same for RunPod's load balancer: 204 while loading, 200 when ready",
        responses={
            200: json_response("Ready", {"status": "ready"}),
            204: {"description": "Loading"},
            503: json_response("Stopping, or without a model", {"status": "stopping"}),
        },
    )
    async def ping() -> Response:
        if door.ready:
            return JSONResponse({"status": "ready"})
        if door.draining or door.load_failure is not None:
            return JSONResponse({"status": "stopping" if door.draining else "failed"}, 503)
        return Response(status_code=204)

    @routes.get(
        "/status",
        summary="Model, device, queues and settings",
        responses={200: json_response("The service's state", _STATUS_EXAMPLE), **errors(401)},
    )
    async def status() -> Response:
        return JSONResponse(await asyncio.to_thread(_status, door, jobs))

    @routes.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=PlainTextResponse,
        responses={200: {"description": "Prometheus' text format"}, **errors(401)},
    )
    async def metrics() -> Response:
        text = await asyncio.to_thread(_metrics, door, jobs)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


_STATUS_EXAMPLE = {
    "version": "0.1.0",
    "uptime_seconds": 86.2,
    "ready": True,
    "model": {"name": "openai/whisper-large-v3-turbo", "compute_type": "float16", "device": "NVIDIA L4"},
    "gpus": [
        {
            "name": "NVIDIA L4",
            "memory_total_mb": 23034,
            "memory_used_mb": 9120,
            "temperature_c": 61,
            "utilization_percent": 87,
        }
    ],
    "queue": {"requests_in_hand": 3, "jobs_queued": 12, "jobs_running": 4},
}


def _status(door: Door, jobs: Jobs) -> dict[str, Any]:
    info = door.service.info
    return {
        "version": __version__,
        "uptime_seconds": round(time.monotonic() - door.started, 1),
        "ready": door.ready,
        "model": None
        if info is None
        else {
            "name": info.name,
            "revision": info.revision,
            "multilingual": info.is_multilingual,
            "compute_type": info.compute_type,
            "device": info.device,
            "engine": info.engine,
        },
        "gpus": gpus(),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "queue": {
            "requests_in_hand": door.desk.in_hand,
            "jobs_queued": jobs.store.count("queued"),
            "jobs_running": jobs.store.count("running"),
        },
        "settings": shown_settings(door.settings),
    }


def _metrics(door: Door, jobs: Jobs) -> str:
    return door.metrics.text(
        (
            ("whisper_requests_in_hand", door.desk.in_hand),
            ("whisper_jobs_queued", jobs.store.count("queued")),
            ("whisper_jobs_running", jobs.store.count("running")),
            ("whisper_model_ready", door.ready),
            ("whisper_uptime_seconds", time.monotonic() - door.started),
            ("whisper_peak_memory_bytes", peak_memory_mb() * 1024 * 1024),
        )
    )


def shown_settings(settings: Settings) -> dict[str, Any]:
    """Settings by variable. Of secrets and paths it says only whether they are set."""
    shown: dict[str, Any] = {}
    for spec in fields(settings):
        value = getattr(settings, spec.name)
        if (
            spec.metadata["secret"]
            or isinstance(value, Path)
            or (isinstance(value, str) and value.startswith(("/", "~")))
        ):
            value = "set" if value else None
        shown[spec.metadata["variables"][0]] = list(value) if isinstance(value, tuple) else value
    return shown


def gpus() -> list[dict[str, Any]] | None:
    """Name, memory in MiB, temperature and load of each card; what a card does not tell is None.

    Empty without a card that has its driver, None where the driver does not answer.
    """
    try:
        import pynvml
    except ImportError:
        return None
    absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    try:
        pynvml.nvmlInit()
        try:
            return [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
        finally:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        if error.value in absent:
            return []
        _log.warning("The cards' driver does not answer", extra={"fields": {"error": type(error).__name__}})
        return None


def _gpu(pynvml: Any, index: int) -> dict[str, Any]:
    def asked(question: Callable[..., Any], *arguments: Any) -> Any:
        # Cards in virtual machines, and parts of a card, do not answer everything; a lost one nothing.
        try:
            return question(*arguments)
        except pynvml.NVMLError:
            return None

    card = asked(pynvml.nvmlDeviceGetHandleByIndex, index)
    memory = load = name = temperature = None
    if card is not None:
        name = asked(pynvml.nvmlDeviceGetName, card)
        memory = asked(pynvml.nvmlDeviceGetMemoryInfo, card)
        temperature = asked(pynvml.nvmlDeviceGetTemperature, card, pynvml.NVML_TEMPERATURE_GPU)
        load = asked(pynvml.nvmlDeviceGetUtilizationRates, card)
    return {
        "name": name,
        "memory_total_mb": None if memory is None else round(memory.total / 2**20),
        "memory_used_mb": None if memory is None else round(memory.used / 2**20),
        "temperature_c": temperature,
        "utilization_percent": None if load is None else load.gpu,
    }
