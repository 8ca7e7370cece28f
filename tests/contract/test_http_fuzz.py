"""Whatever the description allows, and what it does not, is answered: never with a 500, never with silence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.http_kit import serving
from whisper_worker.audio.address import AddressGuard, IPAddress
from whisper_worker.errors import DownloadError


def _nowhere(host: str, port: int) -> list[IPAddress]:
    raise DownloadError("Nothing is fetched in this test.", retryable=False)


def test_every_operation_under_odd_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The addresses in the examples are real ones.
    monkeypatch.setitem(AddressGuard.__init__.__kwdefaults__, "resolve", _nowhere)
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    with serving(tmp_path / "jobs") as client:
        command = [
            *(sys.executable, "-W", "ignore", "-m", "schemathesis.cli", "run", f"{client.base_url}/openapi.json"),
            *("--checks", checks, "--phases", "examples,coverage,fuzzing", "--max-examples", "8", "--seed", "1"),
            *("--mode", "all", "--request-timeout", "20", "--suppress-health-check", "all", "--no-color"),
            *("--generation-deterministic", "--continue-on-failure"),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        operations = sum(map(len, client.get("/openapi.json").json()["paths"].values()))
        assert f"Tested: {operations}\n" in done.stdout
        assert client.get("/ready").status_code == 200
