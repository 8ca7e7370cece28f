"""``whisper-remote``: the whisper command with the work done by an HTTP service. Starts in a blink.

It takes the same arguments and writes the same files; WHISPER_SERVICE_URL or ``--server``
says where the service is.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from whisper_worker.doors.cli_client import Address, ServiceClient
from whisper_worker.doors.cli_options import Command, parse
from whisper_worker.doors.cli_outputs import Console
from whisper_worker.doors.cli_run import refused, run
from whisper_worker.errors import InvalidInput, WhisperWorkerError
from whisper_worker.schema import job_input_from_dict
from whisper_worker.settings import Settings
from whisper_worker.types import AudioSource

PROG = "whisper-remote"


def main(argv: list[str] | None = None) -> int:
    """Send the files that the arguments name; gives the exit status."""
    command = parse(argv, PROG)
    console = Console(PROG, command.verbose)
    try:
        settings = Settings.from_env()
        url = command.server or settings.service_url
        if url is None:
            raise InvalidInput("There is no service to send to: give --server URL or set WHISPER_SERVICE_URL.")
        return send(command, settings, url, console)
    except WhisperWorkerError as error:
        return refused(error, console)


def send(command: Command, settings: Settings, url: str, console: Console) -> int:
    """Run the command at the service. Raises :class:`InvalidInput` for wrong arguments."""
    payload = dict(command.payload)
    # Wrong values are told here, before an hour of audio is on its way.
    job_input_from_dict(payload, replace(settings, strict=False), AudioSource(path=Path()))
    if command.model is not None:
        payload["model"] = command.model
    key_file = command.key_file or settings.service_key_file
    client = ServiceClient(
        Address.parse(url),
        payload,
        key=None if key_file is None else read_key(key_file),
        client_cert=command.client_cert,
        timeout=command.timeout,
        retries=command.retries,
        say=console.say,
    )
    for line in command.without_effect(remote=True):
        console.say(f"warning: {line}")
    return run(command, settings, client, console)


def read_key(path: Path) -> str:
    """The key in a file's first line. Raises :class:`InvalidInput` where there is none."""
    try:
        key = path.read_text(encoding="ascii").split("\n", 1)[0].strip()
    except (OSError, ValueError):
        raise InvalidInput("The key file cannot be read, or holds no plain text.") from None
    if not key or not key.isprintable():
        raise InvalidInput("The key file holds no key in its first line.")
    return key


if __name__ == "__main__":
    sys.exit(main())
