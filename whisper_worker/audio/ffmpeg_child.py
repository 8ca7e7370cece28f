"""One ffmpeg process: where its program is, what it may do, what it says.

The file is handed over as an open descriptor, so ffmpeg learns no name: neither an extension
nor a directory can sway what it takes the bytes for. Demuxers that open further files or
addresses are shut out, as is every protocol but the one for that descriptor; the child has
no environment, writes no file and gets a bounded share of memory.
"""

from __future__ import annotations

import functools
import os
import re
import resource
import selectors
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from whisper_worker.errors import DeadlineExceeded, InternalError
from whisper_worker.types import SAMPLE_RATE, CancelToken

FORMATS = (
    "aa,aac,aax,ac3,ac4,act,aea,aiff,alaw,amr,amrnb,amrwb,apac,ape,aptx,aptx_hd,asf,asf_o,ast,au,avi,avr,bfstm,"
    "bonk,brstm,caf,codec2,codec2raw,daud,dhav,dsf,dss,dts,dtshd,dv,eac3,epaf,flac,flv,g722,g723_1,g726,g726le,g728,"
    "g729,gsm,gxf,hca,iamf,iff,ilbc,ircam,laf,lc3,live_flv,loas,matroska,mlp,mov,mp3,mpc,mpc8,mpeg,mpegts,mtaf,"
    "mulaw,mxf,nistsphere,nsv,nut,ogg,oma,osq,pvf,qcp,qoa,rka,rm,rso,s16le,sbc,sds,shn,sol,sox,spdif,swf,tak,"
    "truehd,tta,ty,voc,vqf,w64,wav,wavarc,wsd,wtv,wv,wve,xa,xwma"
)
"""Demuxers of containers that hold their own sound. Not among them: playlists, scripts, streaming
manifests, numbered images, devices and synthesised music, in whose place a file could name another."""

MEMORY_LIMIT = 2 << 30
"""Bytes of address space for the child; an ordinary decode takes a tenth."""

JUMP = 0.1
"""Seconds by which a frame's time must differ from the end of the one before to be reported."""

_POLL = 0.1
_READ = 1 << 18
_MAX_JUMPS = 10_000
_NO_ERROR = "failed to create or replace stream"
"""Said of Ogg files joined end to end, while their length is looked for. Where a part is lost, more lines follow."""
# Passes every frame on as it is, and prints the time and the position of the first one and of
# each that does not follow on its predecessor. The log is the only way out for a time stamp
# when the samples leave as plain PCM.
_TIMELINE = (
    "asetpts='st(0,PTS*TB);"
    f"if(eq(N,0)+gt(abs(ld(0)-ld(1)),{JUMP}),print(ld(0))+print(N/SR);st(1,ld(0)));"
    "st(1,ld(1)+NB_SAMPLES/SR);PTS'"
)
_LINE = re.compile(r"(?:\[[^\]]* @ [^\]]*\] )*\[(\w+)\] (.*)")
_DURATION = re.compile(r"\s+Duration: (\d+):(\d+):(\d+\.\d+)(?:, start: (-?\d+\.\d+))?")
_STREAM = re.compile(r"\s+Stream #0:(\d+)\S*: (Audio|Video): (\w+)")
_MAPPED = re.compile(r"\s+Stream #0:(\d+) -> #0:0")
_NUMBER = re.compile(r"nan|-?\d+\.\d+")


@functools.cache
def ffmpeg_binary() -> str:
    """The ffmpeg that the package imageio-ffmpeg carries, else the system's.

    The package's is one static file and starts in a fifth of the time that a distribution's takes to find its
    libraries, which for short recordings is a quarter of all that is done. Raises :class:`InternalError` where
    there is neither.
    """
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        found = shutil.which("ffmpeg")
    if found is None:
        raise InternalError("ffmpeg is missing; install it, or `pip install imageio-ffmpeg`.", retryable=False)
    return found


class Misdetected(Exception):
    """ffmpeg took the bytes for some format by a coincidence of a few of them."""


@dataclass(slots=True)
class Report:
    """What ffmpeg said of the file, gathered from its log line by line."""

    opened: bool = False
    container: str = ""
    """First name of the demuxer, e.g. ``mp3`` or ``mov``."""
    declared_seconds: float | None = None
    """Length that the header promises; None where it is missing or a guess from the bit rate."""
    start: float = 0.0
    """Time stamp of the file's first frame, which some versions count into the declared length."""
    codecs: dict[int, str] = field(default_factory=dict)
    """Audio streams: index in the file to codec."""
    has_video: bool = False
    chosen: int | None = None
    """Index of the stream that is decoded."""
    jumps: list[tuple[float, float]] = field(default_factory=list)
    """(time stamp, seconds of sound before it) of the first frame and of each that does not follow on."""
    n_errors: int = 0
    errors: list[str] = field(default_factory=list)
    """The first few error lines, as they came."""
    _rest: bytes = b""
    _guessed: bool = False
    _time: float | None = None

    def feed(self, data: bytes) -> None:
        """Take in more of the log. Raises :class:`Misdetected`."""
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-4096:]
        for line in lines:
            match = _LINE.match(line.decode("utf-8", "replace"))
            if match is None:
                continue
            if match[1] == "info":
                self._read_info(match[2])
            elif match[1] in ("error", "fatal") and match[2] != _NO_ERROR:
                self.n_errors += 1
                if len(self.errors) < 8:
                    self.errors.append(match[2][:300])
            elif "misdetection possible" in match[2]:
                raise Misdetected
            elif match[2].startswith("Estimating duration from bitrate"):
                self._guessed = True

    def _read_info(self, text: str) -> None:
        if text.startswith("Input #0"):
            self.opened = True
            self.container = re.split(r"[ ,]+", text)[2]
        elif self.chosen is None and (found := _DURATION.match(text)) and not self._guessed:
            self.declared_seconds = int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])
            self.start = float(found[4] or 0)
        elif self.chosen is None and (found := _MAPPED.match(text)):
            self.chosen = int(found[1])
        elif self.chosen is None and (found := _STREAM.match(text)):
            if found[2] == "Video":
                self.has_video |= "(attached pic)" not in text
            else:
                self.codecs[int(found[1])] = found[3]
        elif _NUMBER.fullmatch(text):
            if self._time is None:
                self._time = float(text)
            else:
                if len(self.jumps) < _MAX_JUMPS:
                    self.jumps.append((self._time, float(text)))
                self._time = None


@dataclass(frozen=True, slots=True)
class WavHeader:
    n_channels: int
    mask: int
    """Speaker positions of the channels, 0 where the header has none."""
    size: int
    """Bytes before the first sample."""


def read_wav_header(output: bytes | bytearray) -> WavHeader | None:
    """Header of ffmpeg's output; None while not all of it is there."""
    position, layout = 12, None
    while len(output) >= position + 8:
        name, size = struct.unpack_from("<4sI", output, position)
        position += 8
        if name == b"fmt " and len(output) >= position + size:
            n_channels = struct.unpack_from("<H", output, position + 2)[0]
            layout = n_channels, struct.unpack_from("<I", output, position + 20)[0] if size >= 40 else 0
        elif name == b"data" and layout is not None:
            return WavHeader(*layout, size=position)
        position += size
    return None


def decode_command(descriptor: int, *, stream: int | None, options: Mapping[str, object]) -> list[str]:
    """Command line that decodes the file open as ``descriptor`` to 16 kHz WAV on standard output.

    All channels are kept. ``stream`` picks a stream by its index; without it ffmpeg takes the
    default one, else that of most channels. ``options`` are the demuxer's.
    """
    import ffmpeg

    source = ffmpeg.input(
        f"file:/dev/fd/{descriptor}",
        vn=None,
        sn=None,
        dn=None,
        threads=1,
        protocol_whitelist="file",
        format_whitelist=FORMATS,
        **options,
    )
    chosen: dict[str, object] = {} if stream is None else {"map": f"0:{stream}"}
    output = ffmpeg.output(
        source,
        "pipe:1",
        format="wav",
        acodec="pcm_s16le",
        ar=SAMPLE_RATE,
        af=_TIMELINE,
        map_metadata=-1,
        bitexact=None,
        **chosen,
    )
    program = [ffmpeg_binary(), "-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info"]
    return [str(part) for part in ffmpeg.compile(output, cmd=program)]


def run(
    command: list[str],
    descriptor: int,
    *,
    directory: Path | None,
    deadline: float,
    cancel: CancelToken | None,
    on_log: Callable[[bytes], None],
    on_output: Callable[[bytes], None],
) -> int:
    """Run ``command`` to its end and return its exit status; whatever is raised, the child is gone by then.

    ``deadline`` is a time of :func:`time.monotonic`. Log lines that precede a piece of output are
    handed over before it. Raises :class:`DeadlineExceeded`, :class:`Cancelled` and what the callbacks raise.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(descriptor,),
        cwd=directory or "/",
        env={"PATH": os.defpath},
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        _limit(process.pid)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stderr, selectors.EVENT_READ, (0, on_log))
            selector.register(process.stdout, selectors.EVENT_READ, (1, on_output))
            while selector.get_map():
                ready = [key for key, _ in selector.select(_POLL)]
                if cancel is not None:
                    cancel.check()
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(
                        "Decoding the audio took longer than allowed; try again, or raise WHISPER_DECODE_TIMEOUT."
                    )
                for key in sorted(ready, key=lambda key: key.data[0]):
                    data = os.read(key.fd, _READ)
                    if data:
                        key.data[1](data)
                    else:
                        selector.unregister(key.fileobj)
        return process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def _limit(pid: int) -> None:
    """Bound the child from outside: code run between fork and exec is not safe beside threads."""
    if not hasattr(resource, "prlimit"):  # only Linux has it
        return
    with suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
