"""A window's words must not hang on the windows that share its batch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.models import model_cache
from whisper_worker.audio.decode import decode
from whisper_worker.cache.layout import find_model
from whisper_worker.engine.features import log_mel, log_mel_peak, with_silence
from whisper_worker.engine.native import NativeRecognizer
from whisper_worker.engine.recognizer import DecodingOptions, DecodingRow
from whisper_worker.engine.tokenizer import Tokenizer
from whisper_worker.settings import Settings

SPEECH = Path(__file__).parents[1] / "data" / "speech"
FRAMES = (1200, 2000, 1500, 2700)
"""Lengths of the windows, none the same."""
LAST_BITS = 1e-4
"""Of log probabilities, for processors on which sums of other sizes are taken in another order. Where they are not, all
is the same; padding the encoder's output to the longest window moved them by 5e-3, and changed words."""


@cache
def recognizer() -> NativeRecognizer:
    files = find_model(Settings(model_cache=model_cache("tiny.en")))
    tokenizer = Tokenizer.load(files.processor_dir / "tokenizer.json", files.model_dir / "generation_config.json")
    return NativeRecognizer.load(files.model_dir, tokenizer, "tiny.en", None, "auto", "cpu", 1)


@cache
def states() -> list[torch.Tensor]:
    """The same speech with more or less silence behind it."""
    waveform = decode(SPEECH / "jfk.flac", Settings()).waveform
    mel = log_mel(waveform, recognizer().info.n_mels, 0, len(waveform), peak=log_mel_peak(waveform, 80))
    return recognizer().encode([with_silence(mel, frames) for frames in FRAMES])


@pytest.mark.parametrize("beam_size", [None, 5])
@pytest.mark.parametrize("prompts", [((), (), (), ()), ((), (1, 2, 3), (), tuple(range(1000, 1040)))])
def test_a_window_gives_the_same_alone_and_beside_others(
    beam_size: int | None, prompts: tuple[tuple[int, ...], ...]
) -> None:
    options = DecodingOptions(beam_size=beam_size)
    rows = [DecodingRow(state, "en", prompt) for state, prompt in zip(states(), prompts, strict=True)]
    together = recognizer().decode(rows, options)
    for row, result in zip(rows, together, strict=True):
        (alone,) = recognizer().decode([row], options)
        assert result.tokens == alone.tokens
        assert result.avg_logprob == pytest.approx(alone.avg_logprob, abs=LAST_BITS)
        assert result.no_speech_prob == pytest.approx(alone.no_speech_prob, abs=LAST_BITS)


def test_words_have_the_same_attention_alone_and_beside_others() -> None:
    options = DecodingOptions()
    rows = [DecodingRow(state, "en") for state in states()]
    texts = [tuple(range(1000, 1010 + 40 * place)) for place in range(len(rows))]
    together = recognizer().cross_attention(rows, texts, options)
    for row, text, (attention, probabilities) in zip(rows, texts, together, strict=True):
        ((alone, alone_probabilities),) = recognizer().cross_attention([row], [text], options)
        assert torch.equal(attention, alone)
        assert probabilities == alone_probabilities
