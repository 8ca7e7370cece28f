"""One recording through every door that takes files: the same text, words and times."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.contract.http_kit import Process
from tests.e2e.control_plane import ControlPlane, worker
from tests.models import model_cache

ROOT = Path(__file__).parents[2]
CLIP = ROOT / "tests" / "data" / "speech" / "jfk.flac"
SEGMENT_KEYS = ("start", "end", "text", "tokens", "avg_logprob", "words")


def substance(answer: dict[str, Any]) -> list[Any]:
    """What a transcript says, without what it cost. The command's files know no more of a word than its times."""
    said = [[segment[key] for key in SEGMENT_KEYS] for segment in answer["segments"]]
    assert said and answer["segments"][0]["words"]
    return [answer["text"].strip(), answer["language"], said]


async def from_runpod(tmp_path: Path, variables: dict[str, str]) -> dict[str, Any]:
    async with ControlPlane() as plane:
        environment = {**variables, **plane.environment}
        async with worker([sys.executable, "handler.py"], environment, ROOT, tmp_path / "log") as plane.process:
            encoded = base64.b64encode(CLIP.read_bytes()).decode()
            await plane.submit("one", audio_base64=encoded, word_timestamps=True)
            await plane.until(lambda: plane.jobs["one"].results)
        output: dict[str, Any] = plane.jobs["one"].output
        return output


def from_command(variables: dict[str, str], program: str, *arguments: str, output: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", f"whisper_worker.doors.{program}", str(CLIP), *arguments]
    options = [
        "--output_format",
        "json",
        "--output_dir",
        str(output),
        "--word_timestamps",
        "True",
        "--verbose",
        "False",
    ]
    subprocess.run([*command, *options], env=variables, cwd=ROOT, check=True, timeout=120)
    answer: dict[str, Any] = json.loads((output / "jfk.json").read_text(encoding="utf-8"))
    return answer


async def test_one_recording_gives_one_transcript(tmp_path: Path) -> None:
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "WHISPER_MODEL_CACHE": str(model_cache("tiny.en")),
        "WHISPER_THREADS": "2",
        "WHISPER_TMPDIR": str(tmp_path),
    }
    with Process(tmp_path) as service, service.client() as client:
        with CLIP.open("rb") as audio:
            answer = client.post("/transcribe", files={"audio": audio}, data={"word_timestamps": "true"})
        expected = substance(answer.json())
        remote = from_command(variables, "remote", "--server", str(client.base_url), output=tmp_path / "remote")
    assert substance(remote) == expected
    assert substance(from_command(variables, "cli", output=tmp_path / "local")) == expected
    assert substance(await from_runpod(tmp_path, variables)) == expected
