"""``whisper``: openai/whisper's command on this project's engine, in this process or in a service.

Read ``main`` first. Arguments are in cli_options.py, the loop over files in cli_run.py, what
is written in cli_outputs.py. Nothing heavy is imported before there is a file to transcribe:
``--version`` and ``--help`` answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_worker import log
from whisper_worker.doors.cli_inputs import Input
from whisper_worker.doors.cli_options import Command, parse
from whisper_worker.doors.cli_outputs import Console
from whisper_worker.doors.cli_run import refused, run
from whisper_worker.doors.cli_warm import WarmEngine
from whisper_worker.doors.remote import send
from whisper_worker.errors import DownloadError, ModelError, WhisperWorkerError
from whisper_worker.schema import job_input_from_dict
from whisper_worker.settings import Settings
from whisper_worker.types import AudioSource, CancelToken, Progress, Segment, Transcript

if TYPE_CHECKING:
    from whisper_worker.service import Service

PROG = "whisper"


def main(argv: list[str] | None = None) -> int:
    """Transcribe the files that the arguments name; gives the exit status."""
    command = parse(argv, PROG)
    console = Console(PROG, command.verbose)
    try:
        settings = Settings.from_env()
        url = command.server or settings.service_url
        if url is not None:
            return send(command, settings, url, console)
        return _here(command, _with(command, settings), console)
    except WhisperWorkerError as error:
        return refused(error, console)


def _here(command: Command, settings: Settings, console: Console) -> int:
    job_input_from_dict(command.payload, settings, AudioSource(path=Path()))
    for line in command.without_effect(remote=False):
        console.say(f"warning: {line}")
    log.configure(settings.log_format, "ERROR")
    engine = LocalEngine(command, settings, console.say)
    try:
        if command.keep_warm is None:
            return run(command, settings, engine, console)
        warm = WarmEngine(
            command.payload,
            settings,
            command.keep_warm,
            engine,
            console.say,
            get_model=lambda: get_model(settings, console.say),
        )
        return run(command, settings, warm, console)
    finally:
        engine.close()


def _with(command: Command, settings: Settings) -> Settings:
    """The environment's settings with what the arguments say instead."""
    chosen: dict[str, Any] = {
        "model": command.model,
        "model_cache": command.model_dir,
        "device": command.device,
        "compute_type": command.compute_type,
        "threads": command.threads,
    }
    return replace(settings, **{name: value for name, value in chosen.items() if value is not None})


class LocalEngine:
    """The engine in this process; see :class:`whisper_worker.doors.cli_run.Engine`. Nothing loads before a file."""

    def __init__(self, command: Command, settings: Settings, say: Callable[[str], None]) -> None:
        self._payload = command.payload
        self._settings = settings
        self._say = say
        self._service: Service | None = None

    def transcribe(
        self,
        item: Input,
        on_segment: Callable[[Segment], None],
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Transcript:
        """Run one job. Raises typed errors only."""
        job = job_input_from_dict(self._payload, self._settings, item.source)
        cancel = CancelToken()
        try:
            return self._open().transcribe(job, cancel=cancel, on_progress=on_progress, on_segment=on_segment)
        except ModelError as error:
            raise self._explained(error) from error
        except KeyboardInterrupt:
            cancel.cancel()
            raise

    def prepare(self) -> None:
        """Get the model if need be, and load it. Raises :class:`ModelError`."""
        try:
            self._open().load()
        except ModelError as error:
            raise self._explained(error) from error

    def close(self) -> None:
        if self._service is not None:
            self._service.close()

    def _open(self) -> Service:
        if self._service is None:
            from whisper_worker.service import Service

            get_model(self._settings, self._say)
            self._service = Service(self._settings)
        return self._service

    def _explained(self, error: ModelError) -> ModelError:
        """In the words of the command line, where the engine speaks of variables."""
        if self._settings.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                return ModelError("This machine has no CUDA device that torch can use: run with --device cpu.")
        return error


def get_model(settings: Settings, say: Callable[[str], None]) -> None:
    """Make sure that the model is on this machine: as openai/whisper does, fetch it at its first use.

    It goes beside the cached one, under its short name. Raises :class:`ModelError` that says
    what to run where it cannot be had.
    """
    from whisper_worker.cache.layout import SIDE_BY_SIDE, ModelNotHere, default_cache, find_model
    from whisper_worker.cache.names import DEFAULT_MODEL, resolve

    try:
        find_model(settings)
    except ModelNotHere as missing:
        from whisper_worker.cache.save import Request, save

        name = resolve(settings.model or DEFAULT_MODEL)
        say(f"the model {name.short} is not on this machine yet: fetching it")
        request = Request(
            model=name.repository,
            revision=None,
            directory=None,
            source="auto",
            output=default_cache(settings) / SIDE_BY_SIDE / name.short,
            dtype="float16",
            force=False,
        )
        try:
            save(request, say=lambda line: None)
        except (DownloadError, ModelError) as error:
            raise ModelError(f"{missing.message} (Fetching it did not work: {error.message})") from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ModelError(f"The model cannot be saved ({reason}); name another place with --model_dir.") from error


if __name__ == "__main__":
    sys.exit(main())
