"""The threshold of the RunPod worker: ``python handler.py``.

On RunPod it serves jobs until it is told to stop; elsewhere it runs the job of
``test_input.json`` in the working directory and prints its segments.
"""

from __future__ import annotations

import sys

from whisper_worker import log
from whisper_worker.doors import runpod_sdk
from whisper_worker.errors import InvalidInput
from whisper_worker.service import Service
from whisper_worker.settings import Settings


def main() -> None:
    try:
        settings = Settings.from_env()
    except InvalidInput as error:
        sys.exit(error.message)
    log.configure(settings.log_format, settings.log_level)
    service = Service(settings)
    try:
        runpod_sdk.serve(service, settings)
    finally:
        service.close()


if __name__ == "__main__":
    main()
