"""Bringing a model directory of either kind into the cache's layout."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from whisper_worker.cache import ct2
from whisper_worker.cache.layout import (
    CT2_WEIGHTS,
    MODEL_DIR,
    PROCESSOR_DIR,
    WEIGHTS,
    WEIGHTS_INDEX,
    read_model_config,
    shards,
)
from whisper_worker.cache.tensors import Array, FloatType, cast, read_safetensors, write_safetensors
from whisper_worker.cache.tokenizer_files import Vocabulary, write_json
from whisper_worker.errors import ModelError

MODEL_FILES = ("config.json", "generation_config.json")
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
)
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_WEIGHTS_INDEX = "pytorch_model.bin.index.json"


def import_model(source: Path, cache: Path, dtype: FloatType | None) -> str:
    """Write the checkpoint or CTranslate2 conversion in ``source`` into ``cache/model`` and ``cache/processor``.

    ``source`` is only read. ``dtype`` None keeps the weights as they are. A directory in the
    cache's own layout will do as well. Gives the name of the type written. Raises :class:`ModelError`.
    """
    model_dir, processor_dir = cache / MODEL_DIR, cache / PROCESSOR_DIR
    model_dir.mkdir()
    processor_dir.mkdir()
    if ct2.is_ct2_directory(source):
        return ct2.convert(source, model_dir, processor_dir, dtype)
    weights_from, processor_from = _directories(source)
    config = read_model_config(weights_from)
    written = _weights(weights_from, model_dir, dtype)
    _check_tensors(model_dir, config)
    for name in PROCESSOR_FILES:
        if (processor_from / name).is_file():
            shutil.copyfile(processor_from / name, processor_dir / name)
    if not (processor_dir / "tokenizer.json").is_file():
        write_json(processor_dir / "tokenizer.json", Vocabulary.of_checkpoint(processor_from, config).tokenizer())
    if (weights_from / "generation_config.json").is_file():
        shutil.copyfile(weights_from / "generation_config.json", model_dir / "generation_config.json")
    if written is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = written
    write_json(model_dir / "config.json", config)
    return written or str(config.get("dtype", config.get("torch_dtype", "as stored")))


def weight_paths(source: Path) -> tuple[Path, ...]:
    """The files that :func:`import_model` reads the weights from. Raises :class:`ModelError` where there are none."""
    if ct2.is_ct2_directory(source):
        return (source / CT2_WEIGHTS,)
    weights_from, _ = _directories(source)
    return tuple(weights_from / name for name in _weight_files(weights_from))


def _directories(source: Path) -> tuple[Path, Path]:
    """Where the weights and where the processor's files are, in a cache directory or a plain checkpoint."""
    if not (source / MODEL_DIR / "config.json").is_file():
        return source, source
    processor = source / PROCESSOR_DIR
    return source / MODEL_DIR, processor if processor.is_dir() else source / MODEL_DIR


def _weights(source: Path, model_dir: Path, dtype: FloatType | None) -> FloatType | None:
    """Copy or convert; gives the type where it was converted."""
    files = _weight_files(source)
    if not files[0].endswith(".safetensors"):
        chosen: FloatType = dtype or "float32"
        write_safetensors(model_dir / WEIGHTS, cast(_read_torch(source, files), chosen))
        return chosen
    if dtype is None:
        for name in files:
            shutil.copyfile(source / name, model_dir / name)
        if (source / WEIGHTS_INDEX).is_file() and WEIGHTS not in files:
            shutil.copyfile(source / WEIGHTS_INDEX, model_dir / WEIGHTS_INDEX)
        return None
    stored = (item for file in files for item in read_safetensors(source / file).items())
    write_safetensors(model_dir / WEIGHTS, cast(((name, tensor.to_float()) for name, tensor in stored), dtype))
    return dtype


def _check_tensors(model_dir: Path, config: dict[str, object]) -> None:
    """Refuse weights that are damaged, or not those that config.json describes."""
    shapes = {
        name: tensor.data.shape
        for file in _weight_files(model_dir)
        for name, tensor in read_safetensors(model_dir / file).items()
    }
    for name, axis, key in (
        ("model.encoder.conv1.weight", 1, "num_mel_bins"),
        ("model.encoder.embed_positions.weight", 0, "max_source_positions"),
        ("model.decoder.embed_tokens.weight", 0, "vocab_size"),
        ("model.decoder.layer_norm.weight", 0, "d_model"),
    ):
        if name not in shapes or shapes[name][axis] != config.get(key):
            raise ModelError(f"The weights do not fit their config.json: {name} is missing, or {key} differs.")


def _weight_files(source: Path) -> tuple[str, ...]:
    """The weight files to take: safetensors, whole or in shards, else PyTorch's own. Raises :class:`ModelError`."""
    for whole, index in ((WEIGHTS, WEIGHTS_INDEX), (TORCH_WEIGHTS, TORCH_WEIGHTS_INDEX)):
        if (source / whole).is_file():
            return (whole,)
        if (source / index).is_file():
            names = shards(source / index)
            missing = [name for name in names if not (source / name).is_file()]
            if missing:
                raise ModelError(f"{len(missing)} of {len(names)} weight files are missing from the model's directory.")
            return names
    raise ModelError(f"The model's directory has no weights ({WEIGHTS}, {TORCH_WEIGHTS} or {CT2_WEIGHTS}).")


def _read_torch(source: Path, files: tuple[str, ...]) -> Iterator[tuple[str, Array]]:
    import torch

    for file in files:
        try:
            state = torch.load(source / file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises anything for a foreign file; weights_only executes nothing
            raise ModelError(f"{file} is damaged, or holds more than weights.") from error
        for name, tensor in state.items():
            if name != "proj_out.weight":  # the embedding once more
                yield name, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
