"""The few operations the forward pass spends its time in, as fast as plain torch can do them.

docs/benchmarks.md ("CPU kernels") has the figures, and what was tried and lost.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERY_BLOCK = 128
"""Queries whose scores are held at a time: few enough for a core's cache, many enough for a matrix product."""

_ROWS_QUANTISED = 2048
"""Rows of a weight made 8-bit at a time, so that the vocabulary's does not cost its float32 size thrice."""

LOG2_E = math.log2(math.e)


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """What the processor can do by its Linux names; empty where that cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    return frozenset(
        next((line.split(":", 1)[1] for line in text.splitlines() if line.startswith("flags")), "").split()
    )


def has_fast_bfloat16() -> bool:
    """Whether products of bfloat16 run at matrix speed, rather than being emulated in float32."""
    return not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"})


@lru_cache(maxsize=1)
def has_int8() -> bool:
    """Whether this build of torch has the integer product for this processor."""
    try:
        Int8Linear(torch.eye(4), torch.zeros(4))(torch.ones(1, 4))
    except (RuntimeError, AttributeError):
        return False
    return True


class Linear:
    """``x @ weight.T + bias`` in the precision of ``dtype``."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight = weight.to(dtype)
        self._bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self._weight.dtype), self._weight, self._bias)


class Int8Linear:
    """The same with 8-bit weights, scaled by output, and 8-bit inputs, scaled by row as they come.

    A scale for each row, not one for the batch: what a row gives does not depend on its neighbours, and a
    loud row does not cost the others their precision.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, input_scale: Tensor | None = None) -> None:
        """``input_scale``: factors ``(n_in,)`` that the inputs were divided by and the weights take over."""
        self._scale = torch.empty(len(weight))
        quantised = torch.empty(weight.shape, dtype=torch.int8)
        for first in range(0, len(weight), _ROWS_QUANTISED):
            rows = slice(first, first + _ROWS_QUANTISED)
            exact = weight[rows].float()
            if input_scale is not None:
                exact = exact * input_scale
            self._scale[rows] = exact.abs().amax(dim=1).div_(127).clamp_(min=1e-12)
            quantised[rows] = (exact / self._scale[rows, None]).round_()
        self._weight = torch.ops.onednn.qlinear_prepack(quantised, None)
        self._zero_points = torch.zeros(len(weight), dtype=torch.long)
        self._bias = None if bias is None else bias.float()
        # Without VNNI pairs of products are summed in 16 bits, where full 8-bit inputs would overflow.
        self._levels = 127 if not cpu_flags().isdisjoint({"avx512_vnni", "avx_vnni"}) else 63
        # Conversion to integers truncates: the half makes it round.
        self._zero_point = torch.tensor(128.5)

    def __call__(self, x: Tensor) -> Tensor:
        """``x``: float32 ``(..., n_in)``."""
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
        quantised = torch.add(self._zero_point, x / largest, alpha=self._levels).to(torch.uint8)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantised,
            1 / self._levels,
            128,
            self._weight,
            self._scale,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return product.mul_(largest) if self._bias is None else torch.addcmul(self._bias, product, largest)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of every position to every position: ``(heads, length, head size)`` each, and the result.

    ``query`` is scaled already, so that weights are powers of *two* of the scores.
    """
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return _attend_in_blocks(query, key.contiguous(), value.contiguous())
    return F.scaled_dot_product_attention(query[None], key[None], value[None], scale=1 / LOG2_E)[0]


def _attend_in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Both products at matrix speed, no pass to find a row's maximum, one division of the result by the row's sum.

    bfloat16 has float32's range, so powers of two need the maximum only where scores pass 127. A block
    in which that happens shows by its sums and is done again with the maximum taken off.
    """
    out = torch.empty(query.shape[1], query.shape[0], query.shape[2], dtype=query.dtype).transpose(0, 1)
    transposed = key.transpose(1, 2)
    for begin in range(0, query.shape[1], _QUERY_BLOCK):
        block = query[:, begin : begin + _QUERY_BLOCK]
        weights = torch.bmm(block, transposed).exp2_()
        total = weights.sum(dim=-1, keepdim=True)
        least, most = torch.aminmax(total)
        if not 0 < float(least) <= float(most) < math.inf:
            scores = torch.bmm(block, transposed)
            weights = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp2_()
            total = weights.sum(dim=-1, keepdim=True)
        torch.div(torch.bmm(weights, value), total, out=out[:, begin : begin + _QUERY_BLOCK])
    return out
