"""The tokenizer of a CTranslate2 conversion, written as Hugging Face's files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whisper_worker.errors import ModelError

_FIRST_MERGED = 256
"""Ids below are single bytes; above, each token up to end-of-text is the result of one merge, in order."""

_MULTILINGUAL_SIZE = 51_865


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All tokens of a model by id, the special ones and the timestamps among them."""

    tokens: tuple[str, ...]
    _ids: dict[str, int] = field(repr=False)

    @classmethod
    def of_directory(cls, directory: Path) -> Vocabulary:
        """Read ``vocabulary.json`` or ``vocabulary.txt``. Raises :class:`ModelError`."""
        if (directory / "vocabulary.json").is_file():
            content = read_json(directory / "vocabulary.json")
            if not isinstance(content, list) or not all(isinstance(token, str) for token in content):
                raise ModelError("vocabulary.json is not a list of tokens.")
            tokens = tuple(content)
        elif (directory / "vocabulary.txt").is_file():
            text = (directory / "vocabulary.txt").read_text(encoding="utf-8")
            tokens = tuple(text.removesuffix("\n").split("\n"))
        else:
            raise ModelError("The conversion lacks its vocabulary (vocabulary.json or vocabulary.txt).")
        return cls.of_tokens(tokens)

    @classmethod
    def of_checkpoint(cls, directory: Path, config: Mapping[str, object]) -> Vocabulary:
        """Of a checkpoint without tokenizer.json: from ``vocab.json`` and ``added_tokens.json``.

        Timestamps follow from the size that config.json names. Raises :class:`ModelError`.
        """
        ids = {}
        for name in ("vocab.json", "added_tokens.json"):
            if name == "vocab.json" or (directory / name).is_file():
                part = read_json(directory / name)
                if not isinstance(part, dict) or not all(isinstance(number, int) for number in part.values()):
                    raise ModelError(f"{name} is damaged: it does not number tokens.")
                ids.update(part)
        size, by_id = config.get("vocab_size"), {number: token for token, number in ids.items()}
        first = ids.get("<|notimestamps|>", len(ids)) + 1
        if not isinstance(size, int) or any(number not in by_id for number in range(first)):
            raise ModelError("The model's vocabulary has gaps: vocab.json or added_tokens.json is damaged.")
        times = (f"<|{0.02 * (number - first):.2f}|>" for number in range(first, size))
        return cls.of_tokens((*(by_id[number] for number in range(first)), *times))

    @classmethod
    def of_tokens(cls, tokens: tuple[str, ...]) -> Vocabulary:
        return cls(tokens, {token: number for number, token in enumerate(tokens)})

    def id(self, token: str) -> int:
        if token not in self._ids:
            raise ModelError(f"The model's vocabulary lacks {token}: it is not Whisper's.")
        return self._ids[token]

    @property
    def is_multilingual(self) -> bool:
        """As openai/whisper tells it: by the size."""
        return len(self.tokens) >= _MULTILINGUAL_SIZE

    def tokenizer(self) -> dict[str, object]:
        """A tokenizer.json from the tokens alone: the merges follow from the order of the ids."""
        end, first_timestamp = self.id("<|endoftext|>"), self.id("<|notimestamps|>") + 1
        start = self.id("<|startoftranscript|>")
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        special = [
            _added(number, token, special=number < first_timestamp)
            for number, token in enumerate(self.tokens[end:], end)
        ]
        frame = [{"SpecialToken": {"id": self.tokens[number], "type_id": 0}} for number in (start, first_timestamp - 1)]
        close = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [*frame, {"Sequence": {"id": "A", "type_id": 0}}, close],
                "pair": [*frame, *({"Sequence": {"id": part, "type_id": 0}} for part in "AB"), close],
                "special_tokens": {
                    self.tokens[number]: {
                        "id": self.tokens[number],
                        "ids": [number],
                        "tokens": [self.tokens[number]],
                    }
                    for number in (start, first_timestamp - 1, end)
                },
            },
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "vocab": {token: number for number, token in enumerate(self.tokens[:end])},
                "merges": _merges(self.tokens[:end]),
            },
        }


def read_json(path: Path) -> Any:
    """The file's content. Raises :class:`ModelError` where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing from the model's directory.") from None
    except ValueError as error:
        raise ModelError(f"{path.name} is damaged: it is not JSON.") from error


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_tokenizer(source: Path, processor_dir: Path, vocabulary: Vocabulary) -> None:
    """Write tokenizer.json and its companions.

    The source's own tokenizer.json is taken where there is one, and built from the
    vocabulary where not. Timestamp tokens that it lacks are added, so that English-only
    and multilingual models decode them alike.
    """
    tokenizer: Any = (
        read_json(source / "tokenizer.json") if (source / "tokenizer.json").is_file() else vocabulary.tokenizer()
    )
    _check(tokenizer, vocabulary)
    _add_timestamps(tokenizer, vocabulary)
    write_json(processor_dir / "tokenizer.json", tokenizer)
    write_json(processor_dir / "vocab.json", tokenizer["model"]["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    (processor_dir / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    end = "<|endoftext|>"
    special: dict[str, object] = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), end)
    special["additional_special_tokens"] = [
        token["content"] for token in tokenizer["added_tokens"] if token["special"] and token["content"] != end
    ]
    write_json(processor_dir / "special_tokens_map.json", special)
    write_json(
        processor_dir / "tokenizer_config.json",
        {
            **special,
            "add_prefix_space": False,
            "errors": "replace",
            "model_max_length": 448,
            "processor_class": "WhisperProcessor",
            "tokenizer_class": "WhisperTokenizer",
        },
    )


def _check(tokenizer: Any, vocabulary: Vocabulary) -> None:
    try:
        ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    except (KeyError, TypeError) as error:
        raise ModelError("tokenizer.json is damaged, or not a byte-pair tokenizer.") from error
    for token in ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"):
        if ids.get(token) != vocabulary.id(token):
            raise ModelError(f"tokenizer.json and the vocabulary disagree on {token}: they are not of the same model.")


def _add_timestamps(tokenizer: Any, vocabulary: Vocabulary) -> None:
    present = {token["id"] for token in tokenizer["added_tokens"]}
    first = vocabulary.id("<|notimestamps|>") + 1
    for number, token in enumerate(vocabulary.tokens[first:], first):
        if number not in present:
            tokenizer["added_tokens"].append(_added(number, token, special=False))


def _merges(tokens: tuple[str, ...]) -> list[list[str]]:
    """The pair that each merged token was made of: what byte-pair encoding leaves of it with the tokens before it."""
    rank = {token: number for number, token in enumerate(tokens)}
    merges = []
    for number, token in enumerate(tokens[_FIRST_MERGED:], _FIRST_MERGED):
        parts = list(token)
        while len(parts) > 2:
            ranks = [rank.get(left + right, number) for left, right in itertools.pairwise(parts)]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[best] >= number:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:  # the multilingual vocabulary has an empty token, which is no merge
            merges.append(parts)
    return merges


def _added(number: int, content: str, *, special: bool) -> dict[str, object]:
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }
