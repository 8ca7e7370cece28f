"""Settings: defaults, checks that name the variable, and README's table."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from whisper_worker.errors import InvalidInput
from whisper_worker.settings import Settings, settings_table

ROOT = Path(__file__).parents[2]


def test_an_empty_environment_gives_the_defaults() -> None:
    settings = Settings.from_env({})
    assert settings == Settings()
    assert settings.batch_size == 0
    assert settings.engine == "native"


def test_the_first_name_wins_over_the_other_one() -> None:
    both = {"WHISPER_MAX_DOWNLOAD_BYTES": "10", "RUNPOD_MAX_DOWNLOAD_BYTES": "20"}
    assert Settings.from_env(both).max_download_bytes == 10
    assert Settings.from_env({"RUNPOD_MAX_DOWNLOAD_BYTES": "20"}).max_download_bytes == 20


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MODEL_BATCH_SIZE", "many"),
        ("MODEL_BATCH_SIZE", "-1"),
        ("WHISPER_COMPUTE_TYPE", "int4"),
        ("WHISPER_ALLOW_PRIVATE_URLS", "perhaps"),
        ("WHISPER_DOWNLOAD_TIMEOUT", "nan"),
        ("WHISPER_MAX_DOWNLOAD_BYTES", "1G"),
    ],
)
def test_a_bad_value_is_refused_by_the_variables_name(variable: str, value: str) -> None:
    with pytest.raises(InvalidInput, match=f"{variable} must be "):
        Settings.from_env({variable: value})


def test_blank_counts_as_unset() -> None:
    assert Settings.from_env({"MODEL_BATCH_SIZE": " "}).batch_size == 0


def test_the_readme_table_is_the_one_the_settings_print() -> None:
    assert settings_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_child_process_reads_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option of the command line wins over the variable, where it goes back to the default too."""
    monkeypatch.setattr(os, "environ", {"WHISPER_DEVICE": "cuda", "WHISPER_MODEL": "large"})
    settings = replace(Settings(), model="tiny.en", strict=True, threads=2, model_cache=Path("/models"))
    settings = replace(settings, api_keys=("one", "two"))
    assert Settings.from_env(settings.for_child()) == settings


def test_secrets_do_not_show() -> None:
    settings = Settings.from_env({"WHISPER_API_KEYS": "abc, def", "WHISPER_CALLBACK_SECRET": "ghi"})
    assert settings.api_keys == ("abc", "def")
    assert not any(secret in repr(settings) for secret in ("abc", "def", "ghi"))
