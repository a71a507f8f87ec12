"""FP8 with given scales: the bits of torch's division, clamp and cast, without negative zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hostile.small import Tensor, to_bits, to_values
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from quantized import INFINITY, SIGN, weights

from omni_convert.formats import fp8_kernels
from omni_convert.formats import microscaling as mx
from omni_convert.formats.bits import kernel_bits

DTYPES = ["BF16", "F32"]
SIZES = [2.0**-126, 2.0**-91, 2.0**-90, 1.3e-9, 0.0123, 1.0, 3.0, 448.0, 1e9, 2.0**90, 2.0**91, 2.0**120]


def torch_codes(values: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.uint8]:
    quotient = torch.from_numpy(values) / torch.from_numpy(np.broadcast_to(scale, values.shape).copy())
    codes = quotient.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return np.where(codes == 0x80, np.uint8(0), codes)


def run_rows(
    weight: Tensor, scale: NDArray[np.float32], *, power: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    codes, sums = np.full(weight.bits.shape, 99, np.uint8), np.full((len(weight.bits), 2), 99.0)
    bits = kernel_bits(weight.bits, weight.dtype)
    assert fp8_kernels.fp8_rows(bits, codes, scale, sums if power else None, given=True) == -1
    return codes, sums


def check(weight: Tensor, scale: NDArray[np.float32]) -> None:
    expected = torch_codes(to_values(weight), scale[:, None])
    assert run_rows(weight, scale)[0].tobytes() == expected.tobytes()
    assert run_rows(weight, scale, power=False)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_pattern(dtype: str, size: float) -> None:
    """A row for every exponent, so that some go by the reciprocal and some do not, and once all in one."""
    patterns = np.concatenate([np.arange(0x7F80), np.arange(0x8000, 0xFF80)]).astype(np.uint32)
    bits = (patterns << 16) if dtype == "F32" else patterns.astype("<u2")
    for columns in (128, len(bits)):
        rows = bits.reshape(-1, columns)
        check(Tensor(dtype, rows), np.full(len(rows), size, np.float32))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100, 3072])
def test_absmax_scales(dtype: str, columns: int) -> None:
    weight = to_bits(np.random.default_rng(columns).standard_normal((33, columns)) * 0.03, dtype)
    scale, codes = np.empty(33, np.float32), np.empty(weight.bits.shape, np.uint8)
    assert fp8_kernels.fp8_rows(kernel_bits(weight.bits, dtype), codes, scale, None, given=False) == -1
    assert scale.tobytes() == (np.abs(to_values(weight)).max(axis=1) / np.float32(448)).tobytes()
    check(weight, scale)


@settings(max_examples=100, deadline=None)
@given(weights((32, 65, 256)), st.integers(1 << 23, 0x7F7FFFFF))
def test_any_exponent_and_any_normal_scale(weight: Tensor, pattern: int) -> None:
    check(weight, np.full(len(weight.bits), pattern, np.uint32).view(np.float32))


def test_float32_around_every_midpoint() -> None:
    magnitudes = mx.E4M3_VALUES[:127]
    points = np.concatenate([magnitudes, (magnitudes[1:] + magnitudes[:-1]) / 2, [np.float32(464)]])
    points = np.concatenate([points, *(np.nextafter(points, np.float32(end)) for end in (-np.inf, np.inf))])
    values = np.concatenate([points, -points]).astype(np.float32)
    check(Tensor("F32", values.view("<u4").reshape(1, -1)), np.ones(1, np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 40, 128])
@pytest.mark.parametrize("columns", [1, 100, 128, 129, 384, 1000])
def test_blocks(columns: int, width: int, dtype: str) -> None:
    rng = np.random.default_rng([columns, width])
    weight = to_bits(rng.standard_normal((9, columns)), dtype)
    scale = (10.0 ** rng.uniform(-4, 3, -(-columns // width))).astype(np.float32)
    wide = np.repeat(scale, width)[:columns]
    expected = torch_codes(to_values(weight), wide)
    codes, power = np.full(expected.shape, 99, np.uint8), np.full((9, 2), 99.0)
    for sums in (power, None):
        codes[:] = 99
        assert fp8_kernels.fp8_block_rows(weight.bits, codes, scale[None], sums, (9, width), given=True) == -1
        assert codes.tobytes() == expected.tobytes()
    values = to_values(weight).astype(np.float64)
    error = mx.E4M3_VALUES[codes] * wide.astype(np.float64) - values
    assert power[:, 0] == pytest.approx((values**2).sum(axis=1), rel=1e-5)
    assert power[:, 1] == pytest.approx((error**2).sum(axis=1), rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [32, 75, 4096])
def test_power_is_that_of_weight_and_error(columns: int, dtype: str) -> None:
    weight = to_bits(np.random.default_rng(columns).standard_normal((5, columns)), dtype)
    values = to_values(weight).astype(np.float64)
    scale = (np.abs(values).max(axis=1) / 300).astype(np.float32)
    codes, power = run_rows(weight, scale)
    error = mx.E4M3_VALUES[codes] * scale[:, None].astype(np.float64) - values
    assert power[:, 0] == pytest.approx((values**2).sum(axis=1), rel=1e-5)
    assert power[:, 1] == pytest.approx((error**2).sum(axis=1), rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [0, 31, 66])
@pytest.mark.parametrize("payload", [0, 1])
def test_first_nonfinite_is_found(dtype: str, column: int, payload: int) -> None:
    bits = to_bits(np.ones((4, 67)), dtype).bits
    bits[2, column] = bits[3, 0] = INFINITY[dtype] | SIGN[dtype] | payload
    codes, scale = np.empty(bits.shape, np.uint8), np.ones(4, np.float32)
    for chosen in (False, True):
        assert fp8_kernels.fp8_rows(bits, codes, scale, None, given=chosen) == 2
        assert fp8_kernels.fp8_block_rows(bits, codes, scale[None, :3], None, (4, 32), given=chosen) == 2
