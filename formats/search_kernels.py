"""Compiled CPU kernels of ``search``: the same scales, bit for bit, of stored BF16 (uint16) or float32 (uint32) rows.

Costs are summed as integers in narrow lanes, which are emptied into int64 before they can overflow: see ``CHUNK``.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from omni_convert.formats import search
from omni_convert.formats.lanes import (
    BLOCK,
    INLINE,
    OPTIONS,
    convert,
    larger,
    largest_lane,
    load,
    reinterpret,
    repeat,
    smaller,
    store,
    where,
    whole_tiles,
)
from omni_convert.formats.microscaling import E2M1
from omni_convert.formats.rounding import absmax_scale, amax, lower_halves, magnitude, widen, widen_one
from omni_convert.formats.search_lanes import (
    dot,
    high_product,
    sign,
    sums_of_pairs,
    truncated,
    wide_sum,
)

_LOWEST, _HIGHEST = (np.float32(end) for end in search.SEARCHABLE)
_ROUND = np.float32(2.0**23)
"""Added to a float32 from 0 to 2**23 it leaves no fraction bits: the processor has rounded half to even."""

_INT8_CHUNK = 8192
"""Weights until int32 lanes are emptied: 128 pairs of costs, each at most 2**14 * (285 + 2**7), stay below 2**31."""
_INT8_COARSE = np.array(search.INT8_COARSE, np.int64)
_INT8_FINE = np.array(search.INT8_FINE, np.int64)
_INT8_CLIPPED = ((127 << 16) + 0x8000) // (max(search.INT8_COARSE) + max(search.INT8_FINE))
"""Weights above this, in units of the lens, clip with some candidate."""

_FP8_CHUNK = 1024
"""As above: 32 squares, each at most (16 * 512)**2 = 2**26, stay below 2**32."""
_FP8_RAISE = np.int32(20 << 23)

_DUAL_EMAX, _DUAL_THRESHOLD = np.int32(E2M1.emax), np.int32(E2M1.threshold("even"))
_DUAL_BLOCKS = search.GROUP // BLOCK
_DUAL_RATIOS = np.repeat(search.DUAL_RATIOS, _DUAL_BLOCKS).reshape(-1, BLOCK)


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _searchable(largest: Any) -> Any:
    return _LOWEST <= largest <= _HIGHEST


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _block_amax(bits: Any, n: Any, start: Any) -> Any:
    """Largest magnitude of a block."""
    return widen_one(largest_lane(magnitude(load(bits, n, start))))


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _store_lens(bits: Any, n: Any, start: Any, unit: Any, lens: Any, place: Any) -> None:
    """round(|weights| * unit) of a block into ``lens`` (1, K) uint16."""
    sizes = widen(magnitude(load(bits, n, start))) * unit
    store(lens, 0, place, lower_halves(reinterpret(sizes + _ROUND, np.uint32)))


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _collect_large(bits: Any, n: Any, lens: Any, sizes: Any, ends: Any) -> Any:
    """Weights that may clip, in units of the lens, and the last code of their sign; returns how many."""
    count = 0
    for start in range(0, lens.shape[1], BLOCK):
        if largest_lane(load(lens, 0, start)) > _INT8_CLIPPED:
            for k in range(start, start + BLOCK):
                if lens[0, k] > _INT8_CLIPPED:
                    sizes[count] = lens[0, k]
                    ends[count] = 127 + sign(bits[n, k])
                    count += 1
    return count


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _clipping(sizes: Any, ends: Any, count: Any, m: Any, best: Any) -> Any:
    """What clipped weights cost beyond what ``_rounding`` takes them for, or enough to be no better than ``best``.

    No weight costs less clipped than rounded, so the sum does not fall.
    """
    total = np.int64(0)
    for i in range(count):
        if np.float64(total) * search.INT8_WEIGHTS[m] >= best:
            break
        value = np.int64(sizes[i]) * m
        excess = value - (np.int64(ends[i]) << 16)
        if excess > 0x8000:
            cell = excess >> search.INT8_CELL
            place = excess & ((1 << search.INT8_CELL) - 1)
            low = search.INT8_TABLE[cell]
            error = ((value + 0x8000) & 0xFFFF) - 0x8000
            square = (error * error) >> 16
            total += low + (((search.INT8_TABLE[cell + 1] - low) * place) >> search.INT8_CELL)
            total -= square * (search.INT8_OFFSET + (square >> search.INT8_SHIFT))
    return total


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _rounding_parts(lens: Any, start: Any, m: Any) -> Any:
    error = reinterpret(load(lens, 0, start) * m, np.int16)
    square = high_product(error, error)
    return square, (square >> search.INT8_SHIFT) + np.int16(search.INT8_OFFSET)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _rounding(lens: Any, m: Any) -> Any:
    """Cost of weights, all as if none clipped; their number is a multiple of 64."""
    total = np.int64(0)
    for chunk in range(0, lens.shape[1], _INT8_CHUNK):
        costs = repeat(np.int32(0))
        for start in range(chunk, min(chunk + _INT8_CHUNK, lens.shape[1]), 2 * BLOCK):
            square, factor = _rounding_parts(lens, start, m)
            next_square, next_factor = _rounding_parts(lens, start + BLOCK, m)
            costs = costs + sums_of_pairs(square, factor, next_square, next_factor)
        total += wide_sum(costs)
    return total


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _int8_best(lens: Any, sizes: Any, ends: Any, count: Any) -> Any:
    """The m that costs least; what clipping alone makes too expensive is not looked at further."""
    best = np.inf
    chosen = 0
    for candidates in (_INT8_COARSE, _INT8_FINE):
        center = chosen
        for offset in candidates:
            m = center + offset
            clipping = _clipping(sizes, ends, count, m, best)
            if np.float64(clipping) * search.INT8_WEIGHTS[m] < best:
                cost = np.float64(_rounding(lens, np.uint16(m)) + clipping) * search.INT8_WEIGHTS[m]
                if cost < best:
                    best = cost
                    chosen = m
    return chosen


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _int8_scales(bits: Any, scale: Any) -> int:
    columns = bits.shape[1]
    lens = np.empty((1, columns), np.uint16)
    sizes = np.empty(columns, np.uint16)
    ends = np.empty(columns, np.uint8)
    for n in range(len(bits)):
        largest = amax(bits, n)
        if not np.isfinite(largest):
            return n
        scale[n] = absmax_scale(largest, np.float32(search.INT8_LARGEST), np.float32(search.INT8_CLIPS))
        if _searchable(largest):
            unit = np.float32(search.INT8_LENS) / scale[n]
            for start in range(0, columns, BLOCK):
                _store_lens(bits, n, start, unit, lens, start)
            count = _collect_large(bits, n, lens, sizes, ends)
            scale[n] *= search.INT8_RATIOS[_int8_best(lens, sizes, ends, count)]
    return -1


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _fp8_costs(sizes: Any, start: Any, stop: Any, unit: Any) -> Any:
    """The rounding: with M = 2**(exponent + 20), one unit in the last place of size + M is a step of e4m3."""
    costs = repeat(np.uint32(0))
    for at in range(start, stop, BLOCK):
        size = load(sizes, 0, at) * unit
        field = reinterpret(size, np.int32) & 0x7F800000
        magic = reinterpret(field + _FP8_RAISE, np.float32)
        error = size - ((size + magic) - magic)
        costs = costs + reinterpret(truncated(error * error), np.uint32)
    return wide_sum(costs)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _fp8_best(sizes: Any, count: Any, unit: Any, totals: Any) -> Any:
    """The candidate that costs least for the first ``count`` of weights ``sizes`` (1, n) float32."""
    totals[:] = 0
    for start in range(0, count, _FP8_CHUNK):
        stop = min(start + _FP8_CHUNK, count)
        for i in range(search.FP8_CANDIDATES):
            totals[i] += _fp8_costs(sizes, start, stop, unit * search.FP8_INVERSES[i])
    chosen = 0
    best = np.inf
    for i in range(search.FP8_CANDIDATES):
        cost = np.float64(totals[i]) * search.FP8_WEIGHTS[i]
        if cost < best:
            best = cost
            chosen = i
    return chosen


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _fp8_tile(bits: Any, top: Any, bottom: Any, left: Any, right: Any, sizes: Any, totals: Any) -> Any:
    """Scale of ``bits[top:bottom, left:right]``."""
    largest = np.float32(0)
    count = 0
    for n in range(top, bottom):
        for start in range(left, right, BLOCK):
            largest = max(largest, _block_amax(bits, n, start))
            store(sizes, 0, count, widen(magnitude(load(bits, n, start))))
            count += BLOCK
    scale = absmax_scale(largest, np.float32(448), np.float32(search.FP8_CLIPS))
    if _searchable(largest):
        scale *= search.FP8_RATIOS[_fp8_best(sizes, count, np.float32(search.FP8_LENS) / scale, totals)]
    return scale


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _fp8_scales(bits: Any, scale: Any, tall: Any, wide: Any) -> int:
    """``scale`` (ceil(n / tall), K / wide)"""
    for n in range(len(bits)):
        if not np.isfinite(amax(bits, n)):
            return n
    sizes = np.empty((1, min(tall, len(bits)) * wide), np.float32)
    totals = np.empty(search.FP8_CANDIDATES, np.int64)
    for i in range(scale.shape[0]):
        bottom = min((i + 1) * tall, len(bits))
        for j in range(scale.shape[1]):
            scale[i, j] = _fp8_tile(bits, i * tall, bottom, j * wide, (j + 1) * wide, sizes, totals)
    return -1


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _e2m1_cost(lens: Any, start: Any, m: Any) -> Any:
    """Cost of a block: 32 times at most 16383 * 4095, below 2**31."""
    value = high_product(load(lens, 0, start), repeat(np.uint16(m)))
    upper = where(value > 16383, repeat(np.uint16(8191)), repeat(np.uint16(4095)))
    cell = where(value > 32767, repeat(np.uint16(16383)), upper)
    inside = value & cell
    distance = larger(smaller(inside, cell - inside), larger(value, 49152) - 49152)
    error = reinterpret(distance, np.int16)
    factor = high_product(error, repeat(np.int16(search.DUAL_SLOPE))) + np.int16(search.DUAL_OFFSET)
    return dot(error, high_product(error, factor))


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _dual_candidates(largest: Any, plain: Any, fine: Any, factor: Any) -> None:
    """``fine`` bytes by rule ``even`` and factors from lens to cost, of 16 blocks (``largest``, twice) by candidate."""
    for pair in range(len(_DUAL_RATIOS)):
        size = load(largest, 0, 0) / (load(_DUAL_RATIOS, pair, 0) * plain)
        bits = reinterpret(size, np.int32)
        one_more = where((bits & 0x7FFFFF) < _DUAL_THRESHOLD, repeat(np.int32(0)), 1)
        byte = larger((bits >> 23) - _DUAL_EMAX + one_more, 0)
        scaled = size * reinterpret((254 - byte) << 23, np.float32)  # by 2**(127 - byte)
        store(fine, 0, pair * BLOCK, convert(byte, np.uint8))
        lens_factor = reinterpret(scaled * np.float32(2.0**13) + _ROUND, np.uint32)
        store(factor, 0, pair * BLOCK, convert(lens_factor, np.uint16))


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _dual_costs(lens: Any, blocks: Any, factors: Any, cost: Any, below: Any, places: Any) -> None:
    """Costs by candidate and block with the even byte, and ``below`` with one less: -1 where that clips too much.

    ``places``: room for a list of the latter, so that no branch has to be guessed.
    """
    factor = factors[0]
    listed = 0
    for place in range(len(factor)):
        below[place] = -1
        places[listed] = place
        listed += (factor[place] > 0) & (factor[place] < 1 << 15)
    for candidate in range(0, len(factor), _DUAL_BLOCKS):
        for block in range(blocks):
            cost[candidate + block] = _e2m1_cost(lens, block * BLOCK, factor[candidate + block])
    for i in range(listed):
        place = places[i]
        below[place] = _e2m1_cost(lens, place % _DUAL_BLOCKS * BLOCK, 2 * factor[place])


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _dual_best(bytes_: Any, cost: Any, below: Any, blocks: Any) -> Any:
    """The candidate that costs least. Decides between ``cost`` and ``below``, and lowers bytes where that pays."""
    chosen = 0
    best = np.inf
    fine = bytes_[0]
    for candidate in range(search.DUAL_CANDIDATES):
        total = np.float64(0)
        for place in range(candidate * _DUAL_BLOCKS, candidate * _DUAL_BLOCKS + blocks):
            even = cost[place] * search.DUAL_FINE_WEIGHTS[fine[place]]
            lower = below[place] * search.DUAL_FINE_WEIGHTS[np.uint8(fine[place] - 1)]
            pays = (below[place] >= 0) & (lower < even)
            fine[place] -= pays
            total += lower if pays else even
        total *= search.DUAL_WEIGHTS[candidate]
        if total < best:
            best = total
            chosen = candidate
    return chosen


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _dual_group(bits: Any, n: Any, first: Any, blocks: Any, fine: Any, room: Any) -> Any:
    """Coarse scale of a group, of blocks from ``first`` on in row ``n``; sets their ``fine`` bytes."""
    lens, largest, bytes_, factor, cost, below, places = room
    largest[:] = 0
    for block in range(blocks):
        largest[0, block] = largest[0, _DUAL_BLOCKS + block] = _block_amax(bits, n, (first + block) * BLOCK)
    group = largest.max()
    plain = group / np.float32(6) if group / np.float32(6) > 0 else np.float32(1)
    _dual_candidates(largest, plain, bytes_, factor)
    chosen = 0
    if _searchable(group):
        for block in range(blocks):
            counts = largest[0, block] >= group * np.float32(search.DUAL_NEGLIGIBLE)
            unit = np.float32(search.DUAL_LENS) / largest[0, block] if counts else np.float32(0)
            _store_lens(bits, n, (first + block) * BLOCK, unit, lens, block * BLOCK)
        _dual_costs(lens, blocks, factor, cost, below, places)
        chosen = _dual_best(bytes_, cost, below, blocks)
    for block in range(blocks):
        fine[n, first + block] = bytes_[0, chosen * _DUAL_BLOCKS + block]
    return plain * search.DUAL_RATIOS[chosen]


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _dual_scales(bits: Any, fine: Any, coarse: Any) -> int:
    places = search.DUAL_CANDIDATES * _DUAL_BLOCKS
    room = (
        np.empty((1, search.GROUP), np.uint16),
        np.empty((1, BLOCK), np.float32),
        np.empty((1, places), np.uint8),
        np.empty((1, places), np.uint16),
        np.empty(places, np.int32),
        np.empty(places, np.int32),
        np.empty(places + 1, np.int64),
    )
    for n in range(len(bits)):
        if not np.isfinite(amax(bits, n)):
            return n
        for group in range(coarse.shape[1]):
            first = group * _DUAL_BLOCKS
            coarse[n, group] = _dual_group(bits, n, first, min(_DUAL_BLOCKS, fine.shape[1] - first), fine, room)
    return -1


def int8_scales(bits: NDArray[Any], scale: NDArray[np.float32]) -> int:
    """Scales (n,) of ``bits`` (n, K). Returns the first row that holds NaN or Inf, or -1."""
    return int(_int8_scales(whole_tiles(bits, bits.shape[1], 2 * BLOCK), scale))


def fp8_row_scales(bits: NDArray[Any], scale: NDArray[np.float32]) -> int:
    """Scales (n,) of ``bits`` (n, K). Returns the first row that holds NaN or Inf, or -1."""
    padded = whole_tiles(bits, bits.shape[1])
    return int(_fp8_scales(padded, scale[:, None], 1, padded.shape[1]))


def fp8_block_scales(bits: NDArray[Any], scale: NDArray[np.float32], block: tuple[int, int]) -> int:
    """Scales (ceil(n / bn), ceil(K / bk)) of blocks (bn, bk) of ``bits`` (n, K). Returns as ``fp8_row_scales``."""
    padded = whole_tiles(bits, block[1])
    return int(_fp8_scales(padded, scale, block[0], padded.shape[1] // scale.shape[1]))


def dual_scales(bits: NDArray[Any], fine: NDArray[np.uint8], coarse: NDArray[np.float32]) -> int:
    """Scales ``fine`` (n, K / 32) and ``coarse`` (n, ceil(K / 512)) of ``bits`` (n, K), K a multiple of 32.

    Returns the first row that holds NaN or Inf, or -1.
    """
    return int(_dual_scales(np.ascontiguousarray(bits), fine, coarse))
