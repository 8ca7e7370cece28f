"""OpenAI's realtime transcription session: JSON events both ways, sound as base64 PCM in them.

What is said between two pauses (or two commits, where the client turns the server's voice
detection off) is an item. Its settled words go out as deltas while it is being spoken, so the
first deltas come before the item is committed; ``completed`` carries the whole of it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from whisper_worker.audio.resample import Resampler
from whisper_worker.doors.live_whisperlive import SEND_SECONDS, text_of
from whisper_worker.errors import InvalidInput, WhisperWorkerError
from whisper_worker.languages import language_code
from whisper_worker.types import Segment, TranscribeOptions

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection

    from whisper_worker.doors.live_recording import Recording
    from whisper_worker.doors.live_session import Stream

_RATES = (16_000, 24_000)
_ERROR_TYPES = {"INVALID_INPUT": "invalid_request_error", "FORBIDDEN": "invalid_request_error"}
_LEAST_COMMIT_SECONDS = 0.1
_MAX_EVENT_ID = 512
"""Characters, as OpenAI's. A longer one is not told back with its error: many of those may wait to be sent."""
_MOST_OUTGOING = 64
"""Events that wait to be sent; then no more are taken in, until the client has read some."""


@dataclass(frozen=True, slots=True)
class RealtimeConfig:
    """What ``session.update`` may set."""

    options: TranscribeOptions = TranscribeOptions(without_timestamps=True)
    rate: int = 24_000
    server_vad: bool = True
    silence_seconds: float = 0.5


class Conversation:
    """One connection's events."""

    def __init__(self, connection: ServerConnection, served_model: str) -> None:
        self.config = RealtimeConfig()
        self._connection = connection
        self._model = served_model
        self._id = "sess_" + uuid.uuid4().hex[:24]
        self._outgoing: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._sent_one = asyncio.Event()
        self._deaf = False
        """Nothing is sent any more."""
        self._resampler = Resampler(self.config.rate)
        self._item: str | None = None
        self._previous_item: str | None = None
        self._commits: deque[float] = deque()
        """A client's commits that are not yet answered: the seconds up to which all must be settled."""
        self._item_start = 0.0
        self._speech_start = 0.0
        self._started = False
        """The client was told that the item's speech had started: only where the server listens for it."""
        self._text = ""
        """Of the item's completed segments."""
        self._sent = ""
        """What deltas have told of the item."""

    def attach(self, stream: Stream, recording: Recording | None) -> None:
        self._stream = stream
        self._recording = recording
        self._n_settles = stream.session.n_settles
        self._put("session.created", session=self._session())

    # -- in --------------------------------------------------------------------------------

    async def read(self) -> None:
        """Take in events until the client leaves; a wrong one is answered and changes nothing."""
        async for message in self._connection:
            event: Any = None
            try:
                event = _event(message)
                await self._handle(event)
            except InvalidInput as error:
                event_id = event.get("event_id") if isinstance(event, dict) else None
                self._outgoing.put_nowait(self.failure(error, event_id))
            while self._outgoing.qsize() >= _MOST_OUTGOING and not self._deaf:
                self._sent_one.clear()
                await self._sent_one.wait()

    async def _handle(self, event: Mapping[str, Any]) -> None:
        kind = event.get("type")
        if kind == "input_audio_buffer.append":
            await self._append(event.get("audio"))
        elif kind == "input_audio_buffer.commit":
            self._commit()
        elif kind == "input_audio_buffer.clear":
            raise InvalidInput("The buffer cannot be cleared: its sound is transcribed as it comes. Commit it.")
        elif kind in ("session.update", "transcription_session.update"):
            self._update(event.get("session"))
            self._put(f"{str(kind).removesuffix('.update')}.updated", session=self._session())
            # Voice detection turned on ends what was said and settled without it; no more sound need come.
            self.update(())
        else:
            raise InvalidInput("This event is not known here; a transcription session takes audio and updates.")

    async def _append(self, audio: object) -> None:
        import numpy as np

        try:
            data = base64.b64decode(audio, validate=True) if isinstance(audio, str) else b""
        except ValueError:
            data = b""
        if not data or len(data) % 2:
            raise InvalidInput("audio must be base64 of whole 16-bit samples, little-endian, mono.")
        sound = self._resampler.feed(np.frombuffer(data, dtype="<i2").astype(np.int16))
        if self._recording is not None:
            self._recording.sound(sound)
        await self._stream.feed(sound)

    def _commit(self) -> None:
        session = self._stream.session
        begun = self._commits[-1] if self._commits else self._item_start
        if round(session.seconds - begun, 6) < _LEAST_COMMIT_SECONDS:  # 0.3 - 0.2 is less than 0.1
            raise InvalidInput("There is less than 100 ms of sound to commit; append some first.")
        self._commits.append(session.seconds)
        self._stream.flush()

    def _update(self, given: object) -> None:
        config = read_session(given, self.config)
        stream = self._stream
        if config.options != self.config.options:
            stream.configure(config.options)
        stream.session.pause_seconds = config.silence_seconds
        if config.rate != self.config.rate:
            self._resampler = Resampler(config.rate)
        self.config = config

    # -- out -------------------------------------------------------------------------------

    def update(self, completed: Sequence[Segment]) -> None:
        """Turn what is new in the session into events."""
        session = self._stream.session
        # A pause behind a noise without words ends no item: there is none yet.
        paused = session.n_settles != self._n_settles and (self._item is not None or bool(completed))
        self._n_settles = session.n_settles
        # What is said behind a commit has no part in it, and may go on for long.
        while self._commits and (session.speech is None or session.speech[0] >= self._commits[0]):
            at = self._commits.popleft()
            behind = [segment for segment in completed if segment.start + segment.end > 2 * at]
            self._tell([segment for segment in completed if segment not in behind])
            self._end_item(at)
            # A pause before the commit is not one behind it.
            completed, paused = behind, bool(behind)
        opened = session.open_segment
        self._tell(completed, "".join(word.word for word in opened.words[: opened.n_settled]) if opened else "")
        over = paused or session.speech is None
        if self._item is not None and not self._commits and self.config.server_vad and over:
            self._end_item(session.settled_seconds)

    def _tell(self, completed: Sequence[Segment], settled: str | None = None) -> None:
        """Deltas of what is new in the item. ``settled``: of what is still open; None: the item is over."""
        self._text += "".join(segment.text for segment in completed)
        heard = self._stream.session.speech is not None or self._text or self._commits or settled is None
        if self._item is None and heard:
            self._begin_item(completed, over=settled is None)
        if self._item is not None and self.config.server_vad and not self._started:
            self._started, start = True, round(1000 * self._speech_start)
            self._put("input_audio_buffer.speech_started", item_id=self._item, audio_start_ms=start)
        text = (self._text + (settled or "")).lstrip()
        if len(text) > len(self._sent):
            self._put(
                "conversation.item.input_audio_transcription.delta",
                item_id=self._item,
                content_index=0,
                delta=text[len(self._sent) :],
            )
            self._sent = text

    def close(self) -> None:
        """End the last item; :meth:`write` ends once all is sent."""
        if self._item is not None:
            self._end_item(self._stream.session.settled_seconds)
        self._outgoing.put_nowait(None)

    async def write(self) -> None:
        """Raises ``TimeoutError`` where the client does not take what it is sent."""
        try:
            while (event := await self._outgoing.get()) is not None:
                self._sent_one.set()
                await asyncio.wait_for(self._connection.send(json.dumps(event)), SEND_SECONDS)
        finally:
            self._deaf = True
            self._sent_one.set()

    def _begin_item(self, completed: Sequence[Segment], *, over: bool) -> None:
        """``completed``: what is in it already, where all of it came at once. ``over``: speech is that of the next."""
        self._item = "item_" + uuid.uuid4().hex[:24]
        speech = None if over else self._stream.session.speech
        self._speech_start = completed[0].start if completed else speech[0] if speech else self._item_start

    def _end_item(self, end: float) -> None:
        item, previous = self._item, self._previous_item
        if self._started:
            self._put("input_audio_buffer.speech_stopped", item_id=item, audio_end_ms=round(1000 * end))
        self._put("input_audio_buffer.committed", item_id=item, previous_item_id=previous)
        content = [{"type": "input_audio", "transcript": None}]
        shown = {"id": item, "type": "message", "role": "user", "status": "completed", "content": content}
        self._put("conversation.item.added", item=shown, previous_item_id=previous)
        self._put(
            "conversation.item.input_audio_transcription.completed",
            item_id=item,
            content_index=0,
            transcript=self._text.strip(),
            usage={"type": "duration", "seconds": round(end - self._item_start, 3)},
        )
        self._previous_item, self._item = item, None
        self._item_start, self._started, self._text, self._sent = end, False, "", ""

    def _session(self) -> dict[str, Any]:
        config, options = self.config, self.config.options
        detection = {
            "type": "server_vad",
            "threshold": options.vad_threshold,
            "prefix_padding_ms": 300,
            "silence_duration_ms": round(1000 * config.silence_seconds),
        }
        return {
            "id": self._id,
            "object": "realtime.transcription_session",
            "type": "transcription",
            "audio": {
                "input": {
                    "format": {"type": "audio/pcm", "rate": config.rate},
                    "noise_reduction": None,
                    "transcription": {
                        "model": self._model,
                        "language": options.language,
                        "prompt": options.initial_prompt or "",
                    },
                    "turn_detection": detection if config.server_vad else None,
                }
            },
        }

    def _put(self, kind: str, **fields: object) -> None:
        self._outgoing.put_nowait({"type": kind, "event_id": _event_id(), **fields})

    @staticmethod
    def failure(error: WhisperWorkerError, event_id: object = None) -> dict[str, Any]:
        """The event that tells an error."""
        told = {
            "type": _ERROR_TYPES.get(error.code, "server_error"),
            "code": error.code.lower(),
            "message": error.message,
            "param": None,
            "event_id": event_id if isinstance(event_id, str) and len(event_id) <= _MAX_EVENT_ID else None,
        }
        return {"type": "error", "event_id": _event_id(), "error": told}


def read_session(given: object, before: RealtimeConfig) -> RealtimeConfig:
    """``session.update``'s session, in its present and its older flat form, laid over what was set before.

    What is not named stays. The model is this server's, whatever is named. Raises :class:`InvalidInput`.
    """
    session = _object(given, "session")
    if session.get("type", "transcription") != "transcription":
        raise InvalidInput("session.type must be transcription: this server transcribes and does not answer.")
    sound = _object(_object(session.get("audio"), "audio").get("input"), "audio.input")
    unknown = {"include"} & set(session) if session.get("include") else set()
    config = before
    older = {
        name: session[f"input_audio_{name}"]
        for name in ("format", "transcription", "noise_reduction")
        if f"input_audio_{name}" in session
    }
    if "turn_detection" in session:
        older["turn_detection"] = session["turn_detection"]
    sound = {**older, **sound}
    if sound.get("noise_reduction"):
        unknown.add("noise_reduction")
    if unknown:
        raise InvalidInput(f"Not offered here: {', '.join(sorted(unknown))}; leave it out.")
    if (form := sound.get("format")) is not None:
        config = replace(config, rate=_rate(form))
    options = config.options
    if "transcription" in sound:
        transcription = _object(sound["transcription"], "transcription")
        if "language" in transcription:
            language = text_of(transcription["language"], "language")
            options = replace(options, language=language_code(language) if language else None)
        if "prompt" in transcription:
            options = replace(options, initial_prompt=text_of(transcription["prompt"], "prompt") or None)
    if "turn_detection" in sound:
        detection = sound["turn_detection"]
        config = replace(config, server_vad=detection is not None)
        if detection is not None:
            detection = _object(detection, "turn_detection")
            if detection.get("type", "server_vad") != "server_vad":
                raise InvalidInput("turn_detection.type must be server_vad, or turn_detection null.")
            silence = _number(detection, "silence_duration_ms", 1000 * config.silence_seconds, 100, 10_000) / 1000
            config = replace(config, silence_seconds=silence)
            options = replace(options, vad_threshold=_number(detection, "threshold", options.vad_threshold, 0.01, 0.99))
    return replace(config, options=options)


def _event(message: str | bytes) -> dict[str, Any]:
    try:
        event = json.loads(message)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise InvalidInput("A message must be one JSON object with a type.")
    return event


def _rate(form: object) -> int:
    if form == "pcm16":
        return 24_000
    given = _object(form, "format")
    rate = given.get("rate", 24_000)
    if given.get("type", "audio/pcm") != "audio/pcm" or rate not in _RATES:
        raise InvalidInput("format must be audio/pcm at a rate of 24000 or 16000.")
    return int(rate)


def _object(value: object, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidInput(f"{name} must be an object.")
    return value


def _number(data: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidInput(f"{name} must be a number between {low:g} and {high:g}.")
    return float(value)


def _event_id() -> str:
    return "event_" + uuid.uuid4().hex[:20]
