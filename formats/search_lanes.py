"""Operations on ``lanes`` that only the search for scales needs."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from omni_convert.formats.lanes import BLOCK, Lanes

_PAIRS = ir.VectorType(ir.IntType(32), BLOCK // 2)


def _select(builder: Any, vector: Any, other: Any, lanes: range) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return builder.shuffle_vector(vector, other, mask)


def _sums_of_pairs(builder: Any, left: Any, right: Any) -> Any:
    """Products of int16 lanes, neighbours added: one instruction (pmaddwd) where the processor has it."""
    wide = ir.VectorType(ir.IntType(32), BLOCK)
    products = builder.mul(*(builder.sext(_opaque(builder, vector), wide) for vector in (left, right)))
    even, odd = (_select(builder, products, products, range(first, BLOCK, 2)) for first in (0, 1))
    return builder.add(even, odd)


def _sum(builder: Any, vector: Any) -> Any:
    lane = vector.type.element
    name = f"llvm.vector.reduce.add.v{vector.type.count}i{lane.width}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(lane, [vector.type]), name)
    return builder.call(function, [vector])


@intrinsic  # type: ignore[untyped-decorator]
def sums_of_pairs(_context: Any, left: Any, right: Any, next_left: Any, next_right: Any) -> Any:
    """int32 lanes: left[2i] * right[2i] + left[2i + 1] * right[2i + 1], 16 of the first two, 16 of the next two.

    All arguments are int16 lanes; a sum must stay below 2**31.
    """

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        first, second = (_sums_of_pairs(builder, *pair) for pair in (args[:2], args[2:]))
        return _select(builder, first, second, range(BLOCK))

    return Lanes(types.int32)(left, right, next_left, next_right), generate


@intrinsic  # type: ignore[untyped-decorator]
def dot(_context: Any, left: Any, right: Any) -> Any:
    """Sum (int32) of the products of int16 lanes; must stay below 2**31."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _sum(builder, _sums_of_pairs(builder, *args))

    return types.int32(left, right), generate


@intrinsic  # type: ignore[untyped-decorator]
def wide_sum(_context: Any, values: Any) -> Any:
    """Sum (int64) of 32-bit lanes."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        extend = builder.sext if values.dtype.signed else builder.zext
        return _sum(builder, extend(args[0], ir.VectorType(ir.IntType(64), BLOCK)))

    return types.int64(values), generate


@intrinsic  # type: ignore[untyped-decorator]
def truncated(_context: Any, values: Any) -> Any:
    """int32 lanes of float32 lanes, rounded toward zero; must be below 2**31."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fptosi(args[0], ir.VectorType(ir.IntType(32), BLOCK))

    return Lanes(types.int32)(values), generate


def _opaque(builder: Any, vector: Any) -> Any:
    """The same 16-bit lanes, of which LLVM may assume nothing.

    It recognizes a product's upper half only between plain extensions and a truncation, which it would otherwise
    turn into wider arithmetic with what it knows of the operands. The fence, meant for floats, is no instruction.
    """
    floats = ir.VectorType(ir.FloatType(), BLOCK // 2)
    name = f"llvm.arithmetic.fence.v{BLOCK // 2}f32"
    fence = cgutils.get_or_insert_function(builder.module, ir.FunctionType(floats, [floats]), name)
    return builder.bitcast(builder.call(fence, [builder.bitcast(vector, floats)]), vector.type)


@intrinsic  # type: ignore[untyped-decorator]
def high_product(_context: Any, left: Any, right: Any) -> Any:
    """Upper half of the products of 16-bit lanes, both signed or both unsigned: one instruction where there is one."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        wide = ir.VectorType(ir.IntType(32), BLOCK)
        extend, shift = (builder.sext, builder.ashr) if left.dtype.signed else (builder.zext, builder.lshr)
        product = builder.mul(*(extend(_opaque(builder, arg), wide) for arg in args))
        upper = shift(product, ir.Constant(wide, [16] * BLOCK))
        return _opaque(builder, builder.trunc(upper, args[0].type))

    return left(left, right), generate


@intrinsic  # type: ignore[untyped-decorator]
def sign(_context: Any, bits: Any) -> Any:
    """The sign bit (uint8) of a stored pattern."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.trunc(builder.lshr(args[0], ir.Constant(args[0].type, bits.bitwidth - 1)), ir.IntType(8))

    return types.uint8(bits), generate
