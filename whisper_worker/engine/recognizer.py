"""The seam between the pipeline and whatever runs the model.

The pipeline cuts a waveform into windows; a :class:`Recognizer` turns windows into
tokens. Two stand behind this interface: ``native.py`` (this project's forward pass) and
``reference.py`` (Hugging Face's). Both get the same windows and give the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from whisper_worker.types import CancelToken, Task

if TYPE_CHECKING:
    import torch

    from whisper_worker.engine.tokenizer import Tokenizer

N_FRAMES = 3000
"""Mel frames (10 ms each) of the longest window: 30 s."""

FRAMES_PER_SECOND = 100
POSITION_SECONDS = 0.02
"""Seconds for each encoder position and each timestamp token."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the pipeline needs to know about the loaded checkpoint."""

    name: str
    revision: str | None
    n_mels: int
    is_multilingual: bool
    max_target_positions: int
    device: str
    """Human name of the device, e.g. ``cpu`` or ``NVIDIA H200``."""
    compute_type: str
    engine: str
    not_honoured: tuple[str, ...] = ()
    """Options that this engine's search does not have; the pipeline warns of them."""


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """One attempt's settings, the same for all rows of a batch (so they are its batch key)."""

    task: Task = "transcribe"
    temperature: float = 0.0
    beam_size: int | None = None
    best_of: int | None = None
    """Samples a row at temperature > 0; the one with the best length-normalised sum is kept."""
    patience: float | None = None
    length_penalty: float | None = None
    suppress_tokens: tuple[int, ...] = ()
    suppress_blank: bool = True
    """Keep an end of text and a lone blank from being the first token sampled."""
    without_timestamps: bool = False
    max_new_tokens: int = 224
    seed: int = 0


@dataclass(frozen=True, slots=True)
class DecodingRow:
    """One window to decode.

    ``state`` is what :meth:`Recognizer.encode` gave for it. ``prompt`` are the tokens of the
    previous text (hotwords, initial prompt, earlier segments), without ``<|startofprev|>``.
    ``max_timestamp`` is the window's length in seconds, rounded up to a timestamp token: no
    timestamp beyond it may be sampled.
    """

    state: Any
    language: str | None
    prompt: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    max_timestamp: float = 30.0


@dataclass(frozen=True, slots=True)
class DecodingResult:
    """Tokens sampled for one window, timestamps included, end-of-text excluded."""

    tokens: tuple[int, ...]
    avg_logprob: float
    """Sum of token log probabilities (end-of-text included) over their number."""
    no_speech_prob: float
    temperature: float


class Recognizer(Protocol):
    """A loaded model. The scheduler owns it and is its only caller, from ``max_workers`` threads at most."""

    info: ModelInfo
    tokenizer: Tokenizer
    max_workers: int

    def default_batch_size(self) -> int:
        """Windows that may be decoded side by side in the memory now free, at least 1."""
        ...

    def encode(self, mels: Sequence[torch.Tensor]) -> list[Any]:
        """Encoder states of the windows, one opaque value each.

        ``mels``: float32 ``(n_mels, n_frames)`` each, ``n_frames <= 3000``, already clamped
        and scaled as ``features.log_mel`` gives them. The recognizer pads as it needs.
        Raises :class:`OutOfMemory` where the batch does not fit.
        """
        ...

    def detect_language(self, states: Sequence[Any]) -> list[dict[str, float]]:
        """For each window the probability of every language code; ``{"en": 1.0}`` for English-only models."""
        ...

    def decode(
        self,
        rows: Sequence[DecodingRow],
        options: DecodingOptions,
        cancel: Sequence[CancelToken | None] = (),
        done: Callable[[int, DecodingResult], None] | None = None,
    ) -> list[DecodingResult]:
        """Decode windows side by side; a row whose token is cancelled stops early.

        ``done`` may be called with a row's place and its result as soon as that is known.
        Raises :class:`OutOfMemory`
        or :class:`EngineError`.
        """
        ...

    def cross_attention(
        self, rows: Sequence[DecodingRow], tokens: Sequence[Sequence[int]], options: DecodingOptions
    ) -> list[tuple[torch.Tensor, list[float]]]:
        """For word times: attention of the alignment heads over the encoder positions.

        ``tokens[i]`` are text tokens only (no timestamps). Gives per row a float32 tensor
        ``(n_heads, len(tokens[i]) + 1, n_positions)`` of softmaxed weights, where row ``j`` is
        the step that predicts text token ``j`` and the last row the one that predicts
        end-of-text; and the probability of each text token.
        """
        ...
