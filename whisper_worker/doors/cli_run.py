"""The command's loop over its files, the same wherever they are transcribed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, Protocol

from whisper_worker.audio.jobdir import job_directory
from whisper_worker.doors.cli_inputs import Input, expand, is_directory
from whisper_worker.doors.cli_options import Command
from whisper_worker.doors.cli_outputs import Console, check_place, write_outputs
from whisper_worker.errors import InvalidInput, WhisperWorkerError
from whisper_worker.languages import LANGUAGES
from whisper_worker.settings import Settings
from whisper_worker.types import Progress, Segment, Transcript

if TYPE_CHECKING:
    from tqdm import tqdm

EXIT_STATUS: Mapping[str, int] = {
    "INVALID_INPUT": 1,
    "FORBIDDEN": 1,
    "DOWNLOAD": 4,
    "TOO_LARGE": 1,
    "DECODE": 1,
    "TIMEOUT": 4,
    "MODEL": 3,
    "OUT_OF_MEMORY": 4,
    "ENGINE": 4,
    "BUSY": 4,
    "CANCELLED": 130,
    "INTERNAL": 4,
}
"""What an error means to the caller of the command; ``EXIT_CODES`` in cli_options.py tells people."""

INTERRUPTED = 130


class Engine(Protocol):
    """Whoever transcribes: this process, or a service."""

    def transcribe(
        self,
        item: Input,
        on_segment: Callable[[Segment], None],
        on_progress: Callable[[Progress], None] | None,
    ) -> Transcript:
        """Raises typed errors only."""
        ...

    def prepare(self) -> None:
        """Make ready for the first file. Raises typed errors."""
        ...


def refused(error: WhisperWorkerError, console: Console) -> int:
    """Say why the call came to nothing before its first file; gives the exit status."""
    console.say(error.message)
    return 2 if isinstance(error, InvalidInput) else EXIT_STATUS[error.code]


def run(command: Command, settings: Settings, engine: Engine, console: Console) -> int:
    """Transcribe every input and write its outputs; gives the exit status."""
    status = 0
    with _stoppable(), job_directory(settings) as spool:
        try:
            several = len(command.inputs) > 1 or any(is_directory(word) for word in command.inputs)
            for item in expand(command.inputs, spool, settings):
                try:
                    if isinstance(item, tuple):
                        shown, error = item
                        raise error
                    shown = item.shown
                    _one(item, command, engine, console, several)
                except WhisperWorkerError as error:
                    console.say(f"{shown}: {error.message}")
                    status = status or EXIT_STATUS[error.code]
                    if error.code == "MODEL":  # the next file would fail of the same
                        break
        except KeyboardInterrupt:
            console.say("interrupted; what was finished is written")
            return INTERRUPTED
    return status


def _one(item: Input, command: Command, engine: Engine, console: Console, several: bool) -> None:
    if item.is_nothing:
        engine.prepare()
        console.say("the model is ready")
        return
    check_place(command.output_dir, item.stem)
    if several:
        console.note(f"{item.shown}:")
    with _bar(command.verbose is False, item.shown) as on_progress:
        transcript = engine.transcribe(item, console.segment, on_progress)
    for warning in transcript.warnings:
        console.say(f"{item.shown}: warning: {warning}")
    if not transcript.text:
        console.say(f"{item.shown}: no speech was found")
    if "language" not in command.payload and transcript.language:
        console.note(f"Detected language: {LANGUAGES.get(transcript.language, transcript.language).title()}")
    task = str(command.payload.get("task", "transcribe"))
    write_outputs(transcript, command.output_dir, item.stem, command.formats, command.layout, task)


@contextlib.contextmanager
def _bar(wanted: bool, shown: str) -> Iterator[Callable[[Progress], None] | None]:
    """A bar over the recording's seconds with the time left, on standard error."""
    if not wanted or find_spec("tqdm") is None:  # whisper-remote may come without any package
        yield None
        return
    from tqdm import tqdm

    bar: tqdm[NoReturn] = tqdm(
        desc=shown, unit="s", bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
    )
    lock = threading.Lock()

    def show(progress: Progress) -> None:
        if progress.stage == "recognize":
            with lock:
                bar.total = progress.total_seconds
                bar.update(max(0.0, progress.done_seconds - bar.n))

    try:
        yield show
    finally:
        bar.close()


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM leaves as Ctrl-C does, so that temporary files go; a recorder may kill the command at its timeout."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
