"""MX linear (W8A8) on Blackwell through PyTorch's scaled matrix products.

    y[m, n] = sum_b 2**(sx[m, b] + sw[n, b] - 254) * (sum_{k in b} q[m, k] * weight[n, k]) + bias[n]

over the blocks b of 32 columns. Activations are quantized while running, to e4m3 by rule ``rceil``. Weights of MXFP4
run the same way: they are stored as e4m3, which holds every e2m1 value, so nothing is packed and activations keep
8 bits. A product of two MXFP4 matrices would be faster, but PyTorch has it in some builds only, for 10.x, without a
bias.

Not measured on a device yet.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from omni_convert.formats.base import Format
from omni_convert.runtime.cuda_device import Capability, cuda_build, missing_triton, version
from omni_convert.runtime.cuda_quantize import quantize_mx, swizzle
from omni_convert.runtime.prepared import prepared

MULTIPLE = 16  # of N; K is one of 32


def refuse_scaled_mm(fmt: Format, shape: tuple[int, int], capability: Capability) -> str | None:
    """Why kernel ``mx_scaled_mm`` cannot run a weight of ``shape`` (N, K); None if it can."""
    if capability[0] not in (10, 12):
        return f"compute capability {version(capability)}: MX products need 10.x or 12.x"
    if capability[0] == 12 and cuda_build() < (13, 0):  # reported to work there (PyTorch issue 198126)
        return f"PyTorch was built with CUDA {torch.version.cuda}: MX products on 12.x need 13.0"
    if shape[0] % MULTIPLE:
        return f"N is {shape[0]}: cuBLASLt needs a multiple of {MULTIPLE}"
    if not hasattr(functional, "scaled_mm"):
        return f"PyTorch {torch.__version__} has no torch.nn.functional.scaled_mm"
    return missing_triton()


def scaled_mm_linear(
    fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor
) -> Tensor:
    """Kernel ``mx_scaled_mm``. ``x``: (M, K); ``weight``: (N, K) e4m3; ``weight_scale``: (N, K / 32) e8m0 bytes."""
    weight, weight_scale = tensors["weight"].contiguous(), tensors["weight_scale"]
    if not len(x):
        return x.new_empty(0, len(weight))
    codes, scale = quantize_mx(x)
    is_bf16 = x.dtype == torch.bfloat16
    y = functional.scaled_mm(
        codes,
        weight.t(),
        scale,
        functional.ScalingType.BlockWise1x32,
        prepared(handle, [weight_scale], lambda: swizzle(weight_scale)),
        functional.ScalingType.BlockWise1x32,
        swizzle_a=functional.SwizzleType.SWIZZLE_32_4_4,
        swizzle_b=functional.SwizzleType.SWIZZLE_32_4_4,
        bias=bias.to(x.dtype) if is_bf16 and bias is not None else None,
        output_dtype=x.dtype if is_bf16 else torch.float32,
    )
    return (y if is_bf16 or bias is None else y.add_(bias)).to(x.dtype)
