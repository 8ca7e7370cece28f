"""Many clients of the HTTP service at once: throughput, waiting, memory.

    python benchmarks/http_load.py --manifest FILE --model NAME
        [--clients 32] [--requests 96] [--soak 400] [--peers faster-whisper-greedy]

The service is started as people start it. Four things are measured on the same weights:

- clients: each uploads one recording after another, all of them at once, --requests in all;
- bulk: the same recordings as one batch, handed to the engine in one process without a service, as many at once
  as there are clients: what the service could give at best;
- joined: the same sound as one recording, uploaded by one client. Windows of 20 s hold several recordings then,
  where else each has its own, with silence behind it;
- peers: the same recordings one at a time in one process, without a service in between.

Then --soak further requests, four at a time, show whether the service's memory grows. A new service takes
more with every length and mix of windows that it has not met, and gives some back every now and then. So
the first half of the soak's requests, 200 at most, warm it up; after that its resident memory is read every
20 requests, and the medians of the first 200 and the last 200 requests are compared.

The last line is JSON: ``audio_s``; ``clients``, ``bulk``, ``joined`` and each peer with ``wall_s`` and ``speed``
(audio seconds a second), the first with ``p50_s`` and ``p95_s`` of a request and ``failed``;
``of_bulk``, ``of_joined`` and ``of_peers``: the clients' speed divided by theirs; ``soak``: ``requests``,
``failed``, and MB of resident memory ``before``, ``first``, ``last`` and at most (``largest``), with
``growth_percent`` of the median.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import requests
from common import ROOT, Bench, Entry, bench_from, parser, print_json, print_table, read_manifest, say
from jobs import load
from join import SAMPLE_RATE, decode

from whisper_worker.audio.decode import decode as read
from whisper_worker.settings import Settings
from whisper_worker.types import TranscribeOptions

_READY_SECONDS = 600.0
_REQUEST_SECONDS = 3600.0
_GAP = bytes(2 * SAMPLE_RATE)
_SOAK_CLIENTS = 4
_SOAK_STEP = 20
_SOAK_STRETCH = 200


class Service:
    """``whisper-worker serve`` in a process of its own, at a free port."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url

    def transcribe(self, path: Path, language: str | None) -> float:
        """Upload one recording; gives the seconds until its transcript was there. Raises where there is none."""
        begun = time.perf_counter()
        with path.open("rb") as file:
            data = {} if language is None else {"language": language}
            answer = requests.post(f"{self.url}/transcribe", files={"audio": file}, data=data, timeout=_REQUEST_SECONDS)
        answer.raise_for_status()
        return time.perf_counter() - begun

    def rss_mb(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise SystemExit("The service has ended.")


@contextmanager
def serving(bench: Bench, clients: int) -> Iterator[Service]:
    with tempfile.TemporaryDirectory() as directory:
        environment = {
            **os.environ,
            "WHISPER_MODEL": bench.model,
            "WHISPER_THREADS": str(bench.threads),
            "WHISPER_MAX_REQUESTS": str(2 * clients),
            "WHISPER_REQUEST_THREADS": str(clients),
            **({"MODEL_BATCH_SIZE": str(bench.batch_size)} if bench.batch_size else {}),
            "WHISPER_TMPDIR": directory,
            "LOG_FORMAT": "text",
            "LOG_LEVEL": "INFO",
            "HF_HUB_OFFLINE": "1",
        }
        log_file = Path(directory) / "log"
        command = [sys.executable, "-m", "whisper_worker", "serve", "--host", "127.0.0.1", "--port", "0"]
        with log_file.open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)
        try:
            yield _ready(process, log_file)
        finally:
            process.terminate()
            process.wait()


def _ready(process: subprocess.Popen[bytes], log: Path) -> Service:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        _, _, found = log.read_text(encoding="utf-8").partition("Listening port=")
        if found:
            url = f"http://127.0.0.1:{found.split()[0]}"
            if requests.get(f"{url}/ready", timeout=30).status_code == 200:
                return Service(process, url)
        time.sleep(0.1)
    raise SystemExit("The service did not start: " + log.read_text(encoding="utf-8")[-2000:])


def all_at_once(service: Service, entries: Sequence[Entry], clients: int) -> tuple[float, list[float], int]:
    """Wall seconds, seconds of each request, and how many failed."""
    waiting = iter(entries)
    lock = threading.Lock()
    seconds: list[float] = []
    failed = 0

    def client() -> None:
        nonlocal failed
        while True:
            with lock:
                entry = next(waiting, None)
            if entry is None:
                return
            try:
                taken = service.transcribe(entry.path, _language(entry))
            except requests.RequestException as error:
                say(f"{entry.name}: {type(error).__name__}")
                with lock:
                    failed += 1
                continue
            with lock:
                seconds.append(taken)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun, seconds, failed


def soak(service: Service, entries: Sequence[Entry], n_requests: int) -> dict[str, float]:
    """Memory over ``n_requests``; see the module's text."""
    waiting = cycle(entries)
    before, read, failed = service.rss_mb(), [], 0
    for done in range(0, n_requests, _SOAK_STEP):
        failed += all_at_once(service, list(islice(waiting, min(_SOAK_STEP, n_requests - done))), _SOAK_CLIENTS)[2]
        read.append(service.rss_mb())
    stretch = min(_SOAK_STRETCH, n_requests // 2) // _SOAK_STEP or 1
    warm = read[stretch:] or read
    first, last = median(warm[:stretch]), median(warm[-stretch:])
    return {
        "requests": n_requests,
        "failed": failed,
        "before": before,
        "first": first,
        "last": last,
        "largest": max(warm),
        "growth_percent": 100 * (last / first - 1),
    }


def as_one_batch(arguments: argparse.Namespace, entries: Sequence[Entry]) -> float:
    """Wall seconds for all recordings, decoded and transcribed by one pipeline in this process."""
    settings = replace(Settings.from_env(), batch_size=arguments.batch_size)
    pipeline = load(arguments, settings)

    def transcribe(entry: Entry) -> None:
        options = TranscribeOptions(language=_language(entry))
        pipeline.transcribe(read(entry.path, settings).waveform, options)

    transcribe(entries[0])
    with ThreadPoolExecutor(arguments.clients) as pool:
        begun = time.perf_counter()
        for _ in pool.map(transcribe, entries):
            pass
        return time.perf_counter() - begun


def one_at_a_time(bench: Bench, name: str, entries: Sequence[Entry]) -> float:
    with bench.start(name) as engine:
        engine.ready()
        return sum(float(engine.transcribe(entry.path, _language(entry))["wall_s"]) for entry in entries)


def joined(entries: Sequence[Entry], directory: Path) -> tuple[Path, dict[Path, float]]:
    """All recordings in one file with a second between them, and the seconds of each."""
    decoded = {entry.path: decode(entry.path) for entry in entries}
    path = directory / "joined.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        for entry in entries:
            file.writeframesraw(decoded[entry.path] + _GAP)
    return path, {name: len(samples) / 2 / SAMPLE_RATE for name, samples in decoded.items()}


def _language(entry: Entry) -> str | None:
    return None if entry.language == "multi" else entry.language


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--manifest", type=Path, required=True)
    arguments_of.add_argument("--audio-root", type=Path, help="folder of the files; default: the manifest's")
    arguments_of.add_argument("--category", action="append", default=[], help="only this category; may be repeated")
    arguments_of.add_argument("--language", default="en", help="recordings of this language alone")
    arguments_of.add_argument("--clients", type=int, default=32)
    arguments_of.add_argument("--requests", type=int, default=96)
    arguments_of.add_argument("--soak", type=int, default=400, help="further requests, for the memory; 0: none")
    arguments_of.add_argument("--batch-size", type=int, default=0, help="of ours; 0: from free memory")
    arguments = arguments_of.parse_args()

    bench = bench_from(arguments)
    known = [
        entry
        for entry in read_manifest(arguments.manifest, arguments.audio_root, arguments.category)
        if entry.scored and entry.language == arguments.language
    ]
    if not known:
        raise SystemExit("The manifest has no transcribed recording of this language in these categories.")
    entries = list(islice(cycle(known), arguments.requests))
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory, serving(bench, arguments.clients) as service:
        path, lengths = joined(entries, Path(directory))
        audio_s = sum(lengths[entry.path] for entry in entries)
        say(f"{len(entries)} requests, {audio_s:.0f} s of audio, {arguments.clients} clients")
        service.transcribe(known[0].path, arguments.language)
        wall_s, seconds, failed = all_at_once(service, entries, arguments.clients)
        results["clients"] = {
            "wall_s": wall_s,
            "p50_s": median(seconds),
            "p95_s": quantiles(seconds, n=20)[-1] if len(seconds) > 1 else seconds[0],
            "failed": failed,
        }
        results["joined"] = {"wall_s": service.transcribe(path, arguments.language)}
        memory = soak(service, known, arguments.soak) if arguments.soak else {}
    results["bulk"] = {"wall_s": as_one_batch(arguments, entries)}
    for name in arguments.peers:
        results[name] = {"wall_s": one_at_a_time(bench, name, entries)}

    for measured in results.values():
        measured["speed"] = audio_s / measured["wall_s"]
    speed = results["clients"]["speed"]
    print(f"{audio_s:.0f} s of audio, {bench.files.name}, {bench.threads} threads, {arguments.clients} clients\n")
    print_table(
        ["who", "wall s", "x real time", "p50 s", "p95 s", "clients/this"],
        [
            [
                name,
                measured["wall_s"],
                measured["speed"],
                measured.get("p50_s"),
                measured.get("p95_s"),
                speed / measured["speed"],
            ]
            for name, measured in results.items()
        ],
    )
    if memory:
        print(
            f"\nresident memory over {arguments.soak} requests, {memory['failed']:.0f} of them failed: "
            f"{memory['before']:.0f} MB before, then {memory['first']:.0f} to {memory['last']:.0f} MB "
            f"({memory['growth_percent']:+.1f} %), {memory['largest']:.0f} MB at most"
        )
    rounded = {name: {key: round(value, 3) for key, value in measured.items()} for name, measured in results.items()}
    print_json(
        {
            "audio_s": round(audio_s, 2),
            "clients": rounded.pop("clients"),
            "bulk": rounded.pop("bulk"),
            "joined": rounded.pop("joined"),
            "peers": rounded,
            "of_bulk": round(speed / results["bulk"]["speed"], 3),
            "of_joined": round(speed / results["joined"]["speed"], 3),
            "of_peers": {name: round(speed / results[name]["speed"], 3) for name in rounded},
            "soak": {name: round(value, 1) for name, value in memory.items()},
        }
    )


if __name__ == "__main__":
    main()
