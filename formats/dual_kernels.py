"""Compiled CPU kernels of dual-scale MXFP4: from the stored bits of rows to codes, both scales and error.

Error sums go through 32 accumulators in a fixed order, in units of the row's coarse scale.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
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
from omni_convert.formats.microscaling import E2M1
from omni_convert.formats.mx_kernels import carry_of, power_of_two, scale_byte
from omni_convert.formats.rounding import (
    E2M1_ROUNDING,
    absolute,
    add_squares,
    amax,
    invertible,
    magnitude,
    nearest,
    quotient,
    store_power,
    widen,
    widen_one,
)

_BLOCKS = 16
"""How many share a coarse scale."""


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _dual_group(bits: Any, n: Any, span: Any, codes: Any, fine: Any, coarse: Any, reciprocal: Any, wanted: Any) -> Any:
    """Codes of a group, the blocks of ``span`` of row ``n``; sums in units of ``coarse``, unless ``wanted`` is None."""
    signal = repeat(np.float32(0))
    noise = repeat(np.float32(0))
    for block in range(span[0], span[1]):
        value, byte = quotient(widen(load(bits, n, block * BLOCK)), coarse, reciprocal), np.int64(fine[n, block])
        end = E2M1_ROUNDING.largest if byte <= 254 - E2M1_ROUNDING.emax else E2M1_ROUNDING.largest_at_top
        found, rounded = nearest(value * power_of_two(127 - byte), E2M1_ROUNDING, end)
        store(codes, n, block * BLOCK, found)
        if wanted is not None:
            signal = add_squares(signal, value)
            noise = add_squares(noise, absolute(value) - rounded * power_of_two(byte - 127))
    return signal, noise


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _group(bits: Any, n: Any, span: Any, codes: Any, fine: Any, coarse: Any, largest: Any, wanted: Any) -> Any:
    """``_dual_group`` by the quickest way that is exact for weights up to ``largest``."""
    if invertible(bits, coarse, largest):
        return _dual_group(bits, n, span, codes, fine, coarse, np.float32(1) / coarse, wanted)
    return _dual_group(bits, n, span, codes, fine, coarse, None, wanted)


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _dual_scales(bits: Any, n: Any, span: Any, fine: Any, maxima: Any, carry: Any) -> Any:
    """Bytes of a group, its step and its largest magnitude. ``maxima``: space for 16.

    Division rounds monotonically: the largest quotient is the quotient of the largest.
    """
    sizes = magnitude(load(bits, n, span[0] * BLOCK))
    for block in range(span[0], span[1]):
        block_sizes = magnitude(load(bits, n, block * BLOCK))
        sizes = larger(sizes, block_sizes)
        maxima[block - span[0]] = widen_one(largest_lane(block_sizes))
    largest = widen_one(largest_lane(sizes))
    step = _step(largest)
    for block in range(span[0], span[1]):
        fine[n, block] = scale_byte(maxima[block - span[0]] / step, E2M1_ROUNDING.emax, carry)
    return step, largest


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _dual_rows(bits: Any, codes: Any, fine: Any, coarse: Any, power: Any, carry: Any) -> Any:
    """Quantize rows; returns the first row that holds NaN or Inf, or -1."""
    maxima = np.empty(_BLOCKS, np.float32)
    for n in range(len(bits)):
        signal = repeat(np.float32(0))
        noise = repeat(np.float32(0))
        row_step = np.float32(1) if power is None else _step(amax(bits, n))
        for group in range(coarse.shape[1]):
            span = group * _BLOCKS, min((group + 1) * _BLOCKS, fine.shape[1])
            step, largest = _dual_scales(bits, n, span, fine, maxima, carry)
            if not np.isfinite(largest):
                return n
            coarse[n, group] = step
            sums = _group(bits, n, span, codes, fine, step, largest, power)
            if power is not None and largest > 0:  # a group of zeros has step 1
                share = step / row_step
                signal = signal + sums[0] * (share * share)
                noise = noise + sums[1] * (share * share)
        if power is not None:
            store_power(power, n, signal, noise, row_step)
    return -1


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _step(largest: Any) -> Any:
    """Coarse scale of a group, from its largest magnitude."""
    step = largest / np.float32(6)
    return step if step != 0 else np.float32(1)


def dual_rows(
    bits: NDArray[Any],
    codes: NDArray[np.uint8],
    fine: NDArray[np.uint8],
    coarse: NDArray[np.float32],
    power: NDArray[np.float64] | None,
) -> int:
    """Quantize ``bits`` (n, K), K a multiple of 32, into e4m3 bytes (n, K), ``fine`` (n, K / 32) and ``coarse``
    (n, ceil(K / 512)).

    Returns the first row that holds NaN or Inf, or -1.
    """
    return int(in_whole_blocks(_dual_rows, bits, codes, fine, coarse, power, carry_of(E2M1, "even")))


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _dual_codes(bits: Any, codes: Any, fine: Any, coarse: Any, power: Any) -> int:
    for n in range(len(bits)):
        largest = amax(bits, n)
        if not np.isfinite(largest):
            return n
        row_unit = _step(largest)
        signal = repeat(np.float32(0))
        noise = repeat(np.float32(0))
        for group in range(coarse.shape[1]):
            span = group * _BLOCKS, min((group + 1) * _BLOCKS, fine.shape[1])
            scale = coarse[n, group]
            sums = _group(bits, n, span, codes, fine, scale, largest, power)
            share = scale / row_unit
            # More than twice the row's has only the scale 1.0 of a group of zeros or of weights near 2**-149.
            if power is not None and share <= 2:
                signal = signal + sums[0] * (share * share)
                noise = noise + sums[1] * (share * share)
        if power is not None:
            store_power(power, n, signal, noise, row_unit)
    return -1


def dual_codes(
    bits: NDArray[Any],
    codes: NDArray[np.uint8],
    fine: NDArray[np.uint8],
    coarse: NDArray[np.float32],
    power: NDArray[np.float64] | None,
) -> int:
    """The codes alone: ``fine``, at most 254, and ``coarse`` are given. Else as ``dual_rows``."""
    return int(in_whole_blocks(_dual_codes, bits, codes, fine, coarse, power))
