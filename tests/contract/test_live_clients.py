"""WhisperLive's own Python clients, unmodified, against this server.

Installed from their wheels without dependencies; a sound card's stand-in makes a file as long
as its transmission. Each runs in a process of its own, since both packages have one name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.contract.live_kit import (
    JFK,
    RunningServer,
    client_packages,
    finish_client,
    folded,
    sound,
    start_client,
    write_wav,
)
from tests.models import model_cache
from whisper_worker.service import Service
from whisper_worker.settings import Settings

UPSTREAM, FORK = "whisper-live==0.10.0", "whisper-live-client==0.6.3"
OLD, NEW = "websocket-client==1.8.0", "websocket-client==1.9.2"
AV, LOGURU = "av==15.1.0", "loguru==0.7.3"

FILE = """
import sys
try:
    from whisper_live.transcription_client import TranscriptionClient
except ImportError:
    from whisper_live.client import TranscriptionClient
port, audio, srt = int(sys.argv[1]), sys.argv[2], sys.argv[3]
client = TranscriptionClient("127.0.0.1", port, lang="en", model="tiny.en", output_transcription_path=srt)
client(audio)
"""

STREAM = """
import json, sys, wave
from whisper_live.client import StreamingTranscriptionClient
port, audio = int(sys.argv[1]), sys.argv[2]
committed, partial = [], []
client = StreamingTranscriptionClient(
    "127.0.0.1", port, lang="en", model="tiny.en",
    on_partial_transcript=lambda text, _: partial.append(text),
    on_committed_transcript=lambda text, segments: committed.append(segments[0]),
)
with client, wave.open(audio) as file:
    while data := file.readframes(1600):
        client.send(data)
print(json.dumps({"committed": committed, "partial": partial}))
"""

WAIT = """
import sys
from whisper_live.client import TranscriptionClient
for _ in range(int(sys.argv[3])):
    client = TranscriptionClient("127.0.0.1", int(sys.argv[1]), lang="en", model="tiny.en")
    client(sys.argv[2])
    assert not client.client.recording
print("all came back")
"""


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings(model_cache=model_cache("tiny.en"))


@pytest.fixture(scope="module")
def service(settings: Settings) -> Iterator[Service]:
    made = Service(settings)
    yield made
    made.close()


@pytest.fixture
def jfk(tmp_path: Path) -> Path:
    return write_wav(tmp_path / "jfk.wav", sound("jfk.flac"))


def srt_texts(path: Path) -> list[str]:
    blocks = re.split(r"\n\n", path.read_text(encoding="utf-8").strip())
    return [" ".join(block.splitlines()[2:]) for block in blocks]


def check_files(service: Service, settings: Settings, jfk: Path, tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    with RunningServer(service, settings) as server:
        running = []
        for number, (client, websocket) in enumerate(pairs):
            extra = (AV, LOGURU) if client == FORK else (AV,)
            cwd = tmp_path / str(number)
            cwd.mkdir()
            packages = client_packages(client, websocket, *extra)
            running.append((start_client(packages, FILE, server.port, jfk, "out.srt", cwd=cwd), cwd / "out.srt"))
        for process, srt in running:
            output = finish_client(process, timeout=80)
            assert srt.exists(), output[-2000:]
            assert folded(" ".join(srt_texts(srt))) == JFK


def test_a_file_becomes_an_srt_with_nothing_lost_or_doubled(
    service: Service, settings: Settings, jfk: Path, tmp_path: Path
) -> None:
    check_files(service, settings, jfk, tmp_path, [(UPSTREAM, NEW), (FORK, OLD)])


@pytest.mark.long
def test_so_it_does_with_the_other_websocket_client(
    service: Service, settings: Settings, jfk: Path, tmp_path: Path
) -> None:
    check_files(service, settings, jfk, tmp_path, [(UPSTREAM, OLD), (FORK, NEW)])


def test_each_segment_is_committed_once_and_the_tail_comes_after_the_end(
    service: Service, settings: Settings, jfk: Path, tmp_path: Path
) -> None:
    # The last word ends just before the sound does: there is no pause to end it.
    waveform = sound("jfk.flac")
    write_wav(jfk, waveform[: int(10.4 * 16000)])
    with RunningServer(service, settings) as server:
        packages = client_packages(UPSTREAM, NEW, AV)
        output = finish_client(start_client(packages, STREAM, server.port, jfk, cwd=tmp_path), timeout=60)
    told = json.loads(output.splitlines()[-1])
    texts = [segment["text"] for segment in told["committed"]]
    assert folded(" ".join(texts)) == JFK
    assert told["partial"]
    times = [float(segment[edge]) for segment in told["committed"] for edge in ("start", "end")]
    assert times == sorted(times)


def test_a_client_beyond_the_seats_is_told_to_wait_and_does_not_hang(
    service: Service, settings: Settings, jfk: Path, tmp_path: Path
) -> None:
    from websockets.sync.client import connect

    from tests.contract.live_kit import config

    with RunningServer(service, replace(settings, max_clients=1)) as server:
        with connect(f"ws://127.0.0.1:{server.port}/") as seated:
            seated.send(json.dumps(config()))
            assert json.loads(seated.recv(timeout=10))["message"] == "SERVER_READY"
            packages = client_packages(UPSTREAM, OLD, AV)
            process = start_client(packages, WAIT, server.port, jfk, 30, cwd=tmp_path)
            assert "all came back" in finish_client(process, timeout=60)
        assert server.vitals.turned_away == 30
