"""Whisper's forward pass: encoder, decoder step with its caches, cross-attention weights.

After "Robust Speech Recognition via Large-Scale Weak Supervision" (Radford et al. 2022), over
Hugging Face's names of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_worker.engine.weights import ModelDims

PAD_FRAMES = 300
"""Silence after each window, at least: with less the decoder loses the last words."""

PAD_STEP = 100
"""Padded windows are whole multiples of this many frames, so that few lengths occur."""

MAX_FRAMES = 3000


def resolve_compute_type(requested: str, device: torch.device) -> str:
    """What ``requested`` becomes on ``device``.

    CPUs have no fast float16 arithmetic, so float16 becomes bfloat16; where the processor lacks
    bfloat16 products too, float32. On CUDA integer decoders bring nothing and become float16.
    """
    if device.type == "cuda":
        return {"auto": "float16", "int8": "float16", "int8_float16": "float16"}.get(requested, requested)
    resolved = {"auto": "int8", "int8_float16": "int8", "float16": "bfloat16"}.get(requested, requested)
    return "float32" if resolved == "bfloat16" and not _fast_bfloat16() else resolved


def _fast_bfloat16() -> bool:
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Linear:
    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        self._weight = weight.to(device, dtype)
        self._bias = None if bias is None else bias.to(device, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class _Weights:
    """Reads tensors of a checkpoint under a prefix and builds the parts of a layer from them."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self._tensors = tensors
        self.dtype = dtype
        self.device = device

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].to(self.device, self.dtype)

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensor(name + ".weight"), self.tensor(name + ".bias")

    def linear(self, *names: str, scale: float = 1.0) -> _Linear:
        """One linear out of several side by side; ``scale`` is folded into the first of them."""
        weights, biases = [], []
        for place, name in enumerate(names):
            factor = scale if place == 0 else 1.0
            weight = self._tensors[name + ".weight"].float() * factor
            bias = self._tensors.get(name + ".bias")
            weights.append(weight)
            # Whisper's key projections have no bias.
            biases.append(weight.new_zeros(weight.shape[0]) if bias is None else bias.float() * factor)
        return _Linear(torch.cat(weights), torch.cat(biases), self.dtype, self.device)


class _EncoderLayer:
    def __init__(self, weights: _Weights, name: str, n_head: int) -> None:
        self._n_head = n_head
        self._norm_attention = weights.norm(name + "self_attn_layer_norm")
        attention = name + "self_attn."
        self._qkv = weights.linear(attention + "q_proj", attention + "k_proj", attention + "v_proj")
        self._out = weights.linear(attention + "out_proj")
        self._norm_mlp = weights.norm(name + "final_layer_norm")
        self._up = weights.linear(name + "fc1")
        self._down = weights.linear(name + "fc2")

    def __call__(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        normed = F.layer_norm(x, (width,), *self._norm_attention)
        qkv = self._qkv(normed).view(batch, length, 3, self._n_head, width // self._n_head)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self._out(mixed.transpose(1, 2).reshape(batch, length, width))
        normed = F.layer_norm(x, (width,), *self._norm_mlp)
        return x + self._down(F.gelu(self._up(normed)))


class _Encoder:
    def __init__(self, dims: ModelDims, weights: _Weights) -> None:
        self._conv1 = weights.norm("encoder.conv1")
        self._conv2 = weights.norm("encoder.conv2")
        self._positions = weights.tensor("encoder.embed_positions.weight")
        self._layers = [
            _EncoderLayer(weights, f"encoder.layers.{index}.", dims.n_audio_head) for index in range(dims.n_audio_layer)
        ]
        self._norm = weights.norm("encoder.layer_norm")

    def __call__(self, mel: Tensor) -> Tensor:
        """``mel``: ``(batch, n_mels, frames)``, frames even. Gives ``(batch, frames / 2, n_audio_state)``."""
        x = F.gelu(F.conv1d(mel.to(self._positions.dtype), *self._conv1, padding=1))
        x = F.gelu(F.conv1d(x, *self._conv2, stride=2, padding=1)).transpose(1, 2)
        x = x + self._positions[: x.shape[1]]
        for layer in self._layers:
            x = layer(x)
        return F.layer_norm(x, x.shape[-1:], *self._norm)


class _DecoderLayer:
    def __init__(self, weights: _Weights, name: str, head_size: int) -> None:
        scale = head_size**-0.5
        self.norm_self = weights.norm(name + "self_attn_layer_norm")
        attention = name + "self_attn."
        self.qkv = weights.linear(attention + "q_proj", attention + "k_proj", attention + "v_proj", scale=scale)
        self.out = weights.linear(attention + "out_proj")
        self.norm_cross = weights.norm(name + "encoder_attn_layer_norm")
        attention = name + "encoder_attn."
        self.cross_query = weights.linear(attention + "q_proj", scale=scale)
        self.cross_key = weights.linear(attention + "k_proj")
        self.cross_value = weights.linear(attention + "v_proj")
        self.cross_out = weights.linear(attention + "out_proj")
        self.norm_mlp = weights.norm(name + "final_layer_norm")
        self.up = weights.linear(name + "fc1")
        self.down = weights.linear(name + "fc2")


class WhisperModel:
    """A loaded checkpoint.

    ``compute_type`` names what runs: ``float32``, ``bfloat16``, ``float16`` or ``int8``.
    """

    def __init__(self, dims: ModelDims, tensors: Mapping[str, Tensor], compute_type: str, device: torch.device) -> None:
        """``tensors``: the checkpoint's, by Hugging Face's names without the leading ``model.``.

        Raises KeyError where one lacks.
        """
        self.dims = dims
        self.device = device
        self.compute_type = resolve_compute_type(compute_type, device)
        half = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
        if self.compute_type == "int8":
            encoder_dtype = torch.bfloat16 if _fast_bfloat16() else torch.float32
            decoder_dtype = torch.float32
        else:
            encoder_dtype = decoder_dtype = half[self.compute_type]
        self._encoder = _Encoder(dims, _Weights(tensors, encoder_dtype, device))
        weights = _Weights(tensors, decoder_dtype, device)
        self.cross_dtype = encoder_dtype
        self.embedding = weights.tensor("decoder.embed_tokens.weight")
        self.positions = weights.tensor("decoder.embed_positions.weight")
        head = tensors.get("proj_out.weight", tensors["decoder.embed_tokens.weight"])
        self.head = _Linear(head, None, decoder_dtype, device)
        self.norm = weights.norm("decoder.layer_norm")
        self.head_size = dims.n_text_state // dims.n_text_head
        self.layers = [
            _DecoderLayer(weights, f"decoder.layers.{index}.", self.head_size) for index in range(dims.n_text_layer)
        ]

    @torch.inference_mode()
    def encode(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Encoder output ``(n_positions, n_audio_state)`` of each window.

        ``mels``: float32 ``(n_mels, n_frames <= 3000)``, scaled as ``features.log_mel`` gives them. Each is
        padded with silence (its own floor) by :data:`PAD_FRAMES` or more, up to 30 s in all.
        """
        return [self._encoder(_pad(mel)[None].to(self.device))[0] for mel in mels]

    @torch.inference_mode()
    def new_state(self, encoded: Sequence[Tensor], rows_per_window: int, max_tokens: int) -> DecoderState:
        """Caches for ``rows_per_window`` sequences of up to ``max_tokens`` tokens over each encoded window."""
        return DecoderState(self, encoded, rows_per_window, max_tokens)

    @torch.inference_mode()
    def cross_attention(
        self, encoded: Sequence[Tensor], tokens: Tensor, heads: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """One pass over known ``tokens`` ``(batch, n)``, one row a window.

        Gives the softmaxed weights of ``heads`` (layer, head) as float32 ``(batch, n_heads, n, positions)``, zero
        beyond a window's own positions, and the logits ``(batch, n, n_vocab)``.
        """
        state = DecoderState(self, encoded, 1, tokens.shape[1])
        kept: dict[int, Tensor] = {layer: torch.empty(0) for layer, _ in heads}
        logits = state.step(tokens, range(tokens.shape[1]), kept)
        return torch.stack([kept[layer][:, head] for layer, head in heads], dim=1), logits


def _pad(mel: Tensor) -> Tensor:
    wanted = min(MAX_FRAMES, math.ceil((mel.shape[1] + PAD_FRAMES) / PAD_STEP) * PAD_STEP)
    return F.pad(mel, (0, wanted - mel.shape[1]), value=float(mel.min()))


class DecoderState:
    """The decoder's memory of a batch: keys and values of the windows and of the tokens so far.

    Row ``window * rows_per_window + k`` is the k-th sequence of a window. What belongs to a window is
    kept once, however many sequences share it.
    """

    def __init__(self, model: WhisperModel, encoded: Sequence[Tensor], rows_per_window: int, max_tokens: int) -> None:
        self._model = model
        self.n_windows = len(encoded)
        self.rows_per_window = rows_per_window
        self.length = 0
        dims = model.dims
        dtype = model.embedding.dtype
        n_positions = [states.shape[0] for states in encoded]
        longest = max(n_positions)
        self._mask: Tensor | None = None
        if min(n_positions) < longest:
            positions = torch.arange(longest, device=model.device)
            beyond = positions >= torch.tensor(n_positions, device=model.device)[:, None]
            self._mask = torch.zeros(beyond.shape, device=model.device).masked_fill_(beyond, -math.inf)[:, None, None]
        shape = (self.n_windows, dims.n_text_head, longest, model.head_size)
        self._cross: list[tuple[Tensor, Tensor]] = []
        for layer in model.layers:
            key = torch.zeros(shape, dtype=model.cross_dtype, device=model.device)
            value = torch.zeros_like(key)
            for window, states in enumerate(encoded):
                states = states.to(dtype)
                split = (states.shape[0], dims.n_text_head, model.head_size)
                key[window, :, : states.shape[0]] = layer.cross_key(states).view(split).transpose(0, 1)
                value[window, :, : states.shape[0]] = layer.cross_value(states).view(split).transpose(0, 1)
            self._cross.append((key.transpose(2, 3), value))
        shape = (self.n_windows * rows_per_window, dims.n_text_head, max_tokens, model.head_size)
        self._self = [
            (torch.zeros(shape, dtype=dtype, device=model.device), torch.zeros(shape, dtype=dtype, device=model.device))
            for _ in model.layers
        ]

    @torch.inference_mode()
    def step(
        self, tokens: Tensor, logits_at: Sequence[int] = (-1,), attention: dict[int, Tensor] | None = None
    ) -> Tensor:
        """Append ``tokens`` ``(rows, n)``; gives float32 logits ``(rows, len(logits_at), n_vocab)`` at those of the n.

        ``attention``: cross-attention weights of the layers that are its keys are put there.
        """
        model = self._model
        n = tokens.shape[1]
        first, self.length = self.length, self.length + n
        x = model.embedding[tokens] + model.positions[first : self.length]
        width = (x.shape[-1],)
        for index, layer in enumerate(model.layers):
            mixed = self._attend_self(index, layer.qkv(F.layer_norm(x, width, *layer.norm_self)), first)
            x = x + layer.out(mixed)
            query = layer.cross_query(F.layer_norm(x, width, *layer.norm_cross))
            mixed, weights = self._attend_cross(index, query)
            if attention is not None and index in attention:
                attention[index] = weights
            x = x + layer.cross_out(mixed)
            x = x + layer.down(F.gelu(layer.up(F.layer_norm(x, width, *layer.norm_mlp))))
        return model.head(F.layer_norm(x[:, list(logits_at)], width, *model.norm)).float()

    def _attend_self(self, index: int, qkv: Tensor, first: int) -> Tensor:
        rows, n, _ = qkv.shape
        model = self._model
        query, key, value = qkv.view(rows, n, 3, model.dims.n_text_head, model.head_size).permute(2, 0, 3, 1, 4)
        keys, values = self._self[index]
        keys[:, :, first : self.length] = key
        values[:, :, first : self.length] = value
        mask = None
        if n > 1:
            mask = torch.ones(n, self.length, dtype=torch.bool, device=qkv.device).tril(first)
        mixed = F.scaled_dot_product_attention(
            query, keys[:, :, : self.length], values[:, :, : self.length], mask, scale=1.0
        )
        return mixed.transpose(1, 2).reshape(rows, n, -1)

    def _attend_cross(self, index: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of one window share its keys, so they are queries side by side of one product."""
        rows, n, width = query.shape
        model = self._model
        key, value = self._cross[index]
        query = query.view(self.n_windows, -1, model.dims.n_text_head, model.head_size).transpose(1, 2)
        scores = torch.matmul(query.to(key.dtype), key).float()
        if self._mask is not None:
            scores += self._mask
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.matmul(weights.to(value.dtype), value).to(query.dtype)
        return mixed.transpose(1, 2).reshape(rows, n, width), weights

    def reorder_rows(self, index: Tensor) -> None:
        """Row ``i`` continues the sequence of row ``index[i]`` (of the same window): beam search."""
        self._self = [(key[index], value[index]) for key, value in self._self]

    def keep_windows(self, index: Tensor) -> None:
        """Only the windows ``index`` stay, in that order; the others leave with their rows."""
        rows = index[:, None] * self.rows_per_window + torch.arange(self.rows_per_window, device=index.device)
        self.reorder_rows(rows.flatten())
        self._cross = [(key[index], value[index]) for key, value in self._cross]
        if self._mask is not None:
            self._mask = self._mask[index]
        self.n_windows = index.shape[0]
