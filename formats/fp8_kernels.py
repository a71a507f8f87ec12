"""Compiled CPU kernels of FP8 (e4m3) with float32 scales, one per row or one per block.

code = e4m3(w / scale): true division in float32, clamped to 448, rounded half to even, zeros without a sign.
``bits``: (n, K) stored weights, uint16 BF16 or uint32 F32. Scales are positive and finite. Error sums as in
``kernels``, in units of the largest scale.
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
    whole_blocks,
    whole_tiles,
)
from omni_convert.formats.rounding import (
    E4M3_ROUNDING,
    absmax_scale,
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

_END, _CLIPS = np.float32(448), np.float32(464)


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _divided(bits: Any, n: Any, codes: Any, span: Any, step: Any, reciprocal: Any, wanted: Any) -> Any:
    """Codes of the columns of ``span`` of row ``n``; their sums in units of the step, unless ``wanted`` is None."""
    signal = repeat(np.float32(0))
    noise = repeat(np.float32(0))
    for start in range(span[0], span[1], BLOCK):
        value = quotient(widen(load(bits, n, start)), step, reciprocal)
        found, rounded = nearest(value, E4M3_ROUNDING, E4M3_ROUNDING.largest)
        store(codes, n, start, found)
        if wanted is not None:
            signal = add_squares(signal, value)
            noise = add_squares(noise, absolute(value) - rounded)
    return signal, noise


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _part(bits: Any, n: Any, codes: Any, span: Any, step: Any, largest: Any, wanted: Any) -> Any:
    """``_divided`` by the quickest way that is exact for weights up to ``largest``."""
    if invertible(bits, step, largest):
        return _divided(bits, n, codes, span, step, np.float32(1) / step, wanted)
    return _divided(bits, n, codes, span, step, None, wanted)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _row_maxima(bits: Any, maxima: Any) -> None:
    for n in range(len(bits)):
        maxima[n] = amax(bits, n)


def row_maxima(bits: NDArray[Any]) -> NDArray[np.float32]:
    """Largest magnitude of every row of ``bits`` (n, K), not empty; NaN or Inf if one of them is."""
    maxima = np.empty(len(bits), np.float32)
    _row_maxima(whole_blocks(bits), maxima)
    return maxima


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _fp8_shared(bits: Any, codes: Any, scale: Any, power: Any, largest: Any) -> None:
    for n in range(len(bits)):
        signal, noise = _part(bits, n, codes, (0, bits.shape[1]), scale, largest, power)
        if power is not None:
            store_power(power, n, signal, noise, scale)


def fp8_shared(
    bits: NDArray[Any],
    codes: NDArray[np.uint8],
    scale: np.float32,
    power: NDArray[np.float64] | None,
    largest: np.float32,
) -> None:
    """Quantize ``bits`` (n, K) into e4m3 bytes (n, K) with one scale; ``largest``: no weight is larger."""
    in_whole_blocks(_fp8_shared, bits, codes, scale, power, largest)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _fp8_rows(bits: Any, codes: Any, scale: Any, power: Any, given: Any) -> Any:
    for n in range(len(bits)):
        largest = amax(bits, n)
        if not np.isfinite(largest):
            return n
        if not given:
            scale[n] = absmax_scale(largest, _END, _CLIPS)
        signal, noise = _part(bits, n, codes, (0, bits.shape[1]), scale[n], largest, power)
        if power is not None:
            store_power(power, n, signal, noise, scale[n])
    return -1


def fp8_rows(
    bits: NDArray[Any],
    codes: NDArray[np.uint8],
    scale: NDArray[np.float32],
    power: NDArray[np.float64] | None,
    *,
    given: bool,
) -> int:
    """Quantize ``bits`` (n, K) into e4m3 bytes (n, K) with one ``scale`` (n,) per row, chosen here unless ``given``.

    Returns the first row that holds NaN or Inf, or -1.
    """
    return int(in_whole_blocks(_fp8_rows, bits, codes, scale, power, given))


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _block_amax(bits: Any, top: Any, bottom: Any, width: Any, sizes: Any, maxima: Any) -> None:
    """Largest magnitudes of the blocks of ``bits[top:bottom]``, row by row as they lie in memory.

    ``sizes``: space (1, 32 * blocks) for patterns.
    """
    sizes[:] = 0
    for n in range(top, bottom):
        for block in range(len(maxima)):
            largest = load(sizes, 0, block * BLOCK)
            for start in range(block * width, min((block + 1) * width, bits.shape[1]), BLOCK):
                largest = larger(largest, magnitude(load(bits, n, start)))
            store(sizes, 0, block * BLOCK, largest)
    for block in range(len(maxima)):
        maxima[block] = widen_one(largest_lane(load(sizes, 0, block * BLOCK)))


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _block_row(bits: Any, n: Any, codes: Any, scale: Any, maxima: Any, power: Any, width: Any) -> None:
    """Codes of row ``n``, and ``power[n]``, with the scales and largest magnitudes (ceil(K / width),) of its blocks."""
    unit = scale.max()
    signal = repeat(np.float32(0))
    noise = repeat(np.float32(0))
    for block in range(len(scale)):
        span = block * width, min((block + 1) * width, bits.shape[1])
        sums = _part(bits, n, codes, span, scale[block], maxima[block], power)
        if power is not None:
            share = scale[block] / unit
            signal = signal + sums[0] * (share * share)
            noise = noise + sums[1] * (share * share)
    if power is not None:
        store_power(power, n, signal, noise, unit)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _fp8_block_rows(bits: Any, codes: Any, scale: Any, power: Any, tall: Any, width: Any, given: Any) -> Any:
    maxima = np.empty(scale.shape[1], np.float32)
    sizes = np.empty((1, scale.shape[1] * BLOCK), bits.dtype)
    for i in range(scale.shape[0]):
        top, bottom = i * tall, min((i + 1) * tall, len(bits))
        _block_amax(bits, top, bottom, width, sizes, maxima)
        if not given:
            for block in range(len(maxima)):
                scale[i, block] = absmax_scale(maxima[block], _END, _CLIPS)
        if not np.all(np.isfinite(maxima)):
            for n in range(top, bottom):
                if not np.isfinite(amax(bits, n)):
                    return n
        for n in range(top, bottom):
            _block_row(bits, n, codes, scale[i], maxima, power, width)
    return -1


def fp8_block_rows(
    bits: NDArray[Any],
    codes: NDArray[np.uint8],
    scale: NDArray[np.float32],
    power: NDArray[np.float64] | None,
    block: tuple[int, int],
    *,
    given: bool,
) -> int:
    """Quantize ``bits`` (n, K) into e4m3 bytes (n, K) with one ``scale`` (ceil(n / bn), ceil(K / bk)) per block of
    (bn, bk), chosen here unless ``given``.

    Returns the first row that holds NaN or Inf, or -1.
    """
    tall, width = block
    if width % BLOCK == 0:
        return int(in_whole_blocks(_fp8_block_rows, bits, codes, scale, power, tall, width, given))
    tiles = whole_tiles(bits, width)
    found = np.empty(tiles.shape, np.uint8)
    row = _fp8_block_rows(tiles, found, scale, power, tall, tiles.shape[1] // scale.shape[1], given)
    codes[...] = found.reshape(len(bits), scale.shape[1], -1)[:, :, :width].reshape(len(bits), -1)[:, : bits.shape[1]]
    return int(row)
