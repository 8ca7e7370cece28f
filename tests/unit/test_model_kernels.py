"""The kernels alone, at the edges that a whole model seldom meets."""

from __future__ import annotations

import math

import pytest
import torch

from whisper_worker.engine import kernels
from whisper_worker.engine.kernels import Int8Linear, attend


def _exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = query.double() @ key.double().transpose(1, 2) * math.log(2)
    return (torch.softmax(scores, dim=-1) @ value.double()).float()


@pytest.mark.parametrize("length", [1, 100, 128, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_any_length(length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(length)
    query, key, value = (torch.randn(3, length, 32).to(dtype) for _ in range(3))
    got = attend(query * 32**-0.5, key, value).float()
    assert (got - _exact(query * 32**-0.5, key, value)).abs().max() < (0.03 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("shift", [400.0, -400.0])
def test_scores_beyond_the_range_of_powers_of_two(shift: float) -> None:
    """2 ** 400 is no number, and 2 ** -400 is zero for all keys: both must come out as softmax has it."""
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, 200, 32) for _ in range(3))
    query[:, :, 0], key[:, :, 0] = 20.0, shift / 20
    query[0, :150] /= 100  # only some blocks are beyond
    query, key, value = (part.bfloat16() for part in (query, key, value))
    got = attend(query, key, value).float()
    # Scores near 400 have steps of 2 in bfloat16, so the weights are only roughly known; the result must be a mean.
    assert got.isfinite().all()
    assert (got[0, :100] - _exact(query, key, value)[0, :100]).abs().max() < 0.05
    assert got.abs().max() <= value.float().abs().max() * 1.01
    assert got[1].std() > 0.1


def test_int8_products_are_near_and_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(2)
    weight, bias = torch.randn(300, 256), torch.randn(300)
    x = torch.randn(5, 2, 256) * torch.logspace(-3, 3, 5)[:, None, None]
    linear = Int8Linear(weight, bias)
    exact = torch.nn.functional.linear(x, weight, bias)
    got = linear(x)
    for row in range(5):
        assert (got[row] - exact[row]).norm() / exact[row].norm() < 0.02
        assert torch.equal(linear(x[row : row + 1])[0], got[row])
    assert torch.equal(linear(torch.zeros(1, 256)), bias[None])


def test_int8_without_vnni_keeps_pairs_of_products_within_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cpu_flags", lambda: frozenset({"avx2"}))
    torch.manual_seed(3)
    weight, x = torch.randn(64, 128), torch.randn(4, 128)
    linear = Int8Linear(weight, None)
    assert (linear(x) - x @ weight.T).norm() / (x @ weight.T).norm() < 0.03
    assert not kernels.has_fast_bfloat16()


def test_int8_weights_of_many_rows_equal_those_of_few() -> None:
    """Weights are made 8-bit some rows at a time."""
    torch.manual_seed(4)
    weight, x = torch.randn(5000, 32), torch.randn(3, 32)
    assert torch.equal(Int8Linear(weight, None)(x)[:, 4990:], Int8Linear(weight[4990:], None)(x))
