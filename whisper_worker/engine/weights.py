"""From a Hugging Face checkpoint on disk to a :class:`WhisperModel`: no part of transformers is needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from whisper_worker.errors import ModelError

if TYPE_CHECKING:
    from whisper_worker.engine.model import WhisperModel


@dataclass(frozen=True, slots=True)
class ModelDims:
    """Sizes of a Whisper checkpoint; names are openai/whisper's."""

    n_mels: int
    n_audio_ctx: int
    n_audio_state: int
    n_audio_head: int
    n_audio_layer: int
    n_vocab: int
    n_text_ctx: int
    n_text_state: int
    n_text_head: int
    n_text_layer: int


_CONFIG_NAMES = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}


def load(model_dir: Path, compute_type: str, device: str) -> WhisperModel:
    """Build the model from ``config.json`` and the safetensors beside it (one file, or shards with their index).

    ``compute_type`` is one of ``settings.COMPUTE_TYPES``; ``device`` is ``auto``, ``cpu`` or ``cuda``.
    Raises :class:`ModelError` where the checkpoint is missing, damaged or no Whisper, or the device is not there.
    """
    from whisper_worker.engine.model import WhisperModel

    config = _read_json(model_dir / "config.json")
    tensors = {name.removeprefix("model."): tensor for name, tensor in _read_tensors(model_dir).items()}
    try:
        return WhisperModel(_dims(config), tensors, compute_type, _device(device))
    except KeyError as error:
        raise ModelError(f"The checkpoint lacks the tensor {error.args[0]}; fetch the model again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} of the model cannot be read; fetch the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} of the model is not an object; fetch the model again.")
    return content


def _dims(config: dict[str, Any]) -> ModelDims:
    if config.get("model_type") != "whisper":
        raise ModelError("config.json does not describe a Whisper model.")
    if config.get("activation_function", "gelu") != "gelu":
        raise ModelError("Only Whisper checkpoints with the activation function gelu are supported.")
    try:
        return ModelDims(**{field: int(config[name]) for field, name in _CONFIG_NAMES.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError("config.json lacks a size that every Whisper model has; fetch the model again.") from error


def _read_tensors(model_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors by name, mapped from the files: pages are read when a tensor is first used."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = model_dir / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted({Path(str(name)).name for name in _read_json(index).get("weight_map", {}).values()})
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            tensors.update(load_file(model_dir / name))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"The weights file {name} is missing or damaged; fetch the model again.") from error
    return tensors


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("There is no CUDA device here; set WHISPER_DEVICE=cpu or auto.")
    return torch.device(name)
