"""Both engines against openai-whisper: same windows, same weights, float32, token for token."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import model_cache
from whisper_worker.audio.decode import decode
from whisper_worker.cache.layout import find_model
from whisper_worker.engine.features import log_mel, log_mel_peak
from whisper_worker.engine.native import NativeRecognizer
from whisper_worker.engine.recognizer import DecodingOptions, DecodingRow, Recognizer
from whisper_worker.engine.reference import ReferenceRecognizer
from whisper_worker.engine.tokenizer import Tokenizer
from whisper_worker.settings import Settings

TESTS = Path(__file__).parents[1]
GOLDEN = {
    model: json.loads((TESTS / "golden" / "parity" / f"{model}.json").read_text()) for model in ("tiny.en", "base")
}
NATIVE = [
    (NativeRecognizer, model, index)
    for model in GOLDEN
    for index, golden in enumerate(GOLDEN[model])
    if model == "tiny.en" or not golden["beam_size"] or golden["clip"] == "jfk.flac"
]
# Its beams are held to the same in test_reference.py; here greedy decoding suffices.
REFERENCE = [
    (ReferenceRecognizer, model, index)
    for model in GOLDEN
    for index, golden in enumerate(GOLDEN[model])
    if not golden["beam_size"] and (model == "tiny.en" or golden["clip"] == "jfk.flac")
]


@cache
def recognizer(engine: type[Any], model: str) -> Recognizer:
    files = find_model(Settings(model_cache=model_cache(model)))
    tokenizer = Tokenizer.load(files.processor_dir / "tokenizer.json", files.model_dir / "generation_config.json")
    loaded: Recognizer = engine.load(files.model_dir, tokenizer, model, None, "float32", "cpu", 2)
    return loaded


@cache
def window(clip: str, n_mels: int) -> torch.Tensor:
    """Features of the clip followed by silence up to 30 s, as openai-whisper's transcribe makes them."""
    waveform = decode(TESTS / "data" / "speech" / clip, Settings()).waveform
    padded = np.zeros(480_000, dtype=np.int16)
    padded[: len(waveform)] = waveform
    return log_mel(padded, n_mels, 0, len(padded), peak=log_mel_peak(padded, n_mels))


@pytest.mark.parametrize(("engine", "model", "index"), NATIVE + REFERENCE)
def test_tokens_are_openai_whispers(engine: type[Any], model: str, index: int) -> None:
    golden = GOLDEN[model][index]
    loaded = recognizer(engine, model)
    mel = window(golden["clip"], loaded.info.n_mels)
    options = DecodingOptions(
        beam_size=golden["beam_size"], suppress_tokens=loaded.tokenizer.non_speech_tokens, max_new_tokens=224
    )
    (result,) = loaded.decode([DecodingRow(loaded.encode([mel])[0], "en")], options)
    assert list(result.tokens) == golden["tokens"]
    assert loaded.tokenizer.decode(result.tokens).strip() == golden["text"]
    assert result.avg_logprob == pytest.approx(golden["avg_logprob"], abs=1e-3)
    assert result.no_speech_prob == pytest.approx(golden["no_speech_prob"], abs=1e-3)
