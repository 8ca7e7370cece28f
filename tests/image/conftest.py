"""The images under test, each built once a run; what cannot be built fails, it is not skipped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.image import engine
from tests.models import model_cache


@pytest.fixture(scope="session")
def context() -> Path:
    engine.prepare()
    return engine.make_context()


@pytest.fixture(scope="session")
def runpod(context: Path) -> str:
    return engine.build("whisper-worker:runpod", "runpod")


@pytest.fixture(scope="session")
def serve(runpod: str) -> str:
    return engine.build("whisper-worker:serve", "serve")


@pytest.fixture(scope="session")
def live(runpod: str) -> str:
    return engine.build("whisper-worker:live", "live")


@pytest.fixture(scope="session", params=["argument", "context"])
def baked(runpod: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a model inside: one that the build fetched, and one that lay in the build context."""
    if request.param == "argument":
        return engine.build("whisper-worker:baked", "runpod", MODEL="tiny.en")
    context = tmp_path_factory.mktemp("context") / "context"
    shutil.copytree(engine.CONTEXT, context)
    shutil.copytree(model_cache("tiny.en"), context / "whisper_model_cache", dirs_exist_ok=True)
    return engine.build("whisper-worker:baked-from-context", "runpod", context, MODEL="auto")


@pytest.fixture(scope="session")
def mounted() -> list[str]:
    """Options that mount a model where the image looks for one."""
    return ["--volume", f"{model_cache('tiny.en')}:/whisper_model_cache:ro"]
