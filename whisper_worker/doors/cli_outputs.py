"""The files that the command writes, and the lines that it prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any, TextIO

from whisper_worker.doors.cli_options import VERBOSE_JSON
from whisper_worker.errors import InvalidInput
from whisper_worker.formats import SubtitleLayout, timestamp, write
from whisper_worker.languages import LANGUAGES
from whisper_worker.schema import segment_to_dict, transcript_to_dict
from whisper_worker.types import Segment, Transcript


def write_outputs(
    transcript: Transcript, directory: Path, stem: PurePath, formats: Sequence[str], layout: SubtitleLayout, task: str
) -> None:
    """Write ``directory/stem.FORMAT`` for each format, each in one step: who reads it finds all of it.

    Raises :class:`InvalidInput` where it cannot be written.
    """
    for fmt in formats:
        if fmt == VERBOSE_JSON:
            text = json.dumps(verbose_json(transcript, task), ensure_ascii=False)
        else:
            text = write(transcript, fmt, layout)
        extension = "json" if fmt == VERBOSE_JSON else fmt
        target = directory / stem.with_name(f"{stem.name}.{extension}")
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_text(text, encoding="utf-8")
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InvalidInput(f"The {extension} file cannot be written ({reason}); see --output_dir.") from error


def check_place(directory: Path, stem: PurePath) -> None:
    """Look at the place of a recording's outputs before hours of work for it. Raises :class:`InvalidInput`."""
    place = (directory / stem).parent
    there = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        reason = "may not be written to" if there.is_dir() else "is no directory"
        raise InvalidInput(f"The outputs have no place: what --output_dir names {reason}.")


def verbose_json(transcript: Transcript, task: str) -> dict[str, Any]:
    """OpenAI's shape of this name, and what else is known: probability, warnings, receipt."""
    common = transcript_to_dict(transcript)
    shape: dict[str, Any] = {
        "task": task,
        "language": LANGUAGES.get(transcript.language or "", transcript.language),
        "duration": transcript.duration,
        "text": transcript.text,
        "segments": [segment_to_dict(segment) for segment in transcript.segments],
    }
    if any(segment.words is not None for segment in transcript.segments):
        shape["words"] = [asdict(word) for segment in transcript.segments for word in segment.words or ()]
    return {**shape, **{name: common[name] for name in ("language_probability", "warnings", "receipt")}}


class Console:
    """What people see: segments on standard output, the rest one line each on standard error."""

    def __init__(self, prog: str, verbose: bool | None) -> None:
        self._prog = prog
        self._verbose = verbose
        for stream in (sys.stdout, sys.stderr):
            # A terminal that cannot show a letter must not end the job.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")

    def say(self, line: str) -> None:
        """One line on standard error, whatever was asked for."""
        self._print(f"{self._prog}: {line}", sys.stderr)

    def segment(self, segment: Segment) -> None:
        """The line that openai/whisper prints."""
        if self._verbose:
            times = f"[{timestamp(segment.start)} --> {timestamp(segment.end)}]"
            self._print(f"{times} {segment.text}", sys.stdout)

    def note(self, line: str) -> None:
        """A line among the segments."""
        if self._verbose:
            self._print(line, sys.stdout)

    def _print(self, line: str, stream: TextIO) -> None:
        try:
            print(" ".join(line.splitlines()), file=stream, flush=True)
        except OSError as error:
            # Who read the lines has heard enough, or there is no room for them; the files are wanted all the same.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                self.say(f"warning: standard output takes no more lines ({error.strerror}).")
