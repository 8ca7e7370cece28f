"""The RunPod worker over a scripted service: starts in a second, and does what a job's prompt says.

``sleep N`` works for N seconds, ``fault`` fails as a broken CUDA context does, ``long N``
gives N segments.
"""

from __future__ import annotations

import sys
import time
import types

from tests.unit.runpod_fakes import FakeService, transcript
from whisper_worker import log
from whisper_worker.doors import runpod_sdk
from whisper_worker.errors import EngineError
from whisper_worker.settings import Settings
from whisper_worker.types import CancelToken, JobInput, Transcript


def script(job: JobInput, cancel: CancelToken) -> Transcript:
    verb, _, number = (job.options.initial_prompt or "").partition(" ")
    if verb == "sleep":
        until = time.monotonic() + float(number)
        while time.monotonic() < until:
            cancel.check()
            time.sleep(0.02)
    if verb == "fault":
        raise EngineError("The GPU failed; the worker will be replaced.")
    return transcript(*(f" spoken {n}" for n in range(int(number) if verb == "long" else 2)))


if __name__ == "__main__":
    # A GPU whose model has been loaded, as far as the door can tell.
    sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True))  # type: ignore
    settings = Settings.from_env()
    log.configure(settings.log_format, settings.log_level)
    runpod_sdk.serve(FakeService(script), settings)
