"""Vectors of ``BLOCK`` numbers in compiled functions: what LLVM calls ``<32 x type>``, as a type of Numba.

A kernel that is written with them needs no auto-vectorizer, which gives up at narrow integers and short loops: LLVM
splits every operation into as many registers as the processor needs. Operators work lane by lane; a plain number beside
lanes is repeated and takes their type, so integers stay as narrow as they are. Unsigned lanes shift and compare without
a sign. Nothing is reassociated or contracted: results do not depend on the processor.

``load`` and ``store`` take contiguous arrays (n, K) with an index of the row, since a view of a row would count its
references, and do not look where it ends: ``in_whole_blocks`` pads rows before they come to a kernel.
"""

from __future__ import annotations

import contextlib
import operator
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model
from numpy.typing import NDArray

BLOCK = 32

OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}
INLINE = {**OPTIONS, "forceinline": True}  # lanes stay in registers

_INDEX = ir.IntType(32)


def drop_stale_caches(folder: Path) -> None:
    """Remove indexes of Numba's cache that are older than any source of ``folder``.

    Numba compares a cached kernel with its own file only; functions and constants of other files are compiled into it.
    """
    newest = max(path.stat().st_mtime for path in folder.glob("*.py"))
    for index in (folder / "__pycache__").glob("*.nbi"):
        with contextlib.suppress(OSError):  # another process was first, or the folder is not ours: nor is its cache
            if index.stat().st_mtime < newest:
                index.unlink()


drop_stale_caches(Path(__file__).parent)


class Lanes(types.Type):
    """``BLOCK`` numbers of one type; comparisons give lanes of booleans."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, _vector(lanes))


def _lane(dtype: Any) -> Any:
    if dtype == types.boolean:
        return ir.IntType(1)
    return ir.FloatType() if dtype == types.float32 else ir.IntType(dtype.bitwidth)


def _vector(lanes: Lanes) -> Any:
    return ir.VectorType(_lane(lanes.dtype), BLOCK)


def _splat(builder: Any, value: Any) -> Any:
    """A value in every lane."""
    undefined = ir.Constant(ir.VectorType(value.type, BLOCK), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INDEX, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INDEX, BLOCK), [0] * BLOCK))


def _as_lanes(context: Any, builder: Any, value: Any, kind: Any, lanes: Lanes) -> Any:
    """Lanes as they are, a number repeated; integers wrap."""
    return value if kind == lanes else _splat(builder, context.cast(builder, value, kind, lanes.dtype))


def _first_lanes(*kinds: Any) -> Any:
    return next((kind for kind in kinds if isinstance(kind, Lanes)), None)


def _implement(symbol: Any, operation: Any) -> None:
    """Let an operator of Python call an intrinsic wherever it meets lanes."""

    def apply(left: Any, right: Any) -> Any:
        return operation(left, right)

    @overload(symbol)  # type: ignore[untyped-decorator]
    def choose(left: Any, right: Any) -> Any:
        return apply if _first_lanes(left, right) else None


def _binary(symbol: Any, integer: str, unsigned: str, floating: str) -> None:
    """An operator as the named instruction of LLVM."""

    @intrinsic  # type: ignore[untyped-decorator]
    def operation(_context: Any, left: Any, right: Any) -> Any:
        lanes = _first_lanes(left, right)
        name = floating if lanes.dtype == types.float32 else integer if lanes.dtype.signed else unsigned

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pairs = zip(args, signature.args, strict=True)
            return getattr(builder, name)(*(_as_lanes(context, builder, arg, kind, lanes) for arg, kind in pairs))

        return lanes(left, right), generate

    _implement(symbol, operation)


_binary(operator.add, "add", "add", "fadd")
_binary(operator.sub, "sub", "sub", "fsub")
_binary(operator.mul, "mul", "mul", "fmul")
_binary(operator.truediv, "sdiv", "udiv", "fdiv")
_binary(operator.and_, "and_", "and_", "and_")
_binary(operator.or_, "or_", "or_", "or_")
_binary(operator.lshift, "shl", "shl", "shl")
_binary(operator.rshift, "ashr", "lshr", "lshr")


def _comparison(symbol: Any, name: str) -> None:
    @intrinsic  # type: ignore[untyped-decorator]
    def operation(_context: Any, left: Any, right: Any) -> Any:
        lanes = _first_lanes(left, right)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pairs = zip(args, signature.args, strict=True)
            compare = builder.icmp_signed if lanes.dtype.signed else builder.icmp_unsigned
            return compare(name, *(_as_lanes(context, builder, arg, kind, lanes) for arg, kind in pairs))

        return Lanes(types.boolean)(left, right), generate

    _implement(symbol, operation)


_comparison(operator.lt, "<")
_comparison(operator.gt, ">")
_comparison(operator.eq, "==")


@intrinsic  # type: ignore[untyped-decorator]
def where(_context: Any, condition: Any, left: Any, right: Any) -> Any:
    """``left`` where the condition holds, else ``right``; one of the two may be a number."""
    lanes = _first_lanes(left, right)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pairs = zip(args[1:], signature.args[1:], strict=True)
        return builder.select(args[0], *(_as_lanes(context, builder, arg, kind, lanes) for arg, kind in pairs))

    return lanes(condition, left, right), generate


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def smaller(left: Any, right: Any) -> Any:
    """The smaller of integer lanes and lanes or a number."""
    return where(left < right, left, right)


@numba.njit(**INLINE)  # type: ignore[untyped-decorator]
def larger(left: Any, right: Any) -> Any:
    """The larger of integer lanes and lanes or a number."""
    return where(left > right, left, right)


def _conversion(emit: Any) -> Any:
    """An intrinsic that turns lanes into lanes of another type, given as in NumPy."""

    @intrinsic  # type: ignore[untyped-decorator]
    def operation(_context: Any, values: Any, dtype: Any) -> Any:
        result = Lanes(dtype.dtype)

        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return emit(builder, args[0], values.dtype, _vector(result))

        return result(values, dtype), generate

    return operation


def _convert(builder: Any, value: Any, source: Any, target: Any) -> Any:
    """Between integers: the low bits, or extended as the sign of the source says. From integers to float: by value."""
    if target.element == ir.FloatType():
        return builder.sitofp(value, target) if source.signed else builder.uitofp(value, target)
    if target.element.width <= source.bitwidth:
        return builder.trunc(value, target) if target.element.width < source.bitwidth else value
    return builder.sext(value, target) if source.signed else builder.zext(value, target)


convert = _conversion(_convert)
reinterpret = _conversion(lambda builder, value, _source, target: builder.bitcast(value, target))


@intrinsic  # type: ignore[untyped-decorator]
def repeat(_context: Any, value: Any) -> Any:
    """A number in every lane."""
    lanes = Lanes(value)

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return lanes(value), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(_context: Any, left: Any, right: Any, addend: Any) -> Any:
    """left * right + addend of float32 lanes, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = _vector(addend)
        kind = ir.FunctionType(vector, [vector] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{BLOCK}f32")
        pairs = zip(args, signature.args, strict=True)
        return builder.call(fma, [_as_lanes(context, builder, arg, kind, addend) for arg, kind in pairs])

    return addend(left, right, addend), generate


@intrinsic  # type: ignore[untyped-decorator]
def largest_lane(_context: Any, values: Any) -> Any:
    """Maximum of unsigned lanes."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        lane = _lane(values.dtype)
        kind = ir.FunctionType(lane, [args[0].type])
        name = f"llvm.vector.reduce.umax.v{BLOCK}i{lane.width}"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [args[0]])

    return values.dtype(values), generate


@intrinsic  # type: ignore[untyped-decorator]
def _lane_at(_context: Any, values: Any, index: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], args[1])

    return values.dtype(values, index), generate


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def total(values: Any) -> Any:
    """Sum of the lanes in float64, in order."""
    result = np.float64(0)
    for lane in range(BLOCK):
        result += np.float64(_lane_at(values, np.int32(lane)))
    return result


def _pointer(context: Any, builder: Any, kind: Any, array: Any, row: Any, column: Any) -> Any:
    if kind.ndim != 2 or kind.layout != "C":
        raise numba.TypingError(f"lanes are loaded from and stored to contiguous rows, not {kind}")
    parts = context.make_array(kind)(context, builder, array)
    columns = cgutils.unpack_tuple(builder, parts.shape)[1]
    place = builder.add(builder.mul(row, columns), column)
    return builder.bitcast(builder.gep(parts.data, [place]), _vector(Lanes(kind.dtype)).as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def load(_context: Any, array: Any, row: Any, column: Any) -> Any:
    """``BLOCK`` elements of a row, from a column on."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        values = builder.load(_pointer(context, builder, array, *args))
        values.align = array.dtype.bitwidth // 8
        return values

    return Lanes(array.dtype)(array, types.intp, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(_context: Any, array: Any, row: Any, column: Any, values: Any) -> Any:
    """Lanes into a row, from a column on."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[3], _pointer(context, builder, array, *args[:3]), align=array.dtype.bitwidth // 8)

    return types.void(array, types.intp, types.intp, values), generate


def whole_blocks(array: NDArray[Any]) -> NDArray[Any]:
    """Rows (n, K) as kernels take them, contiguous and of whole blocks: others are copied, and padded with zeros."""
    rows, columns = array.shape
    if columns % BLOCK == 0:
        return np.ascontiguousarray(array)
    padded = np.zeros((rows, -(-columns // BLOCK) * BLOCK), array.dtype)
    padded[:, :columns] = array
    return padded


def whole_tiles(bits: NDArray[Any], wide: int, multiple: int = BLOCK) -> NDArray[Any]:
    """Contiguous rows, every ``wide`` columns followed by zeros up to a multiple: (n, tiles * padded width)."""
    rows, columns = bits.shape
    tiles, width = -(-columns // wide), -(-wide // multiple) * multiple
    if (tiles * wide, wide) == (columns, width):
        return np.ascontiguousarray(bits)
    whole = np.zeros((rows, tiles * wide), bits.dtype)
    whole[:, :columns] = bits
    padded = np.zeros((rows, tiles, width), bits.dtype)
    padded[:, :, :wide] = whole.reshape(rows, tiles, wide)
    return padded.reshape(rows, -1)


def in_whole_blocks(kernel: Any, source: NDArray[Any], target: NDArray[Any], *rest: Any) -> Any:
    """``kernel(source, target, *rest)`` for two arrays (n, K) of any K and any strides."""
    padded = whole_blocks(source)
    fits = padded.shape == target.shape and target.flags.c_contiguous
    result = target if fits else np.empty(padded.shape, target.dtype)
    value = kernel(padded, result, *rest)
    if not fits:
        target[:] = result[:, : target.shape[1]]
    return value
