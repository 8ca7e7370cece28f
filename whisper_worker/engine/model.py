"""Whisper's forward pass: encoder, decoder step with its caches, cross-attention weights.

After "Robust Speech Recognition via Large-Scale Weak Supervision" (Radford et al. 2022), over
Hugging Face's names of the weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_worker.engine.kernels import LOG2_E, Int8Linear, Linear, attend, has_fast_bfloat16, has_int8

if TYPE_CHECKING:
    from whisper_worker.engine.weights import ModelDims

PAD_FRAMES = 300
"""Silence after each window, at least: with less the decoder loses the last words."""

PAD_STEP = 100
"""Padded windows are whole multiples of this many frames, so that few lengths occur."""

MAX_FRAMES = 3000

_CACHE_STEP = 64
"""Entries by which the cache of keys and values grows: few windows come near the most they may hold."""

_PRUNE_EVERY = 32
"""Entries after which those that no row continues any more are looked for."""


def resolve_compute_type(requested: str, device: torch.device) -> str:
    """What ``requested`` becomes on ``device``: ``float32``, ``bfloat16``, ``float16`` or ``int8``.

    CPUs have no fast float16 arithmetic, so float16 becomes bfloat16; what the processor or this build
    of torch lacks becomes float32. On CUDA integer weights bring nothing and become float16.
    """
    if device.type == "cuda":
        return {"auto": "float16", "int8": "float16", "int8_float16": "float16"}.get(requested, requested)
    resolved = {"auto": "int8", "int8_float16": "int8", "float16": "bfloat16"}.get(requested, requested)
    if resolved == "int8":
        return "int8" if has_int8() else "float32"
    return "float32" if resolved == "bfloat16" and not has_fast_bfloat16() else resolved


class _Normed:
    """A linear over a layer norm."""

    def __init__(self, gain: Tensor, bias: Tensor, linear: Linear | Int8Linear) -> None:
        self._gain = gain
        self._bias = bias
        self._linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(F.layer_norm(x, x.shape[-1:], self._gain, self._bias))


class _Weights:
    """Builds the parts of a layer from a checkpoint's tensors.

    ``dtype`` is that of the matrix products; ``stream`` that of everything added up between them.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, stream: torch.dtype, int8: bool
    ) -> None:
        self._tensors = tensors
        self._device = device
        self._int8 = int8
        self.dtype = dtype
        self.stream = stream

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].to(self._device)

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensor(name + ".weight").to(self.stream), self.tensor(name + ".bias").to(self.stream)

    def convolution(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensor(name + ".weight").to(self.dtype), self.tensor(name + ".bias").to(self.dtype)

    def linear(self, *names: str, scale: float = 1.0) -> Linear | Int8Linear:
        """One linear out of several side by side; ``scale`` is folded into the first of them."""
        return self.build(*self._side_by_side(names, scale))

    def normed(self, norm: str, *names: str, scale: float = 1.0) -> _Normed:
        """The same over the layer norm ``norm``."""
        return self.build_normed(norm, *self._side_by_side(names, scale))

    def build_normed(self, norm: str, weight: Tensor, bias: Tensor | None) -> _Normed:
        gain, shift = self.norm(norm)
        if not self._int8:
            return _Normed(gain, shift, self.build(weight, bias))
        # Norms put out a few channels far larger than the rest, and 8 bits must span them all. Half of the
        # difference (in the logarithm) moves into the weights, as SmoothQuant does (Xiao et al. 2022), with the
        # norm's own parameters for the sizes of its output.
        # Not by aminmax, which takes ten times as long over the first dimension.
        largest = torch.maximum(-weight.amin(dim=0), weight.amax(dim=0)).float().clamp_(min=1e-8)
        smooth = ((gain.abs() + shift.abs()) / largest).sqrt_().clamp_(min=1e-4)
        return _Normed(gain / smooth, shift / smooth, Int8Linear(weight, bias, smooth))

    def _side_by_side(self, names: Sequence[str], scale: float) -> tuple[Tensor, Tensor]:
        weights, biases = [], []
        for place, name in enumerate(names):
            factor = scale if place == 0 else 1.0
            weight = self.tensor(name + ".weight").float() * factor
            weights.append(weight)
            # Whisper's key projections have no bias.
            biases.append(
                self.tensor(name + ".bias").float() * factor
                if name + ".bias" in self._tensors
                else weight.new_zeros(weight.shape[0])
            )
        return torch.cat(weights), torch.cat(biases)

    def build(self, weight: Tensor, bias: Tensor | None) -> Linear | Int8Linear:
        return Int8Linear(weight, bias) if self._int8 else Linear(weight, bias, self.dtype)


class _EncoderLayer:
    def __init__(self, weights: _Weights, name: str, n_head: int, head_size: int) -> None:
        self._n_head = n_head
        self._dtype = weights.dtype
        attention = name + "self_attn."
        self._qkv = weights.normed(
            name + "self_attn_layer_norm",
            attention + "q_proj",
            attention + "k_proj",
            attention + "v_proj",
            scale=LOG2_E * head_size**-0.5,
        )
        self._out = weights.linear(attention + "out_proj")
        self._up = weights.normed(name + "final_layer_norm", name + "fc1")
        self._down = weights.linear(name + "fc2")

    def __call__(self, x: Tensor) -> None:
        """``x``: ``(length, n_audio_state)``, changed in place."""
        length, width = x.shape
        query, key, value = self._qkv(x).view(length, 3, self._n_head, -1).permute(1, 2, 0, 3)
        x += self._out(attend(query, key, value).transpose(0, 1).reshape(length, width))
        x += self._down(F.gelu(self._up(x)))


class _Encoder:
    def __init__(self, dims: ModelDims, weights: _Weights) -> None:
        self._dtype = weights.dtype
        self._conv1 = weights.convolution("encoder.conv1")
        self._conv2 = weights.convolution("encoder.conv2")
        self._positions = weights.tensor("encoder.embed_positions.weight").to(weights.stream)
        head_size = dims.n_audio_state // dims.n_audio_head
        self._layers = [
            _EncoderLayer(weights, f"encoder.layers.{index}.", dims.n_audio_head, head_size)
            for index in range(dims.n_audio_layer)
        ]
        self._norm = weights.norm("encoder.layer_norm")

    def __call__(self, mel: Tensor) -> Tensor:
        """``mel``: ``(n_mels, frames)``, frames even. Gives ``(frames / 2, n_audio_state)``."""
        x = F.gelu(F.conv1d(mel[None].to(self._dtype), *self._conv1, padding=1))
        x = F.gelu(F.conv1d(x, *self._conv2, stride=2, padding=1))[0].T
        x = torch.add(self._positions[: x.shape[0]], x)
        for layer in self._layers:
            layer(x)
        return F.layer_norm(x, x.shape[-1:], *self._norm).to(self._dtype)


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring windows with as many entries each, which a step's self-attention takes together."""

    windows: slice
    n_entries: int
    """Those that the step adds included."""
    padding: int
    """Of the step's tokens the first so many are none: prompts of several lengths begin together."""
    mask: Tensor | None
    """Added to the scores: ``(windows, 1, queries of a window, entries)``, -inf for what a query may not see."""


class _DecoderLayer:
    """``cross_dtype`` is the encoder's: cross-attention reads its output as it is (see :meth:`attend_cross`)."""

    def __init__(self, weights: _Weights, name: str, n_head: int, cross_dtype: torch.dtype) -> None:
        self._n_head = n_head
        attention = name + "self_attn."
        width = weights.tensor(attention + "k_proj.weight").shape[0]
        self._head_size = width // n_head
        scale = self._head_size**-0.5
        self._qkv = weights.normed(
            name + "self_attn_layer_norm",
            attention + "q_proj",
            attention + "k_proj",
            attention + "v_proj",
            scale=scale,
        )
        self._out = weights.linear(attention + "out_proj")
        attention = name + "encoder_attn."
        self._cross_query = weights.normed(name + "encoder_attn_layer_norm", attention + "q_proj", scale=scale)
        by_head = (n_head, self._head_size, width)
        self._cross_key = weights.tensor(attention + "k_proj.weight").to(cross_dtype).view(by_head)
        value = weights.tensor(attention + "v_proj.weight")
        self._cross_value = value.to(cross_dtype).view(by_head).transpose(1, 2).contiguous()
        out = weights.tensor(attention + "out_proj.weight").float()
        # Weights of attention sum to one, so the bias of the values comes out as it is.
        bias = weights.tensor(attention + "out_proj.bias").float()
        bias = bias + out @ weights.tensor(attention + "v_proj.bias").float()
        self._cross_out = weights.build(out, bias)
        self._up = weights.normed(name + "final_layer_norm", name + "fc1")
        self._down = weights.linear(name + "fc2")

    def attend_self(self, x: Tensor, keys: Tensor, values: Tensor, runs: Sequence[_Run]) -> None:
        """``keys`` and ``values``: ``(windows, heads, capacity, head size)``; those of ``x`` are put there first."""
        rows, n, width = x.shape
        windows = keys.shape[0]
        qkv = self._qkv(x).to(keys.dtype)
        # (3, windows, heads, rows of a window x n, head size)
        query, key, value = qkv.view(windows, -1, 3, self._n_head, self._head_size).permute(2, 0, 3, 1, 4)
        mixed = torch.zeros_like(query)
        for run in runs:
            own, new, seen = run.windows, slice(run.padding, None), slice(run.n_entries)
            filled = slice(run.n_entries - key.shape[2] + run.padding, run.n_entries)
            keys[own, :, filled] = key[own, :, new]
            values[own, :, filled] = value[own, :, new]
            mixed[own, :, new] = F.scaled_dot_product_attention(
                query[own, :, new], keys[own, :, seen], values[own, :, seen], run.mask, scale=1.0
            )
        x += self._out(mixed.transpose(1, 2).reshape(rows, n, width))

    def attend_cross(self, x: Tensor, encoded: Sequence[Tensor]) -> list[Tensor]:
        """Attention over the encoder's output, without keys and values of it.

        ``encoded``: of each run of windows of one length its ``(windows, positions, width)``. Padded to the longest
        of the batch instead, a window's sums would be taken in an order that hangs on its neighbours, and with their
        last bits the near ties among its words.

        A score is q (W e) = (q W) e: instead of projecting every position for every layer, each head's
        query is taken into the encoder's space, and the weighted sum of positions is projected after it.
        That is more arithmetic a step but no work or memory in advance, and all layers read the same small
        matrix, a matrix product of heads by positions for each window. Gives of each run the weights
        ``(windows, rows of a window x n x heads, positions)``.
        """
        rows, n, width = x.shape
        query = self._cross_query(x).to(encoded[0].dtype).view(rows * n, self._n_head, self._head_size)
        absorbed = torch.bmm(query.transpose(0, 1), self._cross_key).transpose(0, 1)
        absorbed = absorbed.reshape(sum(map(len, encoded)), -1, width)
        mixed = torch.empty_like(absorbed)
        weights = []
        first = 0
        for states in encoded:
            last = first + len(states)
            weights.append(torch.softmax(torch.bmm(absorbed[first:last], states.transpose(1, 2)), dim=-1))
            torch.bmm(weights[-1], states, out=mixed[first:last])
            first = last
        mixed = mixed.view(rows * n, self._n_head, width)
        mixed = torch.bmm(mixed.transpose(0, 1), self._cross_value).transpose(0, 1)
        x += self._cross_out(mixed.reshape(rows, n, width).to(x.dtype))
        return weights

    def feed_forward(self, x: Tensor) -> None:
        x += self._down(F.gelu(self._up(x)))


class WhisperModel:
    """A loaded checkpoint. ``compute_type`` names what runs (see :func:`resolve_compute_type`)."""

    def __init__(self, dims: ModelDims, tensors: Mapping[str, Tensor], compute_type: str, device: torch.device) -> None:
        """``tensors``: the checkpoint's, by Hugging Face's names without the leading ``model.``.

        Raises KeyError where one lacks.
        """
        self.dims = dims
        self.device = device
        self.compute_type = resolve_compute_type(compute_type, device)
        int8 = self.compute_type == "int8"
        if int8:
            dtype = torch.bfloat16 if has_fast_bfloat16() else torch.float32
        else:
            dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[self.compute_type]
        # On a CPU sums cost nothing beside products, so they keep float32.
        stream = torch.float32 if device.type == "cpu" else dtype
        self._encoder = _Encoder(dims, _Weights(tensors, device, dtype, stream, int8=False))
        weights = _Weights(tensors, device, dtype, stream, int8)
        # A copy in any case: the last tensor to use the mapped file keeps all of it in memory.
        self._embedding = weights.tensor("decoder.embed_tokens.weight").clone()
        self._positions = weights.tensor("decoder.embed_positions.weight").to(stream)
        self._layers = [
            _DecoderLayer(weights, f"decoder.layers.{index}.", dims.n_text_head, dtype)
            for index in range(dims.n_text_layer)
        ]
        tied = "proj_out.weight" not in tensors
        head = weights.tensor("decoder.embed_tokens.weight" if tied else "proj_out.weight")
        self._head = weights.build_normed("decoder.layer_norm", head, None)

    @torch.inference_mode()
    def encode(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Encoder output ``(n_positions, n_audio_state)`` of each window.

        ``mels``: float32 ``(n_mels, n_frames <= 3000)``, scaled as ``features.log_mel`` gives them. Each is
        padded with silence (its own floor) by :data:`PAD_FRAMES` or more, up to 30 s in all.
        """
        return [self._encoder(_pad(mel).to(self.device)) for mel in mels]

    @torch.inference_mode()
    def new_state(self, encoded: Sequence[Tensor], rows_per_window: int, max_tokens: int) -> DecoderState:
        """A decoder for ``rows_per_window`` sequences of up to ``max_tokens`` tokens over each encoded window."""
        return DecoderState(self, encoded, rows_per_window, max_tokens)

    @torch.inference_mode()
    def cross_attention(
        self, encoded: Tensor, tokens: Tensor, heads: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """One pass over one window's known ``tokens`` ``(n,)``.

        Gives the softmaxed weights of ``heads`` (layer, head) as float32 ``(n_heads, n, positions)``, and the last
        layer's output ``(n, width)``.
        """
        n = len(tokens)
        attention = torch.empty(len(heads), n, len(encoded), device=self.device)

        def take(layer: int, weights: Sequence[Tensor]) -> None:
            by_head = weights[0].view(n, self.dims.n_text_head, -1)
            for place, (wanted, head) in enumerate(heads):
                if wanted == layer:
                    attention[place] = by_head[:, head]

        return attention, DecoderState(self, [encoded], 1, n).forward(tokens[None], take)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``(..., n_vocab)`` of the last layer's output."""
        return self._head(hidden).float()

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The first layer's input ``(rows, n, width)``: ``tokens`` ``(rows, n)`` at ``positions``, by row or one."""
        return torch.add(self._positions[positions], self._embedding[tokens])

    @property
    def layers(self) -> Sequence[_DecoderLayer]:
        return self._layers


def _pad(mel: Tensor) -> Tensor:
    wanted = min(MAX_FRAMES, math.ceil((mel.shape[1] + PAD_FRAMES) / PAD_STEP) * PAD_STEP)
    return F.pad(mel, (0, wanted - mel.shape[1]), value=float(mel.min()))


class DecoderState:
    """The decoder's memory of a batch: the encoded windows, and keys and values of the tokens so far.

    Row ``window * rows_per_window + k`` is the k-th sequence of a window. A window is kept once, however
    many sequences share it. So is what sequences have in common: each token of a row is an entry of its
    window, and a row knows which entries it continues. Rows that are reordered leave entries where they
    are; those that no row continues are dropped now and then. Where a window's entries lie, and how many
    there are, depends on nothing but the window: sums over them have the same last bits in any batch.
    """

    def __init__(self, model: WhisperModel, encoded: Sequence[Tensor], rows_per_window: int, max_tokens: int) -> None:
        self._model = model
        self.n_windows = len(encoded)
        self.rows_per_window = rows_per_window
        self.length = 0
        # Runs of windows of one length, see _DecoderLayer.attend_cross.
        self._encoded = [torch.stack(list(run)) for _, run in itertools.groupby(encoded, len)]
        self._max_entries = rows_per_window * max_tokens
        self._padding = [0] * self.n_windows
        """By window: tokens before its first one, where prompts of several lengths began together."""
        # By layer: keys and values, (2, windows, heads, capacity, head size).
        self._cache = [self._empty_cache(0) for _ in model.layers]
        # By window: (rows of a window, entries).
        self._continues = [
            torch.empty(rows_per_window, 0, dtype=torch.bool, device=model.device) for _ in range(self.n_windows)
        ]
        self._pruned_at = [0] * self.n_windows

    @torch.inference_mode()
    def begin(self, prompts: Sequence[Sequence[int]], logits_at: Sequence[Sequence[int]]) -> Tensor:
        """The first step: a prompt of any length for each window, which all of its rows continue.

        Gives float32 logits ``(windows, len(logits_at[0]), n_vocab)`` at the places ``logits_at`` of each prompt.
        """
        device = self._model.device
        longest = max(map(len, prompts))
        self._padding = [longest - len(prompt) for prompt in prompts]
        tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        group, self.rows_per_window = self.rows_per_window, 1
        self._continues = [own[:1] for own in self._continues]
        hidden = self.forward(tokens)
        self.rows_per_window = group
        self._continues = [own.expand(group, -1) for own in self._continues]
        places = torch.tensor(logits_at, device=device) + torch.tensor(self._padding, device=device)[:, None]
        return self._model.logits(hidden[torch.arange(len(prompts), device=device)[:, None], places])

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Append ``tokens`` ``(rows, n)``. Gives float32 logits ``(rows, n_vocab)`` behind the last."""
        return self._model.logits(self.forward(tokens)[:, -1])

    def forward(self, tokens: Tensor, on_weights: Callable[[int, Sequence[Tensor]], None] | None = None) -> Tensor:
        """Append ``tokens``; gives the last layer's output ``(rows, n, width)``.

        ``on_weights`` is shown each layer's number and weights of cross-attention, as ``_DecoderLayer.attend_cross``
        gives them.
        """
        n = tokens.shape[1]
        x = self._model.embed(tokens, self._next_positions(n))
        self.length += n
        runs = self._add_entries(n)
        for index, layer in enumerate(self._model.layers):
            keys, values = self._cache[index]
            layer.attend_self(x, keys, values, runs)
            weights = layer.attend_cross(x, self._encoded)
            if on_weights is not None:
                on_weights(index, weights)
            layer.feed_forward(x)
        return x

    def _next_positions(self, n: int) -> Tensor:
        """Positions ``(rows or 1, n)`` of the ``n`` tokens that follow."""
        places = torch.arange(self.length, self.length + n, device=self._model.device)[None]
        if any(self._padding):
            padding = torch.tensor(self._padding, device=self._model.device)
            places = places - padding.repeat_interleave(self.rows_per_window)[:, None]
        # Padding has no position, nor what a finished row is given to say; nothing comes of either.
        return places.clamp(0, self._model.dims.n_text_ctx - 1)

    def _empty_cache(self, capacity: int) -> Tensor:
        dims = self._model.dims
        head_size = dims.n_text_state // dims.n_text_head
        shape = (2, self.n_windows, dims.n_text_head, capacity, head_size)
        device = self._model.device
        dtype = torch.float32 if device.type == "cpu" else self._encoded[0].dtype
        return torch.empty(shape, dtype=dtype, device=device)

    def _add_entries(self, n: int) -> list[_Run]:
        """Make room for ``n`` tokens of every row."""
        group, first_step = self.rows_per_window, self.length == n
        own = torch.eye(group, dtype=torch.bool, device=self._model.device).repeat_interleave(n, dim=1)
        shapes = []
        for window, continued in enumerate(self._continues):
            if group > 1 and continued.shape[1] - self._pruned_at[window] >= _PRUNE_EVERY:
                continued = self._pruned(window)
            padding = self._padding[window] if first_step else 0
            self._continues[window] = torch.cat([continued, own[:, padding:]], dim=1)
            shapes.append((self._continues[window].shape[1], padding))
        self._make_room(max(n_entries for n_entries, _ in shapes))
        runs, first = [], 0
        for (n_entries, padding), same in itertools.groupby(shapes):
            windows = slice(first, first + len(list(same)))
            runs.append(_Run(windows, n_entries, padding, self._mask(windows, n - padding)))
            first = windows.stop
        return runs

    def _mask(self, windows: slice, n: int) -> Tensor | None:
        """What ``n`` further tokens of each row of ``windows``, which have as many entries, may not see."""
        group = self.rows_per_window
        if n == 1 and group == 1:
            return None
        seen = torch.stack(self._continues[windows]).repeat_interleave(n, dim=1)
        if n > 1:
            causal = torch.ones(n, n, dtype=torch.bool, device=seen.device).tril()
            seen[:, :, -group * n :] &= causal.repeat(group, group)
        mask = torch.zeros(seen.shape, dtype=self._cache[0].dtype, device=seen.device)
        return mask.masked_fill_(~seen, -math.inf)[:, None]

    def _make_room(self, n_entries: int) -> None:
        filled = self._cache[0].shape[3]
        if n_entries <= filled:
            return
        capacity = min(self._max_entries, math.ceil(n_entries / _CACHE_STEP) * _CACHE_STEP)
        for layer, entries in enumerate(self._cache):
            # One layer at a time, and the old one let go: all of them twice would be the peak of a batch's memory.
            self._cache[layer] = self._empty_cache(max(capacity, n_entries))
            self._cache[layer][:, :, :, :filled] = entries

    def _pruned(self, window: int) -> Tensor:
        """Drop the window's entries that no row continues, if they are many; gives what rows continue of the rest."""
        continued = self._continues[window]
        kept = continued.any(dim=0).nonzero()[:, 0]
        if continued.shape[1] - len(kept) >= _PRUNE_EVERY // 2:
            continued = continued[:, kept]
            for entries in self._cache:
                entries[:, window, :, : len(kept)] = entries[:, window].index_select(2, kept)
        self._pruned_at[window] = continued.shape[1]
        return continued

    @torch.inference_mode()
    def reorder_rows(self, index: Tensor) -> None:
        """Row ``i`` continues the sequence of row ``index[i]`` (of the same window): beam search."""
        group = self.rows_per_window
        within = index.view(-1, group) - group * torch.arange(self.n_windows, device=index.device)[:, None]
        self._continues = [own[rows] for own, rows in zip(self._continues, within, strict=True)]

    @torch.inference_mode()
    def keep_windows(self, index: Tensor) -> None:
        """Only the windows ``index``, rising, stay; the others leave with their rows."""
        places = index.tolist()
        self._continues = [self._continues[place] for place in places]
        self._padding = [self._padding[place] for place in places]
        self._pruned_at = [self._pruned_at[place] for place in places]
        for layer, entries in enumerate(self._cache):
            self._cache[layer] = entries[:, index]
        runs, first = [], 0
        for states in self._encoded:
            kept = index[(index >= first) & (index < first + len(states))] - first
            first += len(states)
            if len(kept):
                runs.append(states[kept])
        self._encoded = runs
        self.n_windows = len(places)
