"""The cards in ``/status``: the real package with its calls replaced, as the driver would answer them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from whisper_worker.doors.http_status import gpus


def failing(code: int) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise pynvml.NVMLError(code)

    return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces calls; to begin with there are two cards that answer everything."""

    def answers(**calls: Any) -> None:
        for name, call in calls.items():
            monkeypatch.setattr(pynvml, name, call)

    answers(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda card: ("NVIDIA L4", "NVIDIA T4")[card],
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(total=23034 << 20, used=9120 << 20, free=13914 << 20),
        nvmlDeviceGetTemperature=lambda card, sensor: 61 if sensor == pynvml.NVML_TEMPERATURE_GPU else -1,
        nvmlDeviceGetUtilizationRates=lambda card: SimpleNamespace(gpu=87, memory=40),
    )
    return answers


FIRST = {
    "name": "NVIDIA L4",
    "memory_total_mb": 23034,
    "memory_used_mb": 9120,
    "temperature_c": 61,
    "utilization_percent": 87,
}


def test_every_card_tells_its_figures(driver: Callable[..., None]) -> None:
    ended: list[bool] = []
    driver(nvmlShutdown=lambda: ended.append(True))
    assert gpus() == [FIRST, {**FIRST, "name": "NVIDIA T4"}]
    assert ended == [True], "the driver is let go of"


def test_zeros_are_figures(driver: Callable[..., None]) -> None:
    """An idle card's load is 0 and not unknown."""
    driver(
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(total=23034 << 20, used=0, free=23034 << 20),
        nvmlDeviceGetUtilizationRates=lambda card: SimpleNamespace(gpu=0, memory=0),
    )
    assert gpus() == [{**FIRST, "memory_used_mb": 0, "utilization_percent": 0}]


def test_what_a_card_does_not_tell_is_none(driver: Callable[..., None]) -> None:
    driver(
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetTemperature=failing(pynvml.NVML_ERROR_NO_PERMISSION),
        nvmlDeviceGetUtilizationRates=failing(pynvml.NVML_ERROR_NOT_SUPPORTED),
    )
    assert gpus() == [{**FIRST, "temperature_c": None, "utilization_percent": None}]


def test_a_lost_card_is_still_counted(driver: Callable[..., None]) -> None:
    def handle(index: int) -> int:
        if index == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    driver(nvmlDeviceGetHandleByIndex=handle)
    assert gpus() == [FIRST, dict.fromkeys(FIRST)]


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_without_a_driver_there_are_no_cards(driver: Callable[..., None], code: int) -> None:
    driver(nvmlInit=failing(code))
    assert gpus() == []


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount"])
def test_a_driver_that_fails_is_not_taken_for_no_cards(
    driver: Callable[..., None], call: str, caplog: pytest.LogCaptureFixture
) -> None:
    driver(
        **{call: failing(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)}, nvmlShutdown=failing(pynvml.NVML_ERROR_UNKNOWN)
    )
    assert gpus() is None
    assert caplog.messages == ["The cards' driver does not answer"]


def test_without_the_package_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus() is None


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="there is a card")
def test_the_package_itself_on_a_machine_without_cards() -> None:
    assert gpus() == []
