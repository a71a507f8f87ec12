"""Stored bits to values: every 16-bit pattern, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hostile.small import Tensor, to_bits, to_values
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import INFINITY, SIGN, weights

from omni_convert.formats import bits as stored
from omni_convert.formats import engine
from omni_convert.formats.bits import first_nonfinite, to_float32


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_every_16_bit_pattern(dtype: str, torch_dtype: torch.dtype) -> None:
    bits = np.arange(2**16, dtype="<u2").reshape(256, 256)
    values = to_float32(bits, dtype)
    expected = torch.from_numpy(bits.view("<i2")).view(torch_dtype).to(torch.float32).numpy()
    finite = np.isfinite(expected)
    assert values.dtype == np.float32
    assert values[finite].tobytes() == expected[finite].tobytes()
    assert np.array_equal(np.isnan(values), np.isnan(expected))
    assert np.array_equal(np.isinf(values), np.isinf(expected))


def test_float32_is_reinterpreted() -> None:
    values = np.array([[0.0, -0.0, 1e-45, 3.4e38]], np.float32)
    assert to_float32(values.view("<u4"), "F32").tobytes() == values.tobytes()


@pytest.mark.parametrize(("dtype", "pattern"), [("BF16", 0x7F80), ("F16", 0xFE01), ("F32", 0x7FC00000)])
def test_first_nonfinite(dtype: str, pattern: int) -> None:
    row = np.zeros(9, "<u4" if dtype == "F32" else "<u2")
    row[[3, 7]] = pattern
    assert first_nonfinite(row, dtype) == 3


@pytest.mark.parametrize("row_maxima", [stored.row_maxima, engine.row_maxima])
@settings(max_examples=60, deadline=None)
@given(weight=weights((1, 31, 32, 33, 100)), negative=st.booleans())
def test_largest_magnitudes(row_maxima: Callable[..., Any], weight: Tensor, negative: bool) -> None:
    bits = weight.bits | weight.bits.dtype.type(SIGN[weight.dtype]) if negative else weight.bits
    found = row_maxima(bits, weight.dtype)
    assert found.dtype == np.float32
    assert np.array_equal(found, np.abs(to_values(weight)).max(axis=1))


@pytest.mark.parametrize("row_maxima", [stored.row_maxima, engine.row_maxima])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("payload", [0, 1])
def test_largest_magnitude_is_not_finite(row_maxima: Callable[..., Any], dtype: str, sign: bool, payload: int) -> None:
    weight = to_bits(np.ones((3, 40)), dtype)
    weight.bits[1, 33] = INFINITY[dtype] | payload | (SIGN[dtype] if sign else 0)
    assert list(np.isfinite(row_maxima(weight.bits, dtype))) == [True, False, True]
