"""How far live text is behind the words, by recordings whose words have times, at the pace of speech.

    python benchmarks/live.py --manifest FILE --model base
    python benchmarks/live.py --manifest FILE --model tiny.en --clients 1,2,4,8
    python benchmarks/live.py --manifest FILE --model base --peer PYTHON

Each client joins recordings of the manifest (with half a second of silence between them) into
a stream of ``--seconds`` and speaks WhisperLive's protocol. For every word that comes out right:

- shown: from its end to the first message that has it in its place;
- settled: to the first message that says that it will not change (``settled``, or completed);
- completed: to the completed segment that holds it.

A server keeps up with its clients where 95 % of these words are shown within three seconds; after
the first number of clients that it does not keep up with it is asked no more.

``--peer`` is a Python that has whisper-live; its server gets the same weights (CTranslate2, int8),
the voice detector's of the silero-vad package (it would fetch them), and the same clients; otherwise
it runs as it comes, with one model for all clients. WER is of the text at the end, the last
incomplete segment included; the batch engine's own is beside it. CPU is what the server's process
takes for a minute of a client's sound, in seconds (needs Linux's /proc).
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import Bench, Entry, bench_from, normalize, parser, print_json, print_table, read_manifest, say, score
from websockets.asyncio.client import connect

from whisper_worker.audio.decode import decode
from whisper_worker.settings import Settings
from whisper_worker.types import SAMPLE_RATE

FRAME = 4096
_GAP_SECONDS = 0.5
_READY_SECONDS = 180.0
_REST_SECONDS = 120.0
_QUIET_SECONDS = 15.0
"""Without new text before the client says that it has ended, as WhisperLive's own does with a file."""
_KEEPS_UP_SECONDS = 3.0

PEER_SERVER = """
import sys
from whisper_live.server import TranscriptionServer
TranscriptionServer().run(
    "127.0.0.1", port=int(sys.argv[1]), backend="faster_whisper", faster_whisper_custom_model_path=sys.argv[2],
    single_model=True, max_clients=int(sys.argv[3]), max_connection_time=3600,
)
"""


@dataclass(frozen=True, slots=True)
class Speech:
    """What one client says."""

    waveform: npt.NDArray[np.int16]
    words: tuple[tuple[str, float], ...]
    """Each normalised word with the second at which it ends."""
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """One as it came: when, and the whole text up to what is completed, settled and shown."""

    at: float
    completed: str
    settled: str
    shown: str


@dataclass(frozen=True, slots=True)
class Heard:
    """One message in words: how many of them are settled and how many completed."""

    at: float
    words: tuple[str, ...]
    n_settled: int
    n_completed: int


def speeches(entries: Sequence[Entry], n: int, seconds: float) -> list[Speech]:
    """A stream for each of ``n`` clients, from different places of the manifest."""
    made = []
    for client in range(n):
        first = client * len(entries) // n
        parts: list[npt.NDArray[np.int16]] = []
        words: list[tuple[str, float]] = []
        texts = []
        at = 0.0
        for entry in [*entries[first:], *entries[:first]]:
            waveform = decode(entry.path, Settings()).waveform
            if parts and at + len(waveform) / SAMPLE_RATE > seconds:
                break
            known = entry.words or tuple(word for segment in entry.segments for word in segment.words)
            words += [(part, at + word.end) for word in known for part in normalize(word.text, "en").split()]
            texts.append(entry.text)
            parts += [waveform, np.zeros(round(_GAP_SECONDS * SAMPLE_RATE), dtype=np.int16)]
            at += len(waveform) / SAMPLE_RATE + _GAP_SECONDS
        made.append(Speech(np.concatenate(parts), tuple(words), " ".join(texts)))
    return made


async def speak(port: int, speech: Speech, uid: str) -> list[Message]:
    """One client at the pace of speech; what it was told."""
    told: list[Message] = []
    completed: dict[str, str] = {}
    changed = 0.0
    async with connect(f"ws://127.0.0.1:{port}/", max_size=None, ping_timeout=None) as connection:
        config = {"uid": uid, "language": "en", "task": "transcribe", "model": "base", "use_vad": True}
        await connection.send(json.dumps({**config, "send_last_n_segments": 100}))
        while json.loads(await asyncio.wait_for(connection.recv(), _READY_SECONDS)).get("message") != "SERVER_READY":
            pass
        begun = time.monotonic()

        async def listen() -> None:
            nonlocal changed
            async for message in connection:
                at = time.monotonic()
                segments = json.loads(message).get("segments")
                if not segments:
                    continue
                for segment in segments:
                    if segment.get("completed"):
                        completed[segment["start"]] = segment["text"]
                last = segments[-1]
                done = " ".join(completed.values())
                settled = f"{done} {last.get('settled', '')}"
                shown = done if last.get("completed") else f"{done} {last['text']}"
                if not told or told[-1].shown != shown:
                    changed = at
                told.append(Message(at - begun, done, settled, shown))

        listening = asyncio.create_task(listen())
        for at in range(0, len(speech.waveform), FRAME):
            part = speech.waveform[at : at + FRAME]
            # A frame can be sent once it is over.
            await asyncio.sleep(max(0.0, begun + (at + len(part)) / SAMPLE_RATE - time.monotonic()))
            await connection.send((part.astype(np.float32) / 32768).tobytes())
        changed = time.monotonic()
        while time.monotonic() < changed + _QUIET_SECONDS and not listening.done():
            await asyncio.sleep(0.1)
        await connection.send(b"END_OF_AUDIO")
        try:
            await asyncio.wait_for(listening, _REST_SECONDS)
        except asyncio.TimeoutError:
            say(f"client {uid}: the server did not close")
        except Exception as error:
            say(f"client {uid}: {type(error).__name__}")
    return told


def heard_in(told: Sequence[Message]) -> list[Heard]:
    """Messages in normalised words: work for after the measurement, on the cores that the server needs."""

    @cache
    def words(text: str) -> tuple[str, ...]:
        return tuple(normalize(text, "en").split())

    return [Heard(one.at, words(one.shown), len(words(one.settled)), len(words(one.completed))) for one in told]


def delays(speech: Speech, heard: Sequence[Heard]) -> dict[str, list[float]]:
    """Seconds from a word's end to its being shown, settled and completed, of the words that came out right."""
    found: dict[str, list[float]] = {"shown": [], "settled": [], "completed": []}
    if not heard:
        return found
    final = heard[-1].words
    matcher = difflib.SequenceMatcher(None, [word for word, _ in speech.words], final, autojunk=False)
    for true_at, heard_at, n in matcher.get_matching_blocks():
        for offset in range(n):
            end, place = speech.words[true_at + offset][1], heard_at + offset
            firsts = {
                "shown": (one.at for one in heard if one.words[place : place + 1] == final[place : place + 1]),
                "settled": (one.at for one in heard if one.n_settled > place),
                "completed": (one.at for one in heard if one.n_completed > place),
            }
            for name, times in firsts.items():
                first = next(times, None)
                if first is not None:
                    found[name].append(first - end)
    return found


def timed_entries(manifest: Path, audio_root: Path | None, categories: Sequence[str]) -> list[Entry]:
    """English recordings whose words have times. Ends the program where there are none."""
    entries = [
        entry
        for entry in read_manifest(manifest, audio_root, categories)
        if entry.scored and entry.language == "en" and (entry.words or any(part.words for part in entry.segments))
    ]
    if not entries:
        raise SystemExit("The manifest has no English recording with word times.")
    return entries


@contextmanager
def our_server(bench: Bench, clients: int) -> Iterator[tuple[int, int]]:
    """Gives its port and its process."""
    environment = {
        **os.environ,
        "WHISPER_MODEL": bench.model,
        "WHISPER_THREADS": str(bench.threads),
        "MAX_CLIENTS": str(clients),
        "MAX_CONNECTION_TIME": "86400",
    }
    port, health = free_port(), free_port()
    command = [sys.executable, "-m", "whisper_worker", "live", "--host", "127.0.0.1"]
    with server([*command, "--port", str(port), "--health-port", str(health)], environment, port) as process:
        yield port, process


@contextmanager
def peer_server(bench: Bench, python: str, clients: int) -> Iterator[tuple[int, int]]:
    """Gives its port and its process."""
    port = free_port()
    with tempfile.TemporaryDirectory() as home:
        # Where it looks for its voice detector.
        detector = Path(home, ".cache", "whisper-live", "silero_vad.onnx")
        detector.parent.mkdir(parents=True)
        spec = importlib.util.find_spec("silero_vad")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("The package silero-vad is missing; install the requirements again.")
        detector.write_bytes(Path(spec.submodule_search_locations[0], "data", "silero_vad.onnx").read_bytes())
        environment = {**os.environ, "HOME": home, "OMP_NUM_THREADS": str(bench.threads), "HF_HUB_OFFLINE": "1"}
        command = [python, "-c", PEER_SERVER, str(port), str(bench.ct2_dir()), str(clients)]
        with server(command, environment, port) as process:
            yield port, process


@contextmanager
def server(command: Sequence[str], environment: dict[str, str], port: int) -> Iterator[int]:
    process = subprocess.Popen(
        command, env=environment, stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while not listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("The server did not start (BENCH_VERBOSE=1 shows what it said).")
            time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def cpu_seconds(process: int) -> float:
    """Of all its threads so far."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(name: str, port: int, process: int, said: Sequence[Speech]) -> dict[str, Any]:
    """All clients at once; the figures of the whole."""

    async def all_clients() -> list[list[Message]]:
        return list(await asyncio.gather(*(speak(port, one, str(number)) for number, one in enumerate(said))))

    before = cpu_seconds(process)
    answers = asyncio.run(all_clients())
    minutes = sum(len(one.waveform) for one in said) / SAMPLE_RATE / 60
    total = sum(
        (score(one.text, told[-1].shown if told else "", "en") for one, told in zip(said, answers, strict=True)),
        start=score("", "", "en"),
    )
    result: dict[str, Any] = {"server": name, "clients": len(said), "wer": total.error_rate}
    result["cpu_s_a_minute"] = round((cpu_seconds(process) - before) / minutes, 1)
    found: dict[str, list[float]] = {"shown": [], "settled": [], "completed": []}
    for one, told in zip(said, answers, strict=True):
        for kind, values in delays(one, heard_in(told)).items():
            found[kind] += values
    for kind, values in found.items():
        for label, share in (("median", 50), ("p95", 95)):
            result[f"{kind}_{label}"] = round(float(np.percentile(values, share)), 2) if values else None
    return result


def batch_wer(bench: Bench, said: Sequence[Speech], directory: Path) -> float:
    """The batch engine on the very same streams."""
    total = score("", "", "en")
    with bench.start("ours") as engine:
        engine.ready()
        for number, one in enumerate(said):
            path = directory / f"{number}.wav"
            with wave.open(str(path), "wb") as file:
                file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
                file.writeframes(one.waveform.tobytes())
            total += score(one.text, str(engine.transcribe(path, "en")["text"]), "en")
    return total.error_rate


def main() -> None:
    arguments = _arguments()
    bench = bench_from(arguments)
    entries = timed_entries(arguments.manifest, arguments.audio_root, arguments.categories)
    results: list[dict[str, Any]] = []
    keeping_up = {"ours": 0, **({"whisper-live": 0} if arguments.peer else {})}
    lost: set[str] = set()
    for clients in arguments.clients:
        said = speeches(entries, clients, arguments.seconds)
        say(f"{clients} clients, {len(said[0].waveform) / SAMPLE_RATE:.0f} s each, at the pace of speech")
        with tempfile.TemporaryDirectory() as directory:
            batch = batch_wer(bench, said, Path(directory))
        for name in [name for name in keeping_up if name not in lost]:
            started = our_server(bench, clients) if name == "ours" else peer_server(bench, arguments.peer, clients)
            with started as (port, process):
                one = measure(name, port, process, said)
            results.append({**one, "batch_wer": batch, "load": round(os.getloadavg()[0], 1)})
            if one["shown_p95"] is not None and one["shown_p95"] < _KEEPS_UP_SECONDS:
                keeping_up[name] = clients
            else:
                lost.add(name)
    kinds = [f"{kind}_{label}" for kind in ("shown", "settled", "completed") for label in ("median", "p95")]
    columns = ["server", "clients", *kinds, "wer", "batch_wer", "cpu_s_a_minute", "load"]
    print_table(columns, [[one[column] for column in columns] for one in results])
    print_json({"benchmark": "live", "model": bench.model, "keeping_up": keeping_up, "results": results})


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, peers=False)
    made.add_argument("--manifest", type=Path, required=True, help="JSON lines; only entries with word times are used")
    made.add_argument("--audio-root", type=Path, help="directory of the files; default: the manifest's")
    made.add_argument("--categories", type=lambda value: value.split(","), default=[], help="only these")
    made.add_argument("--clients", type=_numbers, default=[1], help="at a time; several numbers are tried in turn")
    made.add_argument("--seconds", type=float, default=120.0, help="of speech for each client")
    made.add_argument("--peer", metavar="PYTHON", help="a Python that has whisper-live, to measure its server too")
    made.add_argument("--ct2", type=Path, help="CTranslate2 directory of the same weights for the peer")
    return made.parse_args()


def _numbers(value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


if __name__ == "__main__":
    main()
