"""What the measuring tools share: manifests, scores, tables, and engines in processes of their own.

A manifest is a file of JSON lines; each names a ``file`` beside it (see :class:`Entry`).
Engines are named as in :data:`PEERS`, and ``ours`` is the worker. Peers run in an
environment of their own (``make peers``, or PEERS_PYTHON) on the very weights the worker
uses: the Hugging Face checkpoint itself, for openai-whisper under other names, for
faster-whisper converted once to CTranslate2 in float16 and run in int8.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from whisper_worker.cache.layout import ModelFiles, find_model, read_model_config
from whisper_worker.errors import WhisperWorkerError
from whisper_worker.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
ENGINE_PROCESS = Path(__file__).resolve().parent / "engine_process.py"
CHARACTER_LANGUAGES = frozenset({"ja", "ko", "zh"})
"""Languages scored by characters, since they are not written in words."""

ENGLISH_ONLY_VOCABULARY = 51864


# -- manifests ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of speech in a file, with the times of its words where they are known."""

    start: float
    end: float
    text: str
    words: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a manifest."""

    name: str
    """The path as the manifest gives it."""
    path: Path
    text: str
    language: str | None
    """ISO 639-1; None where nobody speaks, ``multi`` where several languages are spoken."""
    duration: float
    category: str
    expect: str | None
    note: str
    segments: tuple[Span, ...]
    words: tuple[Span, ...]

    @property
    def group(self) -> str:
        return f"{self.category}/{self.language}"

    @property
    def silent(self) -> bool:
        """Whether nothing may be heard in it."""
        return self.expect in ("empty", "empty_or_error") or (self.expect is None and not self.text)

    @property
    def scored(self) -> bool:
        """Whether its text is a reference to count errors against."""
        return bool(self.text) and self.language not in (None, "multi") and self.expect in (None, "ok")


def read_manifest(manifest: Path, audio_root: Path | None = None, categories: Sequence[str] = ()) -> list[Entry]:
    """The entries of a manifest, of the given categories only if there are any."""
    root = audio_root or manifest.parent
    entries = []
    for line in manifest.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        data = json.loads(line)
        text = data.get("text")
        if text is None and data.get("text_file"):
            text = (root / data["text_file"]).read_text(encoding="utf-8")
        entry = Entry(
            name=data["file"],
            path=root / data["file"],
            text=text or "",
            language=data.get("language"),
            duration=float(data.get("duration_s") or 0.0),
            category=data.get("category") or "all",
            expect=data.get("expect"),
            note=data.get("note") or "",
            segments=tuple(_span(item) for item in data.get("segments") or ()),
            words=tuple(_span(item) for item in data.get("words") or ()),
        )
        if not categories or entry.category in categories:
            entries.append(entry)
    if not entries:
        raise SystemExit("The manifest has no entry of these categories.")
    return entries


def _span(data: dict[str, Any]) -> Span:
    words = tuple(_span(word) for word in data.get("words") or ())
    return Span(float(data["start"]), float(data["end"]), data.get("text") or data.get("word") or "", words)


# -- scores ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Score:
    """Error counts of one text or, added up, of many. Units are words, or characters for some languages."""

    reference: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.reference + other.reference,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    def percent(self, count: int) -> float:
        """``count`` in percent of the reference."""
        return round(100 * count / self.reference, 2) if self.reference else 0.0

    @property
    def error_rate(self) -> float:
        return self.percent(self.errors)


@cache
def _normalizers() -> tuple[Any, Any]:
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer(), BasicTextNormalizer()


def normalize(text: str, language: str | None) -> str:
    """Whisper's normalisation, its English one for English and for text of no language."""
    english, basic = _normalizers()
    return str((english if language in ("en", None) else basic)(text)).strip()


def score(reference: str, hypothesis: str, language: str | None, *, by_character: bool = False) -> Score:
    """Word errors after normalisation; character errors, blanks left out, where asked for and in languages
    without word breaks."""
    import jiwer

    reference, hypothesis = normalize(reference, language), normalize(hypothesis, language)
    counted: jiwer.CharacterOutput | jiwer.WordOutput
    if by_character or language in CHARACTER_LANGUAGES:
        counted = jiwer.process_characters("".join(reference.split()), "".join(hypothesis.split()))
    else:
        counted = jiwer.process_words(reference, hypothesis)
    return Score(
        counted.hits + counted.substitutions + counted.deletions,
        counted.substitutions,
        counted.deletions,
        counted.insertions,
    )


def count_words(text: str) -> int:
    """Words that somebody is claimed to have said: what stands in brackets, such as [Music], is not one."""
    return len(normalize(text, None).split())


# -- output ------------------------------------------------------------------------------


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns padded to their widest cell; the first is left-aligned, the others right-aligned."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for number, row in enumerate(cells):
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def print_json(result: dict[str, Any]) -> None:
    """The last line of every tool."""
    print(json.dumps(result, ensure_ascii=False), flush=True)


def say(text: str) -> None:
    """Progress, kept apart from the results."""
    print(text, file=sys.stderr, flush=True)


# -- engines -----------------------------------------------------------------------------

OURS = "ours"

PEERS: dict[str, dict[str, Any]] = {
    "ours-greedy": {"engine": OURS, "beam_size": 1},
    "ours-beam5": {"engine": OURS, "beam_size": 5},
    "faster-whisper": {"engine": "faster-whisper", "beam_size": 5, "batch_size": 0},
    "faster-whisper-float32": {"engine": "faster-whisper", "beam_size": 5, "batch_size": 0, "compute_type": "float32"},
    "faster-whisper-greedy": {"engine": "faster-whisper", "beam_size": 1, "batch_size": 0},
    "faster-whisper-batched8": {"engine": "faster-whisper", "beam_size": 1, "batch_size": 8},
    "faster-whisper-batched16": {"engine": "faster-whisper", "beam_size": 1, "batch_size": 16},
    "faster-whisper-batched8-beam5": {"engine": "faster-whisper", "beam_size": 5, "batch_size": 8},
    "openai-whisper": {"engine": "openai-whisper", "beam_size": 1},
    "openai-whisper-beam5": {"engine": "openai-whisper", "beam_size": 5},
    "transformers": {"engine": "transformers", "beam_size": 1, "batch_size": 8},
}
"""Implementations compared with, by name: sequential ones, batched ones with their batch size, one in another
precision (how far apart its own two are is how much a difference means), and the worker itself with a search
that is not its default."""

Reply = dict[str, Any]


class EngineDied(Exception):
    """The engine's process ended or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything needed to start engines on one model."""

    files: ModelFiles
    model: str
    threads: int
    ct2: Path | None = None
    batch_size: int = 0
    beam_size: int = 0

    @property
    def english_only(self) -> bool:
        return int(str(read_model_config(self.files.model_dir)["vocab_size"])) <= ENGLISH_ONLY_VOCABULARY

    def start(self, name: str, *, cold: bool = False) -> EngineProcess:
        """Start an engine; it loads the model at once (but for ``cold``, where ours does so with the first file)."""
        if name == OURS:
            return self._process(sys.executable, {"engine": OURS, "beam_size": self.beam_size, "cold": cold})
        spec: dict[str, Any] = dict(PEERS[name])
        if spec["engine"] == OURS:
            return self._process(sys.executable, spec | {"cold": cold})
        if spec["engine"] == "faster-whisper":
            spec["ct2_dir"] = str(self.ct2_dir())
        return self._process(peers_python(), spec)

    def _process(self, python: str, spec: dict[str, Any]) -> EngineProcess:
        environment = {
            **os.environ,
            "WHISPER_MODEL": self.model,
            "WHISPER_THREADS": str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
            "LOG_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
        if self.batch_size:
            environment["MODEL_BATCH_SIZE"] = str(self.batch_size)
        directories = {"model_dir": str(self.files.model_dir), "processor_dir": str(self.files.processor_dir)}
        return EngineProcess(python, {**directories, "threads": self.threads, **spec}, environment)

    def ct2_dir(self) -> Path:
        """The same weights for CTranslate2, converted with the peers' Python where that was not done before."""
        if self.ct2 is not None:
            return self.ct2
        weights = sorted(self.files.model_dir.glob("*.safetensors"))
        stamp = "".join(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in weights)
        directory = CACHE / "ct2" / hashlib.sha256(stamp.encode()).hexdigest()[:16]
        if not (directory / "tokenizer.json").is_file():
            say("Converting the checkpoint for faster-whisper (once)")
            directory.parent.mkdir(parents=True, exist_ok=True)
            spec = {"engine": "convert", "ct2_dir": str(directory)}
            with self._process(peers_python(), spec) as process:
                process.wait()
        return directory


def peers_python() -> str:
    """The Python that has the peers installed."""
    python = os.environ.get("PEERS_PYTHON") or str(ROOT / ".venv-peers/bin/python")
    if not Path(python).exists():
        raise SystemExit(
            "The peers are not installed: run 'make peers', or set PEERS_PYTHON to a Python that has them."
        )
    return python


class EngineProcess:
    """An engine at the other end of two pipes. Use as a context; the process ends with it."""

    def __init__(self, python: str, spec: dict[str, Any], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [python, str(ENGINE_PROCESS), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put("")

    def ready(self, timeout: float = 900.0) -> float:
        """Wait until the model is loaded; gives the seconds that took, imports included."""
        return float(self._reply(timeout)["load_s"])

    def request(self, audio: Path, language: str | None, *, word_timestamps: bool = False) -> None:
        """Ask for a transcript without waiting for it."""
        assert self._process.stdin is not None
        question = {"audio": str(audio.resolve()), "language": language, "word_timestamps": word_timestamps}
        with contextlib.suppress(BrokenPipeError):  # said by the reply that does not come
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def reply(self, timeout: float = 3600.0) -> Reply:
        """The next transcript: ``text``, ``language``, ``segments``, ``wall_s``, ``cpu_s``, ``peak_mb``.

        Instead of the first three there is ``error`` (a typed error of the worker) or ``crash``.
        """
        return self._reply(timeout)

    def transcribe(
        self, audio: Path, language: str | None, *, word_timestamps: bool = False, timeout: float = 3600.0
    ) -> Reply:
        self.request(audio, language, word_timestamps=word_timestamps)
        return self.reply(timeout)

    def _reply(self, timeout: float) -> Reply:
        try:
            line = self._replies.get(timeout=timeout)
        except queue.Empty:
            raise EngineDied(f"the engine gave no answer in {timeout:.0f} s") from None
        if not line:
            hint = "" if os.environ.get("BENCH_VERBOSE") else " (BENCH_VERBOSE=1 shows what it said)"
            raise EngineDied(f"the engine's process ended with {self._process.wait()}{hint}")
        return dict(json.loads(line))

    def stop(self) -> None:
        """End the process, gently while it waits for requests."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait(self) -> None:
        """Wait for the process to end by itself."""
        if self._process.wait() != 0:
            raise EngineDied("the engine's process failed (BENCH_VERBOSE=1 shows what it said)")

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def run_files(
    engine: EngineProcess, entries: Sequence[Entry], *, detect_language: bool = False, word_timestamps: bool = False
) -> Iterator[tuple[Entry, Reply]]:
    """Transcribe files one after another, in their own language unless it is to be detected."""
    for number, entry in enumerate(entries, 1):
        language = None if detect_language or entry.language == "multi" else entry.language
        yield entry, engine.transcribe(entry.path, language, word_timestamps=word_timestamps)
        if number % 25 == 0:
            say(f"  {number} of {len(entries)} files")


# -- arguments ---------------------------------------------------------------------------


def parser(description: str | None, *, peers: bool = True) -> argparse.ArgumentParser:
    """The options that all tools share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="short name, hub name or directory; default: the cached model")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of every engine")
    if peers:
        made.add_argument("--peers", type=_names, default=[], help=f"comma-separated, of: {', '.join(PEERS)}")
        made.add_argument("--ct2", type=Path, help="CTranslate2 directory of the same weights for faster-whisper")
    return made


def _names(value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(PEERS)}")
    return names


def bench_from(arguments: argparse.Namespace) -> Bench:
    """Find the model that the arguments and the environment name; ends the program where there is none."""
    try:
        settings = Settings.from_env()
        if arguments.model:
            settings = replace(settings, model=arguments.model)
        files = find_model(settings)
    except WhisperWorkerError as error:
        raise SystemExit(error.message) from None
    return Bench(
        files=files,
        model=arguments.model or settings.model or str(files.model_dir.parent),
        threads=arguments.threads,
        ct2=getattr(arguments, "ct2", None),
        batch_size=getattr(arguments, "batch_size", 0),
        beam_size=getattr(arguments, "beam_size", 0),
    )
