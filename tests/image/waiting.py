"""Waiting for a container, looking into it, and stopping it."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.image import engine
from tests.image.engine import podman, run


def until(condition: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def within(name: str, *command: str, stdin: str | None = None) -> engine.Ran:
    return run(engine.within(name, *command), stdin=stdin or "", seconds=120)


def ready(name: str, url: str) -> bool:
    return within(name, "curl", "-fsS", f"{url}/ready").code == 0


def logs(name: str) -> str:
    return podman("logs", name).both


def stop(name: str, seconds: int) -> tuple[int, float]:
    """SIGTERM, and SIGKILL after ``seconds``; exit status and how long it took."""
    begun = time.monotonic()
    assert podman("stop", "--time", str(seconds), name).code == 0
    took = time.monotonic() - begun
    return int(podman("inspect", "--format", "{{.State.ExitCode}}", name).out), took
