"""Compiled CPU kernels of the MX formats; the tricks of ``kernels`` and these:

* One body rounds to any small float. With e the exponent of |v|, at least that of the smallest normal, neighbours lie
  2**(e - mantissa bits) apart, which is the unit in the last place of M = 2**(e + 23 - mantissa bits): |v| + M - M is
  |v| rounded half to even, by the processor. M is v's own exponent field, raised and shifted.
* An e4m3 byte is the top of a float32 whose exponent has e4m3's bias: multiplying by 2**-120 moves the bias from 127
  to 7, exactly, and makes e4m3's subnormals float32 subnormals.
* Errors are summed in units of the row's largest scale: blocks weigh in with a power of two.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from omni_convert.formats.kernels import OPTIONS, amax, widen
from omni_convert.formats.microscaling import BLOCK, E2M1, Element

_E4M3_BIAS = np.float32(2.0**-120)
GROUP = 512


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


@intrinsic  # type: ignore[untyped-decorator]
def _rounding_magic(_context: Any, value: Any, floor: Any, raise_by: Any) -> Any:
    """2**(max(exponent of value, that of floor) + raise_by), all in 32-bit lanes; ``value`` is not negative."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        field = builder.and_(builder.bitcast(args[0], word), ir.Constant(word, 0x7F800000))
        larger = builder.select(builder.icmp_signed(">", field, args[1]), field, args[1])
        return builder.bitcast(builder.add(larger, args[2]), ir.FloatType())

    return types.float32(types.float32, types.int32, types.int32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _e4m3_byte(_context: Any, shifted: Any, value: Any) -> Any:
    """Exponent and mantissa from ``shifted`` (not negative, bias 7), sign from ``value``; zero has no sign."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        body = builder.lshr(builder.bitcast(args[0], word), ir.Constant(word, 20))
        sign = builder.and_(builder.lshr(builder.bitcast(args[1], word), ir.Constant(word, 24)), ir.Constant(word, 128))
        zero = builder.icmp_unsigned("==", body, ir.Constant(word, 0))
        signed = builder.select(zero, body, builder.or_(body, sign))
        return builder.trunc(signed, ir.IntType(8))

    return types.uint8(types.float32, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _whole_block_magnitude(_context: Any, row: Any, start: Any) -> Any:
    """Largest magnitude pattern of ``BLOCK`` weights: one vector load and LLVM's reduction.

    A loop does the same, but LLVM unrolls it before it thinks of vectors: a tenth of the speed.
    """
    bits = row.dtype.bitwidth
    lane = ir.IntType(bits)
    vector = ir.VectorType(lane, BLOCK)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.bitcast(builder.gep(array.data, [args[1]]), vector.as_pointer())
        values = builder.load(pointer)
        values.align = bits // 8
        magnitudes = builder.and_(values, ir.Constant(vector, [2 ** (bits - 1) - 1] * BLOCK))
        reduce = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(lane, [vector]), f"llvm.vector.reduce.umax.v{BLOCK}i{bits}"
        )
        return builder.call(reduce, [magnitudes])

    return row.dtype(row, types.intp), generate


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def element(value: Any, floor: Any, raise_by: Any, largest: Any) -> Any:
    """e4m3 byte and rounding error (of the magnitude) of one scaled weight."""
    size = abs(value)
    clamped = min(size, largest)
    magic = _rounding_magic(clamped, floor, raise_by)
    rounded = (clamped + magic) - magic
    return _e4m3_byte(rounded * _E4M3_BIAS, value), size - rounded


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def scale_byte(largest: Any, emax: Any, threshold: Any) -> Any:
    """e8m0 byte of a block, from its largest magnitude (float32)."""
    bits = _as_bits(largest)
    one_more = 1 if (bits & 0x7FFFFF) >= threshold else 0
    return max((bits >> 23) - emax + one_more, 0)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def power(exponent: Any) -> Any:
    """2**exponent in float32 for -127 to 127."""
    return _as_float(np.int32(1 << 22)) if exponent == -127 else _as_float(np.int32((exponent + 127) << 23))


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _block_amax(row: Any, start: Any, count: Any) -> Any:
    if count == BLOCK:
        return widen(_whole_block_magnitude(row, start))
    return amax(row[start : start + count])


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _mx_rows(bits: Any, codes: Any, scale: Any, sums: Any, constants: Any, ends: Any) -> int:
    """Quantize rows; returns the first row that holds NaN or Inf, or -1."""
    emax, threshold, floor, raise_by = constants
    rows, columns = bits.shape
    noise = np.empty(BLOCK, np.float32)
    signal = np.empty(BLOCK, np.float32)
    for n in range(rows):
        row = bits[n]
        row_amax = amax(row)
        if not np.isfinite(row_amax):
            return n
        row_byte = scale_byte(row_amax, emax, threshold)
        noise[:] = 0
        signal[:] = 0
        for block in range(scale.shape[1]):
            start = block * BLOCK
            count = min(BLOCK, columns - start)
            byte = scale_byte(_block_amax(row, start, count), emax, threshold)
            scale[n, block] = byte
            inverse = power(127 - byte)
            largest = ends[0] if byte <= 254 - emax else ends[1]
            weight = power(max(byte - row_byte, -127))
            if count < BLOCK:
                for lane in range(count):
                    value = widen(row[start + lane]) * inverse
                    codes[n, start + lane], error = element(value, floor, raise_by, largest)
                    add_error(noise, signal, lane, error * weight, value * weight)
            else:  # a constant trip count keeps the sums in registers
                for lane in range(BLOCK):
                    value = widen(row[start + lane]) * inverse
                    codes[n, start + lane], error = element(value, floor, raise_by, largest)
                    add_error(noise, signal, lane, error * weight, value * weight)
        unit = np.float64(power(row_byte - 127))
        sums[n, 0] = _total(signal) * unit * unit
        sums[n, 1] = _total(noise) * unit * unit
    return -1


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def add_error(noise: Any, signal: Any, lane: Any, error: Any, value: Any) -> None:
    noise[lane] += error * error
    signal[lane] += value * value


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _total(lanes: Any) -> Any:
    """Sum in float64, in order."""
    total = np.float64(0)
    for lane in range(BLOCK):
        total += np.float64(lanes[lane])
    return total


def mx_rows(
    bits: NDArray[Any],
    codes: NDArray[np.uint8],
    scale: NDArray[np.uint8],
    sums: NDArray[np.float64] | None,
    kind: Element,
    rule: str,
) -> int:
    """Quantize ``bits`` (n, K; uint16 BF16 or uint32 F32) into e4m3 bytes (n, K) and e8m0 bytes (n, ceil(K / 32)).

    Returns the first row that holds NaN or Inf, or -1.
    """
    ends = (np.float32(kind.largest), np.float32(kind.largest_at_top))
    return int(_mx_rows(bits, codes, scale, sums, _constants(kind, rule), ends))


def _constants(kind: Element, rule: str) -> tuple[np.int32, ...]:
    """emax, the rule's threshold, and what ``_rounding_magic`` takes: the smallest exponent field, what to add."""
    emin, shift = (127 + kind.emin) << 23, (23 - kind.mantissa_bits) << 23
    return np.int32(kind.emax), np.int32(kind.threshold(rule)), np.int32(emin), np.int32(shift)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _dual_rows(bits: Any, codes: Any, fine: Any, coarse: Any, sums: Any, constants: Any, largest: Any) -> int:
    """Quantize rows; returns the first row that holds NaN or Inf, or -1."""
    emax, threshold, floor, raise_by = constants
    rows = bits.shape[0]
    noise = np.empty(BLOCK, np.float32)
    signal = np.empty(BLOCK, np.float32)
    for n in range(rows):
        row = bits[n]
        row_amax = amax(row)
        if not np.isfinite(row_amax):
            return n
        row_step = _coarse_step(row_amax, largest)
        noise[:] = 0
        signal[:] = 0
        step = row_step
        share = np.float32(0)
        for block in range(fine.shape[1]):
            start = block * BLOCK
            if start % GROUP == 0:
                group_amax = amax(row[start : start + GROUP])
                step = _coarse_step(group_amax, largest)
                share = step / row_step if group_amax > 0 else np.float32(0)  # a group of zeros has step 1
                coarse[n, start // GROUP] = step
            # Division rounds monotonically: the largest quotient is the quotient of the largest.
            byte = scale_byte(_block_amax(row, start, BLOCK) / step, emax, threshold)
            fine[n, block] = byte
            inverse = power(127 - byte)
            weight = share * power(byte - 127)
            for lane in range(BLOCK):
                value = widen(row[start + lane]) / step * inverse
                codes[n, start + lane], error = element(value, floor, raise_by, largest)
                add_error(noise, signal, lane, error * weight, value * weight)
        unit = np.float64(row_step)
        sums[n, 0] = _total(signal) * unit * unit
        sums[n, 1] = _total(noise) * unit * unit
    return -1


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _coarse_step(group_amax: Any, largest: Any) -> Any:
    step = group_amax / largest
    return step if step != 0 else np.float32(1)


def dual_rows(
    bits: NDArray[Any],
    codes: NDArray[np.uint8],
    fine: NDArray[np.uint8],
    coarse: NDArray[np.float32],
    sums: NDArray[np.float64] | None,
) -> int:
    """Quantize ``bits`` (n, K), K a multiple of 32, into e4m3 bytes (n, K), ``fine`` (n, K / 32) and ``coarse``
    (n, ceil(K / 512)).

    Returns the first row that holds NaN or Inf, or -1.
    """
    return int(_dual_rows(bits, codes, fine, coarse, sums, _constants(E2M1, "even"), np.float32(E2M1.largest)))
