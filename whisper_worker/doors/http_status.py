"""How the service is: alive, ready, on what hardware, and what it has counted."""

from __future__ import annotations

import asyncio
import importlib
import time
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
from whisper_worker.metrics import peak_memory_mb
from whisper_worker.settings import Settings


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


def gpus() -> list[dict[str, Any]]:
    """Name, memory, temperature and load of each card; empty without cards or the package that asks them."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml: Any, handle: Any) -> dict[str, Any]:
    def asked(question: Any, *arguments: Any) -> Any:
        # Cards in virtual machines, and parts of a card, do not answer everything.
        try:
            return question(handle, *arguments)
        except pynvml.NVMLError:
            return None

    memory = asked(pynvml.nvmlDeviceGetMemoryInfo)
    load = asked(pynvml.nvmlDeviceGetUtilizationRates)
    return {
        "name": asked(pynvml.nvmlDeviceGetName),
        "memory_total_mb": memory and round(memory.total / 2**20),
        "memory_used_mb": memory and round(memory.used / 2**20),
        "temperature_c": asked(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        "utilization_percent": load and load.gpu,
    }
