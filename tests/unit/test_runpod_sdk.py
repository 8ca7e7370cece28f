"""What is handed to the SDK in each way of starting the worker; the SDK itself is a stand-in here."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.runpod_fakes import FakeService
from whisper_worker.doors import runpod_sdk
from whisper_worker.errors import ModelError
from whisper_worker.settings import Settings

BUCKET = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Serve with an SDK that only writes down what it was given."""
    for name in ("RUNPOD_WEBHOOK_GET_JOB", "RUNPOD_REALTIME_PORT", "RUNPOD_LOG_LEVEL", *BUCKET):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def serve(*arguments: str, version: str = "1.99.0", settings: Settings | None = None) -> SimpleNamespace:
        given = SimpleNamespace(config=None, checks=[])
        serverless = SimpleNamespace(
            start=lambda config: setattr(given, "config", config), register_fitness_check=given.checks.append
        )
        monkeypatch.setitem(sys.modules, "runpod", SimpleNamespace(__version__=version, serverless=serverless))
        monkeypatch.setattr(sys, "argv", ["handler.py", *arguments])
        runpod_sdk.serve(FakeService(), settings or Settings())
        return given

    return serve


def is_stream(given: SimpleNamespace) -> bool:
    return inspect.isasyncgenfunction(given.config["handler"])


def test_the_concurrency_is_constant_and_the_aggregate_kept(start: Callable[..., SimpleNamespace]) -> None:
    config = start(settings=Settings(concurrency=7)).config
    assert [config["concurrency_modifier"](current) for current in (1, 7, 30)] == [7, 7, 7]
    assert config["return_aggregate_stream"] is True


def test_logs_are_quiet_unless_asked_otherwise(
    start: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    assert os.environ["RUNPOD_LOG_LEVEL"] == "INFO"
    monkeypatch.setenv("RUNPOD_LOG_LEVEL", "ERROR")
    start()
    assert os.environ["RUNPOD_LOG_LEVEL"] == "ERROR"


@pytest.mark.parametrize(
    ("variables", "arguments", "expected"),
    [
        ({}, (), False),
        ({}, ("--test_input", "{}"), False),
        ({}, ("--rp_serve_api",), True),
        ({"RUNPOD_WEBHOOK_GET_JOB": "https://example.com"}, (), True),
        ({"RUNPOD_WEBHOOK_GET_JOB": "https://example.com"}, ("--test_input={}",), False),
        ({"RUNPOD_WEBHOOK_GET_JOB": "https://example.com", "RUNPOD_REALTIME_PORT": "80"}, (), False),
        ({"RUNPOD_WEBHOOK_GET_JOB": "https://example.com", "RUNPOD_REALTIME_PORT": "0"}, (), True),
    ],
)
def test_streaming_is_left_out_where_the_sdk_cannot(
    start: Callable[..., SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    arguments: tuple[str, ...],
    expected: bool,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_stream(start(*arguments, settings=Settings(stream=True))) is expected
    assert not is_stream(start(*arguments))


def test_on_the_platform_a_missing_model_is_noticed_at_the_start(
    start: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    assert start().checks == []
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "https://example.com")
    (check,) = start(settings=Settings(model="tiny.en", model_cache=tmp_path)).checks
    with pytest.raises(ModelError):
        check()


def test_an_untested_version_of_the_sdk_is_left_as_it_is(
    start: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    patched: list[bool] = []
    monkeypatch.setattr(runpod_sdk, "install_draining_scaler", lambda: patched.append(True))
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "https://example.com")
    logging.getLogger("whisper_worker").propagate = True
    start(version="1.13.0")
    assert not patched and "not a tested one" in caplog.text
    start(version="1.12.7")
    assert patched


async def test_by_hand_the_segments_are_printed(
    start: Callable[..., SimpleNamespace], capsys: pytest.CaptureFixture[str]
) -> None:
    service = FakeService()
    door = runpod_sdk.RunPodDoor(service, Settings())
    handler = runpod_sdk._handler(door, deployed=False)
    result = await handler({"id": "x", "input": {"audio_url": "https://example.com/a.mp3"}})
    door.close()
    assert result["text"] == "hello world"
    assert capsys.readouterr().out.splitlines() == [
        "[00:00.000 --> 00:01.000] hello",
        "[00:01.000 --> 00:02.000] world",
    ]


def test_no_upload_without_all_of_the_bucket(
    start: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in BUCKET:
        assert runpod_sdk._upload() is None
        monkeypatch.setenv(name, "set")
    assert runpod_sdk._upload() is not None
    monkeypatch.setattr(runpod_sdk, "find_spec", lambda name: None)
    assert runpod_sdk._upload() is None
