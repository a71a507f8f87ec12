"""INT8 linear on CUDA: two Triton kernels, or what PyTorch ships.

Kernel ``triton``: one pass that quantizes the rows, one product whose scales and bias are applied before the int32 sums
leave the registers. Both give the bits of ``reference``. Writing the sums out and reading them again, as
``torch._int_mm`` forces one to (kernel ``cuda_int_mm``), costs about what int8 saves.

Not measured on a device yet. Tile sizes are what is known to suit such products; they change speed, never bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from omni_convert.formats.base import Format
from omni_convert.runtime import reference
from omni_convert.runtime.cpu import MAX_COLUMNS_S8
from omni_convert.runtime.cuda_device import Capability, capability_of, missing_triton, version
from omni_convert.runtime.cuda_quantize import quantize_rows

MULTIPLE = 8  # cuBLASLt: N and K in int8
MIN_ROWS = 17
PADDED_ROWS = 32  # what fewer rows are padded to: time and text-embedding layers run at M = batch size
GROUP = 8
"""Tiles of rows that take turns, see ``triton_kernels.int8_linear``."""

_WITHOUT_INT8 = (10, 3)
"""B300 has no int8 products of its own: compilers fall back to Ampere's, far below BF16 (PyTorch issue 187094)."""


class Tile(NamedTuple):
    """What one program of ``triton_kernels.int8_linear`` computes, and how."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def tile_for(rows: int, capability: Capability) -> Tile:
    """Narrow tiles for few rows, to read the weight with the whole device; else as large as registers allow.

    Shared memory holds ``num_stages`` tiles of each operand: 99 KiB on 8.6, 8.9 and 12.x, 163 and more on the others.
    """
    if rows <= 16:
        return Tile(16, 32, 256, 4, 4)
    if rows <= 64:
        return Tile(64, 64, 128, 4, 4)
    if rows <= 256:
        return Tile(64, 128, 128, 4, 3)
    if capability[0] == 8:  # whose products read their operands from registers, of which 128 x 256 takes too many
        return Tile(128, 128, 128, 8, 3)
    return Tile(128, 256, 128, 8, 3)


def refuse_triton(fmt: Format, shape: tuple[int, int], capability: Capability) -> str | None:
    """Why kernel ``triton`` cannot run a weight of ``shape`` (N, K) on a device; None if it can."""
    if capability < (8, 0):
        return f"compute capability {version(capability)}: Triton needs 8.0"
    return missing_triton() or _refuse_int8(shape, capability)


def refuse_int_mm(fmt: Format, shape: tuple[int, int], capability: Capability) -> str | None:
    """Why ``torch._int_mm`` cannot run a weight of ``shape`` (N, K) on CUDA; None if it can."""
    if capability < (7, 5):
        return f"compute capability {version(capability)}: its tensor cores have no int8"
    if any(size % MULTIPLE for size in shape):
        return f"N, K are {shape[0]}, {shape[1]}: cuBLASLt needs multiples of {MULTIPLE}"
    return _refuse_int8(shape, capability)


def _refuse_int8(shape: tuple[int, int], capability: Capability) -> str | None:
    if capability == _WITHOUT_INT8:
        return f"compute capability {version(capability)}: its tensor cores are slow with int8"
    if shape[1] > MAX_COLUMNS_S8:
        return f"K is {shape[1]}: the int32 accumulator is safe up to {MAX_COLUMNS_S8}"
    return None


def triton_linear(fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor) -> Tensor:
    """Kernel ``triton``. ``x``: (M, K); ``weight``: (N, K) int8; ``weight_scale``: (N, 1) float32; ``bias``: (N,)."""
    from omni_convert.runtime import triton_kernels

    weight = tensors["weight"]
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    (rows, columns), channels = x.shape, weight.shape[0]
    out = x.new_empty(rows, channels)
    if rows == 0:
        return out
    codes, scale = quantize_rows(x, torch.int8)
    tile = tile_for(rows, capability_of(x.device))
    tiles = -(-rows // tile.block_m) * -(-channels // tile.block_n)
    with torch.cuda.device(x.get_device()):  # -1, for the interpreter, is none
        triton_kernels.int8_linear[(tiles,)](
            codes, scale, weight, tensors["weight_scale"].contiguous(), bias, out,
            rows, channels, columns, weight.stride(0),
            has_bias=bias is not None, group_m=GROUP, enable_fp_fusion=False, **tile._asdict(),
        )  # fmt: skip
    return out


def int_mm_linear(fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor) -> Tensor:
    """Kernel ``cuda_int_mm``. ``x``: (M, K); ``weight``: (N, K) int8; ``weight_scale``: (N, 1) float32."""
    weight, rows = tensors["weight"], x.shape[0]
    if rows == 0:
        return x.new_empty(0, weight.shape[0])
    codes, scale = reference.quantize_rows(x)
    if rows < MIN_ROWS:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, PADDED_ROWS - rows))
    # The transposed view of a row-major weight is the layout that cuBLASLt is fast for.
    y = torch._int_mm(codes, weight.t())[:rows].to(torch.float32).mul_(tensors["weight_scale"].view(1, -1))
    return reference.rescale(y, scale, bias, x.dtype)
