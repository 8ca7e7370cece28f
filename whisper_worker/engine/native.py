"""The project's own recognizer: its forward pass (model.py) and token loop (decoding.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from whisper_worker.engine.decoding import decode_batch, initial_tokens
from whisper_worker.engine.memory import batch_size, out_of_memory
from whisper_worker.engine.recognizer import DecodingOptions, DecodingResult, DecodingRow, ModelInfo
from whisper_worker.types import CancelToken

if TYPE_CHECKING:
    from whisper_worker.engine.model import WhisperModel
    from whisper_worker.engine.tokenizer import Tokenizer


class NativeRecognizer:
    """See :class:`whisper_worker.engine.recognizer.Recognizer`."""

    def __init__(self, model: WhisperModel, tokenizer: Tokenizer, name: str, revision: str | None) -> None:
        self.tokenizer = tokenizer
        self._model = model
        device = model.device
        self.max_workers = 2 if device.type == "cpu" else 1
        self.info = ModelInfo(
            name=name,
            revision=revision,
            n_mels=model.dims.n_mels,
            is_multilingual=tokenizer.is_multilingual,
            max_target_positions=model.dims.n_text_ctx,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            compute_type=model.compute_type,
            engine="native",
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
    ) -> NativeRecognizer:
        """Raises :class:`ModelError` for a damaged checkpoint or a device that is not there."""
        from whisper_worker.engine import weights

        if threads:
            torch.set_num_threads(threads)
        return cls(weights.load(model_dir, compute_type, device), tokenizer, name, revision)

    def default_batch_size(self) -> int:
        dims = self._model.dims
        heads = dims.n_text_layer * dims.n_text_state * 2
        # What keys and values of 1500 positions and of one window's tokens would take in half precision. Those of the
        # positions are never made (see attend_cross): their share is room for several beams, logits and the encoder.
        row_bytes = 2 * heads * (dims.n_audio_ctx + dims.n_text_ctx)
        return batch_size(row_bytes, self._model.device)

    def encode(self, mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with out_of_memory():
            return self._model.encode(mels)

    @torch.inference_mode()
    def detect_language(self, states: Sequence[torch.Tensor]) -> list[dict[str, float]]:
        if not self.tokenizer.is_multilingual:
            return [{"en": 1.0} for _ in states]
        with out_of_memory():
            state = self._model.new_state(states, 1, 1)
            logits = state.begin([[self.tokenizer.sot]] * len(states), [[0]] * len(states))[:, 0]
        ids = torch.tensor(self.tokenizer.language_ids, device=logits.device)
        probabilities = torch.softmax(logits[:, ids], dim=-1).tolist()
        return [dict(zip(self.tokenizer.languages, row, strict=True)) for row in probabilities]

    def decode(
        self,
        rows: Sequence[DecodingRow],
        options: DecodingOptions,
        cancel: Sequence[CancelToken | None] = (),
        done: Callable[[int, DecodingResult], None] | None = None,
    ) -> list[DecodingResult]:
        with out_of_memory():
            return decode_batch(self._model, self.tokenizer, rows, options, cancel, done)

    @torch.inference_mode()
    def cross_attention(
        self, rows: Sequence[DecodingRow], tokens: Sequence[Sequence[int]], options: DecodingOptions
    ) -> list[tuple[torch.Tensor, list[float]]]:
        dims = self._model.dims
        heads = self.tokenizer.alignment_heads or tuple(
            # openai/whisper's default where a checkpoint names none: the upper half of the decoder.
            (layer, head)
            for layer in range(dims.n_text_layer // 2, dims.n_text_layer)
            for head in range(dims.n_text_head)
        )
        results = []
        # One window after another: a pass over a text is large enough by itself, and beside a longer one its sums,
        # and with them its words' times, would have other last bits.
        for row, text in zip(rows, tokens, strict=True):
            bare = DecodingRow(None, row.language)
            prefix = initial_tokens(self.tokenizer, bare, _without_timestamps(options), dims.n_text_ctx)
            chosen = torch.tensor(list(text), dtype=torch.long, device=self._model.device)
            first, stop = len(prefix) - 1, len(prefix) - 1 + len(text)
            with out_of_memory():
                known = torch.tensor([*prefix, *text], device=self._model.device)
                attention, hidden = self._model.cross_attention(row.state, known, heads)
                logits = self._model.logits(hidden[first:stop])[:, : self.tokenizer.eot]
                logprobs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
            results.append((attention[:, first : stop + 1], logprobs.exp().tolist()))
        return results


def _without_timestamps(options: DecodingOptions) -> DecodingOptions:
    return DecodingOptions(task=options.task, without_timestamps=True)
