"""The live door's pure parts: configuration, sample formats, the outbox, health pages, resampling."""

from __future__ import annotations

import asyncio
import errno
import json
import urllib.error
import urllib.request
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.unit.test_live_session import Stage, spoken
from whisper_worker.audio.resample import Resampler
from whisper_worker.doors.live_health import HealthServer, Vitals
from whisper_worker.doors.live_realtime import Conversation, RealtimeConfig, _event, read_session
from whisper_worker.doors.live_whisperlive import Outbox, read_config, samples, uid_of
from whisper_worker.engine.live import LiveSession, OpenSegment
from whisper_worker.errors import InvalidInput
from whisper_worker.types import Segment, Word


def message(**changes: Any) -> str:
    return json.dumps({"uid": "u", "language": "en", "task": "transcribe", "model": "base", **changes})


# -- configuration ---------------------------------------------------------------------------


def test_what_is_absent_has_the_protocols_defaults() -> None:
    config = read_config(message(language=None), "base")
    assert (config.n_segments, config.audio_format, config.word_timestamps, config.detect) == (
        10,
        "float32",
        False,
        True,
    )
    options = config.options
    assert (options.language, options.vad, options.vad_threshold, options.no_speech_threshold) == (
        None,
        False,
        0.5,
        0.45,
    )
    assert config.warnings == ()


def test_what_the_seeds_browser_sends_is_taken() -> None:
    config = read_config(message(model="Systran/faster-whisper-small.en", use_vad=False), "openai/whisper-small.en")
    assert config.options.language == "en"
    assert config.warnings == ()


def test_what_is_named_is_honoured() -> None:
    config = read_config(
        message(
            language="german",
            task="translate",
            hotwords="Caddy",
            initial_prompt="Hi",
            vad_parameters={"threshold": 0.3},
        ),
        "base",
    )
    options = config.options
    assert (options.language, options.task, options.hotwords, options.initial_prompt) == (
        "de",
        "translate",
        "Caddy",
        "Hi",
    )
    assert options.vad_threshold == 0.3


@pytest.mark.parametrize("name", ["uid", "language", "task", "model"])
def test_a_missing_key_is_named(name: str) -> None:
    data = json.loads(message())
    del data[name]
    with pytest.raises(InvalidInput, match=name):
        read_config(json.dumps(data), "base")


@pytest.mark.parametrize(
    "changes",
    [
        {"uid": 7},
        {"uid": "x" * 201},
        {"language": 1},
        {"language": "klingon"},
        {"use_vad": "yes"},
        {"send_last_n_segments": 0},
        {"send_last_n_segments": True},
        {"vad_parameters": [1]},
        {"vad_parameters": 3},
        {"audio_format": ["float32"]},
        {"initial_prompt": {"a": 1}},
        {"initial_prompt": "x" * 4001},
        {"hotwords": ["x" * 2000, "y" * 2000]},
        {"model": 5},
        {"model": ["base"]},
        # The tokenizer failed on it, and the client was told to connect again.
        {"initial_prompt": "half \ud800"},
        {"hotwords": ["half \udfff"]},
    ],
)
def test_a_wrong_value_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        read_config(message(**changes), "base")


def test_a_name_that_nobody_knows_is_told() -> None:
    """It was swallowed."""
    (warning,) = read_config(message(beam_sise=5, max_clients=4, target_language="fr"), "base").warnings
    assert warning.endswith(": beam_sise.")
    (warning,) = read_config(message(**{f"{number:01000}": 0 for number in range(50)}), "base").warnings
    assert len(warning) < 2000


def test_whom_an_answer_is_for() -> None:
    assert uid_of(message()) == "u"
    assert uid_of("[]") is uid_of("?") is uid_of('{"uid": 3}') is uid_of(b"\xff") is None


def test_a_tower_of_brackets_is_a_bad_message() -> None:
    tower = "[" * 200_000
    assert uid_of(tower) is None
    for read in (lambda: read_config(tower, "base"), lambda: _event(tower)):
        with pytest.raises(InvalidInput, match="JSON object"):
            read()


def test_formats_of_samples() -> None:
    assert samples(np.array([0, 0.5, -1, 2, np.nan], dtype="<f4").tobytes(), "float32").tolist() == [
        0,
        16384,
        -32768,
        32767,
        0,
    ]
    # Which overflowed, with a warning between the log's lines.
    assert samples(np.array([3e38, -3e38, np.inf], dtype="<f4").tobytes(), "float32").tolist() == [32767, -32768, 0]
    assert samples(np.array([1, -2], dtype="<i2").tobytes(), "int16").tolist() == [1, -2]
    assert samples(bytes([0, 128, 255]), "uint8").tolist() == [-32768, 0, 32512]
    for audio_format, n_bytes in (("float32", 7), ("int16", 3)):
        with pytest.raises(InvalidInput, match="whole samples"):
            samples(b"\0" * n_bytes, audio_format)


# -- the outbox ------------------------------------------------------------------------------


class Wire:
    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.free = asyncio.Event()
        self.free.set()

    async def send(self, message: str) -> None:
        await self.free.wait()
        self.sent.append(json.loads(message))


class Shown(LiveSession):
    """A session that shows what it is told to."""

    def __init__(self) -> None:
        super().__init__(detector=None, clock=lambda: 0.0)  # type: ignore[arg-type]
        self.shown: OpenSegment | None = None

    @property
    def open_segment(self) -> OpenSegment | None:
        return self.shown


def opened(text: str, start: float = 0.0) -> OpenSegment:
    return OpenSegment((Word(text, start, start + 1, 0.9),), 0)


def segment(text: str, start: float) -> Segment:
    return Segment(0, start, start + 1, text, 0.0, 0.0, 1.0, 0.0)


async def drained(outbox: Outbox) -> None:
    outbox.close()
    await asyncio.wait_for(outbox.run(), 5)


async def test_a_completed_text_was_shown_before() -> None:
    wire, session = Wire(), Shown()
    outbox = Outbox(wire, read_config(message(), "base"), session)
    session.shown = opened(" one to")
    outbox.update(())
    outbox.update([segment(" one two", 0.0), segment(" three", 1.0)])
    session.shown = None
    await drained(outbox)
    told = [[(entry["text"], entry["completed"]) for entry in sent["segments"]] for sent in wire.sent]
    assert told == [
        [(" one two", False)],
        [(" one two", True)],
        [(" one two", True), (" three", False)],
        [(" one two", True), (" three", True)],
    ]


async def test_an_unsent_partial_is_replaced_a_completed_segment_never() -> None:
    wire, session = Wire(), Shown()
    outbox = Outbox(wire, replace(read_config(message(), "base"), n_segments=2), session)
    wire.free.clear()
    session.shown = opened(" draft 0")
    outbox.update(())
    running = asyncio.create_task(outbox.run())
    await asyncio.sleep(0)
    for number in range(1, 50):
        session.shown = opened(f" draft {number}", float(number))
        outbox.update([segment(f" final {number}", float(number))] if number % 10 == 0 else ())
    wire.free.set()
    outbox.close()
    await asyncio.wait_for(running, 5)
    texts = [entry["text"] for sent in wire.sent for entry in sent["segments"] if not entry["completed"]]
    assert [text for text in texts if "draft" in text] == [" draft 0", " draft 49"]
    finals = {entry["text"] for sent in wire.sent for entry in sent["segments"] if entry["completed"]}
    assert finals == {f" final {number}" for number in (10, 20, 30, 40)}
    assert all(0 < len(sent["segments"]) <= 3 for sent in wire.sent)


async def test_the_language_comes_first_and_once() -> None:
    wire, session = Wire(), Shown()
    outbox = Outbox(wire, read_config(message(language=None), "base"), session)
    session.shown = opened(" hallo")
    for _ in range(2):
        outbox.detected("de", 0.9)
        outbox.update(())
    await drained(outbox)
    assert wire.sent[0] == {"uid": "u", "language": "de", "language_prob": 0.9}
    assert [set(sent) for sent in wire.sent[1:]] == [{"uid", "segments"}]


async def test_a_text_without_a_blank_gets_one() -> None:
    wire = Wire()
    outbox = Outbox(wire, read_config(message(language="ja"), "large"), Shown())
    outbox.update([segment("はい", 0.0)])
    await drained(outbox)
    assert wire.sent[-1]["segments"][0]["text"] == " はい"


# -- realtime sessions -----------------------------------------------------------------------


def test_updates_lie_over_one_another() -> None:
    first = read_session(
        {"audio": {"input": {"transcription": {"language": "de", "prompt": "Hallo"}}}}, RealtimeConfig()
    )
    detection = {"type": "server_vad", "threshold": 0.3, "silence_duration_ms": 800}
    second = read_session({"type": "transcription", "audio": {"input": {"turn_detection": detection}}}, first)
    assert (second.options.language, second.options.initial_prompt) == ("de", "Hallo")
    assert (second.options.vad_threshold, second.silence_seconds, second.server_vad) == (0.3, 0.8, True)
    assert not read_session({"turn_detection": None}, second).server_vad


@pytest.mark.parametrize(
    "given",
    [
        3,
        {"type": "realtime"},
        {"audio": {"input": {"format": {"type": "audio/pcmu"}}}},
        {"audio": {"input": {"noise_reduction": {"type": "near_field"}}}},
        {"audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}},
        {"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 7}}}},
        {"audio": {"input": {"transcription": {"language": "klingon"}}}},
        {"audio": {"input": {"transcription": {"prompt": "x" * 4001}}}},
        {"audio": {"input": {"transcription": {"prompt": "half \ud800"}}}},
        {"include": ["item.input_audio_transcription.logprobs"]},
    ],
)
def test_what_is_not_offered_is_refused(given: object) -> None:
    with pytest.raises(InvalidInput):
        read_session(given, RealtimeConfig())


def test_a_long_event_id_is_not_told_back() -> None:
    """Those that wait to be sent held all of a message each."""
    assert Conversation.failure(InvalidInput("no"), "mine")["error"]["event_id"] == "mine"
    assert len(str(Conversation.failure(InvalidInput("no"), "x" * 100_000))) < 1000


async def test_who_takes_no_answers_is_not_listened_to() -> None:
    """Until there is room again."""
    taken = 0

    class Chatter(Wire):
        def __aiter__(self) -> Chatter:
            return self

        async def __anext__(self) -> str:
            nonlocal taken
            if taken == 1000:
                raise StopAsyncIteration
            taken += 1
            return "{}"

    wire = Chatter()
    wire.free.clear()
    conversation = Conversation(wire, "base")  # type: ignore[arg-type]
    reading, writing = asyncio.create_task(conversation.read()), asyncio.create_task(conversation.write())
    for _ in range(2000):
        await asyncio.sleep(0)
    assert taken < 100 and not reading.done()
    wire.free.set()
    await asyncio.wait_for(reading, 5)
    conversation.close()
    await asyncio.wait_for(writing, 5)
    assert taken == len(wire.sent) == 1000


def conversation_on(stage: Stage, **session: object) -> Conversation:
    """A conversation about what the stage's session hears, without a connection."""
    conversation = Conversation(Wire(), "base")  # type: ignore[arg-type]
    stream = SimpleNamespace(session=stage.session, flush=stage.session.flush)
    conversation.attach(stream, None)  # type: ignore[arg-type]
    conversation._update(session)
    return conversation


def events_of(conversation: Conversation) -> list[dict[str, Any]]:
    """What it has to tell so far, ``session.created`` left out."""
    events = []
    while not conversation._outgoing.empty():
        events.append(conversation._outgoing.get_nowait() or {})
    return [event for event in events if event["type"] != "session.created"]


def test_a_commit_is_answered_though_somebody_speaks_on() -> None:
    """It waited until what came behind it was settled too, and that was told as if it stood before the commit."""
    stage = Stage([*spoken("one two three", 0.5), *spoken("word " * 40, 2.6)])
    conversation = conversation_on(stage, turn_detection=None)
    stage.session.feed(np.zeros(round(2.5 * 16000), dtype=np.int16))
    conversation._commit()
    stage.session.feed(np.zeros(16000, dtype=np.int16))
    assert stage.step()
    conversation.update(stage.completed)
    kinds = [event["type"].rpartition(".")[2] for event in events_of(conversation)]
    assert kinds == ["delta", "committed", "added", "completed"]


def test_the_least_that_may_be_committed() -> None:
    """A tenth of a second was too little at times, by the last bit of a float."""
    stage = Stage([])
    conversation = conversation_on(stage, turn_detection=None)
    for _ in range(100):
        stage.session.feed(np.zeros(1600, dtype=np.int16))
        conversation._commit()
        conversation.update(())
    stage.session.feed(np.zeros(1599, dtype=np.int16))
    with pytest.raises(InvalidInput):
        conversation._commit()


def test_silence_committed_before_speech_has_its_own_times() -> None:
    stage = Stage(spoken("one two three", 1.5))
    conversation = conversation_on(stage)
    stage.session.feed(np.zeros(16000, dtype=np.int16))
    conversation._commit()
    stage.session.feed(np.zeros(16000, dtype=np.int16))
    conversation.update(())
    started, stopped = (events_of(conversation))[:2]
    assert (started["audio_start_ms"], stopped["audio_end_ms"]) == (0, 1000)


def test_a_noise_before_speech_makes_no_item() -> None:
    """Where both were heard in one step, an empty item ended, before its beginning, while somebody spoke."""
    stage = Stage([("", 0.5, 0.6), *spoken("word " * 10, 1.5)])
    conversation = conversation_on(stage)
    stage.session.feed(np.zeros(round(2.5 * 16000), dtype=np.int16))
    assert stage.step()
    conversation.update(stage.completed)
    (started,) = events_of(conversation)
    assert started["type"] == "input_audio_buffer.speech_started"
    assert started["audio_start_ms"] == pytest.approx(1500, abs=40)


# -- health ----------------------------------------------------------------------------------


def test_the_health_pages() -> None:
    vitals = Vitals(9090, 4, {"WHISPER_MODEL": "small.en", "WHISPER_COMPUTE_TYPE": "int8"})
    server = HealthServer("127.0.0.1", 0, vitals)

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    try:
        status, body = get("/health")
        assert status == 200 and json.loads(body)["status"] == "healthy" and json.loads(body)["timestamp"].endswith("Z")
        status, body = get("/ready")
        assert status == 503 and json.loads(body)["status"] == "not_ready"
        vitals.ready = True
        status, body = get("/ready")
        assert status == 200
        assert json.loads(body)["status"] == "ready" and json.loads(body)["whisperlive_port"] == 9090
        page = json.loads(get("/status")[1])
        assert {"status", "uptime_seconds", "startup_time", "whisperlive", "gpu", "environment"} <= set(page)
        assert page["whisperlive"]["ready"] is True and page["whisperlive"]["port"] == 9090
        assert page["environment"] == {"WHISPER_MODEL": "small.en", "WHISPER_COMPUTE_TYPE": "int8"}
        assert "\nwhisper_live_ready 1\n" in get("/metrics")[1]
        assert get("/nothing")[0] == 404
    finally:
        server.close()


def test_health_is_told_by_ipv6() -> None:
    try:
        server = HealthServer("::1", 0, Vitals(9090, 4, {}))
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            pytest.skip("there is no IPv6 here")
        raise
    try:
        with urllib.request.urlopen(f"http://[::1]:{server.port}/health", timeout=10) as answer:
            assert answer.status == 200
    finally:
        server.close()


# -- resampling ------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [24000, 44100, 48000])
def test_speech_passes_and_what_would_fold_does_not(rate: int) -> None:
    def level(hertz: float) -> float:
        tone = np.round(20000 * np.sin(2 * np.pi * hertz * np.arange(rate) / rate)).astype(np.int16)
        out = Resampler(rate).feed(tone).astype(float)
        assert abs(len(out) - 16000) <= 1
        return 20 * float(np.log10(out[1000:-1000].std() / (20000 / 2**0.5) + 1e-9))

    assert all(abs(level(hertz)) < 0.1 for hertz in (200, 3000, 6800))
    assert all(level(hertz) < -60 for hertz in (8200, 9000, 11500))


def test_pieces_leave_no_seam() -> None:
    sound = np.random.default_rng(1).integers(-20000, 20000, 24000).astype(np.int16)
    whole = Resampler(24000).feed(sound)
    stream = Resampler(24000)
    parts = np.concatenate([stream.feed(sound[at : at + 777]) for at in range(0, len(sound), 777)])
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert Resampler(16000).feed(sound) is sound
