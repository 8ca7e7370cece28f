"""How the live service is, over plain HTTP on a port of its own: /health, /ready, /status, /metrics.

It answers from a thread of its own, also while the model loads or the machine is busy.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from whisper_worker.metrics import peak_memory_mb

_FAILING = 3
"""Sessions in a row that the engine failed, from which on the service is unwell: a card that is lost stays lost."""
_GPU_SECONDS = 5.0
"""For so long the figures of the GPU are taken as they were."""
_GPU_FIELDS = {
    "name": "name",
    "memory_total_mb": "memory.total",
    "memory_used_mb": "memory.used",
    "memory_free_mb": "memory.free",
    "temperature_c": "temperature.gpu",
    "utilization_percent": "utilization.gpu",
}


@dataclass(slots=True)
class Vitals:
    """What the service knows of itself. Written by the event loop, read by the health threads."""

    port: int
    max_clients: int
    environment: Mapping[str, str]
    ready: bool = False
    clients: int = 0
    connections: int = 0
    turned_away: int = 0
    errors: int = 0
    recordings_failed: int = 0
    engine_failures: int = 0
    """Sessions that ended so since something was last transcribed."""
    segments: int = 0
    decodes: int = 0
    audio_seconds: float = 0.0
    decode_seconds: float = 0.0
    worst_lag: float = 0.0
    """Longest wait for one decode in the sessions that ended."""
    started: float = field(default_factory=time.time)

    @property
    def healthy(self) -> bool:
        return self.engine_failures < _FAILING

    @property
    def serving(self) -> bool:
        return self.ready and self.healthy


class HealthServer:
    """Serves from the moment it is made until :meth:`close`."""

    def __init__(self, host: str, port: int, vitals: Vitals) -> None:
        """Port 0 takes any free one. Raises ``OSError`` where the port is taken."""

        class Handler(_Handler):
            pages = Pages(vitals)

        self._server = _Server((host, port), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        """At an address of either family; with none, at all of both, as the service itself listens then."""
        host, port = address
        self._both = not host and socket.has_dualstack_ipv6()
        if self._both:
            host = "::"
        if host:
            self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not self._both)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has left; the default prints their address."""


class Pages:
    """The pages by path, for whichever port they are asked on."""

    def __init__(self, vitals: Vitals) -> None:
        self._vitals = vitals
        self._lock = threading.Lock()
        self._gpu: dict[str, object] | None = None
        self._gpu_read = float("-inf")

    def get(self, path: str) -> tuple[int, str, str] | None:
        """Status, content type and body of a page; None where there is no such page."""
        vitals = self._vitals
        now = _iso(time.time())
        if path == "/health":
            if vitals.healthy:
                return _json(200, {"status": "healthy", "timestamp": now})
            reason = "The engine fails session after session; the log says how. Restart the service."
            return _json(503, {"status": "unhealthy", "reason": reason, "timestamp": now})
        if path == "/ready":
            page = {
                "status": "ready" if vitals.serving else "not_ready",
                "whisperlive_port": vitals.port,
                "timestamp": now,
            }
            return _json(200 if vitals.serving else 503, page)
        if path == "/status":
            return _json(200, self._status())
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4; charset=utf-8", _metrics(vitals)
        return None

    def _status(self) -> dict[str, object]:
        vitals = self._vitals
        return {
            "status": "healthy" if vitals.healthy else "unhealthy",
            "uptime_seconds": round(time.time() - vitals.started),
            "startup_time": _iso(vitals.started),
            "whisperlive": {
                "ready": vitals.serving,
                "port": vitals.port,
                "clients": vitals.clients,
                "max_clients": vitals.max_clients,
            },
            "gpu": self._gpu_figures(),
            "memory": {"peak_mb": round(peak_memory_mb(), 1)},
            "environment": dict(vitals.environment),
        }

    def _gpu_figures(self) -> dict[str, object] | None:
        """The first GPU's, None where there is none."""
        with self._lock:
            if time.monotonic() - self._gpu_read > _GPU_SECONDS:
                self._gpu = _read_gpu()
                self._gpu_read = time.monotonic()
            return self._gpu


def _read_gpu() -> dict[str, object] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, f"--query-gpu={','.join(_GPU_FIELDS.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")] if done.stdout else []
    if len(values) != len(_GPU_FIELDS):
        return None
    return {name: int(value) if value.isdigit() else value for name, value in zip(_GPU_FIELDS, values, strict=True)}


def _metrics(vitals: Vitals) -> str:
    rows: list[tuple[str, str, str, float]] = [
        ("ready", "gauge", "Whether clients are served.", int(vitals.serving)),
        ("clients", "gauge", "Clients being served.", vitals.clients),
        ("max_clients", "gauge", "Clients served at a time.", vitals.max_clients),
        ("connections_total", "counter", "Clients that got a seat.", vitals.connections),
        ("turned_away_total", "counter", "Clients that were told to wait.", vitals.turned_away),
        ("errors_total", "counter", "Sessions that ended with an error.", vitals.errors),
        ("engine_failures", "gauge", "Sessions that the engine failed since it last worked.", vitals.engine_failures),
        ("recordings_failed_total", "counter", "Recordings that broke off.", vitals.recordings_failed),
        ("segments_total", "counter", "Completed segments.", vitals.segments),
        ("decodes_total", "counter", "Decodes in sessions that ended.", vitals.decodes),
        ("audio_seconds_total", "counter", "Sound received in sessions that ended.", vitals.audio_seconds),
        ("decode_seconds_total", "counter", "Waiting for decodes in sessions that ended.", vitals.decode_seconds),
        ("worst_lag_seconds", "gauge", "Longest wait for one decode.", vitals.worst_lag),
        ("peak_memory_bytes", "gauge", "Largest resident size so far.", peak_memory_mb() * 2**20),
    ]
    return "".join(
        f"# HELP whisper_live_{name} {meaning}\n# TYPE whisper_live_{name} {kind}\nwhisper_live_{name} {value:.10g}\n"
        for name, kind, meaning, value in rows
    )


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _json(status: int, page: Mapping[str, object]) -> tuple[int, str, str]:
    return status, "application/json", json.dumps(page)


class _Handler(BaseHTTPRequestHandler):
    pages: Pages
    timeout = 10
    protocol_version = "HTTP/1.1"
    server_version = "live"
    sys_version = ""

    def do_GET(self) -> None:
        found = self.pages.get(self.path.partition("?")[0].rstrip("/"))
        status, kind, body = found or _json(404, {"error": "There are /health, /ready, /status and /metrics."})
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Health checks come every few seconds and say nothing new."""
