"""INT8 linear on CUDA with what PyTorch ships: ``torch._int_mm`` and separate elementwise kernels.

Unmeasured: written from the constraints of the operator, not run on a device by the authors of this file. Without a
fused epilogue it may be no faster than BF16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from omni_convert.formats.base import Format
from omni_convert.runtime.cpu import MAX_COLUMNS_S8
from omni_convert.runtime.reference import quantize_rows, rescale

MULTIPLE = 8  # cuBLASLt: N and K in int8
MIN_ROWS = 17
PADDED_ROWS = 32  # what fewer rows are padded to: time and text-embedding layers run at M = batch size


def refuse_int_mm(shape: tuple[int, int]) -> str | None:
    """Why ``torch._int_mm`` cannot run a weight of ``shape`` (N, K) on CUDA; None if it can."""
    if any(size % MULTIPLE for size in shape):
        return f"N, K are {shape[0]}, {shape[1]}: cuBLASLt needs multiples of {MULTIPLE}"
    if shape[1] > MAX_COLUMNS_S8:
        return f"K is {shape[1]}: the int32 accumulator could overflow"
    return None


def int_mm_linear(fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor) -> Tensor:
    """Kernel ``cuda_int_mm``. ``x``: (M, K); ``weight``: (N, K) int8; ``weight_scale``: (N, 1) float32; unmeasured."""
    weight, rows = tensors["weight"], x.shape[0]
    if rows == 0:
        return x.new_empty(0, weight.shape[0])
    codes, scale = quantize_rows(x)
    if rows < MIN_ROWS:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, PADDED_ROWS - rows))
    # The transposed view of a row-major weight is the layout that cuBLASLt is fast for.
    y = torch._int_mm(codes, weight.t())[:rows].to(torch.float32).mul_(tensors["weight_scale"].view(1, -1))
    return rescale(y, scale, bias, x.dtype)
