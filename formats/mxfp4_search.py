"""Compiled CPU kernel of ``search.mxfp4_scales``: the same bytes, of stored BF16 (uint16) or float32 (uint32) rows."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from omni_convert.formats import search
from omni_convert.formats.lanes import BLOCK, INLINE, OPTIONS, largest_lane, load, whole_blocks
from omni_convert.formats.microscaling import E2M1
from omni_convert.formats.mx_kernels import carry_of, power_of_two, scale_byte
from omni_convert.formats.rounding import E2M1_ROUNDING, amax, magnitude, nearest, widen, widen_one
from omni_convert.formats.search_lanes import truncated, wide_sum

_LOWEST, _HIGHEST = (np.float32(end) for end in search.SEARCHABLE)
_UNIT = np.float32(search.MXFP4_UNIT)
_EVEN = carry_of(E2M1, "even")


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _cost(stored: Any, byte: Any) -> Any:
    sizes = widen(magnitude(stored)) * power_of_two(127 - byte)
    error = (sizes - nearest(sizes, E2M1_ROUNDING, E2M1_ROUNDING.largest)[1]) * _UNIT
    return wide_sum(truncated(error * error))


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _mxfp4_scales(bits: Any, scale: Any) -> int:
    for n in range(len(bits)):
        if not np.isfinite(amax(bits, n)):
            return n
        for block in range(scale.shape[1]):
            stored = load(bits, n, block * BLOCK)
            largest = widen_one(largest_lane(magnitude(stored)))
            if _LOWEST <= largest <= _HIGHEST:
                byte = scale_byte(largest, E2M1_ROUNDING.emax, 0)
                scale[n, block] = byte + (4 * _cost(stored, byte + 1) < _cost(stored, byte))
            else:
                scale[n, block] = scale_byte(largest, E2M1_ROUNDING.emax, _EVEN)
    return -1


def mxfp4_scales(bits: NDArray[Any], scale: NDArray[np.uint8]) -> int:
    """e8m0 bytes (n, ceil(K / 32)) of ``bits`` (n, K). Returns the first row that holds NaN or Inf, or -1."""
    return int(_mxfp4_scales(whole_blocks(bits), scale))
