"""Compiled CPU kernel of INT8: from the stored bits of rows to codes, scales and error, in one pass over the cache.

Adding 1.5 * 2**23 to a float32 of magnitude below 2**22 leaves no fraction bits: the processor's own rounding (half to
even) has rounded to an integer, whose two's complement now sits in the low bits of the pattern.

Error sums go through 32 accumulators in a fixed order: the same figures for any vector width, thread count or split
into blocks of rows.
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
    convert,
    in_whole_blocks,
    larger,
    load,
    reinterpret,
    repeat,
    smaller,
    store,
)
from omni_convert.formats.rounding import (
    absmax_scale,
    add_squares,
    amax,
    invertible,
    lower_halves,
    quotient,
    store_power,
    widen,
)

ROUND = np.float32(12582912.0)  # 1.5 * 2**23
_ROUND_BITS = 0x4B400000


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _row(bits: Any, n: Any, codes: Any, step: Any, reciprocal: Any, power: Any, lowest: Any) -> None:
    """Codes of row ``n``, and ``power[n]``; sums are taken in units of the step. ``lowest``: None if nothing clips."""
    signal = repeat(np.float32(0))
    noise = repeat(np.float32(0))
    for start in range(0, bits.shape[1], BLOCK):
        value = quotient(widen(load(bits, n, start)), step, reciprocal)
        rounded = value + ROUND
        if lowest is not None:
            clamped = smaller(larger(reinterpret(rounded, np.int32), _ROUND_BITS + lowest), _ROUND_BITS + 127)
            rounded = reinterpret(clamped, np.float32)
        store(codes, n, start, convert(lower_halves(reinterpret(rounded, np.uint32)), np.int8))
        if power is not None:
            error = value - (rounded - ROUND)
            signal = add_squares(signal, value)
            noise = add_squares(noise, error)
    if power is not None:
        store_power(power, n, signal, noise, step)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _int8_rows(bits: Any, codes: Any, scale: Any, power: Any) -> int:
    for n in range(len(bits)):
        largest = amax(bits, n)
        if not np.isfinite(largest):
            return n
        step = absmax_scale(largest, np.float32(127), np.float32(127.5))
        scale[n, 0] = step
        if invertible(bits, step, largest):
            _row(bits, n, codes, step, np.float32(1) / step, power, None)
        else:  # the scale may be subnormal and so coarse that a quotient comes to 127.5
            _row(bits, n, codes, step, None, power, -127)
    return -1


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _int8_codes(bits: Any, codes: Any, scale: Any, power: Any, lowest: Any) -> int:
    for n in range(len(bits)):
        largest = amax(bits, n)
        if not np.isfinite(largest):
            return n
        if invertible(bits, scale[n, 0], largest):
            _row(bits, n, codes, scale[n, 0], np.float32(1) / scale[n, 0], power, lowest)
        else:
            _row(bits, n, codes, scale[n, 0], None, power, lowest)
    return -1


def int8_rows(
    bits: NDArray[Any], codes: NDArray[np.int8], scale: NDArray[np.float32], power: NDArray[np.float64] | None
) -> int:
    """Quantize ``bits`` (n, K) into ``codes`` (n, K) and ``scale`` (n, 1); see ``Format.quantize_rows``.

    Returns the first row that holds NaN or Inf, or -1.
    """
    return int(in_whole_blocks(_int8_rows, bits, codes, scale, power))


def int8_codes(
    bits: NDArray[Any],
    codes: NDArray[np.int8],
    scale: NDArray[np.float32],
    power: NDArray[np.float64] | None,
    lowest: int,
) -> int:
    """clamp(round_half_even(w / scale), ``lowest``, 127) of ``bits`` (n, K) into ``codes`` (n, K).

    ``scale``: (n, 1), given, such that no weight is beyond 2**21 of its scale. Else as ``int8_rows``.
    """
    return int(in_whole_blocks(_int8_codes, bits, codes, scale, power, lowest))
