"""The arithmetic that the MX formats share, against exact definitions: scales of blocks, rounding of elements."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omni_convert.formats import lanes, mx_kernels, rounding
from omni_convert.formats import microscaling as mx
from omni_convert.formats.base import SCALE_RULES

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ELEMENTS = [mx.E4M3, mx.E2M1]
LARGEST = {"e4m3": 448, "e2m1": 6}
SIGNIFICANT = {"e4m3": 4, "e2m1": 2}  # bits of the mantissa, with the leading one
EMAX = {"e4m3": 8, "e2m1": 2}
ALL_BF16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
FINITE_BF16 = ALL_BF16[np.isfinite(ALL_BF16)]

each_element = pytest.mark.parametrize("kind", ELEMENTS, ids=lambda kind: kind.name)


def binade(value: Fraction) -> int:
    """The exponent e with 2**e <= value < 2**(e + 1)."""
    return math.frexp(float(value))[1] - 1  # float32 values are normal in float64


def exact_byte(amax: np.float32, kind: mx.Element, rule: str) -> int:
    """The rules as they are named, in exact arithmetic; the exponent is that of the scale, before it is clamped."""
    value = Fraction(float(amax))
    if value == 0:
        return 0
    if rule == "rceil":  # the smallest power of two with which the block's largest does not saturate
        exponent = binade(value) - kind.emax
        exponent += value > LARGEST[kind.name] * Fraction(2) ** exponent
    else:
        if rule == "even":  # round to the element's significant bits first, half to even
            unit = Fraction(2) ** (binade(value) - SIGNIFICANT[kind.name] + 1)
            value = round(value / unit) * unit
        exponent = binade(value) - EMAX[kind.name]
    return min(max(exponent + 127, 0), 254)


def nearest(values: NDArray[np.float32], magnitudes: list[float]) -> NDArray[np.float32]:
    """Nearest of ``magnitudes`` by search, ties to the one with an even place, no negative zero."""
    table = np.array(magnitudes)
    size = np.abs(values.astype(np.float64))
    above = np.minimum(np.searchsorted(table, size), len(table) - 1)
    below = np.maximum(above - 1, 0)
    up, down = table[above] - size, size - table[below]
    place = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    result: NDArray[np.float32] = (np.copysign(table[place], values) + 0.0).astype(np.float32)
    return result


def e4m3_magnitudes() -> list[float]:
    """By their definition: sign, 4 exponent bits of bias 7, 3 mantissa bits, no infinities."""
    values = [mantissa * 2.0**-9 for mantissa in range(8)]
    values += [(8 + mantissa) / 8 * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    return values[:-1]  # the last is NaN


MAGNITUDES = {"e4m3": e4m3_magnitudes(), "e2m1": E2M1_VALUES}


@numba.njit(error_model="numpy")
def _elements(stored: Any, codes: Any, element: Any) -> None:
    for n in range(len(stored)):
        values = rounding.widen(lanes.load(stored, n, 0))
        lanes.store(codes, n, 0, rounding.nearest(values, element, element.largest)[0])


@numba.njit(error_model="numpy")
def _scale_bytes(amax: Any, out: Any, emax: Any, carry: Any) -> None:
    for place in range(len(amax)):
        out[place] = mx_kernels.scale_byte(amax[place], emax, carry)


def kernel_elements(values: NDArray[np.float32], kind: mx.Element) -> NDArray[np.uint8]:
    padded = np.pad(values, (0, -len(values) % lanes.BLOCK)).reshape(-1, lanes.BLOCK)
    codes = np.empty(padded.shape, np.uint8)
    _elements(padded.view(np.uint32), codes, rounding.rounding(kind))
    return codes.ravel()[: len(values)]


def test_e4m3_bytes_are_those_of_torch() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    assert np.array_equal(np.isnan(expected), np.isnan(mx.E4M3_VALUES))
    assert np.flatnonzero(np.isnan(expected)).tolist() == [127, 255]
    numbers = ~np.isnan(expected)
    assert mx.E4M3_VALUES[numbers].tobytes() == expected[numbers].tobytes()
    assert mx.E4M3_VALUES[:127].tolist() == MAGNITUDES["e4m3"]


def test_e8m0_bytes_are_powers_of_two() -> None:
    values = mx.e8m0_values(np.arange(255, dtype=np.uint8))
    assert [Fraction(float(value)) for value in values] == [Fraction(2) ** (byte - 127) for byte in range(255)]
    wide = mx.scales_per_weight(torch.arange(255, dtype=torch.uint8).view(1, -1), 255 * 32 - 5)
    assert wide.shape == (1, 255 * 32 - 5)
    assert wide.numpy().tobytes() == np.repeat(values, 32)[:-5].tobytes()


@pytest.mark.parametrize("count", [1, 3, 277])
def test_powers_of_two_are_exact(count: int) -> None:
    """The C library's and the vectorized pow."""
    exponents = torch.arange(-149, 128, dtype=torch.int32)
    found = torch.cat([mx.power_of_two(part) for part in exponents.split(count)])
    assert found.tolist() == [2.0**exponent for exponent in range(-149, 128)]


def test_expand_repeats_every_scale_32_times() -> None:
    assert mx.expand(np.array([[1, 2], [3, 4]]), 33).tolist() == [[1] * 32 + [2], [3] * 32 + [4]]


@each_element
def test_half_steps_reach_the_midpoints(kind: mx.Element) -> None:
    magnitudes = MAGNITUDES[kind.name]
    for below, value, above in zip(magnitudes, magnitudes[1:], magnitudes[2:], strict=False):
        codes = mx.E4M3_VALUES.tolist()
        for sign in (1, -1):
            half = kind.half_steps[codes.index(sign * value)]
            assert half == (above - value) / 2
            assert half >= (value - below) / 2


def test_half_step_of_zero_in_e4m3() -> None:
    assert (mx.E4M3.half_steps[0], mx.E4M3.half_steps[128]) == (2.0**-10, 2.0**-10)


def test_half_step_of_zero_in_e2m1() -> None:
    assert (mx.E2M1.half_steps[0], mx.E2M1.half_steps[128]) == (0.25, 0.25)


@pytest.mark.parametrize("rule", SCALE_RULES)
@each_element
def test_overshoot_is_what_saturation_cuts_off(kind: mx.Element, rule: str) -> None:
    scales = {"floor": (64, 2), "even": (48, 1), "rceil": (2.0**-15, 2.0**-21)}
    assert kind.overshoot(rule) == scales[rule][ELEMENTS.index(kind)]


@pytest.mark.parametrize("rule", SCALE_RULES)
@each_element
def test_scale_byte_at_every_exponent_and_around_every_threshold(kind: mx.Element, rule: str) -> None:
    turns = [0, 1 << 22, 3 << 21, 15 << 19, (1 << 23) - 1]  # 1, 1.5, 1.75, 1.9375 and the last before 2
    mantissas = sorted({turn + step for turn in turns for step in (-1, 0, 1)} & set(range(1 << 23)))
    patterns = np.array([[field << 23 | mantissa for mantissa in mantissas] for field in range(255)], np.uint32)
    amax = patterns.ravel().view(np.float32)
    expected = [exact_byte(value, kind, rule) for value in amax]
    assert mx.block_scales(torch.from_numpy(amax), kind, rule).tolist() == expected
    found = np.empty(len(amax), np.int64)
    _scale_bytes(amax, found, np.int32(kind.emax), mx_kernels.carry_of(kind, rule))
    assert found.tolist() == expected


@pytest.mark.parametrize("rule", SCALE_RULES)
@each_element
def test_scale_byte_of_every_bf16_magnitude(kind: mx.Element, rule: str) -> None:
    amax = FINITE_BF16[: len(FINITE_BF16) // 2].copy()
    expected = [exact_byte(value, kind, rule) for value in amax]
    assert mx.block_scales(torch.from_numpy(amax), kind, rule).tolist() == expected


@pytest.mark.parametrize(
    ("kind", "rule", "byte"),
    [
        (mx.E4M3, "floor", 246), (mx.E4M3, "even", 247), (mx.E4M3, "rceil", 247),
        (mx.E2M1, "floor", 252), (mx.E2M1, "even", 253), (mx.E2M1, "rceil", 253),
    ],
)  # fmt: skip
def test_scale_byte_of_the_largest_and_the_smallest(kind: mx.Element, rule: str, byte: int) -> None:
    largest = np.array([0x7F7F0000, 0x7F7FFFFF, 0, 1, 0x00010000, 0x007FFFFF], np.uint32).view(np.float32)
    assert mx.block_scales(torch.from_numpy(largest), kind, rule).tolist() == [byte, byte, 0, 0, 0, 0]


@pytest.mark.parametrize("exponent", [0, -10, 9])
@each_element
def test_every_bf16_pattern_is_rounded_to_the_nearest_element(kind: mx.Element, exponent: int) -> None:
    values = FINITE_BF16[np.abs(FINITE_BF16.astype(np.float64)) < 2.0 ** (128 - exponent)] * np.float32(2.0**exponent)
    expected = nearest(values, MAGNITUDES[kind.name])
    found = mx.round_elements(torch.from_numpy(values), kind).numpy()
    assert found.tobytes() == expected.tobytes()  # so zeros are positive
    assert mx.E4M3_VALUES[kernel_elements(values, kind)].tobytes() == expected.tobytes()


@each_element
def test_float32_around_every_midpoint(kind: mx.Element) -> None:
    magnitudes = np.array(MAGNITUDES[kind.name], np.float32)
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
    points = np.concatenate([magnitudes, midpoints, [kind.largest * np.float32(1.1), np.finfo(np.float32).tiny]])
    near = [np.nextafter(points, np.float32(end)) for end in (-np.inf, np.inf)]
    values = np.concatenate([points, *near]).astype(np.float32)
    values = np.concatenate([values, -values])
    expected = nearest(values, MAGNITUDES[kind.name])
    assert mx.round_elements(torch.from_numpy(values), kind).numpy().tobytes() == expected.tobytes()
    assert mx.E4M3_VALUES[kernel_elements(values, kind)].tobytes() == expected.tobytes()


@each_element
def test_torch_casts_what_was_rounded_without_change(kind: mx.Element) -> None:
    values = mx.round_elements(torch.from_numpy(FINITE_BF16), kind)
    assert torch.equal(values.to(torch.float8_e4m3fn).to(torch.float32), values)
    if kind is mx.E4M3:
        cast = torch.from_numpy(FINITE_BF16).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32)
        assert torch.equal(cast, values)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 65])
def test_blocks_are_padded_with_zeros(columns: int) -> None:
    weight = torch.arange(1, 2 * columns + 1, dtype=torch.bfloat16).view(2, columns)
    blocks = mx.to_blocks(weight)
    assert blocks.shape == (2, -(-columns // 32), 32)
    assert torch.equal(blocks.view(2, -1)[:, :columns], weight.float())
    assert blocks.view(2, -1)[:, columns:].sum() == 0
