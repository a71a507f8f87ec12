"""Codes and scales back to float32: the bits of torch, or of the plain NumPy product."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omni_convert.formats import FORMATS, dequantize_kernels
from omni_convert.formats import microscaling as mx

RNG = np.random.default_rng(0)
E4M3_CODES = np.arange(256, dtype=np.uint8)
SCALES = np.array([1, 2.0**-140, 2.0**127, 0.3, 1e-30, 1.1e38, np.inf, 2.0**-149], np.float32)


def some(dtype: type, *shape: int) -> NDArray[Any]:
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max + 1, shape).astype(dtype)


def same_numbers(found: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    """The same bits, but any NaN is as good as another."""
    assert found.shape == expected.shape
    numbers = ~np.isnan(expected)
    return np.array_equal(np.isnan(found), ~numbers) and found[numbers].tobytes() == expected[numbers].tobytes()


def test_every_int8_code() -> None:
    codes = np.tile(np.arange(-128, 128, dtype=np.int8), (len(SCALES), 1))
    out = np.empty(codes.shape, np.float32)
    dequantize_kernels.int8_values(codes, SCALES[:, None], out)
    with np.errstate(over="ignore", invalid="ignore"):
        assert same_numbers(out, codes.astype(np.float32) * SCALES[:, None])


def test_every_e4m3_code_with_every_byte() -> None:
    codes, scale = np.tile(E4M3_CODES, (256, 1)), np.repeat(E4M3_CODES[:, None], 8, axis=1)
    out = np.empty(codes.shape, np.float32)
    dequantize_kernels.mx_values(codes, scale, out)
    with np.errstate(over="ignore", invalid="ignore"):
        assert same_numbers(out, mx.E4M3_VALUES[codes] * mx.e8m0_values(scale[:, :1]))
    numbers = FORMATS["mxfp8"].dequantize(
        {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), "weight_scale": torch.from_numpy(scale)}
    )
    assert same_numbers(out[:255], numbers.numpy()[:255])


@pytest.mark.parametrize("columns", [64, 512, 576, 1088])
def test_dual_scale(columns: int) -> None:
    codes, fine = some(np.uint8, 9, columns), some(np.uint8, 9, columns // 32)
    coarse = RNG.standard_normal((9, -(-columns // 512))).astype(np.float32)
    mul = RNG.uniform(0.1, 7, columns).astype(np.float32)
    out = np.empty(codes.shape, np.float32)
    dequantize_kernels.dual_values(codes, fine, coarse, mul, out)
    wide = np.repeat(coarse, 512, axis=1)[:, :columns]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = mx.E4M3_VALUES[codes] * mx.expand(mx.e8m0_values(fine), columns) * wide * mul
    assert same_numbers(out, expected)


@pytest.mark.parametrize("columns", [1, 31, 32, 100, 256])
def test_fp8(columns: int) -> None:
    codes = some(np.uint8, len(SCALES), columns)
    out = np.empty(codes.shape, np.float32)
    dequantize_kernels.fp8_values(codes, SCALES, out)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        assert same_numbers(out, values * SCALES[:, None])


@pytest.mark.parametrize("columns", [1, 100, 128, 129, 257, 512])
@pytest.mark.parametrize("width", [32, 40, 128])
def test_fp8_blocks(columns: int, width: int) -> None:
    codes, scale = some(np.uint8, 5, columns), RNG.uniform(0.1, 3, -(-columns // width)).astype(np.float32)
    out = np.empty(codes.shape, np.float32)
    dequantize_kernels.fp8_block_values(codes, scale[None], out, (5, width))
    assert same_numbers(out, mx.E4M3_VALUES[codes] * np.repeat(scale, width)[:columns])


def test_bfloat16_is_rounded_once() -> None:
    """Values at, below and above every tie, those that round to infinity, subnormals and NaN."""
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) + np.array([[0], [0x7FFF], [0x8000], [0x8001]], np.uint32)
    scale = ties.reshape(-1).view(np.float32)
    out = np.empty((len(scale), 32), np.uint16)
    dequantize_kernels.int8_values(np.ones(out.shape, np.int8), scale[:, None], out)
    expected = torch.from_numpy(scale).to(torch.bfloat16).unsqueeze(1).expand(-1, 32)
    found = torch.from_numpy(out).view(torch.bfloat16)
    numbers = ~expected.isnan()
    assert torch.equal(found.isnan(), ~numbers)
    assert torch.equal(found[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.parametrize("name", ["int8", "mxfp8", "mxfp4_dualscale"])
def test_values_go_where_they_are_wanted(name: str) -> None:
    fmt = FORMATS[name]
    tensors = {
        suffix: np.ascontiguousarray(tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor)
        for suffix, tensor in fmt.quantize(torch.from_numpy(RNG.standard_normal((4, 576)))).items()
    }
    expected = fmt.dequantize_rows(tensors)
    out = np.full((4, 576), 99, np.float32)
    assert fmt.dequantize_rows(tensors, out) is out
    assert out.tobytes() == expected.tobytes()
    sparse = np.full((8, 1152), 99, np.float32)
    fmt.dequantize_rows(tensors, sparse[::2, ::2])
    assert sparse[::2, ::2].tobytes() == expected.tobytes()
    assert np.all(sparse[1::2] == 99)
