"""Triton kernels: activations to codes in one pass over memory, and INT8 products with scales and bias at the end.

Imported only where Triton is installed. Each gives the bits of a definition elsewhere (``reference``,
``microscaling``), for which three habits must be kept away: ``/`` is approximate (hence ``div_rn``), a product and a
sum may be contracted into one rounding (``enable_fp_fusion=False`` at every launch), and ``max`` loses NaN (hence
magnitudes as integers, among which Inf and NaN are the largest). A number of rows that the compiler took for a constant
would have it compile again for a prompt of another length (hence ``do_not_specialize``).
"""

from __future__ import annotations

import triton
import triton.language as tl

_HIDDEN = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding it to a float32 below 2**22 leaves no bits for a fraction, so the sum is rounded half to even."""
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_MANTISSA = tl.constexpr(0x007FFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _encode(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 -> int8 or e4m3, half to even."""
    if dtype == tl.int8:
        value = (value + _HIDDEN) - _HIDDEN
    return value.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _finite(top: tl.tensor, smallest: tl.constexpr) -> tl.tensor:
    """The magnitude with these bits, at least ``smallest``; NaN if it is not finite."""
    amax = tl.maximum(top.to(tl.float32, bitcast=True), smallest)
    return tl.where(top < _INFINITY, amax, float("nan"))


@triton.jit  # type: ignore[untyped-decorator]
def quantize_rows(
    x: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    largest: tl.constexpr,
    smallest: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """``reference.quantize_rows`` into int8, ``reference.quantize_groups`` of whole rows into e4m3. Grid: (M,)."""
    row = tl.program_id(0).to(tl.int64)
    bits = tl.zeros((block,), tl.int32)
    for start in range(0, columns, block):
        k = start + tl.arange(0, block)
        value = tl.load(x + row * row_stride + k, mask=k < columns, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, value.to(tl.int32, bitcast=True) & _MAGNITUDE)
    amax = _finite(tl.max(bits, axis=0), smallest)
    tl.store(scale + row, tl.div_rn(amax, largest))
    inverse = tl.div_rn(largest, amax)
    for start in range(0, columns, block):  # again, now from a cache
        k = start + tl.arange(0, block)
        value = tl.load(x + row * row_stride + k, mask=k < columns, other=0.0).to(tl.float32)
        tl.store(codes + row * columns + k, _encode(value * inverse, codes.dtype.element_ty), mask=k < columns)


@triton.jit(do_not_specialize=["scale_stride"])  # type: ignore[untyped-decorator]
def quantize_groups(
    x: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    scale_stride: tl.tensor,
    largest: tl.constexpr,
    smallest: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """``reference.quantize_groups``; columns of ``scale`` are ``scale_stride`` apart. Grid: (M, ceil(K / block))."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * block + tl.arange(0, block)
    groups = tl.program_id(1) * (block // size) + tl.arange(0, block // size)
    value = tl.load(x + row * row_stride + k, mask=k < columns, other=0.0).to(tl.float32)
    value = tl.reshape(value, (block // size, size))
    amax = _finite(tl.max(value.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=1), smallest)
    tl.store(scale + row + groups.to(tl.int64) * scale_stride, tl.div_rn(amax, largest), mask=groups * size < columns)
    code = _encode(value * tl.div_rn(largest, amax)[:, None], codes.dtype.element_ty)
    tl.store(codes + row * columns + k, tl.reshape(code, (block,)), mask=k < columns)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def quantize_mx(
    x: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    block: tl.constexpr,
) -> None:
    """``microscaling.quantize_blocks`` of e4m3 by rule ``rceil``, scales as ``cuda_mx.swizzle`` lays them out.

    The bytes that pad ``scale`` become zeros: they multiply nothing, but a NaN there would. A block with a NaN or an
    Inf gets byte 255, which is a NaN. Grid: (rows, padded to 128; ceil(columns / block)). ``block``: a multiple of 128.
    """
    row = tl.program_id(0)
    k = tl.program_id(1) * block + tl.arange(0, block)
    inside = k < tl.where(row < rows, columns, 0)
    value = tl.load(x + row.to(tl.int64) * row_stride + k, mask=inside, other=0.0).to(tl.float32)
    value = tl.reshape(value, (block // 32, 32))
    top = tl.max(value.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=1)
    one_more = ((top & _MANTISSA) > 0x00600000).to(tl.int32)  # a mantissa above 1.75
    byte = tl.maximum((top >> 23) - 8 + one_more, 0)
    inverse = ((254 - byte) << 23).to(tl.float32, bitcast=True)
    byte = tl.where(top < _INFINITY, byte, 255)
    code = (value * inverse[:, None]).to(codes.dtype.element_ty)
    tl.store(codes + row.to(tl.int64) * columns + k, tl.reshape(code, (block,)), mask=inside)
    tiles = (columns + 127) // 128
    groups = tl.program_id(1) * (block // 32) + tl.arange(0, block // 32)
    tile = (row // 128).to(tl.int64) * tiles + groups // 4
    place = tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + groups % 4
    tl.store(scale + place, byte.to(tl.uint8), mask=groups < tiles * 4)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def int8_linear(
    codes: tl.tensor,
    row_scale: tl.tensor,
    weight: tl.tensor,
    channel_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    columns: tl.tensor,
    weight_stride: tl.tensor,
    has_bias: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
) -> None:
    """``reference.reference_linear`` from codes on. Grid: (ceil(M / block_m) * ceil(N / block_n),).

    ``group_m`` tiles of rows take turns before the next tile of channels, so that both operands stay in the L2 cache.
    """
    tiles_m, tiles_n = tl.cdiv(rows, block_m), tl.cdiv(channels, block_n)
    tile, span = tl.program_id(0), group_m * tiles_n
    first_m = tile // span * group_m
    height = tl.minimum(tiles_m - first_m, group_m)
    m = (first_m + tile % span % height) * block_m + tl.arange(0, block_m)
    n = (tile % span // height) * block_n + tl.arange(0, block_n)
    k = tl.arange(0, block_k)
    # Tiles that reach over the edge read rows from the start again, which is cheaper than a mask and never stored.
    a = codes + (m % rows).to(tl.int64)[:, None] * columns + k[None, :]
    b = weight + (n % channels).to(tl.int64)[None, :] * weight_stride + k[:, None]
    total = tl.zeros((block_m, block_n), tl.int32)
    for start in range(0, columns, block_k):
        left = columns - start
        total = tl.dot(
            tl.load(a, mask=k[None, :] < left, other=0),
            tl.load(b, mask=k[:, None] < left, other=0),
            total,
            out_dtype=tl.int32,
        )
        a += block_k
        b += block_k
    y = total.to(tl.float32) * tl.load(channel_scale + n, mask=n < channels, other=0.0)[None, :]
    y = y * tl.load(row_scale + m, mask=m < rows, other=0.0)[:, None]
    if has_bias:
        y = y + tl.load(bias + n, mask=n < channels, other=0.0).to(tl.float32)[None, :]
    place = out + m.to(tl.int64)[:, None] * channels + n[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < channels)[None, :])
