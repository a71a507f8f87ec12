"""Compiled CPU kernels: from the stored bits of some rows to codes, scales and error, in one pass over the cache.

Bit tricks, and why they are exact:

* BF16 is the upper half of a float32, so widening is a shift.
* For finite values of one sign the bit pattern, read as an integer, grows with the value: the largest magnitude
  is an integer maximum of ``bits & 0x7fff``, and anything at or above the exponent of all ones is NaN or Inf.
* Adding 1.5 * 2**23 to a float32 of magnitude below 2**22 leaves no fraction bits: the processor's own rounding
  (half to even) has rounded to an integer, whose two's complement now sits in the low bits of the pattern.

Error sums go through ``LANES`` accumulators in a fixed order, so that LLVM can vectorize them without reordering
float additions: the same figures for any vector width, thread count or split into blocks of rows.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 64
ROUND = np.float32(12582912.0)  # 1.5 * 2**23

OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}


@intrinsic  # type: ignore[untyped-decorator]
def widen(_context: Any, bits: Any) -> Any:
    """float32 of a stored BF16 (uint16) or float32 (uint32)."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        shift = ir.Constant(word, 32 - bits.bitwidth)
        return builder.bitcast(builder.shl(builder.zext(args[0], word), shift), ir.FloatType())

    return types.float32(bits), generate


@intrinsic  # type: ignore[untyped-decorator]
def magnitude(_context: Any, bits: Any) -> Any:
    """The stored pattern without its sign, in its own width (16-bit lanes are twice as many)."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.and_(args[0], ir.Constant(args[0].type, 2 ** (bits.bitwidth - 1) - 1))

    return bits(bits), generate


@intrinsic  # type: ignore[untyped-decorator]
def _low_byte(_context: Any, value: Any) -> Any:
    """The low 8 bits of a float32's pattern, as int8."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.trunc(builder.bitcast(args[0], ir.IntType(32)), ir.IntType(8))

    return types.int8(value), generate


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def amax(row: Any) -> Any:
    """Largest magnitude of a row; NaN or Inf if the row holds one."""
    largest = magnitude(row[0])
    for k in range(row.shape[0]):
        largest = max(largest, magnitude(row[k]))
    return widen(largest)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _int8_step(largest: Any) -> Any:
    """Scale of a row, with the corrections at the ends of float32 that ``int8`` states."""
    step = largest / np.float32(127)
    if largest == 0:
        return np.float32(1)
    if largest / step > np.float32(127.5):
        return np.nextafter(step, np.float32(np.inf))
    if np.isinf(step * np.float32(127)):
        return np.nextafter(step, np.float32(0))
    return step


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _int8(bits: Any, step: Any) -> tuple[np.int8, np.float32, np.float32]:
    """Code, value and rounding error of one weight; the latter two in units of the step."""
    value = min(max(widen(bits) / step, np.float32(-127)), np.float32(127))
    shifted = value + ROUND
    return _low_byte(shifted), value, value - (shifted - ROUND)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _int8_rows(bits: Any, codes: Any, scale: Any, power: Any) -> int:
    """Quantize rows to int8; returns the first row that holds NaN or Inf, or -1."""
    rows, columns = bits.shape
    whole = columns // LANES * LANES
    noise = np.empty(LANES, np.float32)
    signal = np.empty(LANES, np.float32)
    for n in range(rows):
        largest = amax(bits[n])
        if not np.isfinite(largest):
            return n
        step = _int8_step(largest)
        scale[n, 0] = step
        noise[:] = 0
        signal[:] = 0
        for start in range(0, whole, LANES):  # a constant trip count keeps the sums in registers
            for lane in range(LANES):
                code, value, error = _int8(bits[n, start + lane], step)
                codes[n, start + lane] = code
                noise[lane] += error * error
                signal[lane] += value * value
        for lane in range(columns - whole):
            code, value, error = _int8(bits[n, whole + lane], step)
            codes[n, whole + lane] = code
            noise[lane] += error * error
            signal[lane] += value * value
        _store_power(power[n], signal, noise, step)
    return -1


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _store_power(power: Any, signal: Any, noise: Any, step: Any) -> None:
    """Sum the lanes in order; the sums were taken in units of the step."""
    unit = np.float64(step) * np.float64(step)
    total_signal = np.float64(0)
    total_noise = np.float64(0)
    for lane in range(LANES):
        total_signal += np.float64(signal[lane])
        total_noise += np.float64(noise[lane])
    power[0] = total_signal * unit
    power[1] = total_noise * unit


def int8_rows(
    bits: NDArray[Any], codes: NDArray[np.int8], scale: NDArray[np.float32], power: NDArray[np.float64] | None
) -> int:
    """Quantize ``bits`` (n, K) into ``codes`` (n, K) and ``scale`` (n, 1); see ``Format.quantize_rows``.

    Returns the first row that holds NaN or Inf, or -1.
    """
    return int(_int8_rows(bits, codes, scale, power))
