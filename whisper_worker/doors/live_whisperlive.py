"""WhisperLive's protocol: one JSON message of configuration, then frames of sound; JSON back.

What its clients rely on, and what therefore holds here:

- every message echoes ``uid``; ``backend`` is literally ``faster_whisper``;
- a ``segments`` message is never empty and carries nothing but ``uid`` and ``segments``;
- segments begin with a blank, never start before the one before them ended, and never change once
  they are ``completed``;
- a completed segment's text was shown as incomplete before, or clients would write it twice;
- a client that has to wait is given time to close the connection itself.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from whisper_worker.errors import InvalidInput
from whisper_worker.languages import language_code
from whisper_worker.types import Segment, Task, TranscribeOptions, Word

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from whisper_worker.engine.live import LiveSession

END_OF_AUDIO = "END_OF_AUDIO"
AUDIO_FORMATS = {"float32": 4, "int16": 2, "uint8": 1}
"""Bytes a sample."""

SEND_SECONDS = 20.0
"""A client that takes nothing for so long is let go."""
_MAX_UID = 200
MAX_TEXT = 4000
"""Characters of a prompt or of hotwords: the model takes in fewer, and they are tokenised on the event loop."""
_SURE_OF_LANGUAGE = 0.5
_MAX_SEGMENTS = 100
_NOT_OFFERED = {"enable_translation": False, "enable_diarization": False}
_WITHOUT_EFFECT: Mapping[str, object] = {"clip_audio": False, "same_output_threshold": 10}
"""What tunes the original's way of finding the end of a segment, with its defaults."""
_KNOWN = {
    *(
        "uid",
        "language",
        "task",
        "model",
        "use_vad",
        "vad_parameters",
        "no_speech_thresh",
        "initial_prompt",
        "hotwords",
    ),
    *("audio_format", "send_last_n_segments", "word_timestamps", *_NOT_OFFERED, *_WITHOUT_EFFECT),
    # Details of what is not offered, and of the server, which clients send with whatever they ask for.
    *("target_language", "known_speakers", "max_speakers", "diarization_threshold", "hf_token"),
    *("max_clients", "max_connection_time"),
}
_MAX_NAMED, _MAX_NAME = 20, 60
"""Unknown names that are told back, and characters of each."""


@dataclass(frozen=True, slots=True)
class Config:
    """A client's first message."""

    uid: str
    options: TranscribeOptions
    audio_format: str
    n_segments: int
    """Completed segments sent along each time."""
    word_timestamps: bool
    detect: bool
    """The client did not name a language and wants to hear which it is."""
    warnings: tuple[str, ...]


def uid_of(message: str | bytes) -> str | None:
    """Whom an answer to this message is for, as far as it says so."""
    try:
        uid = json.loads(message).get("uid")
    except (ValueError, AttributeError, RecursionError):
        return None
    return uid if isinstance(uid, str) and len(uid) <= _MAX_UID else None


def read_config(message: str | bytes, served_model: str) -> Config:
    """Raises :class:`InvalidInput` that says what is wrong with it."""
    try:
        data = json.loads(message)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise InvalidInput("The first message must be one JSON object with uid, language, task and model.")
    for name in ("uid", "language", "task", "model"):
        if name not in data:
            raise InvalidInput(f"The configuration lacks {name}.")
    uid = uid_of(message)
    if uid is None:
        raise InvalidInput(f"uid must be a string of at most {_MAX_UID} characters.")
    model = data["model"] or ""
    if not isinstance(model, str):
        raise InvalidInput("model must be a name, or null for the one that is served.")
    language = _language(data["language"])
    audio_format = data.get("audio_format") or "float32"
    if not isinstance(audio_format, str) or audio_format not in AUDIO_FORMATS:
        raise InvalidInput(f"audio_format must be one of {', '.join(AUDIO_FORMATS)}.")
    detection = data.get("vad_parameters") or {}
    if not isinstance(detection, dict):
        raise InvalidInput("vad_parameters must be an object.")
    warnings = _warnings(data, model, served_model)
    options = TranscribeOptions(
        language="en" if model.endswith("en") else language,
        task=_task(data["task"]),
        vad=_flag(data, "use_vad"),
        vad_threshold=_number(detection, "threshold", 0.5, 0.01, 0.99),
        no_speech_threshold=_number(data, "no_speech_thresh", 0.45, 0.0, 1.0),
        initial_prompt=_text(data, "initial_prompt"),
        hotwords=_text(data, "hotwords"),
        without_timestamps=True,
    )
    return Config(
        uid=uid,
        options=options,
        audio_format=audio_format,
        n_segments=round(_number(data, "send_last_n_segments", 10, 1, _MAX_SEGMENTS)),
        word_timestamps=_flag(data, "word_timestamps"),
        detect=options.language is None,
        warnings=warnings,
    )


def _warnings(data: Mapping[str, Any], model: str, served_model: str) -> tuple[str, ...]:
    ignored = [
        name for name, default in {**_NOT_OFFERED, **_WITHOUT_EFFECT}.items() if data.get(name, default) != default
    ]
    ignored += [f"vad_parameters.{name}" for name in data.get("vad_parameters") or {} if name != "threshold"]
    ignored += [name for name in data if name not in _KNOWN]
    ignored = [name[:_MAX_NAME] for name in ignored[:_MAX_NAMED]]
    warnings = []
    if model and _short(model) != _short(served_model):
        warnings.append(f"This server runs {served_model}; the model asked for was ignored.")
    if ignored:
        warnings.append(f"Ignored, since this server has no such thing: {', '.join(ignored)}.")
    return tuple(warnings)


def _short(model: str) -> str:
    return model.rpartition("/")[2].removeprefix("faster-").removeprefix("whisper-")


def _language(value: object) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise InvalidInput("language must be a code such as en, or null.")
    return language_code(value)


def _task(value: object) -> Task:
    if value == "transcribe":
        return "transcribe"
    if value == "translate":
        return "translate"
    raise InvalidInput("task must be transcribe or translate.")


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name)
    if not isinstance(value, bool | None):
        raise InvalidInput(f"{name} must be true or false.")
    return bool(value)


def _number(data: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidInput(f"{name} must be a number between {low:g} and {high:g}.")
    return float(value)


def _text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = " ".join(value)
    return text_of(value, name) or None


def text_of(value: object, name: str) -> str:
    """A text for the model. Raises :class:`InvalidInput` where it is none, or too long."""
    if not isinstance(value, str | None):
        raise InvalidInput(f"{name} must be text.")
    if value and len(value) > MAX_TEXT:
        raise InvalidInput(f"{name} must be at most {MAX_TEXT} characters long.")
    # JSON can spell half of a surrogate pair; the tokenizer would fail on it.
    if value and any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidInput(f"{name} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character.")
    return value or ""


def samples(frame: bytes, audio_format: str) -> npt.NDArray[np.int16]:
    """A frame's sound as int16. Raises :class:`InvalidInput` for a frame that ends within a sample."""
    import numpy as np

    if len(frame) % AUDIO_FORMATS[audio_format]:
        raise InvalidInput(f"A frame's length is no multiple of a {audio_format} sample's; send whole samples.")
    if audio_format == "int16":
        return np.frombuffer(frame, dtype="<i2").astype(np.int16)
    if audio_format == "uint8":
        return ((np.frombuffer(frame, dtype=np.uint8).astype(np.int16) - 128) * 256).astype(np.int16)
    sound = np.nan_to_num(np.frombuffer(frame, dtype="<f4").astype(np.float32), posinf=0.0, neginf=0.0)
    # Clipped before as well: the largest numbers would overflow.
    scaled: npt.NDArray[np.int16] = np.clip(np.round(np.clip(sound, -1, 1) * 32768), -32768, 32767).astype(np.int16)
    return scaled


def ready(uid: str) -> dict[str, Any]:
    return {"uid": uid, "message": "SERVER_READY", "backend": "faster_whisper"}


def wait(uid: str | None, minutes: float) -> dict[str, Any]:
    return {"uid": uid, "status": "WAIT", "message": minutes}


def status(uid: str | None, kind: str, message: str) -> dict[str, Any]:
    """``kind``: ERROR or WARNING."""
    return {"uid": uid, "status": kind, "message": message}


def disconnect(uid: str) -> dict[str, Any]:
    return {"uid": uid, "message": "DISCONNECT"}


class Sender(Protocol):
    """A connection as far as it is written to."""

    async def send(self, message: str) -> None: ...


class Outbox:
    """Sends what a session has to show: each completed segment once as new, of what is open only the latest."""

    def __init__(self, connection: Sender, config: Config, session: LiveSession) -> None:
        self._connection = connection
        self._config = config
        self._session = session
        self._shown: deque[dict[str, Any]] = deque(maxlen=config.n_segments)
        self._waiting: deque[Segment] = deque()
        self._last_open: dict[str, Any] | None = None
        self._news = asyncio.Event()
        self._closed = False
        self._language: tuple[str, float] | None = None
        self._detect = config.detect

    def update(self, completed: Sequence[Segment]) -> None:
        """These segments are complete, and the open one may have changed."""
        self._waiting.extend(completed)
        self._news.set()

    def detected(self, language: str, probability: float) -> None:
        """Tell the language before the next segments, once, if the client wants to know and it is sure."""
        if self._detect:
            self._detect = False
            self._language = (language, probability) if probability > _SURE_OF_LANGUAGE else None

    def close(self) -> None:
        """Let :meth:`run` end once all is sent."""
        self._closed = True
        self._news.set()

    async def run(self) -> None:
        """Raises ``TimeoutError`` where the client does not take what it is sent."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._language is not None:
                code, probability = self._language
                self._language = None
                await self._send({"language": code, "language_prob": probability})
            while self._waiting:
                segment = self._waiting.popleft()
                shown = self._entry(segment.start, segment.end, segment.text, segment.words or (), completed=True)
                incomplete = {**shown, "completed": False}
                if not self._last_open or self._last_open["text"] != shown["text"]:
                    await self._show(incomplete)
                self._shown.append(shown)
                await self._show(None if self._waiting else self._open())
            if (entry := self._open()) is not None and entry != self._last_open:
                await self._show(entry)
            if self._closed and not self._news.is_set():
                return

    def _open(self) -> dict[str, Any] | None:
        segment = self._session.open_segment
        if segment is None or self._waiting:
            return None
        entry = self._entry(segment.start, segment.end, segment.text, segment.words, completed=False)
        entry["settled"] = "".join(word.word for word in segment.words[: segment.n_settled])
        return entry

    def _entry(
        self, start: float, end: float, text: str, words: tuple[Word, ...], *, completed: bool
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "start": f"{start:.3f}",
            "end": f"{end:.3f}",
            "text": text if text.startswith(" ") else " " + text,
            "completed": completed,
        }
        if self._config.word_timestamps:
            entry["words"] = [
                {
                    "word": word.word,
                    "start": f"{word.start:.3f}",
                    "end": f"{word.end:.3f}",
                    "probability": round(word.probability, 4),
                }
                for word in words
            ]
        return entry

    async def _show(self, entry: dict[str, Any] | None) -> None:
        if entry is not None:
            self._last_open = entry
        segments = [*self._shown, *([entry] if entry is not None else [])]
        await self._send({"segments": segments})

    async def _send(self, message: dict[str, Any]) -> None:
        text = json.dumps({"uid": self._config.uid, **message})
        await asyncio.wait_for(self._connection.send(text), SEND_SECONDS)
