"""Does the live service stay as it is? Speech and silence by turns, at the pace of speech, for an hour.

    python benchmarks/live_soak.py --manifest FILE --model tiny.en --minutes 60

One client speaks WhisperLive's protocol: a minute of recordings, then a minute of silence (no
sound at all and a faint hiss by turns). Of the server's process it reads the resident memory behind
each (medians of every ten minutes: what is in work comes and goes by a hundred MB), and the CPU
time that each minute of speech and of silence costs. Words whose place is in a silence were
invented, whether they stayed or were shown for a moment only. Needs Linux's /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
from common import Entry, bench_from, normalize, parser, print_json, print_table, score
from live import FRAME, cpu_seconds, our_server, timed_entries
from websockets.asyncio.client import ClientConnection, connect

from whisper_worker.audio.decode import decode
from whisper_worker.settings import Settings
from whisper_worker.types import SAMPLE_RATE

_TURN_SECONDS = 60.0
_HISS = 30.0
"""Standard deviation of the hiss: -61 dB of full scale."""
_SETTLING_SECONDS = 3.0
"""A turn's last words are still at work when it is over: its CPU time is read so much later."""
_MARGIN_SECONDS = 0.5
"""A place so close to speech may be off by as much."""
_REST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One stretch of the stream: recordings, or silence, which has no text."""

    start: float
    waveform: npt.NDArray[np.int16]
    text: str

    @property
    def end(self) -> float:
        return self.start + len(self.waveform) / SAMPLE_RATE


@dataclass(slots=True)
class Account:
    """What was heard, and what was read of the process."""

    completed: dict[str, str] = field(default_factory=dict)
    """Text by its start."""
    shown: dict[tuple[float, float], str] = field(default_factory=dict)
    """All that was ever to be seen, by its place."""
    cpu: list[float] = field(default_factory=list)
    """Seconds for each turn."""
    resident: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of the stream and MB, once a turn."""


def turns(entries: Sequence[Entry], seconds: float) -> list[Turn]:
    """Speech and silence by turns, until ``seconds`` are over."""
    recordings = itertools.cycle([(decode(entry.path, Settings()).waveform, entry.text) for entry in entries])
    chance = np.random.default_rng(0)
    n = round(_TURN_SECONDS * SAMPLE_RATE)
    made: list[Turn] = []
    at = 0.0
    while at < seconds:
        if not made or not made[-1].text:
            parts: list[npt.NDArray[np.int16]] = []
            texts: list[str] = []
            while sum(map(len, parts)) < n:
                waveform, text = next(recordings)
                parts.append(waveform)
                texts.append(text)
            made.append(Turn(at, np.concatenate(parts), " ".join(texts)))
        else:
            hiss = chance.normal(0.0, _HISS, n) if len(made) % 4 == 3 else np.zeros(n)
            made.append(Turn(at, hiss.astype(np.int16), ""))
        at = made[-1].end
    return made


def resident_mb(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def soak(port: int, process: int, stream: Sequence[Turn]) -> Account:
    """Speak all turns; what came of it."""
    account = Account()
    async with connect(f"ws://127.0.0.1:{port}/", max_size=None, ping_timeout=None) as connection:
        config = {"uid": "soak", "language": "en", "task": "transcribe", "model": "", "use_vad": True}
        await connection.send(json.dumps({**config, "send_last_n_segments": 2}))
        while json.loads(await connection.recv()).get("message") != "SERVER_READY":
            pass
        begun = time.monotonic()
        listening = asyncio.create_task(_listen(connection, account))
        reading = asyncio.create_task(_read(process, stream, begun, account))
        for turn in stream:
            for at in range(0, len(turn.waveform), FRAME):
                part = turn.waveform[at : at + FRAME]
                over = begun + turn.start + (at + len(part)) / SAMPLE_RATE
                await asyncio.sleep(max(0.0, over - time.monotonic()))
                await connection.send((part.astype(np.float32) / 32768).tobytes())
        await reading
        await connection.send(b"END_OF_AUDIO")
        await asyncio.wait_for(listening, _REST_SECONDS)
    return account


async def _listen(connection: ClientConnection, account: Account) -> None:
    async for message in connection:
        for segment in json.loads(message).get("segments", []):
            account.shown[float(segment["start"]), float(segment["end"])] = segment["text"]
            if segment["completed"]:
                account.completed[segment["start"]] = segment["text"]


async def _read(process: int, stream: Sequence[Turn], begun: float, account: Account) -> None:
    account.resident.append((0.0, resident_mb(process)))
    before = cpu_seconds(process)
    for turn in stream:
        await asyncio.sleep(max(0.0, begun + turn.end + _SETTLING_SECONDS - time.monotonic()))
        now = cpu_seconds(process)
        account.cpu.append(now - before)
        account.resident.append((turn.end, resident_mb(process)))
        before = now


def invented(stream: Sequence[Turn], account: Account) -> int:
    """Words that were shown inside a silence."""
    silences = [(turn.start + _MARGIN_SECONDS, turn.end - _MARGIN_SECONDS) for turn in stream if not turn.text]
    return sum(
        len(normalize(text, "en").split())
        for (start, end), text in account.shown.items()
        if any(first < (start + end) / 2 < last for first, last in silences)
    )


def cpu_a_minute(stream: Sequence[Turn], account: Account, *, speech: bool) -> float | None:
    """Seconds of processor time for a minute of one kind."""
    found = [
        (cpu, turn.end - turn.start) for turn, cpu in zip(stream, account.cpu, strict=True) if bool(turn.text) == speech
    ]
    return round(60 * sum(cpu for cpu, _ in found) / sum(length for _, length in found), 2) if found else None


def _resident(stream: Sequence[Turn], account: Account, until: float, every: float, *, speech: bool) -> float | None:
    """Median of the resident memory behind the turns of one kind, of those that end in the ``every`` minutes before
    minute ``until``: one reading says more of where in a decode it fell."""
    found = [
        megabytes
        for turn, (_, megabytes) in zip(stream, account.resident[1:], strict=True)
        if bool(turn.text) == speech and until - every < turn.end / 60 <= until
    ]
    return round(median(found), 1) if found else None


def main() -> None:
    arguments = _arguments()
    bench = bench_from(arguments)
    entries = timed_entries(arguments.manifest, arguments.audio_root, arguments.categories)
    stream = turns(entries, 60 * arguments.minutes)
    with our_server(bench, 1) as (port, process):
        account = asyncio.run(soak(port, process, stream))
    resident = {
        f"{mark:g}": {"speech": _resident(stream, account, mark, arguments.every, speech=True)}
        | {"silence": _resident(stream, account, mark, arguments.every, speech=False)}
        for mark in (arguments.every * n for n in range(1, math.ceil(stream[-1].end / 60 / arguments.every) + 1))
    }
    total = score(" ".join(turn.text for turn in stream), " ".join(account.completed.values()), "en")
    result = {
        "benchmark": "live_soak",
        "model": bench.model,
        "minutes": round(stream[-1].end / 60, 1),
        "rss_mb": resident,
        "rss_mb_at_start": round(account.resident[0][1], 1),
        "cpu_s_a_minute_of_speech": cpu_a_minute(stream, account, speech=True),
        "cpu_s_a_minute_of_silence": cpu_a_minute(stream, account, speech=False),
        "words_invented_in_silence": invented(stream, account),
        "wer": total.error_rate,
    }
    print_table(
        ["to minute", "MB behind speech", "MB behind silence"],
        [[minute, value["speech"], value["silence"]] for minute, value in resident.items()],
    )
    print_json(result)


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, peers=False)
    made.add_argument("--manifest", type=Path, required=True, help="JSON lines; only entries with word times are used")
    made.add_argument("--audio-root", type=Path, help="directory of the files; default: the manifest's")
    made.add_argument("--categories", type=lambda value: value.split(","), default=[], help="only these")
    made.add_argument("--minutes", type=float, default=60.0)
    made.add_argument("--every", type=float, default=10.0, help="minutes that a line of the table is the median of")
    return made.parse_args()


if __name__ == "__main__":
    main()
