"""The worker in its container against the control plane: jobs, progress, a cancelled one, and SIGTERM."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.control_plane import ControlPlane
from tests.image import engine
from tests.image.engine import podman, running

JFK_URL = json.loads((engine.ROOT / "test_input.json").read_text(encoding="utf-8"))["input"]["audio_url"]
AUDIO = engine.ROOT / "tests/e2e/audio"


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    jfk = tmp_path / "jfk.ogg"
    jfk.write_bytes(base64.b64decode(JFK_URL.partition(",")[2]))
    async with ControlPlane({"jfk.ogg": jfk, "printing.mp3": AUDIO / "printing.mp3"}) as plane:
        yield plane


async def test_jobs_progress_cancel_and_sigterm(plane: ControlPlane, runpod: str, mounted: list[str]) -> None:
    variables = {**plane.environment, "WHISPER_ALLOW_PRIVATE_URLS": "true", "WHISPER_CONCURRENCY": "2"}
    given = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
    hardened = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "all"]
    with running(runpod, options=[*given, *hardened, *mounted], network="host") as name:
        await plane.submit("cancelled", audio_url=f"{plane.url}/slow")
        await plane.submit("jfk", audio_url=f"{plane.url}/audio/jfk.ogg")
        await plane.submit("missing", audio_url=f"{plane.url}/audio/none.mp3")
        await plane.until(lambda: plane.jobs["jfk"].results and plane.jobs["missing"].results, 120)
        await plane.until(lambda: plane.slow_requests == 1)
        plane.stop("cancelled")
        await plane.until(lambda: plane.slow_requests == 0)
        assert "your country" in plane.jobs["jfk"].output["text"].lower()
        assert plane.jobs["jfk"].progress and not plane.jobs["jfk"].late_progress
        assert plane.jobs["missing"].error["code"] == "DOWNLOAD"

        await plane.submit("last", audio_url=f"{plane.url}/audio/printing.mp3")
        await plane.until(lambda: plane.jobs["last"].taken == 1)
        stopped = await asyncio.to_thread(podman, "stop", "--time", "30", name)
        assert stopped.code == 0, stopped.both
        assert podman("inspect", "--format", "{{.State.ExitCode}}", name).out.strip() == "0", podman("logs", name).both
    assert "art of printing" in plane.jobs["last"].output["text"].lower(), "the job in hand was finished and told"
    assert plane.jobs["cancelled"].results == []
    assert any("jfk" in ids or "cancelled" in ids for ids in plane.pings)
