"""Weight-only linear of every format: decode some rows, multiply, decode the next.

    y = x @ w.T + bias,  w = Format.dequantize(tensors) rounded once to the dtype of x

Activations stay as they are: an ``input_scale`` is loaded and saved, but not used, and ``mul_scale``, which engines
multiply activations by, is multiplied into the weight, where it costs no rounding of its own.

On the CPU the compiled kernels of ``formats`` decode, elsewhere, and where numba does not work, PyTorch. It casts e4m3
one element at a time; a table of all pairs of codes is an order of magnitude faster: one index of 16 bits fetches two
float32. The buffers are small enough for a processor's caches, and for the allocator to reuse.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from omni_convert.formats.base import Format, row_slice
from omni_convert.formats.engine import first_working
from omni_convert.formats.fp8 import Fp8
from omni_convert.formats.int8 import Int8
from omni_convert.formats.microscaling import BLOCK, power_of_two
from omni_convert.formats.mxfp4_dualscale import GROUP
from omni_convert.runtime.threads import in_threads

Array = TypeVar("Array", Tensor, NDArray[Any])

BUFFER = 1 << 22
"""Decoded weights that exist at a time, if a scale does not span more."""
CHUNK = 1 << 19
"""Of those that PyTorch decodes, how many are float32 at a time: 2 MiB."""
ROWS = 64
"""Matrix products are cut at multiples of it."""


def decoded_linear(
    fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor
) -> Tensor:
    """Kernel ``decode``. ``x``: (M, K); ``tensors``: those of the checkpoint, (N, K) as a whole; ``bias``: (N,)."""
    rows, columns = tensors["weight"].shape
    bias = None if bias is None else bias.to(x.dtype)
    step = min(rows, _multiple(BUFFER // columns, math.lcm(ROWS, fmt.rows_per_scale)))
    buffer = x.new_empty(step, columns)
    if step == rows:
        return torch.nn.functional.linear(x, decode(fmt, tensors, buffer), bias)
    out = x.new_empty(len(x), rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = decode(fmt, some_rows(fmt, tensors, start, stop), buffer[: stop - start]).t()
        if bias is None:
            torch.mm(x, weight, out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, weight, out=out[:, start:stop])
    return out


def decode(fmt: Format, tensors: Mapping[str, Tensor], out: Tensor) -> Tensor:
    """``out`` (n, K), bf16, fp16 or fp32, contiguous: filled with the values of ``fmt.dequantize``, rounded once."""
    if out.device.type == "cpu":
        first_working(lambda: _run_kernel(fmt, tensors, out), lambda: _run_tables(fmt, tensors, out))
    else:
        _run_tables(fmt, tensors, out)
    return out


def _run_kernel(fmt: Format, tensors: Mapping[str, Tensor], out: Tensor) -> None:
    """With the compiled kernel, which rounds to BF16 itself, in threads."""
    is_half = out.dtype == torch.float16
    target = torch.empty_like(out, dtype=torch.float32) if is_half else out
    values = _array(target)
    arrays = {suffix: _array(tensor.detach()) for suffix, tensor in tensors.items()}

    def some(start: int, stop: int) -> None:
        fmt.compiled_values(some_rows(fmt, arrays, start, stop), values[start:stop])

    in_threads(some, (values.shape[0], values.shape[1]), fmt.rows_per_scale)
    if is_half:
        out.copy_(target)


def _array(tensor: Tensor) -> NDArray[Any]:
    """As kernels take it, in the same memory: e4m3 as its bytes, BF16 as its patterns."""
    views = {torch.float8_e4m3fn: torch.uint8, torch.bfloat16: torch.uint16}
    return tensor.view(views.get(tensor.dtype, tensor.dtype)).numpy()


def _run_tables(fmt: Format, tensors: Mapping[str, Tensor], out: Tensor) -> None:
    """With PyTorch alone, on any device."""
    rows, columns = out.shape
    step = min(rows, _multiple(CHUNK // columns, fmt.rows_per_scale))
    values = torch.empty(step, columns, dtype=torch.float32, device=out.device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = some_rows(fmt, tensors, start, stop)
        chunk = values[: stop - start]
        _look_up(part["weight"], chunk)
        _multiply_scales(fmt, part, chunk)
        out[start:stop] = chunk


def some_rows(fmt: Format, tensors: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
    """The tensors of rows ``start`` to ``stop`` of a weight; ``start``: a multiple of ``fmt.rows_per_scale``."""
    parts = {suffix: tensor[row_slice(fmt, start, stop)] for suffix, tensor in tensors.items()}
    return parts | {"weight": tensors["weight"][start:stop]} | {name: tensors[name] for name in fmt.whole_suffixes}


def _look_up(codes: Tensor, out: Tensor) -> None:
    """``out``: (n, K) float32, contiguous, receives the value of every code, of e4m3 NaN for the two that are."""
    if codes.dtype == torch.int8:
        out.copy_(codes)
        return
    codes = codes.contiguous()
    if codes.shape[1] % 2 or codes.storage_offset() % 2:
        index, target = codes.view(torch.uint8), out
        table = _values(codes.device)
    else:
        index, target = codes.view(torch.uint16), out.view(torch.int64)
        table = _pairs(codes.device)
    torch.index_select(table, 0, index.to(torch.int32).flatten(), out=target.view(-1))


@functools.cache
def _values(device: torch.device) -> Tensor:
    """(256,) float32: the value of every e4m3 byte."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(torch.float32).to(device)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """(65536,) int64: two float32, for every pair of neighbouring bytes as an unsigned number."""
    with torch.inference_mode(False), torch.no_grad():
        numbers = (
            torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.uint16).view(torch.uint8)
        )  # its bytes, in order
        return _values(torch.device("cpu"))[numbers.to(torch.int64)].view(torch.int64).to(device)


def _multiply_scales(fmt: Format, tensors: Mapping[str, Tensor], values: Tensor) -> None:
    """In the order of ``fmt.dequantize``, for the same bits."""
    if isinstance(fmt, Int8):
        values.mul_(tensors["weight_scale"])
        return
    if isinstance(fmt, Fp8):
        if fmt.block_size is None:
            values.mul_(tensors["weight_scale"].unsqueeze(1))
        else:
            scale = tensors["weight_scale_inv"].repeat_interleave(fmt.block_size[0], 0)[: len(values)]
            _multiply_groups(values, scale, fmt.block_size[1])
        return
    _multiply_groups(values, power_of_two(tensors["weight_scale"].to(torch.int32) - 127), BLOCK)
    if "weight_dual_scale" in tensors:
        _multiply_groups(values, tensors["weight_dual_scale"].squeeze(-1), GROUP)
        values.mul_(tensors["mul_scale"])


def _multiply_groups(values: Tensor, scale: Tensor, size: int) -> None:
    """Each ``size`` columns by their scale. ``scale``: (n, ceil(K / size))."""
    whole = values.shape[1] // size
    values[:, : whole * size].view(len(values), whole, size).mul_(scale[:, :whole, None])
    if values.shape[1] % size:
        values[:, whole * size :].mul_(scale[:, whole:])


def _multiple(number: int, unit: int) -> int:
    """The largest multiple of ``unit`` up to ``number``, but at least one."""
    return max(number // unit, 1) * unit
