"""Where health is answered, what a start that fails says, and sessions that end though a cancellation was lost."""

from __future__ import annotations

import asyncio
import logging
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from whisper_worker.doors.live import _end, main
from whisper_worker.doors.live_health import HealthServer, Pages, Vitals
from whisper_worker.log import ROOT

ADDRESSES = ("127.0.0.1", "[::1]")


def answers(host: str, port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


async def listens(host: str) -> list[bool]:
    """Whether a service of asyncio's, as the live service's is, takes connections at each of the addresses."""
    server = await asyncio.start_server(lambda reader, writer: writer.close(), host, 0)
    async with server:
        ports = {one.family: one.getsockname()[1] for one in server.sockets}
        found = []
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family) as probe:
                probe.settimeout(5)
                found.append(family in ports and probe.connect_ex((address, ports[family])) == 0)
        return found


@pytest.mark.parametrize("host", ["", "0.0.0.0", "127.0.0.1", "::", "::1"])
def test_health_listens_where_the_service_does(host: str) -> None:
    """With no host the service took both families, and health IPv4 alone."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6")
    with closing(HealthServer(host, 0, Vitals(0, 1, {}))) as health:
        assert [answers(address, health.port) for address in ADDRESSES] == asyncio.run(listens(host))


def test_counters_do_not_stand_still() -> None:
    vitals = Vitals(0, 1, {}, audio_seconds=1_234_567.5)
    page = Pages(vitals).get("/metrics")
    assert page is not None and "whisper_live_audio_seconds_total 1234567.5\n" in page[2]


@pytest.fixture
def root_log() -> Iterator[None]:
    """Takes back what ``main`` does to the log."""
    root = logging.getLogger(ROOT)
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = before


@pytest.mark.parametrize("port", ["65536", "-1", "http"])
def test_a_wrong_port_is_a_wrong_argument(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    """65536 ended in a traceback, once the model was loaded."""
    with pytest.raises(SystemExit) as ended:
        main([f"--health-port={port}"])
    assert ended.value.code == 2 and "0 to 65535" in capsys.readouterr().err


@pytest.mark.usefixtures("root_log")
def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """There are two; whoever cannot log in could not tell which."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--host", "127.0.0.1", "--port", "0", "--health-port", str(port)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "Address already in use" in said and f"health_port={port}" in said


@pytest.mark.usefixtures("root_log")
def test_recordings_that_cannot_be_kept_are_told_at_the_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The service was ready, and refused every client."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("WHISPER_LIVE_RECORDINGS", str(tmp_path / "file" / "kept"))
    assert main(["--host", "127.0.0.1", "--port", "0", "--health-port", "0"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "WHISPER_LIVE_RECORDINGS" in said and "Not a directory" in said and str(tmp_path) not in said


async def test_a_lost_cancellation_is_repeated() -> None:
    """``wait_for`` below Python 3.12 may lose one: the seat was never free again."""
    lost = 0

    async def send_for_ever() -> None:
        nonlocal lost
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            lost += 1
        await asyncio.Event().wait()

    tasks = [asyncio.create_task(send_for_ever()), asyncio.create_task(asyncio.sleep(0))]
    await asyncio.sleep(0)
    await asyncio.wait_for(_end(tasks), 10)
    assert lost == 1 and all(task.done() for task in tasks)
