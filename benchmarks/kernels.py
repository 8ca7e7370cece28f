"""The model's kernels one by one: what ships beside what was tried and lost, and the model they make.

    python benchmarks/kernels.py [--model NAME] [--threads N] [--rounds N] [--compute-type TYPE]

Everything runs in the sizes of the given model over a window of 20 s, and every round times each
variant once, in turn, so that a change in the machine's load hits all of them. CPU time is shown
too: it says more than wall time where other programs run beside. Variants that ship are marked.

The last line is JSON: by kernel and variant ``wall_ms`` (median), ``wall_ms_min`` and
``cpu_ms_min``; ``load_s`` and ``peak_mb`` of the model.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from common import bench_from, parser, print_json, print_table, say
from torch import Tensor

from whisper_worker.engine import weights
from whisper_worker.engine.features import log_mel, log_mel_peak
from whisper_worker.engine.kernels import LOG2_E, Int8Linear, Linear, attend
from whisper_worker.engine.model import WhisperModel
from whisper_worker.engine.weights import ModelDims
from whisper_worker.metrics import peak_memory_mb

POSITIONS = 1150
"""Encoder positions of a window of 20 s with its padding."""

BATCHES = (1, 8, 16, 32)
TOKENS = 60
"""Tokens so far, half of what a window of 20 s holds in dense speech."""

Variants = dict[str, Callable[[], Any]]


def main() -> None:
    arguments_of = parser(__doc__, peers=False)
    arguments_of.add_argument("--rounds", type=int, default=9)
    arguments_of.add_argument("--compute-type", default="auto")
    arguments = arguments_of.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    model = weights.load(bench_from(arguments).files.model_dir, arguments.compute_type, "cpu")
    load_s = time.perf_counter() - started
    dims = model.dims
    results: dict[str, dict[str, dict[str, float]]] = {}
    torch.manual_seed(0)
    with torch.inference_mode():
        groups: list[tuple[str, Callable[[], Variants]]] = [
            ("encode one window", lambda: _encode(model)),
            *((f"decoder step, {batch} windows", lambda batch=batch: _step(model, batch)) for batch in BATCHES),
            ("decoder step, 4 windows of 5 rows", lambda: _step(model, 4, 5)),
            ("encoder attention, one layer", lambda: _attention(dims)),
            ("encoder linear with GELU, one layer", lambda: _encoder_linear(dims)),
            *((f"decoder linear, {rows} rows", lambda rows=rows: _decoder_linear(dims, rows)) for rows in (1, 16)),
            *(
                (f"cross-attention of a step, all layers, {batch} windows", lambda batch=batch: _cross(dims, batch))
                for batch in (1, 8, 16)
            ),
            ("self-attention of a step, one layer, 16 rows", lambda: _self_attention(dims)),
            ("features of 10 minutes", lambda: _features(dims)),
        ]
        for name, build in groups:
            say(name)
            results[name] = _measure(build(), arguments.rounds)
            gc.collect()
    print_table(
        ("kernel and variant (* ships)", "wall ms", "least", "CPU ms, least"),
        [
            (f"{group}: {variant}", times["wall_ms"], times["wall_ms_min"], times["cpu_ms_min"])
            for group, variants in results.items()
            for variant, times in variants.items()
        ],
    )
    print_json(
        {
            "compute_type": model.compute_type,
            "threads": arguments.threads,
            "load_s": round(load_s, 3),
            "peak_mb": round(peak_memory_mb()),
            "kernels": results,
        }
    )


def _measure(variants: Variants, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds by variant; each runs once unmeasured."""
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            wall_from, cpu_from = time.perf_counter(), time.process_time()
            run()
            if number:
                wall[name].append(1000 * (time.perf_counter() - wall_from))
                cpu[name].append(1000 * (time.process_time() - cpu_from))
    return {
        name: {
            "wall_ms": round(median(wall[name]), 3),
            "wall_ms_min": round(min(wall[name]), 3),
            "cpu_ms_min": round(min(cpu[name]), 3),
        }
        for name in variants
    }


def _encode(model: WhisperModel) -> Variants:
    mels = {seconds: torch.randn(model.dims.n_mels, 100 * seconds).clamp_(-1, 1) for seconds in (10, 20, 30)}
    return {f"{seconds} s *": partial(model.encode, [mel]) for seconds, mel in mels.items()}


def _step(model: WhisperModel, n_windows: int, rows: int = 1) -> Variants:
    encoded = model.encode([torch.randn(model.dims.n_mels, 2000).clamp_(-1, 1)]) * n_windows
    repeats = 10
    token = torch.zeros(n_windows * rows, 1, dtype=torch.long)

    def steps() -> None:
        state = model.new_state(encoded, rows, TOKENS + repeats)
        state.step(token.expand(-1, TOKENS))
        for _ in range(repeats):
            state.step(token)

    return {f"{repeats} steps after a prompt of {TOKENS} *": steps}


def _heads(length: int, dims: ModelDims, dtype: torch.dtype) -> list[Tensor]:
    size = dims.n_audio_state // dims.n_audio_head
    return [torch.randn(dims.n_audio_head, length, size).to(dtype) for _ in range(3)]


def _attention(dims: ModelDims) -> Variants:
    exact = _heads(POSITIONS, dims, torch.float32)
    query, key, value = (part.bfloat16() for part in exact)
    scaled = query * (query.shape[-1] ** -0.5 * LOG2_E)

    def blocks_softmax() -> None:
        for block in scaled.split(128, dim=1):
            torch.bmm(torch.softmax(torch.bmm(block, key.transpose(1, 2)), dim=-1), value)

    return {
        "fused, float32": lambda: F.scaled_dot_product_attention(exact[0][None], exact[1][None], exact[2][None]),
        "fused, bfloat16": lambda: F.scaled_dot_product_attention(query[None], key[None], value[None]),
        "whole score matrix, softmax": lambda: torch.bmm(
            torch.softmax(torch.bmm(scaled, key.transpose(1, 2)), dim=-1), value
        ),
        "blocks of queries, softmax": blocks_softmax,
        "blocks, powers of two, divided at the end *": lambda: attend(scaled, key, value),
    }


def _encoder_linear(dims: ModelDims) -> Variants:
    width = dims.n_audio_state
    weight, bias, x = torch.randn(4 * width, width) * 0.04, torch.randn(4 * width), torch.randn(POSITIONS, width)
    plain, half, integer = Linear(weight, bias, torch.float32), Linear(weight, bias, torch.bfloat16), None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())
    bias_half = bias.bfloat16()
    integer = Int8Linear(weight, bias)
    return {
        "float32": lambda: F.gelu(plain(x)),
        "bfloat16 *": lambda: F.gelu(half(x)),
        "bfloat16, GELU by tanh": lambda: F.gelu(half(x), approximate="tanh"),
        "bfloat16, packed, GELU fused": lambda: torch.ops.mkldnn._linear_pointwise(
            x.bfloat16(), packed, bias_half, "gelu", [], "none"
        ),
        "int8, scales by row": lambda: F.gelu(integer(x)),
        "int8, one scale": lambda: F.gelu(_one_scale(integer, x)),
    }


def _one_scale(linear: Int8Linear, x: Tensor) -> Tensor:
    """What dynamic quantisation usually is: one scale for the whole input, the product's epilogue used in full."""
    step = float(x.abs().max()) / 127
    quantised = (x / step).add_(128.5).to(torch.uint8)
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        quantised,
        step,
        128,
        linear._weight,
        linear._scale,
        linear._zero_points,
        linear._bias,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return product


def _decoder_linear(dims: ModelDims, rows: int) -> Variants:
    width = dims.n_text_state
    weight, bias, x = torch.randn(4 * width, width) * 0.04, torch.randn(4 * width), torch.randn(rows, width)
    plain, half, integer = Linear(weight, bias, torch.float32), Linear(weight, bias, torch.bfloat16), None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())
    bias_half = bias.bfloat16()
    integer = Int8Linear(weight, bias)

    def hundred(run: Callable[[], object]) -> Callable[[], None]:
        def runs() -> None:
            for _ in range(100):
                run()

        return runs

    return {
        "float32, 100 times": hundred(lambda: plain(x)),
        "bfloat16, 100 times": hundred(lambda: half(x)),
        "bfloat16, packed, 100 times": hundred(
            lambda: torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, bias_half, "none", [], "").float()
        ),
        "int8, scales by row, 100 times *": hundred(lambda: integer(x)),
        "int8, one scale, 100 times": hundred(lambda: _one_scale(integer, x)),
    }


def _cross(dims: ModelDims, n_windows: int) -> Variants:
    """One query for each window; the projections on both sides are left out of all variants but the last."""
    head_size = dims.n_text_state // dims.n_text_head
    shape = (n_windows, dims.n_text_head, POSITIONS, head_size)
    layers = [(torch.randn(shape), torch.randn(shape)) for _ in range(dims.n_text_layer)]
    halves = [(key.bfloat16(), value.bfloat16()) for key, value in layers]
    query = torch.randn(n_windows, dims.n_text_head, 1, head_size) * head_size**-0.5
    query_half = query.bfloat16()
    encoded = torch.randn(n_windows, POSITIONS, dims.n_text_state).bfloat16()
    into = torch.randn(dims.n_text_head, head_size, dims.n_text_state).bfloat16() * head_size**-0.5
    out_of = into.transpose(1, 2).contiguous()

    def absorbed() -> None:
        for _ in layers:
            query_in = query_half[:, :, 0].transpose(0, 1).bmm(into).transpose(0, 1)
            scores = torch.bmm(query_in.reshape(n_windows, -1, dims.n_text_state), encoded.transpose(1, 2))
            mixed = torch.bmm(torch.softmax(scores, dim=-1), encoded)
            mixed.view(n_windows, dims.n_text_head, -1).transpose(0, 1).bmm(out_of)

    def projected(keys_and_values: list[tuple[Tensor, Tensor]], query: Tensor) -> None:
        for key, value in keys_and_values:
            torch.matmul(torch.softmax(torch.matmul(query, key.transpose(2, 3)), dim=-1), value)

    def fused(keys_and_values: list[tuple[Tensor, Tensor]], query: Tensor) -> None:
        for key, value in keys_and_values:
            F.scaled_dot_product_attention(query, key, value)

    return {
        "keys and values, fused, float32": lambda: fused(layers, query),
        "keys and values, fused, bfloat16": lambda: fused(halves, query_half),
        "keys and values, products, float32": lambda: projected(layers, query),
        "keys and values, products, bfloat16": lambda: projected(halves, query_half),
        "encoder output itself, bfloat16 *": absorbed,
    }


def _self_attention(dims: ModelDims) -> Variants:
    shape = (16, dims.n_text_head, TOKENS, dims.n_text_state // dims.n_text_head)
    key, value = torch.randn(shape), torch.randn(shape)
    query = torch.randn(16, dims.n_text_head, 1, shape[-1])
    key_half, value_half, query_half = key.bfloat16(), value.bfloat16(), query.bfloat16()
    return {
        "fused, float32 *": lambda: F.scaled_dot_product_attention(query, key, value),
        "fused, bfloat16": lambda: F.scaled_dot_product_attention(query_half, key_half, value_half),
        "products, float32": lambda: torch.softmax(query @ key.transpose(2, 3), dim=-1) @ value,
        "products, bfloat16": lambda: torch.softmax(query_half @ key_half.transpose(2, 3), dim=-1) @ value_half,
    }


def _features(dims: ModelDims) -> Variants:
    time_s = torch.arange(600 * 16000) / 16000
    loudness = 0.3 * torch.sin(0.7 * time_s).square()
    waveform = (loudness * torch.sin(2 * math.pi * (300 + 100 * torch.sin(time_s)) * time_s) * 32767).short()
    window = 20 * 16000
    return {
        "the file's peak *": lambda: log_mel_peak(waveform, dims.n_mels),
        "windows of 20 s *": lambda: [
            log_mel(waveform, dims.n_mels, start, start + window, peak=1.0) for start in range(0, len(waveform), window)
        ],
    }


if __name__ == "__main__":
    main()
