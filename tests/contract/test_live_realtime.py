"""OpenAI's realtime transcription session, by the official client."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from openai import AsyncOpenAI
from websockets.asyncio.client import connect

from tests.contract.live_kit import JFK, RunningServer, folded, sound
from tests.models import model_cache
from whisper_worker.service import Service
from whisper_worker.settings import Settings


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    settings = Settings(model_cache=model_cache("tiny.en"), api_keys=("sk-live",))
    service = Service(settings)
    with RunningServer(service, settings) as running:
        yield running
    service.close()


@pytest.fixture(scope="module")
def speech() -> npt.NDArray[np.int16]:
    """jfk.flac at 24 kHz, as a browser's microphone would give it, and a second of silence."""
    at_16 = sound("jfk.flac").astype(np.float64)
    spectrum = np.fft.rfft(at_16)
    n = len(at_16) * 3 // 2
    wide = np.zeros(n // 2 + 1, dtype=complex)
    wide[: len(spectrum)] = spectrum
    at_24 = np.fft.irfft(wide, n) * 1.5
    return np.concatenate([np.clip(at_24, -32768, 32767).astype(np.int16), np.zeros(24000, dtype=np.int16)])


def client(server: RunningServer) -> AsyncOpenAI:
    address = f"127.0.0.1:{server.port}/v1"
    return AsyncOpenAI(api_key="sk-live", base_url=f"http://{address}", websocket_base_url=f"ws://{address}")


def session(**sound: Any) -> dict[str, Any]:
    return {
        "type": "transcription",
        "audio": {"input": {"transcription": {"model": "whisper-1", "language": "en"}, **sound}},
    }


async def append(connection: Any, speech: npt.NDArray[np.int16]) -> None:
    for at in range(0, len(speech), 4800):
        piece = base64.b64encode(speech[at : at + 4800].tobytes()).decode()
        await connection.input_audio_buffer.append(audio=piece)


async def test_server_vad_makes_items_of_what_is_said(server: RunningServer, speech: npt.NDArray[np.int16]) -> None:
    async with client(server) as openai, openai.realtime.connect(model="whisper-1") as connection:
        assert (await connection.recv()).type == "session.created"
        await connection.session.update(session=session())
        updated = await connection.recv()
        assert updated.type == "session.updated"
        assert updated.session.audio.input.transcription.language == "en"
        await append(connection, speech)
        kinds: list[str] = []
        deltas: dict[str, str] = {}
        transcripts: dict[str, str] = {}
        previous = None
        while folded(" ".join(transcripts.values())) != JFK:
            event = await connection.recv()
            kinds.append(event.type)
            if event.type == "conversation.item.input_audio_transcription.delta":
                deltas[event.item_id] = deltas.get(event.item_id, "") + event.delta
            elif event.type == "input_audio_buffer.committed":
                assert event.previous_item_id == previous
                previous = event.item_id
            elif event.type == "conversation.item.input_audio_transcription.completed":
                transcripts[event.item_id] = event.transcript
                assert event.usage.type == "duration" and event.usage.seconds > 0
    assert len(transcripts) > 1
    assert {item: text.strip() for item, text in deltas.items()} == transcripts
    one = ["speech_started", "speech_stopped", "committed"]
    told = [kind.removeprefix("input_audio_buffer.") for kind in kinds if kind.startswith("input_audio_buffer.")]
    assert told == one * len(transcripts)


async def test_an_item_that_came_at_once_has_a_beginning(server: RunningServer, speech: npt.NDArray[np.int16]) -> None:
    """Where a clause and the pause behind it were heard in one step, its speech had stopped but never started."""
    clause = np.concatenate([speech[: 24000 * 2], np.zeros(24000, dtype=np.int16)])
    async with client(server) as openai, openai.realtime.connect(model="whisper-1") as connection:
        await connection.session.update(session=session())
        await connection.input_audio_buffer.append(audio=base64.b64encode(clause.tobytes()).decode())
        events = []
        while not events or not events[-1].type.endswith("transcription.completed"):
            events.append(await connection.recv())
    told = [event for event in events if event.type.startswith("input_audio_buffer.")]
    started, stopped, committed = told
    assert [event.type.rpartition(".")[2] for event in told] == ["speech_started", "speech_stopped", "committed"]
    assert started.item_id == stopped.item_id == committed.item_id == events[-1].item_id
    assert 0 <= started.audio_start_ms < stopped.audio_end_ms <= 3000


async def test_a_commit_ends_an_item_where_the_client_says_so(
    server: RunningServer, speech: npt.NDArray[np.int16]
) -> None:
    async with client(server) as openai, openai.realtime.connect(model="whisper-1") as connection:
        await connection.session.update(session=session(turn_detection=None))
        transcripts = []
        for part in (speech[: 24000 * 3], speech[24000 * 3 :]):
            await append(connection, part)
            await connection.input_audio_buffer.commit()
            async for event in connection:
                assert event.type != "input_audio_buffer.speech_started"
                if event.type == "conversation.item.input_audio_transcription.completed":
                    transcripts.append(event.transcript)
                    break
    assert folded(transcripts[0]) == "and so my fellow americans"
    assert folded(" ".join(transcripts)) == JFK


async def test_voice_detection_turned_on_ends_what_was_said_before(
    server: RunningServer, speech: npt.NDArray[np.int16]
) -> None:
    """Its item stayed open, whatever silence came, took in what was said next, and stopped without having started."""
    async with client(server) as openai, openai.realtime.connect(model="whisper-1") as connection:
        await connection.session.update(session=session(turn_detection=None))
        await append(connection, speech[: 24000 * 3])
        said = ""
        while folded(said) != "and so my fellow americans":
            event = await asyncio.wait_for(connection.recv(), 30)
            said += getattr(event, "delta", "")
        await asyncio.sleep(1)  # the pause has settled all by then
        await connection.session.update(session=session(turn_detection={"type": "server_vad"}))
        kinds: list[str] = []
        while not kinds or kinds[-1] != "completed":
            event = await asyncio.wait_for(connection.recv(), 10)
            kinds.append(event.type.rpartition(".")[2])
    assert kinds[:4] == ["updated", "speech_started", "speech_stopped", "committed"]
    assert event.transcript == said.strip()


async def test_what_is_being_said_when_voice_detection_is_turned_on_ends_at_its_pause(
    server: RunningServer, speech: npt.NDArray[np.int16]
) -> None:
    async with client(server) as openai, openai.realtime.connect(model="whisper-1") as connection:
        await connection.session.update(session=session(turn_detection=None))
        await append(connection, speech[:24000])
        await connection.session.update(session=session(turn_detection={"type": "server_vad"}))
        await append(connection, speech[24000 : 24000 * 3])
        told = []
        event = await connection.recv()
        while event.type != "conversation.item.input_audio_transcription.completed":
            event = await asyncio.wait_for(connection.recv(), 30)
            if event.type.startswith("input_audio_buffer."):
                told.append((event.type.rpartition(".")[2], event.item_id))
    assert folded(event.transcript) == "and so my fellow americans"
    assert told == [(kind, event.item_id) for kind in ("speech_started", "speech_stopped", "committed")]


async def test_commits_in_a_row_are_each_answered(server: RunningServer, speech: npt.NDArray[np.int16]) -> None:
    """Nobody waits for the first answer, and each item holds what was said before its commit."""
    async with client(server) as openai, openai.realtime.connect(model="whisper-1") as connection:
        await connection.session.update(session=session(turn_detection=None))
        for part in (speech[: 24000 * 3], speech[24000 * 3 :], np.zeros(12000, dtype=np.int16)):
            await append(connection, part)
            await connection.input_audio_buffer.commit()
        committed, transcripts = [], []
        while len(transcripts) < 3:
            event = await asyncio.wait_for(connection.recv(), 30)
            assert event.type != "error"
            if event.type == "input_audio_buffer.committed":
                committed.append(event.item_id)
            elif event.type == "conversation.item.input_audio_transcription.completed":
                assert event.item_id == committed[-1]
                transcripts.append(event.transcript)
    assert len(set(committed)) == 3
    assert folded(transcripts[0]) == "and so my fellow americans"
    assert folded(" ".join(transcripts)) == JFK and transcripts[2] == ""


async def test_a_wrong_event_is_answered_and_changes_nothing(
    server: RunningServer, speech: npt.NDArray[np.int16]
) -> None:
    headers = {"Authorization": "Bearer sk-live"}
    async with connect(
        f"ws://127.0.0.1:{server.port}/v1/realtime?intent=transcription", additional_headers=headers
    ) as raw:
        assert json.loads(await raw.recv())["type"] == "session.created"
        wrong: list[str] = [
            "nonsense",
            json.dumps({"type": "response.create", "event_id": "mine"}),
            json.dumps({"type": "input_audio_buffer.append", "audio": "!"}),
            # Letters beyond ASCII, and half a character, ended the session as a defect.
            json.dumps({"type": "input_audio_buffer.append", "audio": "é"}),
            json.dumps({"type": "session.update", "session": session(transcription={"prompt": "\ud800"})}),
            json.dumps({"type": "input_audio_buffer.commit"}),
            json.dumps({"type": "session.update", "session": {"type": "realtime"}}),
            json.dumps({"type": "session.update", "session": session(format={"type": "audio/pcmu"})}),
        ]
        for message in wrong:
            await raw.send(message)
            error = json.loads(await raw.recv())
            assert error["type"] == "error"
            assert error["error"]["type"] == "invalid_request_error" and error["error"]["message"]
            assert (error["error"]["event_id"] == "mine") == ("mine" in message)
        older = {"input_audio_format": "pcm16", "input_audio_transcription": {"language": "en"}, "turn_detection": None}
        await raw.send(json.dumps({"type": "transcription_session.update", "session": older}))
        updated = json.loads(await raw.recv())
        assert updated["type"] == "transcription_session.updated"
        assert updated["session"]["audio"]["input"]["turn_detection"] is None
