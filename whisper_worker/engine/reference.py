"""The reference recognizer: transformers' Whisper, with the traps of its pipeline closed.

The stock pipeline searches five beams unasked, runs a seek loop over every chunk, decodes
the padding of short ones, detects a language per chunk and keeps every step's scores. Here
the windows come from our pipeline, and ``GenerationMixin.generate`` is called under the
Whisper class's own override, with transformers' own rules for Whisper's tokens: one pass a
window, greedy unless asked. It is the yardstick of the native engine and the way out on odd
hardware.

Not honoured, because transformers' search has no such thing: ``patience`` (a window's search
ends with its ``beam_size``-th finished sequence, which is a patience of 1).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
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

    max_workers = 1

    def __init__(self, model: Any, tokenizer: Tokenizer, name: str, revision: str | None) -> None:
        self.tokenizer = tokenizer
        self._model = model.eval()
        # A checkpoint's generation config fills every setting that a call leaves open (its own list of
        # suppressed tokens among them), so an empty one takes its place.
        self._model.generation_config = _transformers().GenerationConfig()
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
            not_honoured=("patience",),
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
        hf = _transformers()
        hf.utils.logging.disable_progress_bar()
        with out_of_memory():
            try:
                model = hf.WhisperForConditionalGeneration.from_pretrained(
                    model_dir, dtype=dtype, local_files_only=True
                )
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
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
                    # The least value of a mel is what silence has after clamping.
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
        with out_of_memory():
            logits = self._next_logits(states, [[self.tokenizer.sot]] * len(states))
        rows = torch.softmax(logits[:, list(self.tokenizer.language_ids)], dim=-1)
        return [dict(zip(self.tokenizer.languages, row, strict=True)) for row in rows.tolist()]

    @torch.inference_mode()
    def decode(
        self,
        rows: Sequence[DecodingRow],
        options: DecodingOptions,
        cancel: Sequence[CancelToken | None] = (),
        done: Callable[[int, DecodingResult], None] | None = None,
    ) -> list[DecodingResult]:
        n_context = self._model.config.max_target_positions
        prompts = [initial_tokens(self.tokenizer, row, options, n_context) for row in rows]
        results: dict[int, DecodingResult] = {}
        for n_prompt in {len(prompt) for prompt in prompts}:
            places = [place for place, prompt in enumerate(prompts) if len(prompt) == n_prompt]
            stops = [cancel[place] for place in places] if cancel else []
            decoded = self._decode([rows[i] for i in places], [prompts[i] for i in places], options, stops)
            results.update(zip(places, decoded, strict=True))
        return [results[place] for place in range(len(rows))]

    def _decode(
        self,
        rows: Sequence[DecodingRow],
        prompts: Sequence[list[int]],
        options: DecodingOptions,
        cancel: Sequence[CancelToken | None],
    ) -> list[DecodingResult]:
        """:meth:`decode` for rows whose prompts are of one length."""
        hf = _transformers()
        n_context = self._model.config.max_target_positions
        n_prompt = len(prompts[0])
        eot = self.tokenizer.eot
        sampling = options.temperature > 0
        beams = 1 if sampling else options.beam_size or 1
        group = options.best_of or 1 if sampling else beams
        config = hf.GenerationConfig(
            num_beams=beams,
            early_stopping=beams > 1,
            do_sample=sampling,
            temperature=options.temperature if sampling else None,
            top_k=0 if sampling else None,
            num_return_sequences=group,
            max_new_tokens=min(options.max_new_tokens, n_context - n_prompt),
            eos_token_id=eot,
            pad_token_id=eot,
            decoder_start_token_id=self.tokenizer.sot,
        )
        states = [row.state for row in rows]
        stacked = torch.stack(states)
        sums = _Sums(n_prompt, len(rows), eot)
        with out_of_memory(), torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(options.seed)
            at_sot = [prompt[: prompt.index(self.tokenizer.sot) + 1] for prompt in prompts]
            first = torch.softmax(self._next_logits(states, at_sot), dim=-1)
            no_speech: list[float] = first[:, self.tokenizer.no_speech].tolist()
            sequences = hf.generation.GenerationMixin.generate(
                self._model,
                encoder_outputs=hf.modeling_outputs.BaseModelOutput(last_hidden_state=stacked),
                attention_mask=torch.ones(stacked.shape[:2], device=self._device, dtype=torch.long),
                decoder_input_ids=torch.tensor(prompts, device=self._device),
                generation_config=config,
                logits_processor=hf.LogitsProcessorList([*self._rules(rows, options, n_prompt), sums]),
                stopping_criteria=hf.StoppingCriteriaList([_Cancelled(cancel)] if cancel else []),
            )
        drawn: list[list[int]] = sequences[:, n_prompt:].tolist()
        return [
            self._best(drawn[place * group : (place + 1) * group], place, sums, options, probability)
            for place, probability in enumerate(no_speech)
        ]

    def _best(
        self, drawn: Sequence[list[int]], window: int, sums: _Sums, options: DecodingOptions, no_speech_prob: float
    ) -> DecodingResult:
        """The sequence that openai/whisper's ranking puts first: by log probability over its length."""

        def ranked(tokens: tuple[int, ...]) -> tuple[float, float]:
            total = sums.total(window, tokens)
            length = max(1, len(tokens))
            penalty = options.length_penalty
            return total / (length if penalty is None else ((5 + length) / 6) ** penalty), total

        eot = self.tokenizer.eot
        texts = [tuple(tokens[: tokens.index(eot)] if eot in tokens else tokens) for tokens in drawn]
        (_, total), best = max(((ranked(tokens), tokens) for tokens in texts), key=lambda pair: pair[0][0])
        return DecodingResult(best, total / (len(best) + 1), no_speech_prob, options.temperature)

    def _rules(self, rows: Sequence[DecodingRow], options: DecodingOptions, n_prompt: int) -> list[Any]:
        """What may not be said: transformers' own processors, which are openai/whisper's rules."""
        hf = _transformers()
        tokenizer = self.tokenizer
        device = str(self._device)
        suppressed = {*options.suppress_tokens, *tokenizer.control_tokens}
        if options.without_timestamps:
            suppressed.update(range(tokenizer.timestamp_begin, self._model.config.vocab_size))
        rules: list[Any] = [hf.SuppressTokensLogitsProcessor(sorted(suppressed), device=device)]
        if options.suppress_blank:
            blank = list(tokenizer.blank_tokens)
            rules.append(hf.SuppressTokensAtBeginLogitsProcessor(blank, n_prompt, device=device))
        if not options.without_timestamps:
            names = _TimestampNames(
                tokenizer.no_timestamps, tokenizer.eot, round(MAX_INITIAL_TIMESTAMP / POSITION_SECONDS)
            )
            rules.append(_LatestTimestamps(tokenizer.timestamp_begin, rows))
            rules.append(hf.WhisperTimeStampLogitsProcessor(names, begin_index=n_prompt))
        return rules

    def _next_logits(self, states: Sequence[torch.Tensor], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """float32 logits ``(rows, n_vocab)`` of what follows ``tokens``."""
        output = self._model.model.decoder(
            input_ids=torch.tensor(tokens, device=self._device),
            encoder_hidden_states=torch.stack(list(states)),
            use_cache=False,
        )
        logits: torch.Tensor = self._model.proj_out(output.last_hidden_state[:, -1]).float()
        return logits

    @torch.inference_mode()
    def cross_attention(
        self, rows: Sequence[DecodingRow], tokens: Sequence[Sequence[int]], options: DecodingOptions
    ) -> list[tuple[torch.Tensor, list[float]]]:
        # Only the written-out attention gives its weights; left on, it would slow every later job.
        usual = self._model.config._attn_implementation
        try:
            self._model.set_attn_implementation("eager")
            with out_of_memory():
                # Row by row: the weights of all heads and layers are many times what the alignment needs.
                return [self._aligned(row, list(text), options) for row, text in zip(rows, tokens, strict=True)]
        finally:
            self._model.set_attn_implementation(usual)

    def _aligned(self, row: DecodingRow, text: list[int], options: DecodingOptions) -> tuple[torch.Tensor, list[float]]:
        config = self._model.config
        heads = self.tokenizer.alignment_heads or tuple(
            # openai/whisper's default where a checkpoint names none: the upper half of the decoder.
            (layer, head)
            for layer in range(config.decoder_layers // 2, config.decoder_layers)
            for head in range(config.decoder_attention_heads)
        )
        plain = DecodingOptions(task=options.task, without_timestamps=True)
        prefix = initial_tokens(self.tokenizer, DecodingRow(None, row.language), plain, config.max_target_positions)
        output = self._model.model.decoder(
            input_ids=torch.tensor([[*prefix, *text]], device=self._device),
            encoder_hidden_states=row.state[None],
            output_attentions=True,
            use_cache=False,
        )
        first = len(prefix) - 1
        attention = torch.stack([output.cross_attentions[layer][0, head, first:] for layer, head in heads]).float()
        logits = self._model.proj_out(output.last_hidden_state[0, first:-1])[:, : self.tokenizer.eot]
        chosen = torch.tensor(text, device=self._device, dtype=torch.long)
        probabilities = torch.softmax(logits.float(), dim=-1).gather(1, chosen[:, None])[:, 0]
        return attention, probabilities.tolist()


class _TimestampNames:
    """The fields of a generation config that transformers' timestamp rules read."""

    def __init__(self, no_timestamps_token_id: int, eos_token_id: int, max_initial_timestamp_index: int) -> None:
        self.no_timestamps_token_id = no_timestamps_token_id
        self.eos_token_id = self.bos_token_id = eos_token_id
        self.max_initial_timestamp_index = max_initial_timestamp_index
        self._detect_timestamp_from_logprob = True


class _LatestTimestamps:
    """A logits processor that keeps each row's timestamps inside its window."""

    def __init__(self, begin: int, rows: Sequence[DecodingRow]) -> None:
        self._after = [begin + 1 + math.ceil(round(row.max_timestamp / POSITION_SECONDS, 3)) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        group = len(scores) // len(self._after)
        for window, after in enumerate(self._after):
            scores[window * group : (window + 1) * group, after:] = -math.inf
        return scores


class _Sums:
    """The last logits processor: makes scores log probabilities and adds up those of what is chosen.

    It sees a step's scores before the choice and the choice at the next step. Beams change
    places in between, so sums are kept by window and tokens, and only one step's scores are
    held; ``output_scores`` would hold the whole vocabulary of every step.
    """

    def __init__(self, n_prompt: int, n_windows: int, eot: int) -> None:
        self._n_prompt = n_prompt
        self._n_windows = n_windows
        self._eot = eot
        self._sums: dict[tuple[int, tuple[int, ...]], float] = {}
        self._ended: dict[tuple[int, tuple[int, ...]], float] = {}
        """Sums with end-of-text put behind."""
        self._rows: dict[tuple[int, tuple[int, ...]], int] = {}
        self._logprobs = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs = torch.log_softmax(scores.float(), dim=-1)
        group = len(input_ids) // self._n_windows
        keys = [(row // group, tuple(tokens)) for row, tokens in enumerate(input_ids[:, self._n_prompt :].tolist())]
        if self._rows:
            parents = [self._rows[window, tokens[:-1]] for window, tokens in keys]
            gains: list[float] = self._logprobs[parents, input_ids[:, -1]].tolist()
            for (window, tokens), gain in zip(keys, gains, strict=True):
                self._sums[window, tokens] = self._sums[window, tokens[:-1]] + gain
        else:
            self._sums.update(dict.fromkeys(keys, 0.0))
        ends: list[float] = logprobs[:, self._eot].tolist()
        self._ended.update((key, self._sums[key] + end) for key, end in zip(keys, ends, strict=True))
        self._rows = {key: row for row, key in enumerate(keys)}
        self._logprobs = logprobs
        return logprobs

    def total(self, window: int, tokens: tuple[int, ...]) -> float:
        """Log probability of a window's text: with its end, or without one where it was cut off."""
        ended = self._ended.get((window, tokens))
        if ended is not None:
            return ended
        parent = (window, tokens[:-1])
        if parent not in self._rows:
            return -math.inf  # a cancelled search, stopped before its last choice was seen
        return self._sums[parent] + float(self._logprobs[self._rows[parent], tokens[-1]])


class _Cancelled:
    """Ends the rows of jobs that were cancelled."""

    def __init__(self, cancel: Sequence[CancelToken | None]) -> None:
        self._cancel = cancel

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        group = len(input_ids) // len(self._cancel)
        stop = [token is not None and token.cancelled for token in self._cancel for _ in range(group)]
        return torch.tensor(stop, device=input_ids.device)


def _transformers() -> Any:
    """The library, loaded when first needed; its annotations are too partial to check against."""
    return importlib.import_module("transformers")
