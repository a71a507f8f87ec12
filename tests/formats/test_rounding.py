"""The arithmetic of the CPU kernels: by trial of all cases where it leaves the beaten track."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from omni_convert.formats import lanes, mx_kernels, rounding
from omni_convert.formats import microscaling as mx

fused = pytest.mark.skipif(not rounding.FUSES, reason="this processor divides")
each_element = pytest.mark.parametrize("kind", [mx.E4M3, mx.E2M1], ids=lambda kind: kind.name)


@numba.njit(error_model="numpy")
def _count_wrong_quotients(values: Any, divisors: Any) -> int:
    wrong = 0
    for divisor in divisors:
        for n in range(len(values)):
            value = lanes.load(values, n, 0)
            found = lanes.reinterpret(rounding.quotient(value, divisor, np.float32(1) / divisor), np.uint32)
            expected = lanes.reinterpret(rounding.quotient(value, divisor, None), np.uint32)
            wrong += lanes.largest_lane(lanes.where(found == expected, found & 0, 1))
    return wrong


@fused
def test_quotients_of_every_bf16_mantissa_by_every_float32_mantissa() -> None:
    """Positive ones suffice: no step knows a sign."""
    values = np.arange(128, 256, dtype=np.float32).reshape(-1, lanes.BLOCK)
    divisors = np.arange(1 << 23, 1 << 24, dtype=np.float32)
    assert _count_wrong_quotients(values, divisors) == 0
    assert _count_wrong_quotients(values, divisors * np.float32(2.0**67)) == 0  # up to 2**91
    assert _count_wrong_quotients(values * np.float32(2.0**-109), divisors[:1000] * np.float32(2.0**-113)) == 0


@numba.njit(error_model="numpy")
def _quotients(bits: Any, divisor: Any, out: Any) -> None:
    for n in range(len(bits)):
        values = rounding.widen(lanes.load(bits, n, 0))
        lanes.store(out, n, 0, rounding.quotient(values, divisor, np.float32(1) / divisor))


@numba.njit(error_model="numpy")
def _invertible(bits: Any, divisor: Any, largest: Any) -> bool:
    return rounding.invertible(bits, divisor, largest)


def natural_order(values: NDArray[Any]) -> NDArray[Any]:
    """Lanes hold even places first."""
    return values.reshape(-1, 2, lanes.BLOCK // 2).swapaxes(1, 2).ravel()


@fused
@pytest.mark.parametrize("divisor", [2.0**-90, 1.7 * 2.0**-90, 0.013, 448, 2.0**90 / 3, 2.0**90])
@pytest.mark.filterwarnings("ignore:overflow")
def test_quotients_of_every_bf16_weight_that_may_be_inverted(divisor: float) -> None:
    step = np.float32(divisor)
    bits = np.arange(0x7F80, dtype=np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    allowed = values <= step * np.float32(2**20)
    assert _invertible(bits.reshape(-1, lanes.BLOCK), step, values[allowed].max())
    out = np.empty((len(bits) // lanes.BLOCK, lanes.BLOCK), np.float32)
    _quotients(bits.reshape(out.shape), step, out)
    found, expected = natural_order(out), values / step
    exact = allowed & (values >= 2.0**-102)
    assert found[exact].tobytes() == expected[exact].tobytes()
    rest = allowed & ~exact
    assert np.all(np.abs(found[rest]) < 2.0**-11)
    assert np.all(expected[rest] < 2.0**-11)


def test_what_may_not_be_inverted() -> None:
    narrow, wide = np.zeros((1, 32), np.uint16), np.zeros((1, 32), np.uint32)
    one = np.float32(1)
    assert _invertible(narrow, one, one) == rounding.FUSES
    assert not _invertible(wide, one, one)
    assert not _invertible(narrow, np.float32(2.0**-91), one * 0)
    assert not _invertible(narrow, np.float32(2.0**91), one)
    assert not _invertible(narrow, one, np.float32(2.0**21))


@numba.njit(error_model="numpy")
def _differing_bytes(bits: Any, element: Any, largest: Any, first: Any, last: Any) -> int:
    """Scale bytes with which some BF16 weight below 2**(emax + 1) is rounded otherwise in 16 bits than in float32."""
    wrong = 0
    for byte in range(first, last):
        for n in range(len(bits)):
            stored = lanes.load(bits, n, 0)
            stored = lanes.where(rounding.magnitude(stored) < ((byte + element.emax + 1) << 7), stored, 0)
            short = rounding.e4m3(stored, byte, largest) if element.emax == 8 else rounding.e2m1(stored, byte, largest)
            values = rounding.widen(stored) * mx_kernels.power_of_two(127 - byte)
            long = rounding.nearest(values, element, largest)[0]
            wrong += lanes.largest_lane(lanes.where(short == long, short & 0, 1))
    return wrong


@each_element
def test_every_bf16_weight_under_every_byte_in_16_bits_as_in_float32(kind: mx.Element) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(-1, lanes.BLOCK)
    element, top = rounding.rounding(kind), 255 - kind.emax
    assert _differing_bytes(bits, element, element.largest, mx_kernels.LOWEST, top) == 0
    assert _differing_bytes(bits, element, element.largest, 0, mx_kernels.LOWEST) > 0  # so they do not go there


def test_rows_of_any_length_and_strides_come_in_whole_blocks() -> None:
    seen: list[tuple[tuple[int, ...], bool]] = []

    def double(source: NDArray[Any], target: NDArray[Any], offset: int) -> int:
        seen.append((source.shape, source.flags.c_contiguous and target.flags.c_contiguous))
        target[:] = 2 * source + offset
        return 7

    for columns, step in ((1, 1), (31, 1), (32, 1), (33, 2), (64, 2)):
        source = np.arange(3 * columns * step, dtype=np.int32).reshape(3, -1)[:, ::step]
        target = np.full((3, 2 * columns), -1)[:, ::step][:, :columns]
        assert lanes.in_whole_blocks(double, source, target, 5) == 7
        assert np.array_equal(target, 2 * source + 5)
        assert seen.pop() == ((3, -(-columns // 32) * 32), True)


def test_caches_older_than_any_source_are_dropped(tmp_path: Path) -> None:
    cache = tmp_path / "__pycache__"
    cache.mkdir()
    for name, time in (("a.py", 100), ("b.py", 300), ("__pycache__/a.old.nbi", 200), ("__pycache__/a.new.nbi", 400)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time, time))
    lanes.drop_stale_caches(tmp_path)
    assert [path.name for path in cache.iterdir()] == ["a.new.nbi"]
