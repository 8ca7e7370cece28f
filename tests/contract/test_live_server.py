"""The live door by plain WebSocket: seats, ends, bad frames, slow readers, silence, many at once."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import io
import json
import logging
import resource
import socket
import struct
import sys
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.contract.live_kit import JFK, RunningServer, config, folded, sound
from tests.models import model_cache
from whisper_worker import log
from whisper_worker.doors import live
from whisper_worker.doors.live import CLOSE_CODES
from whisper_worker.doors.live_session import Stream
from whisper_worker.doors.live_whisperlive import Outbox
from whisper_worker.errors import ERROR_CODES, EngineError, WhisperWorkerError
from whisper_worker.service import Service
from whisper_worker.settings import Settings
from whisper_worker.types import TranscribeOptions

Message = dict[str, Any]


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings(model_cache=model_cache("tiny.en"))


@pytest.fixture(scope="module")
def service(settings: Settings) -> Iterator[Service]:
    made = Service(settings)
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(service: Service, settings: Settings) -> Iterator[RunningServer]:
    with RunningServer(service, settings) as running:
        yield running


@pytest.fixture(scope="module")
def jfk() -> npt.NDArray[np.int16]:
    return sound("jfk.flac")


def address(server: RunningServer, path: str = "/") -> str:
    return f"ws://127.0.0.1:{server.port}{path}"


async def begin(connection: ClientConnection, **changes: Any) -> list[Message]:
    """Configure, and wait until the server is ready: what it said until then."""
    await connection.send(json.dumps(config(**changes)))
    said = []
    while True:
        said.append(json.loads(await asyncio.wait_for(connection.recv(), 20)))
        if said[-1].get("message") == "SERVER_READY" or said[-1].get("status") == "ERROR":
            return said


def frames(waveform: npt.NDArray[np.int16], size: int = 4096) -> Iterator[bytes]:
    for at in range(0, len(waveform), size):
        yield (waveform[at : at + size].astype(np.float32) / 32768).tobytes()


async def until_closed(connection: ClientConnection, timeout: float = 60) -> list[Message]:
    messages: list[Message] = []

    async def read() -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                messages.append(json.loads(await connection.recv()))

    await asyncio.wait_for(read(), timeout)
    return messages


async def transcribe(
    server: RunningServer, waveform: npt.NDArray[np.int16], path: str = "/", **changes: Any
) -> list[Message]:
    async with connect(address(server, path)) as connection:
        await begin(connection, **changes)
        reading = asyncio.create_task(until_closed(connection))
        for frame in frames(waveform):
            await connection.send(frame)
        await connection.send(b"END_OF_AUDIO")
        messages = await reading
        assert connection.close_code == 1000
        return messages


def completed(messages: list[Message]) -> list[Message]:
    """Each completed segment once, in order."""
    seen: dict[tuple[str, str], Message] = {}
    for message in messages:
        for segment in message.get("segments", []):
            if segment["completed"]:
                before = seen.setdefault((segment["start"], segment["text"]), segment)
                assert before == segment, "a completed segment changed"
    return list(seen.values())


def text_of(messages: list[Message]) -> str:
    return folded("".join(segment["text"] for segment in completed(messages)))


# -- the protocol ----------------------------------------------------------------------------


async def test_messages_are_as_the_clients_need_them(server: RunningServer, jfk: npt.NDArray[np.int16]) -> None:
    messages = await transcribe(server, jfk, path="/ws", word_timestamps=True, send_last_n_segments=2)
    assert text_of(messages) == JFK
    last_shown = None
    ends = 0.0
    for message in messages:
        assert set(message) == {"uid", "segments"}
        assert message["uid"] == "test"
        segments = message["segments"]
        assert segments
        assert sum(segment["completed"] for segment in segments) <= 2
        assert all(segment["completed"] for segment in segments[:-1])
        for segment in segments:
            assert segment["text"].startswith(" ")
            assert segment["start"] == f"{float(segment['start']):.3f}"
            assert segment["words"]
            assert set(segment["words"][0]) == {"word", "start", "end", "probability"}
        if segments[-1]["completed"]:
            # Shown as incomplete first, word for word.
            assert last_shown == segments[-1]["text"]
        else:
            last_shown = segments[-1]["text"]
    for segment in completed(messages):
        assert float(segment["start"]) >= ends
        ends = float(segment["end"])
    assert ends <= len(jfk) / 16000


async def test_int16_and_uint8_are_heard_like_float32(server: RunningServer, jfk: npt.NDArray[np.int16]) -> None:
    async def send(audio_format: str, data: bytes) -> str:
        async with connect(address(server)) as connection:
            await begin(connection, audio_format=audio_format)
            await connection.send(data)
            await connection.send("END_OF_AUDIO")
            return text_of(await until_closed(connection))

    eight_bits = ((jfk >> 8) + 128).astype(np.uint8)
    assert await send("float32", (jfk.astype(np.float32) / 32768).tobytes()) == JFK
    assert await send("int16", jfk.tobytes()) == JFK
    # Eight bits hiss: a word of it may be heard otherwise.
    rough = await send("uint8", eight_bits.tobytes())
    assert difflib.SequenceMatcher(None, rough.split(), JFK.split()).ratio() > 0.8


async def test_sound_sent_before_the_server_is_ready_counts(server: RunningServer, jfk: npt.NDArray[np.int16]) -> None:
    async with connect(address(server)) as connection:
        await connection.send(json.dumps(config()))
        for frame in frames(jfk):
            await connection.send(frame)
        await connection.send("END_OF_AUDIO")
        assert text_of(await until_closed(connection)) == JFK


async def test_what_is_ignored_is_named(server: RunningServer) -> None:
    async with connect(address(server)) as connection:
        said = await begin(
            connection,
            model="large-v3",
            language="en",
            enable_diarization=True,
            vad_parameters={"threshold": 0.4, "max": 1},
        )
    warnings = " ".join(message["message"] for message in said if message.get("status") == "WARNING")
    assert "tiny.en" in warnings and "enable_diarization" in warnings and "vad_parameters.max" in warnings


async def test_a_model_name_that_ends_in_en_forces_english(server: RunningServer, jfk: npt.NDArray[np.int16]) -> None:
    assert text_of(await transcribe(server, jfk[:64000], language="de", model="small.en")).startswith(
        "and so my fellow"
    )


@pytest.mark.parametrize(
    ("first", "says"),
    [
        ("not json", "JSON"),
        ("[1]", "JSON"),
        (json.dumps({"uid": "test", "task": "transcribe", "model": "base"}), "language"),
        (json.dumps(config(task="summarize")), "task"),
        (json.dumps(config(task="translate")), "English-only"),
        (json.dumps(config(language="de", model="base")), "English only"),
        (json.dumps(config(audio_format="mp3")), "audio_format"),
        (json.dumps(config(no_speech_thresh="high")), "no_speech_thresh"),
        (b"\xff\xfe", "JSON"),
    ],
)
async def test_a_bad_configuration_is_answered(server: RunningServer, first: str | bytes, says: str) -> None:
    async with connect(address(server)) as connection:
        await connection.send(first)
        (error,) = await until_closed(connection, 20)
        assert error["status"] == "ERROR"
        assert says in error["message"]
        assert connection.close_code == 1003


async def test_a_broken_frame_hurts_only_its_sender(server: RunningServer, jfk: npt.NDArray[np.int16]) -> None:
    async def break_it() -> Message:
        async with connect(address(server)) as connection:
            await begin(connection)
            await connection.send(b"\x00" * 4097)
            return (await until_closed(connection, 20))[-1]

    async def vanish() -> None:
        connection = await connect(address(server))
        await begin(connection)
        await connection.send(next(frames(jfk)))
        connection.transport.abort()

    async def not_numbers() -> list[Message]:
        async with connect(address(server)) as connection:
            await begin(connection)
            await connection.send(np.full(16000, np.nan, dtype=np.float32).tobytes())
            await connection.send(b"END_OF_AUDIO")
            return await until_closed(connection)

    error, _, nothing, messages = await asyncio.gather(break_it(), vanish(), not_numbers(), transcribe(server, jfk))
    assert error["status"] == "ERROR" and "whole samples" in error["message"]
    assert completed(nothing) == []
    assert text_of(messages) == JFK
    await seats_free(server)


async def seats_free(server: RunningServer) -> None:
    async with asyncio.timeout(20):
        while server.vitals.clients:
            await asyncio.sleep(0.02)


# -- seats and time --------------------------------------------------------------------------


async def test_a_fifth_client_waits_and_is_given_time_to_leave(server: RunningServer) -> None:
    await seats_free(server)
    seated = [await connect(address(server)) for _ in range(4)]
    for connection in seated:
        await begin(connection)
    async with connect(address(server)) as fifth:
        await fifth.send(json.dumps(config(uid="fifth")))
        told = json.loads(await asyncio.wait_for(fifth.recv(), 10))
        assert told["uid"] == "fifth" and told["status"] == "WAIT"
        assert 0 < told["message"] <= 10
        # The server does not close at once: its client would hang.
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(fifth.recv(), 1.0)
    for connection in seated:
        await connection.close()
    await seats_free(server)


async def test_what_is_sent_without_a_seat_is_not_kept(server: RunningServer) -> None:
    """Eight frames of up to 4 MB of each client waited in memory, and the sender for them."""
    async with contextlib.AsyncExitStack() as seats:
        for _ in range(4):
            await begin(await seats.enter_async_context(connect(address(server))))
        async with connect(address(server)) as standing:
            await standing.send(json.dumps(config()))
            assert json.loads(await standing.recv())["status"] == "WAIT"
            begun = time.monotonic()
            for _ in range(24):
                await standing.send(bytes(2**21))
            await (await standing.ping())
            assert time.monotonic() - begun < 4
    await seats_free(server)


async def test_a_silent_client_loses_its_seat_in_time(service: Service, settings: Settings) -> None:
    with RunningServer(service, replace(settings, max_clients=1, max_connection_time=1.0)) as server:
        async with connect(address(server)) as connection:
            await begin(connection)
            messages = await until_closed(connection, 20)
            assert messages == [{"uid": "test", "message": "DISCONNECT"}]
            assert connection.close_code == 1000
        await seats_free(server)


async def test_the_end_of_the_time_flushes_first(
    service: Service, settings: Settings, jfk: npt.NDArray[np.int16]
) -> None:
    with RunningServer(service, replace(settings, max_connection_time=3.0)) as server:
        async with connect(address(server)) as connection:
            await begin(connection)
            for frame in frames(jfk[: 16000 * 11]):
                await connection.send(frame)
            messages = await until_closed(connection, 30)
    assert messages[-1] == {"uid": "test", "message": "DISCONNECT"}
    assert text_of(messages) == JFK


async def test_stopping_flushes_and_closes(service: Service, settings: Settings, jfk: npt.NDArray[np.int16]) -> None:
    with RunningServer(service, settings) as server:
        connection = await connect(address(server))
        await begin(connection)
        for frame in frames(jfk):
            await connection.send(frame)
        reading = asyncio.create_task(until_closed(connection))
        async with asyncio.timeout(20):
            while not server.vitals.segments:
                await asyncio.sleep(0.02)
        await asyncio.to_thread(server.stop)
        messages = await reading
    assert messages[-1] == {"uid": "test", "message": "DISCONNECT"}


# -- sound and silence -----------------------------------------------------------------------


async def test_a_minute_of_silence_says_nothing_and_costs_nothing(server: RunningServer) -> None:
    decodes = server.vitals.decodes
    rng = np.random.default_rng(3)
    hiss = np.round(20 * rng.normal(size=60 * 16000)).astype(np.int16)
    assert await transcribe(server, hiss, use_vad=False) == []
    await seats_free(server)
    assert server.vitals.decodes - decodes <= 2


async def test_a_repeated_phrase_survives(server: RunningServer, jfk: npt.NDArray[np.int16]) -> None:
    phrase = np.concatenate([jfk[: 3 * 16000], np.zeros(16000, dtype=np.int16)])
    messages = await transcribe(server, np.concatenate([phrase, phrase, phrase]))
    assert text_of(messages) == " ".join(["and so my fellow americans"] * 3)


async def test_a_pause_completes_without_an_end(server: RunningServer, jfk: npt.NDArray[np.int16]) -> None:
    async with connect(address(server)) as connection:
        await begin(connection)
        for frame in frames(np.concatenate([jfk, np.zeros(16000, dtype=np.int16)])):
            await connection.send(frame)
        messages: list[Message] = []
        while text_of(messages) != JFK:
            messages.append(json.loads(await asyncio.wait_for(connection.recv(), 20)))


async def test_a_stall_completes_without_an_end(server: RunningServer, jfk: npt.NDArray[np.int16]) -> None:
    async with connect(address(server)) as connection:
        await begin(connection)
        for frame in frames(jfk[: int(10.4 * 16000)]):
            await connection.send(frame)
        messages: list[Message] = []
        while text_of(messages) != JFK:
            messages.append(json.loads(await asyncio.wait_for(connection.recv(), 20)))


async def test_a_slow_reader_blocks_nobody(server: RunningServer, jfk: npt.NDArray[np.int16]) -> None:
    raw = socket.create_connection(("127.0.0.1", server.port))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.sendall(
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )

    def frame(opcode: int, data: bytes) -> bytes:
        return bytes([0x80 | opcode, 0x80 | 127]) + struct.pack("!Q", len(data)) + b"\0\0\0\0" + data

    raw.sendall(frame(1, json.dumps(config(uid="x" * 200)).encode()))
    for part in frames(jfk):
        raw.sendall(frame(2, part))
    begun = time.monotonic()
    assert text_of(await transcribe(server, jfk)) == JFK
    assert time.monotonic() - begun < 30
    raw.close()
    await seats_free(server)


async def test_more_sound_than_fits_makes_the_sender_wait(server: RunningServer, jfk: npt.NDArray[np.int16]) -> None:
    minutes = np.concatenate([jfk, np.zeros(8000, dtype=np.int16)] * 4)
    messages = await transcribe(server, minutes)
    assert text_of(messages).count("my fellow americans") == 4


async def test_four_clients_keep_up(server: RunningServer, jfk: npt.NDArray[np.int16]) -> None:
    await seats_free(server)

    async def speak(number: int) -> float:
        """At the pace of speech; the time from the last sound to the last text."""
        async with connect(address(server)) as connection:
            await begin(connection, uid=str(number))
            begun = time.monotonic()
            reading = asyncio.create_task(until_closed(connection))
            for place, frame in enumerate(frames(jfk)):
                await asyncio.sleep(max(0.0, begun + place * 0.256 - time.monotonic()))
                await connection.send(frame)
            ended = time.monotonic()
            await connection.send(b"END_OF_AUDIO")
            assert text_of(await reading) == JFK
            return time.monotonic() - ended

    lags = await asyncio.gather(*(speak(number) for number in range(4)))
    # A bound on waiting for ever, not a measure of speed: benchmarks/live.py measures.
    assert max(lags) < 20


async def test_nobody_has_the_event_loop_to_himself(service: Service) -> None:
    """Silence that came without pause, and frames of nothing, were taken in while all others waited."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    with ThreadPoolExecutor(1) as threads:
        stream = Stream(service.pipeline(), TranscribeOptions(), threads, lambda: None)
        waiting = asyncio.create_task(others())
        await stream.feed(np.zeros(16000 * 240, dtype=np.int16))
        assert turns >= 60
        for _ in range(100):
            await stream.feed(np.zeros(0, dtype=np.int16))
        assert turns >= 160
        waiting.cancel()
        stream.close()


async def raw_request(server: RunningServer, target: str) -> bytes:
    """The first line of the answer to a handshake for this target."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    lines = ("Host: x", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    writer.write("\r\n".join((f"GET {target} HTTP/1.1", *lines, key, "", "")).encode())
    first = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    return first


async def test_what_is_asked_for_need_not_be_a_url(server: RunningServer) -> None:
    """``//[`` was a defect, before any key was looked at."""
    assert b" 101 " in await raw_request(server, "//[")
    for probe in ("/health", "/ready/", "/health?from=gateway"):
        assert b" 200 " in await raw_request(server, probe)
    await seats_free(server)


async def test_the_librarys_troubles_are_log_lines_too(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were tracebacks with paths, between lines of JSON."""
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)

    def broken(*_: object) -> None:
        raise RuntimeError("/secret")

    root = logging.getLogger(log.ROOT)
    before = root.handlers[:], root.level, root.propagate
    log.configure("json", "INFO")
    try:
        monkeypatch.setattr(live._WhisperLive, "_end", broken)
        async with connect(address(server)) as connection:
            await connection.send("{}")
            await until_closed(connection)
        async with asyncio.timeout(20):  # the library writes after the connection, and the seat, are gone
            while '"ERROR"' not in written.getvalue():
                await asyncio.sleep(0.02)
        await seats_free(server)
    finally:
        root.handlers[:], root.level, root.propagate = before
    said = written.getvalue()
    lines = [json.loads(line) for line in said.splitlines()]
    assert [line["error"] for line in lines if line["level"] == "ERROR"] == ["RuntimeError"] and "/secret" not in said


# -- keys, recordings ------------------------------------------------------------------------


async def test_a_key_is_asked_for_where_there_is_one(service: Service, settings: Settings) -> None:
    with RunningServer(service, replace(settings, api_keys=("sesame", "other"))) as server:
        for wrong in ({}, {"additional_headers": {"Authorization": "Bearer open"}}):
            with pytest.raises(InvalidStatus) as refused:
                await connect(address(server), **wrong)
            assert refused.value.response.status_code == 401
        async with connect(address(server), additional_headers={"Authorization": "Bearer sesame"}) as connection:
            await begin(connection)
        async with connect(address(server, "/?token=other")) as connection:
            await begin(connection)
        async with connect(address(server), subprotocols=["whisper-live", "bearer.sesame"]) as connection:
            assert connection.subprotocol == "whisper-live"
            await begin(connection)


async def test_a_recording_holds_the_sound_and_the_text(
    service: Service, settings: Settings, jfk: npt.NDArray[np.int16], tmp_path: Path
) -> None:
    with RunningServer(service, replace(settings, live_recordings=tmp_path / "kept")) as server:
        messages = await transcribe(server, jfk)
        async with connect(address(server)) as connection:
            await begin(connection)
            for frame in frames(jfk):
                await connection.send(frame)
            # Gone without a word of farewell: what was said is kept all the same.
        await seats_free(server)
    kept = sorted((tmp_path / "kept").iterdir())
    assert sorted(path.suffix for path in kept) == [".json", ".json", ".srt", ".srt", ".wav", ".wav"]
    for path in kept:
        assert path.stat().st_mode & 0o077 == 0
        if path.suffix == ".wav":
            with wave.open(str(path)) as file:
                assert np.array_equal(np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16), jfk)
        elif path.suffix == ".json":
            assert folded(json.loads(path.read_text(encoding="utf-8"))["text"]) == JFK == text_of(messages)
        else:
            assert path.read_text(encoding="utf-8").startswith("1\n00:00:00,")


async def test_what_was_said_before_a_broken_connection_is_kept(
    service: Service, settings: Settings, jfk: npt.NDArray[np.int16], tmp_path: Path
) -> None:
    with RunningServer(service, replace(settings, live_recordings=tmp_path)) as server:
        connection = await connect(address(server))
        await begin(connection)
        for frame in frames(jfk):
            await connection.send(frame)
        await (await connection.ping())
        connection.transport.abort()
        await seats_free(server)
    (kept,) = tmp_path.glob("*.json")
    assert folded(json.loads(kept.read_text(encoding="utf-8"))["text"]) == JFK
    (kept,) = tmp_path.glob("*.wav")
    with wave.open(str(kept)) as file:
        assert file.getnframes() == len(jfk)


async def test_a_full_disk_ends_the_recording_and_not_the_session(
    service: Service, settings: Settings, jfk: npt.NDArray[np.int16], tmp_path: Path
) -> None:
    """It ended the session as a defect, left a header that promised no sound, and the log without its last line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunningServer(service, replace(settings, live_recordings=tmp_path)) as server:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            messages = await transcribe(server, jfk)
            await seats_free(server)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert text_of(messages) == JFK
    assert (server.vitals.recordings_failed, server.vitals.errors) == (1, 0)
    (kept,) = tmp_path.glob("*.wav")
    with wave.open(str(kept)) as file:
        heard = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
    assert len(heard) > 90_000 and np.array_equal(heard, jfk[: len(heard)])
    (kept,) = tmp_path.glob("*.json")
    assert folded(json.loads(kept.read_text(encoding="utf-8"))["text"]) == JFK


# -- too slow --------------------------------------------------------------------------------


async def test_what_cannot_be_finished_in_time_is_no_good_end(
    server: RunningServer, jfk: npt.NDArray[np.int16], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slowly(*_: object) -> None:
        await asyncio.sleep(10)

    monkeypatch.setattr(live, "_FLUSH_SECONDS", 0.2)
    monkeypatch.setattr(Stream, "_recognize", slowly)
    async with connect(address(server)) as connection:
        await begin(connection)
        for frame in frames(jfk):
            await connection.send(frame)
        await connection.send(b"END_OF_AUDIO")
        messages = await until_closed(connection)
    assert connection.close_code == 1013
    assert messages[-1]["status"] == "ERROR" and "too slow" in messages[-1]["message"]
    await seats_free(server)


async def test_an_engine_that_fails_every_session_is_unwell(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, jfk: npt.NDArray[np.int16]
) -> None:
    """It was healthy and ready on every page, so nothing ever started it anew."""

    async def lost(*_: object) -> None:
        raise EngineError("The card is gone.")

    with monkeypatch.context() as patched:
        patched.setattr(Stream, "_recognize", lost)
        for _ in range(3):
            assert b" 200 " in await raw_request(server, "/health")
            async with connect(address(server)) as connection:
                await begin(connection)
                for frame in frames(jfk[:48000]):
                    await connection.send(frame)
                assert (await until_closed(connection))[-1]["status"] == "ERROR"
            assert connection.close_code == 1011
    await seats_free(server)
    assert b" 503 " in await raw_request(server, "/health") and b" 503 " in await raw_request(server, "/ready")
    # Whoever is served nevertheless sets it right.
    assert text_of(await transcribe(server, jfk)) == JFK
    assert b" 200 " in await raw_request(server, "/health") and b" 200 " in await raw_request(server, "/ready")


async def test_who_reads_too_slowly_may_come_again(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stuck(*_: object) -> None:
        raise asyncio.TimeoutError

    monkeypatch.setattr(Outbox, "run", stuck)
    async with connect(address(server)) as connection:
        await begin(connection)
        await until_closed(connection)
    assert connection.close_code == 1013
    await seats_free(server)


def test_every_error_code_has_a_close_code() -> None:
    assert set(CLOSE_CODES) == ERROR_CODES


def test_what_may_be_tried_again_is_not_closed_for_good() -> None:
    """The page gives up at 1003 and 1008."""
    retryable = {kind.code for kind in WhisperWorkerError.__subclasses__() if kind.default_retryable}
    assert not {CLOSE_CODES[code] for code in retryable} & {1003, 1008}


@pytest.mark.long
async def test_an_hour_of_clients_leaves_memory_flat(server: RunningServer, jfk: npt.NDArray[np.int16]) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(5):
        await transcribe(server, jfk)
    before = resident()
    for _ in range(330):
        assert text_of(await transcribe(server, jfk)) == JFK
    assert resident() - before < 50 * 2**20


@pytest.mark.parametrize("path", ["/", "/v1/realtime"])
async def test_a_frame_over_the_limit_is_an_error(
    service: Service, settings: Settings, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was counted as if the client had left."""
    monkeypatch.setattr(live, "_MAX_FRAME_BYTES", 1000)
    with RunningServer(service, settings) as server:
        async with connect(address(server, path)) as connection:
            if path == "/":
                await begin(connection)
            await connection.send(bytes(1001))
            await until_closed(connection)
        assert connection.close_code == 1009 and "exceeds limit" in (connection.close_reason or "")
        await seats_free(server)
        assert server.vitals.errors == 1


async def test_a_closed_connection_is_no_error(server: RunningServer) -> None:
    errors = server.vitals.errors
    connection = await connect(address(server))
    await begin(connection)
    await connection.close()
    with pytest.raises(ConnectionClosed):
        await connection.recv()
    await seats_free(server)
    assert server.vitals.errors == errors
