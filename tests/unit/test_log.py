"""Log lines in the two shapes that users parse."""

from __future__ import annotations

import json
import logging
import re

import pytest

from whisper_worker import log


def test_text_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("text", "INFO")
    with log.job_context("job-7"):
        log.get_logger("fetch").info("Downloaded", extra={"fields": {"bytes": 12}})
    line = capsys.readouterr().err.strip()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| INFO \| \[job-7\] Downloaded bytes=12", line)


def test_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("json", "INFO")
    with log.job_context("job-7"):
        log.get_logger("fetch").info("Downloaded", extra={"fields": {"bytes": 12}})
    line = json.loads(capsys.readouterr().err)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {"level": "INFO", "component": "fetch", "message": "Downloaded", "job_id": "job-7", "bytes": 12}


def test_no_job_no_brackets_and_levels_are_held(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("text", "WARNING")
    log.get_logger("fetch").info("hidden")
    log.get_logger("fetch").warning("shown")
    printed = capsys.readouterr().err
    assert "hidden" not in printed
    assert printed.endswith("| WARNING | shown\n")
    assert logging.getLogger("whisper_worker").propagate is False


def test_a_failure_is_logged_without_the_text_of_its_exception(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback names files and may quote the request; a log line must not."""
    log.configure("text", "INFO")
    try:
        raise RuntimeError("secret words at /a/path")
    except RuntimeError:
        log.get_logger("service").exception("Unexpected failure")
    printed = capsys.readouterr().err
    assert "secret" not in printed
    assert "RuntimeError" in printed
    assert "test_log.py" in printed or "test_a_failure" in printed
