"""The search for scales: kernel and reference choose the same bits, and what they choose is better."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hostile.small import Tensor, to_bits, to_values
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from quantized import INFINITY, weights

from omni_convert.formats import dual_kernels, kernels, search, search_kernels
from omni_convert.formats import microscaling as mx
from omni_convert.formats.bits import kernel_bits
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale

Arrays = tuple[NDArray[Any], ...]
BLOCK = (3, 48)
METHODS = ["int8", "fp8 rows", "fp8 blocks", "dual"]


def kernel(method: str, bits: NDArray[Any], block: tuple[int, int] = BLOCK) -> Arrays:
    """Scales by the compiled kernels, into arrays full of rubbish."""
    rows, columns = bits.shape
    scale = np.full(rows, 99, np.float32)
    if method == "int8":
        assert search_kernels.int8_scales(bits, scale) == -1
        return (scale,)
    if method == "fp8 rows":
        assert search_kernels.fp8_row_scales(bits, scale) == -1
        return (scale,)
    if method == "fp8 blocks":
        tall, wide = block
        scale = np.full((-(-rows // tall), -(-columns // wide)), 99, np.float32)
        assert search_kernels.fp8_block_scales(bits, scale, block) == -1
        return (scale,)
    fine, coarse = np.full((rows, columns // 32), 99, np.uint8), np.full((rows, -(-columns // 512)), 99, np.float32)
    assert search_kernels.dual_scales(bits, fine, coarse) == -1
    return fine, coarse


def reference(method: str, values: NDArray[np.float32], block: tuple[int, int] = BLOCK) -> Arrays:
    weight = torch.from_numpy(values.copy())
    if method == "dual":
        fine, coarse = search.dual_scales(weight)
        return fine.numpy(), coarse.numpy()
    if method == "fp8 blocks":
        return (search.fp8_block_scales(weight, block).numpy(),)
    return ((search.int8_scales if method == "int8" else search.fp8_row_scales)(weight).numpy(),)


def per_weight(method: str, scales: Arrays, shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> torch.Tensor:
    """The scale of every weight (float32)."""
    rows, columns = shape
    if method == "dual":
        fine, coarse = mx.expand(mx.e8m0_values(scales[0]), columns), np.repeat(scales[1], 512, axis=1)[:, :columns]
        return torch.from_numpy(fine * coarse)
    if method == "fp8 blocks":
        return torch.from_numpy(np.repeat(np.repeat(scales[0], block[0], axis=0), block[1], axis=1)[:rows, :columns])
    return torch.from_numpy(scales[0])[:, None]


def scaled(method: str, values: NDArray[np.float32], scales: Arrays, block: tuple[int, int] = BLOCK) -> torch.Tensor:
    """Weights in units of their scales (float32), as they are rounded."""
    weight = torch.from_numpy(values.copy())
    if method != "dual":
        return weight / per_weight(method, scales, values.shape, block)
    coarse = torch.from_numpy(np.repeat(scales[1], 512, axis=1)[:, : values.shape[1]])
    return weight / coarse * torch.from_numpy(mx.expand(mx.e8m0_values(254 - scales[0]), values.shape[1]))


def dequantized(
    method: str, values: NDArray[np.float32], scales: Arrays, block: tuple[int, int] = BLOCK
) -> torch.Tensor:
    """What codes with these scales stand for (N, K) float32."""
    ratio, scale = scaled(method, values, scales, block), per_weight(method, scales, values.shape, block)
    if method == "int8":
        return ratio.round().clamp(-128, 127) * scale
    if method == "dual":
        return mx.round_elements(ratio, mx.E2M1) * scale
    return ratio.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


FARTHEST = {
    "int8": 127 + search.INT8_OVERSHOOT,
    "fp8 rows": 464,
    "fp8 blocks": 464,
    "dual": 6 + search.DUAL_OVERSHOOT,
}


def check(method: str, weight: Tensor, block: tuple[int, int] = BLOCK) -> Arrays:
    """Same bits twice; scales finite and positive, their product with every code finite, overshoot as stated."""
    values = to_values(weight)
    found = kernel(method, kernel_bits(weight.bits, weight.dtype), block)
    for one, other in zip(found, reference(method, values, block), strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    assert np.isfinite(found[-1]).all()
    assert (found[-1] > 0).all()
    assert scaled(method, values, found, block).abs().max() <= FARTHEST[method]
    assert dequantized(method, values, found, block).isfinite().all()
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("columns", [64, 448, 512, 1088, 1536, 8256])
def test_kernel_and_reference_agree(method: str, dtype: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    values = np.stack(
        [
            rng.standard_normal(columns),
            rng.standard_t(2, columns),
            rng.uniform(-1, 1, columns),
            rng.choice([-1, 0.5, 1], columns),
            np.zeros(columns),
            np.where(np.arange(columns) == 7, 1e3, 1e-3 * rng.standard_normal(columns)),
            np.where(np.arange(columns) < 32, 1e-13, 1) * rng.standard_normal(columns),
            rng.standard_normal(columns) * 2.0 ** -rng.integers(0, 60, columns),
        ]
    )
    check(method, to_bits(values, dtype))


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize("columns", [1, 2, 15, 17, 47, 63, 65, 100, 129, 511, 513])
def test_any_number_of_columns(method: str, columns: int) -> None:
    check(method, to_bits(np.random.default_rng(columns).standard_normal((4, columns)), "F32"))


def test_long_rows_of_large_errors() -> None:
    """Narrow sums would overflow: with the plain scale all weights but one lie half a step off."""
    check("int8", to_bits([[127.0] + [10.5] * 65535]))
    check("fp8 rows", to_bits([[448.0] + [272.0, 304.0, 336.0, 368.0, 400.0] * 13107]))


@settings(max_examples=60, deadline=None)
@given(weight=weights((1, 31, 64, 65, 130)), method=st.sampled_from(METHODS[:3]))
def test_any_finite_bits(weight: Tensor, method: str) -> None:
    check(method, weight)


@settings(max_examples=40, deadline=None)
@given(weight=weights((64, 128, 576)))
def test_any_finite_bits_in_groups(weight: Tensor) -> None:
    check("dual", weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_ends_of_float32(method: str, dtype: str) -> None:
    patterns = np.random.default_rng(3).integers(0, INFINITY[dtype], (8, 64))
    patterns[0] = INFINITY[dtype] - 1
    patterns[1] = 1
    patterns[2] = np.arange(64)
    patterns[3] = 0
    patterns[3, 5] = INFINITY[dtype] - 1
    patterns[4] = INFINITY[dtype] // 2
    patterns[5] = INFINITY[dtype] // 2 - np.arange(64) * (INFINITY[dtype] // 128)
    check(method, Tensor(dtype, patterns.astype("<u2" if dtype == "BF16" else "<u4")))


@pytest.mark.parametrize("method", METHODS)
def test_rows_do_not_depend_on_each_other(method: str) -> None:
    weight = to_bits(np.random.default_rng(4).standard_normal((9, 1088)))
    whole = kernel(method, weight.bits)
    parts = [kernel(method, weight.bits[start : start + 3]) for start in range(0, 9, 3)]
    for found, *split in zip(whole, *parts, strict=True):
        assert np.concatenate(split).tobytes() == found.tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_rows_are_reported(method: str) -> None:
    bits = to_bits(np.random.default_rng(5).standard_normal((4, 128))).bits
    bits[2, 77] = 0x7FC0
    bits[3, 0] = 0xFF80
    assert {
        "int8": lambda: search_kernels.int8_scales(bits, np.empty(4, np.float32)),
        "fp8 rows": lambda: search_kernels.fp8_row_scales(bits, np.empty(4, np.float32)),
        "fp8 blocks": lambda: search_kernels.fp8_block_scales(bits, np.empty((1, 4), np.float32), (4, 32)),
        "dual": lambda: search_kernels.dual_scales(bits, np.empty((4, 4), np.uint8), np.empty((4, 1), np.float32)),
    }[method]() == 2


def test_constants_are_the_same_everywhere() -> None:
    """They come from pow(), which C libraries round differently; a search must not depend on it."""
    tables = (search.INT8_RATIOS, search.INT8_WEIGHTS, search.INT8_TABLE, search.FP8_RATIOS, search.FP8_INVERSES)
    more = (search.FP8_WEIGHTS, search.DUAL_RATIOS, search.DUAL_WEIGHTS, search.DUAL_FINE_WEIGHTS)
    digest = hashlib.sha256(b"".join(table.tobytes() for table in (*tables, *more))).hexdigest()
    assert digest[:16] == "0408613d8d1e8fb4"


def test_int8_by_hand() -> None:
    """63 weights of 10.5 are off by 0.5 with scale 1; with 512 / 488, they are 10.008 and 127 is 121.05."""
    (scale,) = check("int8", to_bits([[127.0] + [10.5] * 63, [-128.0] + [0.0] * 63]))
    assert scale.tolist() == [np.float32(512 / 488), np.float32(128) / np.float32(127)]


def test_dual_by_hand() -> None:
    """Next to a block that is exact, one of 0.25 and a 3.75: saturating at half the scale costs 0.75**2.4 = 0.5 instead
    of 32 * 0.25**2.4 = 1.1."""
    fine, coarse = check("dual", to_bits([[6.0] * 32 + [3.75] + [0.25] * 31]))
    assert (fine.tolist(), coarse.tolist()) == ([[127, 126]], [[1.0]])
    fine, coarse = check("dual", to_bits([[0.0] * 64, [3.0] * 32 + [0.0] * 32]))
    assert (fine.tolist(), coarse.tolist()) == ([[0, 0], [127, 0]], [[1.0], [0.5]])


def costs(method: str, values: NDArray[np.float32], scales: Arrays, groups: int) -> NDArray[np.float64]:
    """Sums of |error|**p in float64, by group of columns."""
    error = np.abs(dequantized(method, values, scales).numpy().astype(np.float64) - values)
    power = (error / np.abs(values).max(axis=1, keepdims=True)) ** (2 if method == "fp8 rows" else 2.4)
    sums: NDArray[np.float64] = power.reshape(len(values), groups, -1).sum(axis=2)
    return sums


@pytest.mark.parametrize("nu", [2, 5, 50])
def test_fp8_finds_the_best_candidate(nu: int) -> None:
    values = np.random.default_rng(nu).standard_t(nu, (16, 512)).astype(np.float32)
    plain = np.abs(values).max(axis=1) / np.float32(448)
    every = [costs("fp8 rows", values, (plain * ratio,), 1) for ratio in search.FP8_RATIOS]
    found = costs("fp8 rows", values, kernel("fp8 rows", values.view(np.uint32)), 1)
    np.testing.assert_allclose(found, np.min(every, axis=0), rtol=1e-4)


@pytest.mark.parametrize("columns", [2, 100, 4096])
def test_int8_is_never_worse_than_the_plain_scale(columns: int) -> None:
    """In the norm of the search."""
    values = np.random.default_rng(columns).standard_t(2, (32, columns)).astype(np.float32)
    plain = np.abs(values).max(axis=1) / np.float32(127)
    lens = torch.from_numpy(np.rint(np.abs(values) * (np.float32(128) / plain)[:, None]).astype(np.int64))
    end = torch.where(torch.from_numpy(values) < 0, 128 << 16, 127 << 16)
    m = torch.from_numpy(np.rint(512 * plain / kernel("int8", values.view(np.uint32))[0]).astype(np.int64))
    found, before = (
        search.int8_costs(lens * m[:, None], end).sum(dim=1) * (512 / m) ** 2.4 for m in (m, torch.full_like(m, 512))
    )
    assert (found <= before).all()
    assert (found < before).any()


@pytest.mark.parametrize("nu", [2, 5, 50])
def test_int8_is_as_good_as_the_best_candidate(nu: int) -> None:
    values = np.random.default_rng(nu).standard_t(nu, (16, 512)).astype(np.float32)
    plain = np.abs(values).max(axis=1) / np.float32(127)
    every = [costs("int8", values, (plain * search.INT8_RATIOS[m],), 1) for m in search.INT8_COARSE]
    found = costs("int8", values, kernel("int8", values.view(np.uint32)), 1)
    assert (found < np.min(every, axis=0) * 1.02).all()


@pytest.mark.parametrize("nu", [2, 5, 50])
def test_dual_is_better_than_the_plain_scales(nu: int) -> None:
    values = np.random.default_rng(nu).standard_t(nu, (16, 1024)).astype(np.float32)
    tensors = Mxfp4DualScale().quantize(torch.from_numpy(values))
    plain = tensors["weight_scale"].numpy(), tensors["weight_dual_scale"].squeeze(-1).numpy()
    found, before = costs("dual", values, kernel("dual", values.view(np.uint32)), 2), costs("dual", values, plain, 2)
    assert (found < before * 1.01).all()  # the search approximates the norm
    assert found.sum() < before.sum() * 0.95


@settings(max_examples=40, deadline=None)
@given(weight=weights((1, 64, 130)))
def test_int8_codes(weight: Tensor) -> None:
    values, bits = to_values(weight), kernel_bits(weight.bits, weight.dtype)
    (scale,) = kernel("int8", bits)
    codes, again = np.full((2, *bits.shape), 99, np.int8)
    power = np.full((len(bits), 2), 99.0)
    assert kernels.int8_codes(bits, codes, scale[:, None], power, -128) == -1
    assert kernels.int8_codes(bits, again, scale[:, None], None, -128) == -1
    assert again.tobytes() == codes.tobytes()
    ratio = scaled("int8", values, (scale,))
    assert (codes == ratio.round().clamp(-128, 127).numpy()).all()
    check_power(power, ratio, codes, scale[:, None].astype(np.float64))


@settings(max_examples=40, deadline=None)
@given(weight=weights((64, 576, 1024)))
def test_dual_codes(weight: Tensor) -> None:
    bits = kernel_bits(weight.bits, weight.dtype)
    expected = Mxfp4DualScale().quantize(torch.from_numpy(to_values(weight).copy()))
    plain = expected["weight_scale"].numpy(), expected["weight_dual_scale"].squeeze(-1).numpy()
    codes, again = np.full((2, *bits.shape), 99, np.uint8)
    power = np.full((len(bits), 2), 99.0)
    assert dual_kernels.dual_codes(bits, codes, *plain, None) == -1
    assert codes.tobytes() == expected["weight"].view(torch.uint8).numpy().tobytes()
    scales = kernel("dual", bits)
    assert dual_kernels.dual_codes(bits, codes, *scales, power) == -1
    assert dual_kernels.dual_codes(bits, again, *scales, None) == -1
    assert again.tobytes() == codes.tobytes()
    coarse = np.repeat(scales[1], 512, axis=1)[:, : bits.shape[1]].astype(np.float64)
    unit = coarse * mx.expand(mx.e8m0_values(scales[0]), bits.shape[1])
    check_power(power, scaled("dual", to_values(weight), scales), mx.E4M3_VALUES[codes], unit)


def check_power(power: Any, ratio: torch.Tensor, codes: NDArray[Any], unit: NDArray[np.float64]) -> None:
    exact = ratio.numpy().astype(np.float64)
    signal, noise = (((part * unit) ** 2).sum(axis=1) for part in (exact, exact - codes))
    np.testing.assert_allclose(power[:, 0], signal, rtol=1e-5, atol=1e-80)  # float32 sums lose subnormal weights
    assert (np.abs(power[:, 1] - noise) <= 1e-5 * noise + 1e-12 * signal + 1e-80).all()


def test_codes_report_non_finite_rows() -> None:
    bits = to_bits(np.ones((3, 64))).bits
    bits[1, 3] = 0x7F80
    one, fine = np.ones((3, 1), np.float32), np.full((3, 2), 127, np.uint8)
    assert kernels.int8_codes(bits, np.empty((3, 64), np.int8), one, None, -128) == 1
    assert dual_kernels.dual_codes(bits, np.empty((3, 64), np.uint8), fine, one, None) == 1
