"""The reference recognizer: transformers' Whisper, with the traps of its pipeline closed.

The stock pipeline searches five beams unasked, runs a seek loop over every chunk, decodes
the padding of short ones, detects a language per chunk and keeps every step's scores. Here
the windows come from our pipeline, and ``GenerationMixin.generate`` is called under the
Whisper class's own override, with transformers' own logits processors: one pass a window,
greedy unless asked. It is the yardstick of the native engine and the way out on odd hardware.

Not honoured, because transformers' search has no such thing: ``patience``, and
``length_penalty`` in openai/whisper's form (its beams are ranked by mean log probability).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from whisper_worker.engine.decoding import MAX_INITIAL_TIMESTAMP, initial_tokens
from whisper_worker.engine.memory import batch_size, out_of_memory
from whisper_worker.engine.recognizer import (
    N_FRAMES,
    POSITION_SECONDS,
    DecodingOptions,
    DecodingResult,
    DecodingRow,
    ModelInfo,
)
from whisper_worker.errors import ModelError
from whisper_worker.types import CancelToken

if TYPE_CHECKING:
    from whisper_worker.engine.tokenizer import Tokenizer

_ENCODER_BATCH = 8
"""Windows encoded at once: more bring no speed and cost memory."""


class ReferenceRecognizer:
    """See :class:`whisper_worker.engine.recognizer.Recognizer`."""

    def __init__(self, model: Any, tokenizer: Tokenizer, name: str, revision: str | None) -> None:
        self.tokenizer = tokenizer
        self._model = model.eval()
        self._device: torch.device = model.device
        config = model.config
        self.info = ModelInfo(
            name=name,
            revision=revision,
            n_mels=config.num_mel_bins,
            is_multilingual=tokenizer.is_multilingual,
            max_target_positions=config.max_target_positions,
            device=torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type,
            compute_type=str(model.dtype).removeprefix("torch."),
            engine="transformers",
            not_honoured=("patience", "length_penalty"),
        )

    @classmethod
    def load(
        cls,
        model_dir: Path,
        tokenizer: Tokenizer,
        name: str,
        revision: str | None,
        compute_type: str,
        device: str,
        threads: int,
    ) -> ReferenceRecognizer:
        """Raises :class:`ModelError` for a damaged checkpoint or a device that is not there.

        ``compute_type``: transformers knows no int8 here, so all integer types and ``auto``
        become float32 on a CPU and float16 on a GPU.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ModelError("There is no CUDA device here; set WHISPER_DEVICE=cpu or auto.")
        cuda = torch.cuda.is_available() and device != "cpu"
        if threads:
            torch.set_num_threads(threads)
        exact = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        dtype = exact.get(compute_type, torch.float16 if cuda else torch.float32)
        try:
            model = _transformers().WhisperForConditionalGeneration.from_pretrained(
                model_dir, dtype=dtype, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError("The model cache cannot be loaded; fill it again: python save_pipeline.py.") from error
        return cls(model.to("cuda" if cuda else "cpu"), tokenizer, name, revision)

    def default_batch_size(self) -> int:
        config = self._model.config
        positions = config.max_source_positions + config.max_target_positions
        row_bytes = 2 * config.decoder_layers * config.d_model * positions * self._model.dtype.itemsize
        return batch_size(row_bytes, self._device)

    @torch.inference_mode()
    def encode(self, mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        states: list[torch.Tensor] = []
        with out_of_memory():
            for first in range(0, len(mels), _ENCODER_BATCH):
                padded = [
                    torch.nn.functional.pad(mel, (0, N_FRAMES - mel.shape[1]), value=float(mel.min()))
                    for mel in mels[first : first + _ENCODER_BATCH]
                ]
                features = torch.stack(padded).to(self._device, self._model.dtype)
                states.extend(self._model.get_encoder()(features).last_hidden_state)
        return states

    @torch.inference_mode()
    def detect_language(self, states: Sequence[torch.Tensor]) -> list[dict[str, float]]:
        if not self.tokenizer.is_multilingual:
            return [{"en": 1.0} for _ in states]
        ids = list(self.tokenizer.language_ids)
        rows = torch.softmax(self._logits(states, [[self.tokenizer.sot]] * len(states))[:, -1, ids], dim=-1)
        return [dict(zip(self.tokenizer.languages, row, strict=True)) for row in rows.tolist()]

    @torch.inference_mode()
    def decode(
        self,
        rows: Sequence[DecodingRow],
        options: DecodingOptions,
        cancel: Sequence[CancelToken | None] = (),
    ) -> list[DecodingResult]:
        hf = _transformers()
        n_context = self._model.config.max_target_positions
        prompts = [initial_tokens(self.tokenizer, row, options, n_context) for row in rows]
        n_prompt = len(prompts[0])
        beams = options.beam_size or 1 if options.temperature == 0 else 1
        samples = options.best_of or 1 if options.temperature > 0 else 1
        eot = self.tokenizer.eot
        config = hf.GenerationConfig(
            num_beams=beams,
            do_sample=options.temperature > 0,
            temperature=options.temperature or None,
            top_k=0 if options.temperature > 0 else None,
            num_return_sequences=samples,
            length_penalty=1.0 if beams > 1 else None,
            max_new_tokens=min(options.max_new_tokens, n_context - n_prompt),
            eos_token_id=eot,
            pad_token_id=eot,
            decoder_start_token_id=self.tokenizer.sot,
            return_dict_in_generate=True,
        )
        states = [row.state for row in rows]
        with out_of_memory(), torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(options.seed)
            sot_at = prompts[0].index(self.tokenizer.sot)
            first = torch.softmax(self._logits(states, prompts)[:, sot_at], dim=-1)
            no_speech: list[float] = first[:, self.tokenizer.no_speech].tolist()
            processors, scores = self._processors(rows, options, n_prompt)
            output = hf.generation.GenerationMixin.generate(
                self._model,
                encoder_outputs=_as_output(torch.stack(states)),
                decoder_input_ids=torch.tensor(prompts, device=self._device),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=hf.StoppingCriteriaList([_AllCancelled(cancel)]),
            )
        sequences: list[list[int]] = output.sequences[:, n_prompt:].tolist()
        results = []
        for place in range(len(rows)):
            candidates = []
            for at in range(place * samples, (place + 1) * samples):
                tokens = sequences[at]
                tokens = tokens[: tokens.index(eot)] if eot in tokens else tokens
                mean = float(output.sequences_scores[at]) if beams > 1 else scores.mean(at, len(tokens), sequences[at])
                candidates.append((mean * (len(tokens) + 1) / max(1, len(tokens)), mean, tuple(tokens)))
            _, mean, chosen = max(candidates)
            results.append(DecodingResult(chosen, mean, no_speech[place], options.temperature))
        return results

    def _processors(
        self, rows: Sequence[DecodingRow], options: DecodingOptions, n_prompt: int
    ) -> tuple[Any, _ChosenScores]:
        """transformers' own rules for Whisper's tokens, and what reads off the scores behind them."""
        hf = _transformers()
        tokenizer = self.tokenizer
        suppressed = {*options.suppress_tokens, *tokenizer.control_tokens}
        device = str(self._device)
        processors: list[Any] = [
            hf.SuppressTokensAtBeginLogitsProcessor(list(tokenizer.blank_tokens), n_prompt, device=device),
        ]
        if options.without_timestamps:
            suppressed |= set(range(tokenizer.timestamp_begin, self._model.config.vocab_size))
            processors.append(hf.SuppressTokensLogitsProcessor(sorted(suppressed), device=device))
        else:
            processors.append(hf.SuppressTokensLogitsProcessor(sorted(suppressed), device=device))
            rules = _TimestampRules(
                tokenizer.no_timestamps, tokenizer.eot, round(MAX_INITIAL_TIMESTAMP / POSITION_SECONDS)
            )
            processors.append(hf.WhisperTimeStampLogitsProcessor(rules, begin_index=n_prompt))
        scores = _ChosenScores(n_prompt)
        return hf.LogitsProcessorList([*processors, scores]), scores

    def _logits(self, states: Sequence[torch.Tensor], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """float32 logits ``(rows, n, n_vocab)`` of one pass over known tokens."""
        with out_of_memory():
            output = self._model(
                encoder_outputs=_as_output(torch.stack(list(states))),
                decoder_input_ids=torch.tensor(tokens, device=self._device),
                use_cache=False,
            )
        logits: torch.Tensor = output.logits.float()
        return logits

    @torch.inference_mode()
    def cross_attention(
        self, rows: Sequence[DecodingRow], tokens: Sequence[Sequence[int]], options: DecodingOptions
    ) -> list[tuple[torch.Tensor, list[float]]]:
        config = self._model.config
        heads = self.tokenizer.alignment_heads or tuple(
            (layer, head)
            for layer in range(config.decoder_layers // 2, config.decoder_layers)
            for head in range(config.decoder_attention_heads)
        )
        plain = DecodingOptions(task=options.task, without_timestamps=True)
        prefixes = [
            initial_tokens(self.tokenizer, DecodingRow(None, row.language), plain, config.max_target_positions)
            for row in rows
        ]
        n_prefix = len(prefixes[0])
        length = n_prefix + max(len(sequence) for sequence in tokens)
        padded = torch.full((len(rows), length), self.tokenizer.eot, device=self._device)
        for place, (prefix, sequence) in enumerate(zip(prefixes, tokens, strict=True)):
            padded[place, : n_prefix + len(sequence)] = torch.tensor([*prefix, *sequence])
        # Only the written-out attention gives its weights; left on, it would slow every later job.
        usual = config._attn_implementation
        try:
            self._model.set_attn_implementation("eager")
            with out_of_memory():
                output = self._model(
                    encoder_outputs=_as_output(torch.stack([row.state for row in rows])),
                    decoder_input_ids=padded,
                    output_attentions=True,
                    use_cache=False,
                )
        finally:
            self._model.set_attn_implementation(usual)
        attention = torch.stack([output.cross_attentions[layer][:, head] for layer, head in heads], dim=1).float()
        results = []
        for place, sequence in enumerate(tokens):
            first, stop = n_prefix - 1, n_prefix - 1 + len(sequence)
            logprobs = torch.log_softmax(output.logits[place, first:stop, : self.tokenizer.eot].float(), dim=-1)
            chosen = torch.tensor(list(sequence), device=self._device, dtype=torch.long)
            probabilities: list[float] = logprobs.gather(1, chosen[:, None])[:, 0].exp().tolist()
            results.append((attention[place, :, first : stop + 1], probabilities))
        return results


class _TimestampRules:
    """The fields of a generation config that transformers' timestamp rules read."""

    def __init__(self, no_timestamps_token_id: int, eos_token_id: int, max_initial_timestamp_index: int) -> None:
        self.no_timestamps_token_id = no_timestamps_token_id
        self.eos_token_id = self.bos_token_id = eos_token_id
        self.max_initial_timestamp_index = max_initial_timestamp_index
        self._detect_timestamp_from_logprob = True


class _ChosenScores:
    """A last logits processor that adds up the log probabilities of what was chosen.

    It sees each step's scores before the choice and the choice at the next step, so it keeps
    one step's scores and not all of them, as ``output_scores`` would.
    """

    def __init__(self, n_prompt: int) -> None:
        self._n_prompt = n_prompt
        self._last: torch.Tensor | None = None
        self._gained: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._last is not None:
            self._gained.append(self._last.gather(1, input_ids[:, -1:])[:, 0])
        self._last = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def mean(self, row: int, n_text: int, sequence: Sequence[int]) -> float:
        """Mean log probability of a row's text and its end, if it came to one."""
        assert self._last is not None
        values = [float(step[row]) for step in self._gained[: n_text + 1]]
        if len(values) <= n_text and len(values) < len(sequence):
            values.append(float(self._last[row, sequence[len(values)]]))
        return sum(values) / (n_text + 1)


class _AllCancelled:
    """Stops generation once every row's job was cancelled; transformers' batch has no way to lose one row."""

    def __init__(self, cancel: Sequence[CancelToken | None]) -> None:
        self._cancel = cancel

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stop = bool(self._cancel) and all(token is not None and token.cancelled for token in self._cancel)
        return torch.full((input_ids.shape[0],), stop, device=input_ids.device, dtype=torch.bool)


def _as_output(states: torch.Tensor) -> Any:
    return _transformers().modeling_outputs.BaseModelOutput(last_hidden_state=states)


def _transformers() -> Any:
    """The library, loaded when first needed; its annotations are too partial to check against."""
    return importlib.import_module("transformers")
