"""What people call a model, and what is taken for it."""

from __future__ import annotations

import re

import pytest

from whisper_worker.cache.names import DEFAULT_MODEL, canonical, has_sizes_of, known_short, resolve, same_model
from whisper_worker.errors import ModelError

OPENAI = (
    "tiny tiny.en base base.en small small.en medium medium.en large-v1 large-v2 large-v3 large large-v3-turbo turbo"
).split()
DISTILLED = "distil-large-v2 distil-large-v3 distil-large-v3.5 distil-small.en distil-medium.en".split()


@pytest.mark.parametrize("name", [*OPENAI, *DISTILLED])
def test_short_names_are_known_and_pinned(name: str) -> None:
    found = resolve(name)
    assert known_short(found.short) == found.short
    assert not found.is_ct2
    assert found.revision is not None
    assert re.fullmatch(r"[0-9a-f]{40}", found.revision)


@pytest.mark.parametrize(
    ("name", "repository", "short"),
    [
        ("large", "openai/whisper-large-v3", "large-v3"),
        ("turbo", "openai/whisper-large-v3-turbo", "large-v3-turbo"),
        ("large-v1", "openai/whisper-large", "large-v1"),
        ("openai/whisper-large", "openai/whisper-large", "large-v1"),
        ("OpenAI/Whisper-Tiny.en", "openai/whisper-tiny.en", "tiny.en"),
        ("whisper-base", "openai/whisper-base", "base"),
        ("faster-whisper-base", "openai/whisper-base", "base"),
        ("faster-distil-whisper-large-v3", "distil-whisper/distil-large-v3", "distil-large-v3"),
        (" base ", "openai/whisper-base", "base"),
        ("distil-large-v3.5", "distil-whisper/distil-large-v3.5", "distil-large-v3.5"),
        (DEFAULT_MODEL, "openai/whisper-large-v3-turbo", "large-v3-turbo"),
    ],
)
def test_names_of_checkpoints(name: str, repository: str, short: str) -> None:
    found = resolve(name)
    assert (found.repository, found.short, found.is_ct2) == (repository, short, False)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("Systran/faster-whisper-base", "base"),
        ("Systran/faster-whisper-tiny.en", "tiny.en"),
        ("Systran/faster-whisper-large-v3", "large-v3"),
        ("Systran/faster-distil-whisper-large-v3", "distil-large-v3"),
        ("Systran/faster-distil-whisper-small.en", "distil-small.en"),
        ("deepdml/faster-whisper-large-v3-turbo-ct2", "large-v3-turbo"),
        ("mobiuslabsgmbh/faster-whisper-large-v3-turbo", "large-v3-turbo"),
        ("distil-whisper/distil-large-v3.5-ct2", "distil-large-v3.5"),
    ],
)
def test_conversions_stand_for_their_model(name: str, short: str) -> None:
    """They keep their own repository, but a cache that holds the model under another name will do."""
    found = resolve(name)
    assert (found.repository, found.short, found.revision, found.is_ct2) == (name, short, None, True)
    assert same_model(name, short)


def test_a_repository_of_ones_own_is_taken_as_it_is() -> None:
    found = resolve("kotoba-tech/kotoba-whisper-v2.2")
    assert (found.repository, found.short, found.revision) == (
        "kotoba-tech/kotoba-whisper-v2.2",
        "kotoba-tech--kotoba-whisper-v2.2",
        None,
    )
    assert known_short(found.short) is None
    assert not same_model("someone/faster-whisper-large-v3-german", "large-v3")


@pytest.mark.parametrize("name", ["", "tinny", "base.fr", "../secret/place", "a/b/c", "org/..", "org/na me", "-x/y"])
def test_what_cannot_be_a_model_is_refused_without_repeating_it(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert "secret" not in caught.value.message


def test_a_near_miss_is_pointed_out() -> None:
    with pytest.raises(ModelError, match=r"Did you mean tiny\?"):
        resolve("tinny")


def test_a_label_that_is_no_name_equals_itself_only() -> None:
    assert same_model("my-tune", "my-tune")
    assert not same_model("my-tune", "base")
    assert canonical("my-tune") == "my-tune"
    assert canonical("turbo") == DEFAULT_MODEL


def test_sizes_tell_models_apart() -> None:
    turbo = {"d_model": 1280, "encoder_layers": 32, "decoder_layers": 4, "vocab_size": 51866}
    assert has_sizes_of(turbo, "large-v3-turbo")
    assert not has_sizes_of(turbo, "large-v3")
    assert not has_sizes_of({}, "base")
    assert has_sizes_of(turbo, "somebody--tune")
