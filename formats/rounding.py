"""Float arithmetic of the CPU kernels, 32 weights at a time, and why every trick is exact.

Stored weights are BF16 (uint16) or float32 (uint32) patterns.

* BF16 is the upper half of a float32, so widening is a shift.
* For finite values of one sign the pattern, read as an integer, grows with the value: the largest magnitude is an
  integer maximum, and anything at or above the exponent of all ones is NaN or Inf.
* One body rounds float32 to any small float. With e the exponent of |v|, at least that of the smallest normal,
  neighbours lie 2**(e - mantissa bits) apart, which is the unit in the last place of M = 2**(e + 23 - mantissa bits):
  |v| + M - M is |v| rounded half to even, by the processor. M is v's own exponent field, raised and shifted.
* An e4m3 byte is the top of a float32 whose exponent has e4m3's bias: multiplying by 2**-120 moves the bias from 127
  to 7, exactly, and makes e4m3's subnormals float32 subnormals.
* BF16 needs no float32, in half the registers: taking a power of two out of a value is subtracting from its exponent
  field. Adding half a unit less one, plus the last kept bit, and shifting rounds half to even; a carry into the
  exponent is what it should be.
"""

from __future__ import annotations

import platform
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic, overload

from omni_convert.formats.lanes import (
    BLOCK,
    INLINE,
    Lanes,
    convert,
    larger,
    largest_lane,
    load,
    multiply_add,
    reinterpret,
    smaller,
    total,
    where,
)
from omni_convert.formats.microscaling import E2M1, E4M3, Element


def _fuses() -> bool:
    """Whether this processor multiplies and adds in one step; for others LLVM calls the C library, lane by lane."""
    return platform.machine().lower() in ("arm64", "aarch64") or bool(binding.get_host_cpu_features().get("fma"))


FUSES = _fuses()

_WORD = ir.IntType(32)
_HALF = ir.VectorType(_WORD, BLOCK // 2)


def _every(constant: int) -> Any:
    return ir.Constant(_HALF, [constant] * (BLOCK // 2))


def _take(builder: Any, values: Any, places: list[int]) -> Any:
    choice = ir.Constant(ir.VectorType(_WORD, len(places)), places)
    return builder.shuffle_vector(values, ir.Constant(values.type, ir.Undefined), choice)


@intrinsic  # type: ignore[untyped-decorator]
def widen(_context: Any, stored: Any) -> Any:
    """float32 (32,) of stored weights, those at even places before those at odd places."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if stored.dtype.bitwidth == 32:
            words = _take(builder, args[0], [*range(0, BLOCK, 2), *range(1, BLOCK, 2)])
        else:
            pairs = builder.bitcast(args[0], _HALF)
            even, odd = builder.shl(pairs, _every(16)), builder.and_(pairs, _every(0xFFFF0000))
            words = builder.shuffle_vector(even, odd, ir.Constant(ir.VectorType(_WORD, BLOCK), list(range(BLOCK))))
        return builder.bitcast(words, ir.VectorType(ir.FloatType(), BLOCK))

    return Lanes(types.float32)(stored), generate


def _narrowing(join: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def narrow(_context: Any, words: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            even, odd = (_take(builder, args[0], list(range(start, start + 16))) for start in (0, 16))
            return builder.bitcast(join(builder, even, odd), ir.VectorType(ir.IntType(16), BLOCK))

        return Lanes(types.uint16)(words), generate

    return narrow


def _join_upper(builder: Any, even: Any, odd: Any) -> Any:
    return builder.or_(builder.and_(odd, _every(0xFFFF0000)), builder.lshr(even, _every(16)))


def _join_lower(builder: Any, even: Any, odd: Any) -> Any:
    return builder.or_(builder.shl(odd, _every(16)), builder.and_(even, _every(0xFFFF)))


upper_halves = _narrowing(_join_upper)
lower_halves = _narrowing(_join_lower)


@intrinsic  # type: ignore[untyped-decorator]
def widen_one(_context: Any, stored: Any) -> Any:
    """float32 of one stored weight."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        shift = ir.Constant(_WORD, 32 - stored.bitwidth)
        return builder.bitcast(builder.shl(builder.zext(args[0], _WORD), shift), ir.FloatType())

    return types.float32(stored), generate


def magnitude(stored: Any) -> Any:
    """Patterns (32,) without their signs."""
    raise NotImplementedError("compiled code only")


@overload(magnitude)  # type: ignore[untyped-decorator]
def _magnitude(stored: Any) -> Any:
    mask = 2 ** (stored.dtype.bitwidth - 1) - 1

    def clear(stored: Any) -> Any:
        return stored & mask

    return clear


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def amax(bits: Any, n: Any) -> Any:
    """Largest magnitude (float32) of row ``n`` of stored weights; NaN or Inf if it holds one."""
    largest = magnitude(load(bits, n, 0))
    for start in range(BLOCK, bits.shape[1], BLOCK):
        largest = larger(largest, magnitude(load(bits, n, start)))
    return widen_one(largest_lane(largest))


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def absmax_scale(largest: Any, end: Any, clips: Any) -> Any:
    """See ``scales.absmax_scales``."""
    if largest == 0:
        return np.float32(1)
    scale = largest / end
    if largest / scale > clips:
        return np.nextafter(scale, np.float32(np.inf))
    if np.isinf(scale * end):
        return np.nextafter(scale, np.float32(0))
    return scale


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def invertible(bits: Any, divisor: Any, largest: Any) -> Any:
    """Whether ``quotient`` may use the reciprocal for stored weights up to ``largest``."""
    narrow = FUSES and bits.itemsize == 2
    return narrow and 2.0**-90 <= divisor <= 2.0**90 and largest <= divisor * np.float32(2.0**20)


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def quotient(values: Any, divisor: Any, reciprocal: Any) -> Any:
    """float32(values / divisor), rounded half to even; ``reciprocal``: float32(1 / divisor), or None to divide.

    With the reciprocal: a first guess, its exact remainder, and the guess corrected by it. For values of 8 significant
    bits this is the rounded quotient, by trial of all 2**7 mantissas of values with all 2**23 of divisors; powers of
    two change nothing where ``invertible`` says so. There the remainder, a multiple of 2**(exponent of value - 47),
    has no bits below float32, unless the value is below 2**-102 and its quotient too small to matter: below 2**-12.
    """
    if reciprocal is None:
        return values / divisor
    guess = values * reciprocal
    return multiply_add(multiply_add(guess, -divisor, values), reciprocal, guess)


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def absolute(values: Any) -> Any:
    """|values|, float32."""
    return reinterpret(reinterpret(values, np.uint32) & 0x7FFFFFFF, np.float32)


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def shortfall(size: Any, codes: Any, unit: Any) -> Any:
    """size - |value of codes| * unit * 2**-120, exact: as float32 patterns, e4m3 bytes are 2**-120 of their value."""
    return size - widen((convert(codes, np.uint16) & 0x7F) << 4) * unit


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def add_squares(sums: Any, values: Any) -> Any:
    """sums + values * values; rounded once where the processor can."""
    return multiply_add(values, values, sums) if FUSES else sums + values * values


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def store_power(power: Any, n: Any, signal: Any, noise: Any, unit: Any) -> None:
    """``power[n]`` from lanes of sums that were taken in units of ``unit``."""
    square = np.float64(unit) * np.float64(unit)
    power[n, 0] = total(signal) * square
    power[n, 1] = total(noise) * square


class Rounding(NamedTuple):
    """An element as its rounding needs it; the last three are bits of float32 numbers."""

    emax: int
    raise_by: int
    smallest: int
    largest: int
    largest_at_top: int


def rounding(element: Element) -> Rounding:
    smallest, *largest = np.array([2.0**element.emin, element.largest, element.largest_at_top], np.float32).view("i4")
    return Rounding(element.emax, (23 - element.mantissa_bits) << 23, int(smallest), *map(int, largest))


E4M3_ROUNDING, E2M1_ROUNDING = rounding(E4M3), rounding(E2M1)


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def nearest(values: Any, element: Any, largest: Any) -> Any:
    """e4m3 bytes and magnitudes (float32) of the elements nearest to float32 values: half to even, at most ``largest``
    (bits), zeros without a sign."""
    clamped = smaller(reinterpret(values, np.int32) & 0x7FFFFFFF, largest)
    field = larger(clamped & 0x7F800000, element.smallest)
    magic = reinterpret(field + element.raise_by, np.float32)
    rounded = (reinterpret(clamped, np.float32) + magic) - magic
    code = upper_halves(reinterpret(rounded * np.float32(2.0**-120), np.uint32)) >> 4
    return _signed(code, upper_halves(reinterpret(values, np.uint32))), rounded


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _signed(code: Any, pattern: Any) -> Any:
    """Bytes of codes (32,) uint16 with the signs of 16-bit patterns, except at zeros."""
    return convert(where(code > 0, code | ((pattern >> 8) & 0x80), 0), np.uint8)


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _scaled(pattern: Any, byte: Any, largest: Any) -> Any:
    """Patterns (32,) int16 of |BF16 weight| / 2**(byte - 127) with exponent bias 7, at most ``largest`` (bits).

    Below the smallest normal of e4m3 the field is 0 or negative, above the true mantissa.
    """
    return smaller(reinterpret(pattern & 0x7FFF, np.int16) - ((byte - 7) << 7), (largest >> 16) - (120 << 7))


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def e4m3(pattern: Any, byte: Any, largest: Any) -> Any:
    """What ``nearest`` gives for BF16 weights / 2**(byte - 127), as e4m3 bytes.

    ``byte``: at least 12, so that subnormal weights, whose mantissa is read wrongly, are zero.
    A normal result keeps 3 of 7 mantissa bits. A subnormal one is the mantissa with its leading one, shifted by 5
    at exponent field 0 and one more for each step below: from 9 on that is less than half. Both are brought to
    where 9 bits are cut off; no bit is lost on the way unless the result is zero.
    """
    scaled = _scaled(pattern, byte, largest)
    places = smaller(reinterpret(0 - (scaled >> 7), np.uint16), 15)
    bits = reinterpret(scaled, np.uint16)
    subnormal = (((bits & 0x7F) | 0x80) << 4) >> places
    spread = where(scaled < 128, subnormal, bits << 5)
    return _signed((spread + (((spread >> 9) & 1) + 255)) >> 9, pattern)


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def e2m1(pattern: Any, byte: Any, largest: Any) -> Any:
    """What ``nearest`` gives for BF16 weights / 2**(byte - 127), as e2m1; ``byte``: as ``e4m3``.

    From 1 on, one mantissa bit is kept. Below, 0.75 and more is 1, more than 0.25 is 0.5; the rest is zero.
    """
    scaled = _scaled(pattern, byte, largest)
    normal = reinterpret(where(scaled < 832, 768, larger(scaled, 896)), np.uint16)
    code = ((normal + (((normal >> 6) & 1) + 31)) >> 6) << 2
    return _signed(where(scaled > 640, code, 0), pattern)
