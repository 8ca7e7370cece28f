"""``whisper-worker``: one word for each door. Nothing heavy is imported before the word is known."""

from __future__ import annotations

import importlib
import sys

_DOORS = {
    "serve": ("http", "HTTP service, its web page and OpenAI's routes (port 5000)"),
    "live": ("live", "live transcription over WebSocket (port 9090)"),
    "transcribe": ("cli", "the whisper command: files in, subtitles out"),
}


def main(arguments: list[str] | None = None) -> int:
    """Start the door named by the first argument; returns its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--version"]:
        from whisper_worker import __version__

        print(__version__)
        return 0
    if not given or given[0] not in _DOORS:
        print("usage: whisper-worker COMMAND [options]\n", file=sys.stderr)
        for name, (_, meaning) in _DOORS.items():
            print(f"  {name:<12}{meaning}", file=sys.stderr)
        return 0 if given[:1] in (["-h"], ["--help"]) else 2
    door = importlib.import_module(f"whisper_worker.doors.{_DOORS[given[0]][0]}")
    status: int = door.main(given[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
