"""FP8 linear (W8A8) on CUDA through PyTorch's scaled matrix products.

    y[m, n] = (sum_k q[m, k] * weight[n, k]) * scale[m] * weight_scale[n] + bias[n]

with one scale per token that is measured while running; a recorded ``input_scale`` would save nothing and lose range.
Weights with scales per 128 x 128 block have activations with scales per 1 x 128, inside the sum over k.

Not measured on a device yet: written from the operators' constraints and what is reported of them. cuBLAS refuses row
scales where M is small and K is large (torchao issue 4582), and on compute capability 12 altogether (PyTorch issue
192707); products without scales have no such gaps. So where row scales are not safe, the sums come out in float32 and
the scales follow: slower for large M, where they take more time to write and read.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from omni_convert.formats.base import Format
from omni_convert.formats.fp8 import Fp8
from omni_convert.runtime.cuda_device import Capability, cuda_build, version
from omni_convert.runtime.cuda_quantize import quantize_groups, quantize_rows
from omni_convert.runtime.prepared import prepared
from omni_convert.runtime.reference import rescale

MULTIPLE = 16  # of N and K
SIZE = 128
"""The one block size that cuBLASLt knows."""
PADDED_BLOCKS = 4
"""cuBLASLt reads the scales of that many blocks along K at a time."""
SMALL = 256
"""With more rows, row scales have always worked."""


def refuse_scaled_mm(fmt: Format, shape: tuple[int, int], capability: Capability) -> str | None:
    """Why kernel ``scaled_mm`` cannot run a weight of ``shape`` (N, K); None if it can."""
    assert isinstance(fmt, Fp8)
    reason = _refuse_any(shape, capability)
    if reason is not None:
        return reason
    if not hasattr(functional, "scaled_mm"):
        return f"PyTorch {torch.__version__} has no torch.nn.functional.scaled_mm"
    if fmt.block_size is not None:
        return _refuse_blocks(fmt.block_size, shape, capability)
    if capability[0] > 10:
        return f"compute capability {version(capability)}: row scales are refused there"
    return "this PyTorch has no row scales on Windows" if sys.platform == "win32" else None


def refuse_unscaled(fmt: Format, shape: tuple[int, int], capability: Capability) -> str | None:
    """Why kernel ``unscaled_mm`` cannot run a weight of ``shape`` (N, K); None if it can."""
    assert isinstance(fmt, Fp8)
    return "its scales are per block" if fmt.block_size is not None else _refuse_any(shape, capability)


def _refuse_any(shape: tuple[int, int], capability: Capability) -> str | None:
    if capability < (8, 9):
        return f"compute capability {version(capability)}: fp8 products need 8.9"
    if any(size % MULTIPLE for size in shape):
        return f"N, K are {shape[0]}, {shape[1]}: cuBLASLt needs multiples of {MULTIPLE}"
    return None


def _refuse_blocks(block_size: tuple[int, int], shape: tuple[int, int], capability: Capability) -> str | None:
    if capability[0] != 9:
        return f"compute capability {version(capability)}: products of blocks need 9.x"
    if block_size != (SIZE, SIZE):
        return f"blocks of {block_size[0]}x{block_size[1]}: cuBLASLt knows {SIZE}x{SIZE}"
    if any(size % SIZE for size in shape):
        return f"N, K are {shape[0]}, {shape[1]}: blocks need multiples of {SIZE}"
    if cuda_build() < (12, 9):
        return f"PyTorch was built with CUDA {torch.version.cuda}: products of blocks need 12.9"
    return None


def scaled_mm_linear(
    fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor
) -> Tensor:
    """Kernel ``scaled_mm``. ``x``: (M, K); ``tensors``: of the checkpoint, (N, K) as a whole; ``bias``: (N,)."""
    assert isinstance(fmt, Fp8)
    if fmt.block_size is not None:
        return _block_linear(x, tensors, bias, handle)
    if len(x) <= SMALL or x.dtype != torch.bfloat16:  # CUTLASS, where it steps in, knows bf16 only
        return unscaled_linear(fmt, x, tensors, bias, handle)
    weight = tensors["weight"].contiguous()
    codes, scale = quantize_rows(x, weight.dtype)
    return functional.scaled_mm(
        codes,
        weight.t(),
        scale,
        functional.ScalingType.RowWise,
        _channel_scale(tensors, handle),
        functional.ScalingType.RowWise,
        bias=None if bias is None else bias.to(x.dtype),
        output_dtype=x.dtype,
        use_fast_accum=True,
    )


def unscaled_linear(
    fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor
) -> Tensor:
    """Kernel ``unscaled_mm``: the same, with scales and bias applied to sums in float32."""
    weight = tensors["weight"].contiguous()
    if not len(x):
        return x.new_empty(0, len(weight))
    codes, scale = quantize_rows(x, weight.dtype)
    one = _one(x.device)
    y = torch._scaled_mm(codes, weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=True)
    return rescale(y.mul_(tensors["weight_scale"].view(1, -1)), scale, bias, x.dtype)


def _block_linear(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor) -> Tensor:
    weight, weight_scale = tensors["weight"].contiguous(), tensors["weight_scale_inv"]
    rows = len(x)
    if not rows:
        return x.new_empty(0, len(weight))
    codes, scale = quantize_groups(x, SIZE, -(-rows // MULTIPLE) * MULTIPLE)
    y = functional.scaled_mm(
        codes,
        weight.t(),
        scale,
        functional.ScalingType.BlockWise1x128,
        prepared(handle, [weight_scale], lambda: pad_blocks(weight_scale)),
        functional.ScalingType.BlockWise128x128,
        output_dtype=x.dtype if x.dtype == torch.bfloat16 else torch.float32,
    )[:rows]
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def pad_blocks(weight_scale: Tensor) -> Tensor:
    """(N / 128, K / 128) -> (K / 128 padded to 4, N / 128) with strides (1, K / 128 padded to 4)."""
    return functional.pad(weight_scale, (0, -weight_scale.shape[1] % PADDED_BLOCKS)).t()


def _channel_scale(tensors: Mapping[str, Tensor], handle: Tensor) -> Tensor:
    """(1, N) float32, contiguous."""
    channels, weight_scale = len(tensors["weight"]), tensors["weight_scale"]
    if len(weight_scale) == channels:
        return weight_scale.view(1, channels)
    repeated: Tensor = prepared(handle, [weight_scale], lambda: weight_scale.expand(1, channels).contiguous())
    return repeated


@functools.cache
def _one(device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.ones((), dtype=torch.float32, device=device)
