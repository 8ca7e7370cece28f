"""CTranslate2's Whisper conversions, turned back into Hugging Face checkpoints.

``model.bin`` is a list of named tensors: a version, the name of the model's kind, a
revision, then for each tensor its name, shape, type and bytes, then aliases; numbers are
little-endian. Attention projections are fused there (query, key and value in one matrix),
and int8 matrices carry one scale a row: value = stored / scale. The format and the names
are those of CTranslate2's own converter and loader.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whisper_worker.cache.layout import CT2_WEIGHTS, WEIGHTS
from whisper_worker.cache.tensors import Array, FloatType, Stored, cast, map_file, view, write_safetensors
from whisper_worker.cache.tokenizer_files import Vocabulary, read_json, write_json, write_tokenizer
from whisper_worker.errors import ModelError

_BINARY_VERSIONS = range(4, 7)
_TYPES = {0: "F32", 1: "I8", 2: "I16", 3: "I32", 4: "F16", 5: "BF16"}
_GELU = 3
"""CTranslate2's number of Whisper's activation."""

_N_TIMESTAMPS = 1501
"""<|0.00|> to <|30.00|> in steps of 0.02 s."""


def is_ct2_directory(directory: Path) -> bool:
    return (directory / CT2_WEIGHTS).is_file() and not (directory / WEIGHTS).exists()


def convert(source: Path, model_dir: Path, processor_dir: Path, dtype: FloatType | None) -> FloatType:
    """Write the conversion in ``source`` as a checkpoint into two existing directories.

    ``dtype`` None keeps what is stored: float16 where the source's numbers are that, else
    float32 (which holds bfloat16 and int8 values exactly). Gives the type written. Memory
    in use is at most one copy of the weights in ``dtype``. Raises :class:`ModelError`.
    """
    spec = _read(source / CT2_WEIGHTS)
    chosen: FloatType = dtype or ("float16" if spec["decoder/embeddings/weight"].dtype == "F16" else "float32")
    weights = _Weights(spec)
    tensors = cast(weights.tensors(), chosen)
    shape = _Shape.of(tensors, weights)
    vocabulary = Vocabulary.of_directory(source)
    if len(vocabulary.tokens) != shape.vocabulary:
        raise ModelError(
            f"The conversion's vocabulary has {len(vocabulary.tokens)} tokens and its weights {shape.vocabulary}: "
            "they are not of the same model."
        )
    write_safetensors(model_dir / WEIGHTS, tensors)
    write_json(model_dir / "config.json", _config(shape, vocabulary, chosen))
    write_json(
        model_dir / "generation_config.json",
        _generation_config(read_json(source / "config.json"), shape, vocabulary),
    )
    write_json(processor_dir / "preprocessor_config.json", _preprocessor_config(shape.mels))
    write_tokenizer(source, processor_dir, vocabulary)
    return chosen


def _read(path: Path) -> dict[str, Stored]:
    buffer = map_file(path)
    try:
        return _Reader(buffer).model()
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise ModelError("model.bin is damaged, or no CTranslate2 model. Get it again.") from error


class _Reader:
    """A cursor over model.bin."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self._offset = 0

    def model(self) -> dict[str, Stored]:
        version = self._number("I")
        if version not in _BINARY_VERSIONS:
            raise ModelError(f"model.bin has binary version {version}, which is not handled (4 to 6 are).")
        kind = self._text()
        if kind != "WhisperSpec":
            raise ModelError(f"model.bin holds a {kind!r} model; only Whisper's are taken.")
        self._number("I")  # the revision of the kind: its parts are looked for by name below
        tensors = {self._text(): self._tensor() for _ in range(self._number("I"))}
        for _ in range(self._number("I")):
            alias, name = self._text(), self._text()
            tensors[alias] = tensors[name]
        if self._offset != len(self._buffer):
            raise ModelError("model.bin is damaged: bytes are left over. Get it again.")
        return tensors

    def _number(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self._buffer, self._offset)
        self._offset += struct.calcsize("<" + code)
        return int(value)

    def _text(self) -> str:
        length = self._number("H")  # with the closing zero
        raw = self._buffer[self._offset : self._offset + length]
        self._offset += length
        return raw[:-1].decode()

    def _tensor(self) -> Stored:
        shape = tuple(self._number("I") for _ in range(self._number("B")))
        dtype, n_bytes = _TYPES[self._number("B")], self._number("I")
        tensor = view(self._buffer, self._offset, n_bytes, dtype, shape)
        self._offset += n_bytes
        return tensor


class _Weights:
    """The tensors of a conversion under Hugging Face's names, as floats."""

    def __init__(self, stored: dict[str, Stored]) -> None:
        self._stored = stored
        for side in ("encoder", "decoder"):
            if self.scalar(f"{side}/pre_norm", 1) != 1 or self.scalar(f"{side}/activation", _GELU) != _GELU:
                raise ModelError("model.bin is no Whisper model of the known kind (norms or activation differ).")

    def scalar(self, name: str, default: int | None = None) -> int:
        if name not in self._stored:
            if default is None:
                raise ModelError(f"model.bin lacks {name}.")
            return default
        return int(self._stored[name].data)

    def tensors(self) -> Iterator[tuple[str, Array]]:
        for side in ("encoder", "decoder"):
            for layer in range(self._n_layers(side)):
                yield from self._layer(side, f"{side}/layer_{layer}", f"model.{side}.layers.{layer}")
            yield f"model.{side}.embed_positions.weight", self._float(f"{side}/position_encodings/encodings")
            yield from self._norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for name in ("conv1", "conv2"):
            yield from self._linear(f"encoder/{name}", f"model.encoder.{name}")
        yield "model.decoder.embed_tokens.weight", self._float("decoder/embeddings/weight")

    def _n_layers(self, side: str) -> int:
        numbers = {
            int(name.split("/")[1][6:])
            for name in self._stored
            if name.startswith(f"{side}/layer_") and name.split("/")[1][6:].isdigit()
        }
        if numbers != set(range(len(numbers))) or not numbers:
            raise ModelError(f"model.bin is damaged: layers of the {side} are missing.")
        return len(numbers)

    def _layer(self, side: str, source: str, target: str) -> Iterator[tuple[str, Array]]:
        yield from self._norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
        yield from self._fused(f"{source}/self_attention/linear_0", f"{target}.self_attn", "q", "k", "v")
        yield from self._linear(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
        if side == "decoder":
            yield from self._norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
            yield from self._linear(f"{source}/attention/linear_0", f"{target}.encoder_attn.q_proj")
            yield from self._fused(f"{source}/attention/linear_1", f"{target}.encoder_attn", "k", "v")
            yield from self._linear(f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj")
        yield from self._norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
        yield from self._linear(f"{source}/ffn/linear_0", f"{target}.fc1")
        yield from self._linear(f"{source}/ffn/linear_1", f"{target}.fc2")

    def _norm(self, source: str, target: str) -> Iterator[tuple[str, Array]]:
        yield f"{target}.weight", self._float(f"{source}/gamma")
        yield f"{target}.bias", self._float(f"{source}/beta")

    def _linear(self, source: str, target: str) -> Iterator[tuple[str, Array]]:
        yield f"{target}.weight", self._float(f"{source}/weight")
        yield f"{target}.bias", self._float(f"{source}/bias")

    def _fused(self, source: str, target: str, *parts: str) -> Iterator[tuple[str, Array]]:
        weights = np.split(self._float(f"{source}/weight"), len(parts))
        biases = np.split(self._float(f"{source}/bias"), len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            yield f"{target}.{part}_proj.weight", weight
            if part != "k":
                yield f"{target}.{part}_proj.bias", bias
            elif bias.any():
                raise ModelError("model.bin is no Whisper model of the known kind: its attention keys have a bias.")

    def _float(self, name: str) -> Array:
        stored = self._stored.get(name)
        if stored is None:
            raise ModelError(f"model.bin lacks {name}.")
        if stored.dtype in ("I8", "I16"):
            scale = self._stored.get(f"{name}_scale")
            if scale is None or f"{name}_zero" in self._stored:
                raise ModelError(f"model.bin stores {name} in a way that is not handled.")
            per_row = scale.to_float().astype(np.float32).reshape(-1, *[1] * (stored.data.ndim - 1))
            return stored.data / per_row
        return stored.to_float()


@dataclass(frozen=True, slots=True)
class _Shape:
    """The sizes that config.json names."""

    width: int
    mels: int
    vocabulary: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    hidden: tuple[int, int]
    positions: tuple[int, int]

    @classmethod
    def of(cls, tensors: dict[str, Array], weights: _Weights) -> _Shape:
        sides = ("encoder", "decoder")

        def rows(name: str) -> tuple[int, int]:
            first, second = (tensors[f"model.{side}.{name}.weight"].shape[0] for side in sides)
            return first, second

        n_layers = [
            sum(name.startswith(f"model.{side}.layers.") and name.endswith("fc1.weight") for name in tensors)
            for side in sides
        ]
        vocabulary, width = tensors["model.decoder.embed_tokens.weight"].shape
        return cls(
            width=width,
            mels=tensors["model.encoder.conv1.weight"].shape[1],
            vocabulary=vocabulary,
            layers=(n_layers[0], n_layers[1]),
            heads=(weights.scalar("encoder/num_heads"), weights.scalar("decoder/num_heads")),
            hidden=rows("layers.0.fc1"),
            positions=rows("embed_positions"),
        )


def _config(shape: _Shape, vocabulary: Vocabulary, dtype: FloatType) -> dict[str, object]:
    end = vocabulary.id("<|endoftext|>")
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": vocabulary.id("<|startoftranscript|>"),
        "d_model": shape.width,
        "num_mel_bins": shape.mels,
        "vocab_size": shape.vocabulary,
        "encoder_layers": shape.layers[0],
        "decoder_layers": shape.layers[1],
        "encoder_attention_heads": shape.heads[0],
        "decoder_attention_heads": shape.heads[1],
        "encoder_ffn_dim": shape.hidden[0],
        "decoder_ffn_dim": shape.hidden[1],
        "max_source_positions": shape.positions[0],
        "max_target_positions": shape.positions[1],
        "is_encoder_decoder": True,
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _generation_config(source: dict[str, object], shape: _Shape, vocabulary: Vocabulary) -> dict[str, object]:
    end = vocabulary.id("<|endoftext|>")
    start = vocabulary.id("<|startoftranscript|>")
    config: dict[str, object] = {
        "alignment_heads": source.get("alignment_heads") or _upper_half(shape),
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": start,
        "is_multilingual": vocabulary.is_multilingual,
        "max_initial_timestamp_index": 50,
        "max_length": shape.positions[1],
        "no_timestamps_token_id": vocabulary.id("<|notimestamps|>"),
        "prev_sot_token_id": vocabulary.id("<|startofprev|>"),
        "return_timestamps": False,
    }
    for theirs, ours in (("suppress_ids", "suppress_tokens"), ("suppress_ids_begin", "begin_suppress_tokens")):
        if theirs in source:
            config[ours] = source[theirs]
    if vocabulary.is_multilingual:
        translate = vocabulary.id("<|translate|>")
        config["lang_to_id"] = {vocabulary.tokens[number]: number for number in range(start + 1, translate)}
        config["task_to_id"] = {"transcribe": vocabulary.id("<|transcribe|>"), "translate": translate}
    return config


def _upper_half(shape: _Shape) -> list[list[int]]:
    """Heads that openai/whisper and CTranslate2 align words with where a model names none."""
    layers, heads = shape.layers[1], shape.heads[1]
    return [[layer, head] for layer in range(layers // 2, layers) for head in range(heads)]


def _preprocessor_config(mels: int) -> dict[str, object]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "chunk_length": 30,
        "feature_size": mels,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": 480_000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "sampling_rate": 16_000,
    }
