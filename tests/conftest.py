"""Shared by all tests: nothing here reaches the network or loads a model by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _quiet_package_logger() -> Iterator[None]:
    """A test that configures logging leaves no handler behind for the next."""
    root = logging.getLogger("whisper_worker")
    handlers, level, propagate = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    root.propagate = propagate
