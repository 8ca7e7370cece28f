"""Any audio or video file to a 16 kHz mono waveform.

A plain WAV file of that very form is read as it is. Otherwise, in the ordinary case, one ffmpeg
process does it, without a probe before. What it says of the file is read from its log; only
where that gives a reason (no sound in the stream taken, a headerless format) the file is
decoded once more with other choices.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from whisper_worker import log
from whisper_worker.audio import ffmpeg_child, pieces, plain_wav
from whisper_worker.audio.downmix import BLOCK, Downmix
from whisper_worker.errors import AudioDecodeError, InvalidInput, TooLarge
from whisper_worker.settings import Settings
from whisper_worker.types import SAMPLE_RATE, CancelToken

SILENT_PEAK = 32
"""A stream whose loudest sample is this (-60 dBFS) or less has no sound, if another one has."""

_RAW_FORMATS: dict[str, dict[str, object]] = {
    ".g722": {"format": "g722"},
    ".gsm": {"format": "gsm"},
    ".ulaw": {"format": "mulaw", "ar": 8000},
    ".ul": {"format": "mulaw", "ar": 8000},
    ".alaw": {"format": "alaw", "ar": 8000},
    ".al": {"format": "alaw", "ar": 8000},
    ".sln": {"format": "s16le", "ar": 8000},
    ".sln16": {"format": "s16le", "ar": 16000},
}
"""Formats without any header: telephony's, for which an extension is all there is to go by."""

_FRAMES = (
    (re.compile(rb"ID3|\xff[\xf2-\xf7\xfa-\xff]"), "mp3"),
    (re.compile(rb"\xff[\xf0\xf1\xf8\xf9]"), "aac"),
    (re.compile(rb"\x0b\x77"), "eac3"),
    (re.compile(rb"\x7f\xfe\x80\x01"), "dts"),
    (re.compile(rb"G.{187}G", re.DOTALL), "mpegts"),
)
"""How the frames of formats without a header begin. Of a few of them alone ffmpeg does not say what they are. AC-3 is
read by E-AC-3's reader as well."""
_FEW_FRAMES_BYTES = 64 << 10
"""A larger file that was not recognised is none of these."""

_MAGIC = (
    (b"PK\x03\x04", "a ZIP archive"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"GIF8", "an image"),
    (b"#EXTM3U", "a playlist"),
    (b"ffconcat", "a playlist"),
    (b"[playlist]", "a playlist"),
)
# Fewer bytes a second than any speech codec needs: such a length in a header is not believed
# before it is decoded.
_LEAST_BYTES_PER_SECOND = 500
_LONGEST_GAP = 3600.0
_SHORTEST_STRETCH = 0.5
_log = log.get_logger("decode")


@dataclass(frozen=True, slots=True)
class DecodedAudio:
    """``waveform``: int16, shape (n,), 16 kHz mono. ``duration`` is its length in seconds."""

    waveform: npt.NDArray[np.int16]
    duration: float
    n_channels: int
    """Channels of the stream that was decoded."""
    codec: str
    warnings: tuple[str, ...] = ()
    stream: int | None = None
    """Index of the stream that was decoded, where the file has several of sound."""


def decode(
    path: Path,
    settings: Settings,
    *,
    directory: Path | None = None,
    cancel: CancelToken | None = None,
    channel: int | None = None,
    stream: int | None = None,
) -> DecodedAudio:
    """Decode the file at ``path``; ``channel`` takes one channel (from 0) in place of the mix of all, ``stream`` the
    stream of that index in place of the first one with sound.

    The content decides what the file is; its extension is asked only when the bytes say nothing.
    Time 0 is where the recording starts, also where the sound starts later. ``directory`` is
    ffmpeg's working directory; nothing is written there.

    Raises :class:`AudioDecodeError`, :class:`TooLarge` (longer than max_audio_seconds),
    :class:`DeadlineExceeded`, :class:`InvalidInput` (no such file or channel) and :class:`Cancelled`.
    """
    started = time.monotonic()
    with _open(path) as file:
        head = file.read(4096)
        _refuse_what_is_no_audio(head)
        n_bytes = os.fstat(file.fileno()).st_size
        audio = _plain(file, n_bytes, settings, cancel) if channel in (None, 0) else None
        if audio is None:
            deadline = started + settings.decode_timeout
            job = _Job(file.fileno(), n_bytes, head, settings, directory, deadline, cancel, channel)
            # A recorder that died wrote its last header some time before: the samples behind it count as well.
            taken = job.decode_stream(stream, {"ignore_length": 1} if job.riff_surplus > 0.1 * n_bytes else {})
            if not taken.report.opened and path.suffix.lower() in _RAW_FORMATS:
                taken = job.decode_stream(options=_RAW_FORMATS[path.suffix.lower()])
            elif not taken.report.opened and n_bytes <= _FEW_FRAMES_BYTES:
                taken = _few_frames(job) or taken
            audio = _finish(taken if stream is not None else _stream_with_sound(job, taken), job)
    seconds = round(time.monotonic() - started, 3)
    fields = {"codec": audio.codec, "channels": audio.n_channels, "audio_seconds": audio.duration, "seconds": seconds}
    _log.info("Audio conversion completed", extra={"fields": fields})
    return audio


def _open(path: Path) -> IO[bytes]:
    try:
        # Not to be held up by the other end of a pipe that somebody named as a file.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except (OSError, ValueError):
        raise InvalidInput("The audio file does not exist or may not be read.") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InvalidInput("The audio path is not a regular file.")
    return file


def _plain(file: IO[bytes], n_bytes: int, settings: Settings, cancel: CancelToken | None) -> DecodedAudio | None:
    """The file's samples where they are the waveform already; None where ffmpeg is needed."""
    if cancel is not None:
        cancel.check()
    place = plain_wav.find_samples(file, n_bytes)
    if place is None:
        return None
    if place[1] > settings.max_audio_seconds * SAMPLE_RATE:
        raise _too_long(settings)
    waveform = plain_wav.read_samples(file, place)
    return None if waveform is None else DecodedAudio(waveform, len(waveform) / SAMPLE_RATE, 1, "pcm_s16le")


def _refuse_what_is_no_audio(head: bytes) -> None:
    """Say plainly what the bytes are where that is plain, instead of what ffmpeg makes of them."""
    if not head:
        raise AudioDecodeError("The file is empty (0 bytes): check that the recording was uploaded whole.")
    what = next((name for magic, name in _MAGIC if head.startswith(magic)), None)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1024].lower()
    if what is None and re.match(rb"<(!doctype html|html|head|body|script)\b", text):
        what = "an HTML page"
    elif what is None and text.startswith((b"<?xml", b"<error", b"<mpd", b"<smil", b"<svg")):
        what = "an XML document"
    elif what is None and text[:1] in (b"{", b"[") and _is_text(head):
        what = "a JSON document"
    if what is not None:
        raise AudioDecodeError(f"The bytes are {what}, not audio: check the URL or the file.")


def _is_text(head: bytes) -> bool:
    # The last character may be cut, hence the decoder that forgives it.
    printable = head.decode("utf-8", "ignore")
    return len(printable) > 0.9 * len(head) and not re.search(r"[\x00-\x08\x0b\x0e-\x1f]", printable)


@dataclass(frozen=True, slots=True)
class _Job:
    descriptor: int
    n_bytes: int
    head: bytes
    """The first bytes of the file."""
    settings: Settings
    directory: Path | None
    deadline: float
    cancel: CancelToken | None
    channel: int | None

    @property
    def riff_surplus(self) -> int:
        """Bytes that a WAV file has more (or, negative, fewer) than its header says; 0 where it says nothing."""
        size = int.from_bytes(self.head[4:8], "little")
        # Recorders that cannot go back write the largest number they have, or one near it.
        if not self.head.startswith(b"RIFF") or self.head[8:12] != b"WAVE" or size == 0 or size >= 0x7FFF_0000:
            return 0
        return self.n_bytes - size - 8

    def decode_stream(self, stream: int | None = None, options: Mapping[str, object] | None = None) -> _Stream:
        """One run of ffmpeg over the file, with further demuxer ``options``."""
        whole = stream is None and not options
        taken = _Stream(self, divisible=whole)
        try:
            return self._run(taken, stream, options or {})
        except ffmpeg_child.Misdetected:
            return _Stream(self)
        except _LongFile:
            pass
        try:
            return self._run_pieces(taken.report)
        except pieces.Disagreement:
            return self._run(_Stream(self), stream, {})

    def _run(self, taken: _Stream, stream: int | None, options: Mapping[str, object]) -> _Stream:
        # Where the system opens /dev/fd as a duplicate, the child goes on from our place in the file.
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        taken.exit_status = ffmpeg_child.run(
            ffmpeg_child.decode_command(self.descriptor, stream=stream, options=options),
            self.descriptor,
            directory=self.directory,
            deadline=self.deadline,
            cancel=self.cancel,
            on_log=taken.report.feed,
            on_output=taken.feed,
        )
        taken.close()
        return taken

    def _run_pieces(self, report: ffmpeg_child.Report) -> _Stream:
        """The file by several processes at once; ``report`` is what the first one said of its header."""
        taken = _Stream(self)
        pieces.run_pieces(
            self.descriptor,
            report.declared_seconds or 0.0,
            directory=self.directory,
            deadline=self.deadline,
            cancel=self.cancel,
            on_output=taken.feed,
        )
        taken.report, taken.exit_status = report, 0
        taken.close()
        return taken


class _LongFile(Exception):
    """The header promises so much that the file is better decoded in pieces."""


class _Stream:
    """The samples of one stream as they come from ffmpeg, mixed to mono on their way."""

    def __init__(self, job: _Job, *, divisible: bool = False) -> None:
        self.report = ffmpeg_child.Report()
        self.exit_status = 1
        self.n_channels = 0
        self.n_samples = 0
        self._job = job
        self._divisible = divisible
        self._limit = job.settings.max_audio_seconds * SAMPLE_RATE
        self.waveform = np.empty(0, np.int16)
        """The first ``n_samples`` count, until :meth:`close` drops the rest."""
        self._downmix: Downmix | None = None
        self._pending = bytearray()

    @property
    def peak(self) -> int:
        return max(int(self.waveform.max()), -int(self.waveform.min())) if self.n_samples else -1

    def feed(self, data: bytes) -> None:
        """Take more of ffmpeg's WAV output. Raises :class:`TooLarge` once there is too much."""
        self._pending += data
        if not self.n_channels and (header := ffmpeg_child.read_wav_header(self._pending)):
            self._refuse_declared_length()
            if self._divisible and header.n_channels <= 2 and self._is_long():
                raise _LongFile
            del self._pending[: header.size]
            self._set_channels(header)
        size = 2 * self.n_channels * BLOCK
        while self.n_channels and len(self._pending) >= size:
            self._add(bytes(self._pending[:size]))
            del self._pending[:size]

    def close(self) -> None:
        """Take the last samples in and set the level of the whole."""
        if self.n_channels:
            self._add(bytes(self._pending[: len(self._pending) // (2 * self.n_channels) * 2 * self.n_channels]))
        self._pending.clear()
        self.waveform.resize(self.n_samples, refcheck=False)
        if self._downmix is not None and self._downmix.gain > 1:
            for start in range(0, self.n_samples, 1 << 20):
                part = self.waveform[start : start + (1 << 20)]
                part[:] = np.clip(np.rint(part * np.float32(self._downmix.gain)), -32768, 32767)

    def _set_channels(self, header: ffmpeg_child.WavHeader) -> None:
        channel, n_channels = self._job.channel, header.n_channels
        if channel is not None and not 0 <= channel < n_channels:
            raise InvalidInput(f"Channel {channel} was asked for, but the audio has {n_channels} (counted from 0).")
        self.n_channels = n_channels
        if n_channels > 1 and channel is None:
            self._downmix = Downmix(n_channels, header.mask)

    def _is_long(self) -> bool:
        report = self.report
        return (
            report.container in pieces.FORMATS
            and (report.declared_seconds or 0) >= pieces.LEAST_SECONDS
            and len(report.codecs) == 1
            and pieces.n_workers() > 1
        )

    def _refuse_declared_length(self) -> None:
        """Stop before a long decode where the header's length is too much and the file is big enough to hold it."""
        declared = self.report.declared_seconds
        if declared is None or declared <= self._job.settings.max_audio_seconds:
            return
        if self._job.n_bytes >= declared * _LEAST_BYTES_PER_SECOND:
            raise _too_long(self._job.settings)

    def _add(self, pcm: bytes) -> None:
        block = np.frombuffer(pcm, "<i2").reshape(-1, self.n_channels)
        mono = self._downmix.add(block) if self._downmix is not None else block[:, self._job.channel or 0]
        end = self.n_samples + len(mono)
        if end > self._limit:
            raise _too_long(self._job.settings)
        if end > len(self.waveform):
            # Grows in place (mremap) by a quarter: a list of pieces would need twice the memory once joined.
            self.waveform.resize(max(end, len(self.waveform) * 5 // 4, 64 * BLOCK), refcheck=False)
        self.waveform[self.n_samples : end] = mono
        self.n_samples = end


def _too_long(settings: Settings) -> TooLarge:
    return TooLarge(
        f"The audio is longer than the {settings.max_audio_seconds:g} s that this worker takes; "
        "send it in parts, or raise WHISPER_MAX_AUDIO_SECONDS."
    )


def _stream_with_sound(job: _Job, taken: _Stream) -> _Stream:
    """``taken``, or where it has no sound and the file has other audio streams, the first of these that has."""
    for stream in sorted(taken.report.codecs):
        if taken.peak > SILENT_PEAK:
            break
        if stream != taken.report.chosen:
            other = job.decode_stream(stream)
            if other.peak > taken.peak:
                taken = other
    return taken


def _few_frames(job: _Job) -> _Stream | None:
    """A file of a few frames, by the format that its first bytes are those of; None where it is not whole in it."""
    for start, name in _FRAMES:
        if start.match(job.head):
            taken = job.decode_stream(options={"format": name})
            # Bytes that begin like a frame by coincidence give errors, or nothing at all.
            return taken if taken.n_samples and not taken.report.n_errors else None
    return None


def _finish(taken: _Stream, job: _Job) -> DecodedAudio:
    report = taken.report
    if not taken.n_channels or (not taken.n_samples and report.n_errors):
        raise _failure(report, job.head)
    warnings = []
    ordered = sorted(report.codecs)
    if report.chosen is not None and len(ordered) > 1 and report.chosen != ordered[0]:
        warnings.append(f"audio: track {ordered.index(report.chosen) + 1} of {len(ordered)} was taken.")
    if not taken.n_samples:
        warnings.append("audio: the file holds no samples.")
    silences = _missing_stretches(report.jumps, taken.n_samples / SAMPLE_RATE)
    missing = sum(seconds for _, seconds in silences)
    warnings += _damage(taken, job, taken.n_samples / SAMPLE_RATE + missing)
    waveform = _insert_silence(taken, silences, job.settings) if silences else taken.waveform
    if any(position for position, _ in silences):
        warnings.append(f"audio: {missing:.1f} s are missing in the file; they are kept as silence.")
    codec = report.codecs.get(report.chosen if report.chosen is not None else -1, "unknown")
    stream = report.chosen if len(ordered) > 1 else None
    return DecodedAudio(waveform, len(waveform) / SAMPLE_RATE, taken.n_channels, codec, tuple(warnings), stream)


def _damage(taken: _Stream, job: _Job, got: float) -> list[str]:
    """What to tell of a file that is not whole; ``got`` is the length of what was read, gaps included."""
    report, found = taken.report, []
    if report.n_errors or taken.exit_status:
        found.append("audio: parts of the file are damaged or cut off; what could be read was transcribed.")
    promised = report.declared_seconds
    alone = not report.has_video and len(report.codecs) == 1  # else another stream may be as long as that
    short = promised is not None and alone and got < promised - max(0.5, 0.01 * promised, report.start)
    if short and promised is not None:
        found.append(f"audio: the file's header promises {promised:.1f} s, but it holds {got:.1f} s.")
    elif job.riff_surplus < 0:
        found.append("audio: the file is shorter than its header says; it may have been cut off.")
    return found


def _missing_stretches(jumps: list[tuple[float, float]], n_seconds: float) -> list[tuple[float, float]]:
    """Where time stamps run ahead of the sound: (position, seconds missing there).

    Only what lasts is believed: a time stamp that is taken back within half a second, one that
    goes backwards (files joined end to end) and one more than an hour ahead change nothing.
    """
    stretches: list[tuple[float, float]] = []
    filled = wrong = 0.0
    for number, (stamp, position) in enumerate(jumps):
        if number and not position:
            break  # ffmpeg began to count anew, for a stream that changes its channels or rate on the way
        end = jumps[number + 1][1] if number + 1 < len(jumps) else n_seconds
        ahead = stamp - position - wrong - filled
        if not ahead > ffmpeg_child.JUMP or end - position < min(_SHORTEST_STRETCH, n_seconds / 2):
            continue
        if ahead > _LONGEST_GAP:
            wrong += ahead
        else:
            stretches.append((position, ahead))
            filled += ahead
    return stretches


def _insert_silence(taken: _Stream, silences: list[tuple[float, float]], settings: Settings) -> npt.NDArray[np.int16]:
    gaps = [(round(position * SAMPLE_RATE), round(seconds * SAMPLE_RATE)) for position, seconds in silences]
    n_samples = taken.n_samples + sum(length for _, length in gaps)
    if n_samples > settings.max_audio_seconds * SAMPLE_RATE:
        raise _too_long(settings)
    waveform = np.zeros(n_samples, np.int16)
    source = target = 0
    for position, length in [*gaps, (taken.n_samples, 0)]:
        part = taken.waveform[source:position]
        waveform[target : target + len(part)] = part
        source, target = source + len(part), target + len(part) + length
    return waveform


def _failure(report: ffmpeg_child.Report, head: bytes) -> AudioDecodeError:
    if report.opened and not report.codecs:
        return AudioDecodeError("The file has no audio stream; send one with sound.")
    if not report.opened and _is_text(head):
        return AudioDecodeError("The bytes are text, not audio: check the URL or the file.")
    if any("Cannot allocate memory" in line for line in report.errors):
        return AudioDecodeError("Decoding the audio needs more memory than allowed: the file is damaged or hostile.")
    reason = _useful_line(report.errors)
    return AudioDecodeError(
        f"The bytes could not be read as audio ({reason}): check that the file plays and was uploaded whole."
    )


def _useful_line(errors: list[str]) -> str:
    """ffmpeg's first error line that says more than that there is one, without paths, names and addresses."""
    if any("not on whitelist" in line for line in errors):
        return "its format is none of those taken as audio"
    general = re.compile(
        r"Error (opening|while|submitting)|Invalid data found|Conversion failed|Output file|Task finish"
    )
    line = next((line for line in errors if not general.search(line)), "no format was recognised")
    line = re.sub(r"'[^']*'|\"[^\"]*\"|\b\w+:/\S*|(?<!\w)/\S+|\bfile:\S+", "...", line)
    return json.dumps(line, ensure_ascii=False)[1:-1].strip(" .:")[:120]
