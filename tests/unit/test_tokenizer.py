"""Whisper's tokens, on the real tokenizer files of tiny.en and base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models import model_cache
from whisper_worker.cache.layout import find_model
from whisper_worker.engine.tokenizer import Tokenizer
from whisper_worker.errors import InvalidInput, ModelError
from whisper_worker.languages import LANGUAGES
from whisper_worker.settings import Settings


@pytest.fixture(scope="module", params=["tiny.en", "base"])
def files(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    found = find_model(Settings(model_cache=model_cache(request.param)))
    return found.processor_dir / "tokenizer.json", found.model_dir / "generation_config.json"


@pytest.fixture(scope="module")
def tokenizer(files: tuple[Path, Path]) -> Tokenizer:
    return Tokenizer.load(*files)


def test_special_ids_agree_with_the_generation_config(tokenizer: Tokenizer, files: tuple[Path, Path]) -> None:
    config = json.loads(files[1].read_text())
    assert tokenizer.no_timestamps == config["no_timestamps_token_id"]
    assert tokenizer.sot == config["decoder_start_token_id"]
    assert tokenizer.eot == config["eos_token_id"]
    assert sorted(tokenizer.blank_tokens) == sorted(config["begin_suppress_tokens"])
    # The published list holds the control tokens too, which are always suppressed here.
    published = {token for token in config["suppress_tokens"] if token < tokenizer.eot}
    assert set(tokenizer.non_speech_tokens) == published


def test_languages(tokenizer: Tokenizer) -> None:
    assert set(tokenizer.languages) <= set(LANGUAGES)
    if tokenizer.is_multilingual:
        assert len(tokenizer.languages) == 99
        de = tokenizer.language_token("de")
        assert tokenizer.sot_sequence("de", "translate", timestamps=True) == [tokenizer.sot, de, tokenizer.translate]
        with pytest.raises(InvalidInput):
            tokenizer.language_token("yue")
    else:
        assert tokenizer.languages == ("en",)
        assert tokenizer.sot_sequence("en", "transcribe", timestamps=False) == [tokenizer.sot, tokenizer.no_timestamps]


def test_text_survives_and_special_tokens_give_none(tokenizer: Tokenizer) -> None:
    text = " Hello, it's me — don't go."
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.sot, tokenizer.timestamp_begin, *ids, tokenizer.eot]) == text
    assert tokenizer.timestamp(tokenizer.timestamp_begin + 75) == pytest.approx(1.5)


def test_words_keep_their_blanks_and_characters_stay_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" Hello, it's 会議.")
    words, groups = tokenizer.split_words(ids, "en")
    assert words[0] == " Hello"
    assert " it's" in words
    assert "".join(words) == " Hello, it's 会議."
    assert [token for group in groups for token in group] == ids
    characters, _ = tokenizer.split_words(tokenizer.encode("会議です"), "ja")
    assert "".join(characters) == "会議です"
    assert all("\ufffd" not in character for character in characters)


def test_a_damaged_file_is_a_model_error(files: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{")
    with pytest.raises(ModelError):
        Tokenizer.load(broken, files[1])


def test_control_tokens_in_a_callers_text_are_text(tokenizer: Tokenizer) -> None:
    written = "<|startoftranscript|> so <|endoftext|>"
    tokens = tokenizer.encode(written)
    assert max(tokens) < tokenizer.eot
    assert tokenizer.decode(tokens) == written
