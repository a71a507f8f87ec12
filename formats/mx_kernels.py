"""Compiled CPU kernels of the MX formats, with the arithmetic of ``rounding``.

A block's element codes depend on its weights' bits and its byte only: quotients by powers of two are exact.
Error sums go through 32 accumulators in a fixed order, in units of the row's largest scale, so that nothing overflows:
the same figures for any vector width, thread count or split into blocks of rows.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from omni_convert.formats.lanes import (
    BLOCK,
    INLINE,
    OPTIONS,
    in_whole_blocks,
    larger,
    largest_lane,
    load,
    repeat,
    store,
)
from omni_convert.formats.microscaling import E4M3, Element
from omni_convert.formats.rounding import (
    E2M1_ROUNDING,
    E4M3_ROUNDING,
    add_squares,
    e2m1,
    e4m3,
    magnitude,
    nearest,
    shortfall,
    store_power,
    widen,
    widen_one,
)

_BLOCKS = 16
"""How many share a coarse scale."""
LOWEST = 12
"""The smallest byte that ``e4m3`` and ``e2m1`` take."""


@intrinsic  # type: ignore[untyped-decorator]
def _as_float(_context: Any, bits: Any) -> Any:
    """The float32 that the low 32 bits of an integer spell."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = args[0] if bits.bitwidth == 32 else builder.trunc(args[0], ir.IntType(32))
        return builder.bitcast(word, ir.FloatType())

    return types.float32(bits), generate


@intrinsic  # type: ignore[untyped-decorator]
def _as_bits(_context: Any, value: Any) -> Any:
    """The pattern of a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(value), generate


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def scale_byte(largest: Any, emax: Any, carry: Any) -> Any:
    """e8m0 byte of a block, from its largest magnitude (float32); ``carry``: see ``carry_of``."""
    return max(((_as_bits(largest) + carry) >> 23) - emax, 0)


def carry_of(element: Element, rule: str) -> int:
    """What carries a mantissa into the exponent, from the rule's threshold on."""
    return (1 << 23) - element.threshold(rule)


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def power_of_two(exponent: Any) -> Any:
    """2**exponent in float32 for -127 to 127."""
    return _as_float(np.int32(1 << 22)) if exponent == -127 else _as_float(np.int32((exponent + 127) << 23))


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _float_codes(stored: Any, byte: Any, element: Any) -> Any:
    largest = element.largest if byte <= 254 - element.emax else element.largest_at_top
    return nearest(widen(stored) * power_of_two(127 - byte), element, largest)[0]


def _codes(stored: Any, byte: Any, element: Any) -> Any:
    """e4m3 bytes (32,) of a block of stored weights with a scale byte."""
    raise NotImplementedError("compiled code only")


@overload(_codes)  # type: ignore[untyped-decorator]
def _choose_codes(stored: Any, byte: Any, element: Any) -> Any:
    def of_bf16(stored: Any, byte: Any, element: Any) -> Any:
        if byte < LOWEST or byte > 254 - element.emax:
            return _float_codes(stored, byte, element)
        if element.emax == E4M3_ROUNDING.emax:
            return e4m3(stored, byte, element.largest)
        return e2m1(stored, byte, element.largest)

    def of_float32(stored: Any, byte: Any, element: Any) -> Any:
        return _float_codes(stored, byte, element)

    return of_bf16 if stored.dtype == types.uint16 else of_float32


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _mx_rows(bits: Any, codes: Any, scale: Any, power: Any, carry: Any, element: Any) -> int:
    """Quantize rows; returns the first row that holds NaN or Inf, or -1. ``carry``: None if scales are given.

    Bytes first: a block's maximum takes long to come, and the processor looks only a few blocks ahead.
    """
    for n in range(len(bits)):
        sizes = magnitude(load(bits, n, 0))
        for block in range(scale.shape[1]):
            block_sizes = magnitude(load(bits, n, block * BLOCK))
            sizes = larger(sizes, block_sizes)
            if carry is not None:
                scale[n, block] = scale_byte(widen_one(largest_lane(block_sizes)), element.emax, carry)
        largest = widen_one(largest_lane(sizes))
        if not np.isfinite(largest):
            return n
        row_byte = scale_byte(largest, element.emax, 1 << 23)
        inverse = power_of_two(127 - row_byte)
        signal = repeat(np.float32(0))
        noise = repeat(np.float32(0))
        for block in range(scale.shape[1]):
            stored, byte = load(bits, n, block * BLOCK), np.int64(scale[n, block])
            found = _codes(stored, byte, element)
            store(codes, n, block * BLOCK, found)
            if power is not None:
                size = widen(magnitude(stored)) * inverse
                error = shortfall(size, found, power_of_two(max(120 + byte - row_byte, -127)))
                signal = add_squares(signal, size)
                noise = add_squares(noise, error)
        if power is not None:
            store_power(power, n, signal, noise, power_of_two(row_byte - 127))
    return -1


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _mxfp8_rows(bits: Any, codes: Any, scale: Any, power: Any, carry: Any) -> Any:
    return _mx_rows(bits, codes, scale, power, carry, E4M3_ROUNDING)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _mxfp4_rows(bits: Any, codes: Any, scale: Any, power: Any, carry: Any) -> Any:
    return _mx_rows(bits, codes, scale, power, carry, E2M1_ROUNDING)


def mx_rows(
    bits: NDArray[Any],
    codes: NDArray[np.uint8],
    scale: NDArray[np.uint8],
    power: NDArray[np.float64] | None,
    element: Element,
    rule: str | None,
) -> int:
    """Quantize ``bits`` (n, K; uint16 BF16 or uint32 F32) into e4m3 bytes (n, K) and e8m0 bytes (n, ceil(K / 32)).

    ``rule``: None if ``scale`` is given. Returns the first row that holds NaN or Inf, or -1.
    """
    kernel = _mxfp8_rows if element == E4M3 else _mxfp4_rows
    carry = None if rule is None else carry_of(element, rule)
    return int(in_whole_blocks(kernel, bits, codes, scale, power, carry))
