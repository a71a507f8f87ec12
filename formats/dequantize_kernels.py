"""Compiled CPU kernels from codes and scales back to values, the products in the order that the formats state.

``codes``: (n, K) int8 or e4m3 bytes (uint8). ``out``: (n, K), receives the values: float32, or the patterns of BF16 as
uint16, rounded once, half to even.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import overload
from numpy.typing import NDArray

from omni_convert.formats.lanes import (
    BLOCK,
    INLINE,
    OPTIONS,
    convert,
    in_whole_blocks,
    load,
    reinterpret,
    store,
    where,
    whole_tiles,
)
from omni_convert.formats.microscaling import e8m0_values

_NAN = 0x7FC00000
_E8M0 = e8m0_values(np.arange(256, dtype=np.uint8))
_GROUP = 512


def _store_values(out: Any, n: Any, start: Any, values: Any) -> None:
    """float32 (32,) into a row of ``out``, rounded if that holds BF16; any NaN becomes the usual one."""
    raise NotImplementedError("compiled code only")


@overload(_store_values)  # type: ignore[untyped-decorator]
def _choose_store(out: Any, n: Any, start: Any, values: Any) -> Any:
    def store_float32(out: Any, n: Any, start: Any, values: Any) -> None:
        store(out, n, start, values)

    def store_bfloat16(out: Any, n: Any, start: Any, values: Any) -> None:
        bits = reinterpret(values, np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        store(out, n, start, convert(where(is_nan, _NAN >> 16, rounded), np.uint16))

    return store_float32 if out.dtype == types.float32 else store_bfloat16


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def _e4m3_values(codes: Any) -> Any:
    """float32 (32,) of e4m3 bytes (32,): the fields moved, and the exponent's bias from 7 to 127.

    Subnormals count multiples of 2**-9.
    """
    wide = convert(codes, np.uint32)
    size = wide & 0x7F
    small = reinterpret(convert(size, np.float32) * np.float32(2.0**-9), np.uint32)
    bits = where(size < 8, small, (size << 20) + (120 << 23))
    bits = where(size == 0x7F, _NAN, bits)
    return reinterpret(bits | ((wide & 0x80) << 24), np.float32)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _int8_values(codes: Any, out: Any, scale: Any) -> None:
    for n in range(len(codes)):
        step = scale[n, 0]
        for start in range(0, codes.shape[1], BLOCK):
            _store_values(out, n, start, convert(load(codes, n, start), np.float32) * step)


def int8_values(codes: NDArray[np.int8], scale: NDArray[np.float32], out: NDArray[Any]) -> None:
    """code * ``scale[n, 0]``."""
    in_whole_blocks(_int8_values, codes, out, scale)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _mx_values(codes: Any, out: Any, scale: Any) -> None:
    for n in range(len(codes)):
        for block in range(scale.shape[1]):
            step = _E8M0[scale[n, block]]
            _store_values(out, n, block * BLOCK, _e4m3_values(load(codes, n, block * BLOCK)) * step)


def mx_values(codes: NDArray[np.uint8], scale: NDArray[np.uint8], out: NDArray[Any]) -> None:
    """value of the code * 2**(``scale[n, k // 32]`` - 127)."""
    in_whole_blocks(_mx_values, codes, out, scale)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _dual_values(codes: Any, out: Any, fine: Any, coarse: Any, mul: Any) -> None:
    for n in range(len(codes)):
        for block in range(fine.shape[1]):
            start = block * BLOCK
            values = _e4m3_values(load(codes, n, start)) * _E8M0[fine[n, block]]
            _store_values(out, n, start, values * coarse[n, start // _GROUP] * load(mul, 0, start))


def dual_values(
    codes: NDArray[np.uint8],
    fine: NDArray[np.uint8],
    coarse: NDArray[np.float32],
    mul: NDArray[np.float32],
    out: NDArray[Any],
) -> None:
    """value of the code * 2**(``fine[n, k // 32]`` - 127) * ``coarse[n, k // 512]`` * ``mul[k]``; K % 32 = 0."""
    in_whole_blocks(_dual_values, codes, out, fine, coarse, np.ascontiguousarray(mul).reshape(1, -1))


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _fp8_values(codes: Any, out: Any, scale: Any) -> None:
    for n in range(len(codes)):
        step = scale[n]
        for start in range(0, codes.shape[1], BLOCK):
            _store_values(out, n, start, _e4m3_values(load(codes, n, start)) * step)


def fp8_values(codes: NDArray[np.uint8], scale: NDArray[np.float32], out: NDArray[Any]) -> None:
    """value of the code * ``scale[n]``."""
    in_whole_blocks(_fp8_values, codes, out, scale)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _fp8_block_values(codes: Any, out: Any, scale: Any, tall: Any, width: Any) -> None:
    for n in range(len(codes)):
        for block in range(scale.shape[1]):
            for start in range(block * width, min((block + 1) * width, codes.shape[1]), BLOCK):
                _store_values(out, n, start, _e4m3_values(load(codes, n, start)) * scale[n // tall, block])


def fp8_block_values(
    codes: NDArray[np.uint8], scale: NDArray[np.float32], out: NDArray[Any], block: tuple[int, int]
) -> None:
    """value of the code * ``scale[n // bn, k // bk]``, (ceil(n / bn), ceil(K / bk)), for blocks of (bn, bk)."""
    tall, width = block
    if width % BLOCK == 0:
        in_whole_blocks(_fp8_block_values, codes, out, scale, tall, width)
        return
    tiles = whole_tiles(codes, width)
    values = np.empty(tiles.shape, out.dtype)
    _fp8_block_values(tiles, values, scale, tall, tiles.shape[1] // scale.shape[1])
    out[...] = values.reshape(len(out), scale.shape[1], -1)[:, :, :width].reshape(len(out), -1)[:, : out.shape[1]]
