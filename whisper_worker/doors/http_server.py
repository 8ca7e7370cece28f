"""Runs the application under uvicorn: one socket, an end in order, an end for want of work."""

from __future__ import annotations

import signal
import socket

import uvicorn
from fastapi import FastAPI

from whisper_worker.settings import Settings


class Server(uvicorn.Server):
    """uvicorn's server, whose application hears of the end when it begins and not when all is over."""

    def __init__(self, app: FastAPI, settings: Settings, idle_timeout: float | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=round(settings.drain_timeout),
            )
        )
        self._state = app.state
        self._idle_timeout = idle_timeout

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; whether to stop."""
        idle = self._idle_timeout is not None and self._state.idle_seconds() > self._idle_timeout
        stopping = await super().on_tick(counter) or idle
        if stopping:
            self._state.drain()
        return stopping


def run(app: FastAPI, listener: socket.socket, settings: Settings, idle_timeout: float | None) -> None:
    """Serve until a signal or idleness ends it."""
    server = Server(app, settings, idle_timeout)
    # The server raises the signal again when it has stopped, for whoever listened before: having
    # stopped in order is no failure. And one that comes before it listens counts too.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    server.run(sockets=[listener])
