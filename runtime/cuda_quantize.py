"""Activations to codes on CUDA: one Triton kernel each, or where Triton is missing the definitions of ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_convert.formats.microscaling import BLOCK
from omni_convert.runtime import reference
from omni_convert.runtime.cuda_device import missing_triton

LARGEST = {torch.int8: reference.QMAX, torch.float8_e4m3fn: reference.E4M3_MAX}
ROW_BLOCK = 4096
"""How much of a row a program holds at a time."""
GROUP_BLOCK = 1024

TILE_ROWS, TILE_BLOCKS = 128, 4
"""The scales of so many rows and blocks lie together in 512 bytes, see ``swizzle``."""


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x``: (M, K), M > 0. Returns codes (M, K), e4m3 or int8 (needs Triton), and scale (M, 1) float32."""
    if missing_triton():
        return reference.quantize_groups(x, x.shape[1])
    from omni_convert.runtime import triton_kernels

    x = _whole_rows(x)
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=dtype, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(ROW_BLOCK, 1 << (columns - 1).bit_length())
    with torch.cuda.device(x.get_device()):
        triton_kernels.quantize_rows[(rows,)](
            x, codes, scale, columns, x.stride(0),
            largest=LARGEST[dtype], smallest=reference.SMALLEST_AMAX, block=block,
            num_warps=max(1, block // 512), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale


def quantize_groups(x: Tensor, size: int, padded_rows: int) -> tuple[Tensor, Tensor]:
    """``x``: (M, K), M > 0, K a multiple of ``size``, itself a power of two.

    Returns e4m3 codes (padded_rows, K) and scale (padded_rows, K / size) float32 with strides (1, padded_rows). What is
    beyond M is undefined.
    """
    x = _whole_rows(x)
    rows, columns = x.shape
    codes = torch.empty(padded_rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(columns // size, padded_rows, dtype=torch.float32, device=x.device).t()
    if missing_triton():
        codes[:rows], scale[:rows] = reference.quantize_groups(x, size)
        return codes, scale
    from omni_convert.runtime import triton_kernels

    with torch.cuda.device(x.get_device()):
        triton_kernels.quantize_groups[(rows, -(-columns // GROUP_BLOCK))](
            x, codes, scale, columns, x.stride(0), padded_rows,
            largest=reference.E4M3_MAX, smallest=reference.SMALLEST_AMAX, size=size, block=GROUP_BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale


def quantize_mx(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x``: (M, K), M > 0, K a multiple of 32. Needs Triton.

    Returns e4m3 codes (M, K) and scales as ``swizzle`` would lay them out. The exponent of a block is chosen by rule
    ``rceil``, by which nothing saturates.
    """
    from omni_convert.runtime import triton_kernels

    x = _whole_rows(x)
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    padded_rows, padded_blocks = padded_scales(rows, columns)
    scale = torch.empty(padded_rows * padded_blocks, dtype=torch.uint8, device=x.device)
    with torch.cuda.device(x.get_device()):
        triton_kernels.quantize_mx[(padded_rows, -(-columns // GROUP_BLOCK))](
            x, codes, scale, rows, columns, x.stride(0),
            block=GROUP_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale.view(torch.float8_e8m0fnu)


def _whole_rows(x: Tensor) -> Tensor:
    """``x`` with neighbouring columns side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def padded_scales(rows: int, columns: int) -> tuple[int, int]:
    """Rows and blocks of the scales of a matrix (rows, columns) once they fill whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // (BLOCK * TILE_BLOCKS)) * TILE_BLOCKS


def swizzle(scale: Tensor) -> Tensor:
    """e8m0 bytes (rows, blocks) uint8 -> the flat float8_e8m0fnu that cuBLASLt reads.

    Tiles of 128 x 4, row by row of tiles; within one, byte 16 * (row % 32) + 4 * (row // 32) + block. Zeros fill tiles
    up. Source: cuBLAS, "1D block scaling factors layout".
    """
    rows, blocks = scale.shape
    padded_rows, padded_blocks = padded_scales(rows, blocks * BLOCK)
    padded = torch.nn.functional.pad(scale, (0, padded_blocks - blocks, 0, padded_rows - rows))
    tiles = padded.view(-1, 4, 32, padded_blocks // TILE_BLOCKS, TILE_BLOCKS)  # tile row, row // 32, row % 32, ...
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(torch.float8_e8m0fnu)
