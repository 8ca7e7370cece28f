"""Whisper's tokens: text to ids and back, and the special ids by name.

Wraps the fast tokenizer of a Hugging Face checkpoint (``tokenizer.json``) together with the
ids that its ``generation_config.json`` records.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_worker.errors import InvalidInput, ModelError
from whisper_worker.languages import UNSPACED
from whisper_worker.types import Task

if TYPE_CHECKING:
    import tokenizers

_SYMBOLS = [
    *'"#()*+/:;<=>@[\\]^_`{|}~「」『』',
    *"<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪".split(),
]
_NOTES = "♩♪♫♬♭♮♯"
"""Signs that captions use for sounds and speakers; a transcript of speech wants none of them."""


class Tokenizer:
    """Ids and text of one checkpoint. Immutable after construction, so shared by all jobs."""

    def __init__(self, backend: tokenizers.Tokenizer, generation_config: dict[str, Any]) -> None:
        self._backend = backend
        self.no_timestamps = self._special("<|notimestamps|>")
        self.timestamp_begin = self.no_timestamps + 1
        self.sot = self._special("<|startoftranscript|>")
        self.eot = self._special("<|endoftext|>")
        self.sot_prev = self._special("<|startofprev|>")
        # Checkpoints name this token <|nocaptions|> or <|nospeech|>; its place is the same in all.
        self.no_speech = self.no_timestamps - 1
        self.is_multilingual = backend.token_to_id("<|de|>") is not None and bool(
            generation_config.get("is_multilingual", True)
        )
        self.transcribe: int | None = None
        self.translate: int | None = None
        self._language_ids: dict[str, int] = {}
        if self.is_multilingual:
            self.transcribe = self._special("<|transcribe|>")
            self.translate = self._special("<|translate|>")
            first_task = min(self.transcribe, self.translate)
            for token_id in range(self.sot + 1, first_task):
                token = backend.id_to_token(token_id)
                if token:
                    self._language_ids[token.strip("<|>")] = token_id
        heads = generation_config.get("alignment_heads")
        self.alignment_heads: tuple[tuple[int, int], ...] | None = (
            tuple((int(layer), int(head)) for layer, head in heads) if heads else None
        )

    @classmethod
    def load(cls, tokenizer_file: Path, generation_config_file: Path) -> Tokenizer:
        """Read both files. Raises :class:`ModelError` if one is missing or damaged."""
        import tokenizers

        try:
            generation_config = json.loads(generation_config_file.read_text(encoding="utf-8"))
            backend = tokenizers.Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:
            raise ModelError(
                "The model cache holds no readable tokenizer; fill it again with python save_pipeline.py --force."
            ) from error
        return cls(backend, generation_config)

    def _special(self, token: str) -> int:
        token_id: int | None = self._backend.token_to_id(token)
        if token_id is None:
            raise ModelError(f"The model's tokenizer lacks {token}; it is not a Whisper checkpoint.")
        return token_id

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self._language_ids) if self.is_multilingual else ("en",)

    @property
    def language_ids(self) -> tuple[int, ...]:
        """Ids of the language tokens, in the order of :attr:`languages`; empty for English-only models."""
        return tuple(self._language_ids.values())

    def language_token(self, code: str) -> int:
        """Raises :class:`InvalidInput` for a language that this model was not trained on."""
        try:
            return self._language_ids[code]
        except KeyError:
            raise InvalidInput(
                "The loaded model does not know this language; use a larger or multilingual one."
            ) from None

    def sot_sequence(self, language: str | None, task: Task, *, timestamps: bool) -> list[int]:
        """Tokens between the previous text and the transcript."""
        sequence = [self.sot]
        if self.is_multilingual:
            assert self.transcribe is not None and self.translate is not None
            sequence.append(self.language_token(language or "en"))
            sequence.append(self.translate if task == "translate" else self.transcribe)
        if not timestamps:
            sequence.append(self.no_timestamps)
        return sequence

    def encode(self, text: str) -> list[int]:
        # What a caller writes is text, even where it looks like one of the model's control tokens.
        self._backend.encode_special_tokens = True
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the text tokens among ``tokens``; special tokens and timestamps give nothing."""
        text: str = self._backend.decode([token for token in tokens if token < self.eot], skip_special_tokens=False)
        return text

    def timestamp(self, token: int) -> float:
        """Seconds from the start of the window that a timestamp token stands for."""
        return (token - self.timestamp_begin) * 0.02

    @cached_property
    def non_speech_tokens(self) -> tuple[int, ...]:
        """What ``suppress_tokens="-1"`` stands for: caption signs, alone or after a blank.

        " -" and " '" are kept out only as single tokens at the start of a word, so that
        hyphens and apostrophes inside words remain possible.
        """
        found = {self.encode(" -")[0], self.encode(" '")[0]}
        for symbol in [*_SYMBOLS, *_NOTES]:
            for ids in (self.encode(symbol), self.encode(" " + symbol)):
                # The musical notes share their first byte token, which nothing else in speech needs.
                if len(ids) == 1 or symbol in _NOTES:
                    found.add(ids[0])
        return tuple(sorted(found))

    @cached_property
    def control_tokens(self) -> tuple[int, ...]:
        """Special tokens that are never part of a transcript: all but end-of-text and timestamps."""
        return tuple(range(self.eot + 1, self.timestamp_begin))

    @cached_property
    def blank_tokens(self) -> tuple[int, ...]:
        """What may not be the first token: a lone blank, and an end before anything was said."""
        return (*self.encode(" "), self.eot)

    def split_words(self, tokens: Sequence[int], language: str | None) -> tuple[list[str], list[list[int]]]:
        """Cut text tokens into words: their text (with leading blank) and their tokens.

        Languages without blanks are cut at character boundaries, others at blanks and
        before punctuation, as openai/whisper does.
        """
        pieces, piece_tokens = self._split_characters(tokens)
        if language in UNSPACED:
            return pieces, piece_tokens
        words: list[str] = []
        word_tokens: list[list[int]] = []
        for piece, ids in zip(pieces, piece_tokens, strict=True):
            starts_word = piece.startswith(" ") or piece.strip() in string.punctuation or ids[0] >= self.eot
            if starts_word or not words:
                words.append(piece)
                word_tokens.append(list(ids))
            else:
                words[-1] += piece
                word_tokens[-1].extend(ids)
        return words, word_tokens

    def _split_characters(self, tokens: Sequence[int]) -> tuple[list[str], list[list[int]]]:
        """Smallest runs of tokens that decode to whole characters (a character may span tokens)."""
        whole = self.decode(tokens)
        pieces: list[str] = []
        piece_tokens: list[list[int]] = []
        pending: list[int] = []
        offset = 0
        for token in tokens:
            pending.append(token)
            text = self.decode(pending)
            broken = text.find("\ufffd")
            # A replacement sign that the whole text also has at this place was really said.
            if broken < 0 or whole[offset + broken : offset + broken + 1] == "\ufffd":
                pieces.append(text)
                piece_tokens.append(pending)
                offset += len(text)
                pending = []
        if pending:
            pieces.append(self.decode(pending))
            piece_tokens.append(pending)
        return pieces, piece_tokens
