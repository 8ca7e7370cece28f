"""The reference recognizer: its plumbing on a small random model, its text on tiny.en."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import model_cache
from whisper_worker.audio.decode import decode
from whisper_worker.cache.layout import find_model
from whisper_worker.engine.decoding import _Rules, initial_tokens
from whisper_worker.engine.features import log_mel, log_mel_peak
from whisper_worker.engine.native import NativeRecognizer
from whisper_worker.engine.recognizer import DecodingOptions, DecodingRow
from whisper_worker.engine.reference import ReferenceRecognizer
from whisper_worker.engine.tokenizer import Tokenizer
from whisper_worker.errors import ModelError, OutOfMemory
from whisper_worker.settings import Settings
from whisper_worker.types import CancelToken

TESTS = Path(__file__).parents[1]
END_BIAS = 3.5


def tokenizer_of(name: str) -> Tokenizer:
    files = find_model(Settings(model_cache=model_cache(name)))
    return Tokenizer.load(files.processor_dir / "tokenizer.json", files.model_dir / "generation_config.json")


def random_recognizer(name: str) -> ReferenceRecognizer:
    """The tokens of a real checkpoint over a small model that knows nothing."""
    import transformers

    tokenizer = tokenizer_of(name)
    torch.manual_seed(3)
    config = transformers.WhisperConfig(
        vocab_size=tokenizer.timestamp_begin + 1501,
        num_mel_bins=80,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        init_std=0.3,
        eos_token_id=tokenizer.eot,
        bos_token_id=tokenizer.eot,
        pad_token_id=tokenizer.eot,
        decoder_start_token_id=tokenizer.sot,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    tokenizer.alignment_heads = ((0, 1), (1, 0), (1, 1))
    model = transformers.WhisperForConditionalGeneration(config)
    # Likely to end a transcript, so that both kinds of sequences occur: ended ones and cut ones.
    # (A padding token has no weights of its own in a new model.)
    end = torch.randn(32)
    model.proj_out.weight.data[tokenizer.eot] = 0.3 * end
    model.model.decoder.layer_norm.bias.data += END_BIAS * end / end.norm()
    return ReferenceRecognizer(model, tokenizer, name, None)


@pytest.fixture(scope="module")
def small() -> ReferenceRecognizer:
    return random_recognizer("tiny.en")


@pytest.fixture(scope="module")
def states(small: ReferenceRecognizer) -> list[Any]:
    generator = torch.Generator().manual_seed(11)
    return small.encode([torch.randn(80, n, generator=generator) for n in (3000, 700, 1500)])


def rows_of(states: list[Any], **more: Any) -> list[DecodingRow]:
    return [DecodingRow(state, "en", **more) for state in states]


def is_well_timed(tokens: tuple[int, ...], tokenizer: Tokenizer, limit: float) -> bool:
    stamps = [tokenizer.timestamp(token) for token in tokens if token >= tokenizer.timestamp_begin]
    return bool(stamps) and stamps == sorted(stamps) and stamps[0] <= 1.0 and stamps[-1] <= limit


def sum_by_hand(
    recognizer: ReferenceRecognizer, row: DecodingRow, options: DecodingOptions, sampled: tuple[int, ...]
) -> float:
    """Log probability of sampled tokens: one pass over all of them, then the native engine's rules step by step."""
    prompt = initial_tokens(recognizer.tokenizer, row, options, 448)
    with torch.inference_mode():
        logits = recognizer._model(
            encoder_outputs=(row.state[None],), decoder_input_ids=torch.tensor([[*prompt, *sampled]]), use_cache=False
        ).logits[0, len(prompt) - 1 :]
    rules = _Rules(recognizer.tokenizer, options, [row], 1)
    total = 0.0
    for step, token in enumerate(sampled):
        here = logits[step : step + 1].float().clone()
        rules.apply(here)
        total += float(torch.log_softmax(here, dim=-1)[0, token])
        rules.accept(torch.tensor([token]))
    return total


# -- decoding ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "search", [{}, {"beam_size": 3}, {"temperature": 1.0, "best_of": 2}, {"beam_size": 2, "length_penalty": 0.5}]
)
@pytest.mark.parametrize("given", [{}, {"prompt": (50, 60, 70), "prefix": (80,)}])
def test_results_obey_the_rules_and_count_right(
    small: ReferenceRecognizer, states: list[Any], search: dict[str, Any], given: dict[str, Any]
) -> None:
    options = DecodingOptions(suppress_tokens=(11, 13), max_new_tokens=12, **search)
    rows = rows_of(states, max_timestamp=5.01, **given)
    for row, result in zip(rows, small.decode(rows, options), strict=True):
        assert 0 < len(result.tokens) <= 12
        assert is_well_timed(result.tokens, small.tokenizer, 5.02)
        assert not {11, 13} & set(result.tokens)
        assert small.tokenizer.eot not in result.tokens
        n = len(result.tokens)
        sampled = result.tokens if n == 12 else (*result.tokens, small.tokenizer.eot)
        expected = sum_by_hand(small, row, options, sampled) / (n + 1)
        assert result.avg_logprob == pytest.approx(expected, abs=1e-3)


def test_ends_are_counted_where_there_are_ends(small: ReferenceRecognizer, states: list[Any]) -> None:
    """The random model ends some sequences and not others: the test above has seen both kinds."""
    free = small.decode(rows_of(states, max_timestamp=5.01), DecodingOptions(max_new_tokens=12))
    never = DecodingOptions(suppress_tokens=(small.tokenizer.eot,), max_new_tokens=12)
    assert all(len(result.tokens) == 12 for result in small.decode(rows_of(states), never))
    assert any(len(result.tokens) < 12 for result in free)


def test_rows_do_not_depend_on_their_batch(small: ReferenceRecognizer, states: list[Any]) -> None:
    for options in (DecodingOptions(max_new_tokens=10), DecodingOptions(max_new_tokens=10, beam_size=3)):
        together = small.decode(rows_of(states), options)
        alone = [small.decode([row], options)[0] for row in rows_of(states)]
        assert [result.tokens for result in together] == [result.tokens for result in alone]
        for a, b in zip(together, alone, strict=True):
            assert a.avg_logprob == pytest.approx(b.avg_logprob, abs=1e-4)
            assert a.no_speech_prob == pytest.approx(b.no_speech_prob, abs=1e-6)


def test_no_speech_is_read_at_the_start_of_the_transcript(small: ReferenceRecognizer, states: list[Any]) -> None:
    tokenizer = small.tokenizer
    options = DecodingOptions(max_new_tokens=2)
    prompt = (tokenizer.sot_prev, 50, 60, tokenizer.sot)
    (result,) = small.decode([DecodingRow(states[0], "en", prompt=(50, 60))], options)
    with torch.inference_mode():
        logits = small._model(encoder_outputs=(states[0][None],), decoder_input_ids=torch.tensor([prompt])).logits
    expected = float(torch.softmax(logits[0, -1].float(), dim=-1)[tokenizer.no_speech])
    assert result.no_speech_prob == pytest.approx(expected, rel=1e-4)


def test_without_timestamps_there_are_none(small: ReferenceRecognizer, states: list[Any]) -> None:
    options = DecodingOptions(without_timestamps=True, max_new_tokens=10, temperature=1.0)
    for result in small.decode(rows_of(states), options):
        assert result.tokens and max(result.tokens) < small.tokenizer.eot


def test_sampling_follows_its_seed_and_leaves_the_global_one(small: ReferenceRecognizer, states: list[Any]) -> None:
    def sample(seed: int) -> list[tuple[int, ...]]:
        options = DecodingOptions(temperature=1.0, seed=seed, max_new_tokens=10)
        return [result.tokens for result in small.decode(rows_of(states), options)]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_best_sample_is_kept(
    small: ReferenceRecognizer, states: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    rank = ReferenceRecognizer._best

    def spy(self: Any, drawn: Any, window: int, sums: Any, options: Any, probability: float) -> Any:
        eot = self.tokenizer.eot
        texts = [tuple(tokens[: tokens.index(eot)] if eot in tokens else tokens) for tokens in drawn]
        seen.append([(text, sums.total(window, text)) for text in texts])
        return rank(self, drawn, window, sums, options, probability)

    monkeypatch.setattr(ReferenceRecognizer, "_best", spy)
    results = small.decode(rows_of(states), DecodingOptions(temperature=1.0, best_of=4, max_new_tokens=8))
    for result, candidates in zip(results, seen, strict=True):
        assert len(candidates) == 4
        best, total = max(candidates, key=lambda pair: pair[1] / len(pair[0]))
        assert result.tokens == best
        assert result.avg_logprob == pytest.approx(total / (len(best) + 1))


@pytest.mark.parametrize("search", [{}, {"beam_size": 2}, {"temperature": 1.0, "best_of": 2}])
def test_a_cancelled_row_stops_and_the_others_go_on(
    small: ReferenceRecognizer, states: list[Any], search: dict[str, Any]
) -> None:
    gone = CancelToken()
    gone.cancel()
    options = DecodingOptions(suppress_tokens=(small.tokenizer.eot,), max_new_tokens=9, **search)
    results = small.decode(rows_of(states), options, [None, gone, CancelToken()])
    assert len(results[1].tokens) <= 1
    assert len(results[0].tokens) == len(results[2].tokens) == 9


def test_the_checkpoints_own_settings_do_not_leak_in(small: ReferenceRecognizer, states: list[Any]) -> None:
    usual = small.decode(rows_of(states), DecodingOptions(max_new_tokens=10))
    import transformers

    make_config: Any = transformers.GenerationConfig
    config = make_config(
        suppress_tokens=list({token for result in usual for token in result.tokens}), num_beams=4, max_length=3
    )
    small._model.generation_config = config
    again = ReferenceRecognizer(small._model, small.tokenizer, "tiny.en", None)
    assert again.decode(rows_of(states), DecodingOptions(max_new_tokens=10)) == usual


def test_a_full_device_is_told_apart(
    small: ReferenceRecognizer, states: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(small._model.model.decoder, "forward", full)
    calls: list[Any] = [
        lambda: small.decode(rows_of(states), DecodingOptions()),
        lambda: small.cross_attention(rows_of(states), [(50,)] * 3, DecodingOptions()),
    ]
    for call in calls:
        with pytest.raises(OutOfMemory, match="MODEL_BATCH_SIZE"):
            call()
    monkeypatch.setattr(small._model.model.encoder, "forward", full)
    with pytest.raises(OutOfMemory):
        small.encode([torch.zeros(80, 100)])


# -- attention -----------------------------------------------------------------------------


def test_cross_attention_gives_weights_and_restores_the_fast_kernel(
    small: ReferenceRecognizer, states: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = small._model.config._attn_implementation
    assert usual != "eager"
    texts = [(50, 60, 70), (80,), (90, 91)]
    results = small.cross_attention(rows_of(states), texts, DecodingOptions())
    for text, (attention, probabilities) in zip(texts, results, strict=True):
        assert attention.shape == (3, len(text) + 1, 1500)
        assert attention.dtype == torch.float32
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, len(text) + 1), atol=1e-4, rtol=0)
        assert len(probabilities) == len(text) and all(0 < value < 1 for value in probabilities)
    assert small._model.config._attn_implementation == usual

    def broken(*_: Any, **__: Any) -> None:
        assert small._model.config._attn_implementation == "eager"
        raise ValueError("broken")

    monkeypatch.setattr(small._model.model.decoder, "forward", broken)
    with pytest.raises(ValueError, match="broken"):
        small.cross_attention(rows_of(states), texts, DecodingOptions())
    assert small._model.config._attn_implementation == usual


# -- language ------------------------------------------------------------------------------


def test_languages_sum_to_one() -> None:
    recognizer = random_recognizer("base")
    states = recognizer.encode([torch.zeros(80, 3000), torch.ones(80, 200)])
    for probabilities in recognizer.detect_language(states):
        assert set(probabilities) == set(recognizer.tokenizer.languages)
        assert sum(probabilities.values()) == pytest.approx(1.0)


def test_an_english_model_hears_english(small: ReferenceRecognizer, states: list[Any]) -> None:
    assert small.detect_language(states) == [{"en": 1.0}] * 3


# -- loading -------------------------------------------------------------------------------


def test_transformers_is_imported_only_by_a_model() -> None:
    code = "import sys, whisper_worker.engine.reference; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_damaged_checkpoint_and_a_missing_card_are_model_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_model(Settings(model_cache=model_cache("tiny.en")))
    tokenizer = tokenizer_of("tiny.en")
    shutil.copy(files.model_dir / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08" + bytes(40))
    with pytest.raises(ModelError) as caught:
        ReferenceRecognizer.load(tmp_path, tokenizer, "tiny.en", None, "float32", "cpu", 0)
    assert str(tmp_path) not in caught.value.message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="CUDA"):
        ReferenceRecognizer.load(files.model_dir, tokenizer, "tiny.en", None, "float16", "cuda", 0)


@pytest.fixture(scope="module")
def tiny() -> ReferenceRecognizer:
    files = find_model(Settings(model_cache=model_cache("tiny.en")))
    return ReferenceRecognizer.load(files.model_dir, tokenizer_of("tiny.en"), "tiny.en", "r1", "int8", "cpu", 0)


def test_what_was_loaded(tiny: ReferenceRecognizer) -> None:
    info = tiny.info
    assert (info.name, info.revision, info.engine, info.device) == ("tiny.en", "r1", "transformers", "cpu")
    assert (info.n_mels, info.is_multilingual, info.max_target_positions) == (80, False, 448)
    assert info.compute_type == "float32"
    assert info.not_honoured == ("patience",)
    assert tiny.default_batch_size() >= 1


# -- real speech ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    waveform: np.ndarray = decode(TESTS / "data" / "speech" / "jfk.flac", Settings()).waveform
    return log_mel(waveform, 80, 0, len(waveform), peak=log_mel_peak(waveform, 80))


def test_beam_search_is_openai_whispers(tiny: ReferenceRecognizer) -> None:
    """With timestamps, re-ranked: the same tokens and the same mean as openai-whisper's own search."""
    golden = next(
        entry
        for entry in json.loads((TESTS / "golden" / "parity" / "tiny.en.json").read_text())
        if entry["beam_size"] and entry["clip"] == "jfk.flac"
    )
    waveform = np.zeros(480_000, dtype=np.int16)
    samples = decode(TESTS / "data" / "speech" / "jfk.flac", Settings()).waveform
    waveform[: len(samples)] = samples
    mel = log_mel(waveform, 80, 0, len(waveform), peak=log_mel_peak(waveform, 80))
    options = DecodingOptions(beam_size=golden["beam_size"], suppress_tokens=tiny.tokenizer.non_speech_tokens)
    (result,) = tiny.decode([DecodingRow(tiny.encode([mel])[0], "en")], options)
    assert list(result.tokens) == golden["tokens"]
    assert result.avg_logprob == pytest.approx(golden["avg_logprob"], abs=1e-3)


def test_a_short_window_reads_as_speech_and_keeps_to_its_length(
    tiny: ReferenceRecognizer, speech: torch.Tensor
) -> None:
    seconds = speech.shape[1] / 100
    row = DecodingRow(tiny.encode([speech])[0], "en", max_timestamp=seconds)
    (result,) = tiny.decode([row], DecodingOptions(suppress_tokens=tiny.tokenizer.non_speech_tokens))
    text = tiny.tokenizer.decode(result.tokens).strip()
    assert text.startswith("And so my fellow Americans") and "your country" in text
    assert is_well_timed(result.tokens, tiny.tokenizer, seconds + 0.02)
    assert result.avg_logprob > -0.5 and result.no_speech_prob < 0.1


def test_attention_is_the_native_engines(tiny: ReferenceRecognizer, speech: torch.Tensor) -> None:
    files = find_model(Settings(model_cache=model_cache("tiny.en")))
    native = NativeRecognizer.load(files.model_dir, tiny.tokenizer, "tiny.en", None, "float32", "cpu", 0)
    padded = torch.nn.functional.pad(speech, (0, 3000 - speech.shape[1]), value=float(speech.min()))
    text = tiny.tokenizer.encode(" And so my fellow Americans, ask not")
    pairs = []
    for recognizer in (tiny, native):
        row = DecodingRow(recognizer.encode([padded])[0], "en")
        pairs.append(recognizer.cross_attention([row], [text], DecodingOptions())[0])
    (ours, our_probabilities), (theirs, their_probabilities) = pairs
    torch.testing.assert_close(ours, theirs[..., :1500], atol=2e-3, rtol=0)
    assert our_probabilities == pytest.approx(their_probabilities, abs=2e-3)
