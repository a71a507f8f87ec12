"""How activations are quantized, and the INT8 linear, in plain PyTorch: the definitions that kernels match bit for bit.

    y[m, n] = (sum_k q[m, k] * weight[n, k]) * weight_scale[n] * scale[m] + bias[n]

``q`` and ``scale`` come from ``quantize_rows``. The sum is an exact integer; the products and the sum with the
bias are float32, in this order, each rounded once; the result is rounded once more to the dtype of ``x``.

Quotients are of two tensors: where one is a number, PyTorch multiplies by a reciprocal, on some devices at least.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

QMAX = 127.0
E4M3_MAX = 448.0

SMALLEST_AMAX = 2.0**-100
"""Rows below this magnitude share one scale: 127 / amax stays finite and rows of zeros need no special case."""

_MAGNITUDE_BITS: Mapping[torch.dtype, tuple[torch.dtype, int]] = {
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.float32: (torch.int32, 0x7FFF_FFFF),
}
ACTIVATION_DTYPES = tuple(_MAGNITUDE_BITS)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric dynamic INT8, one scale per row (token).

    ``x``: (M, K) bf16, fp16 or fp32. Returns codes (M, K) int8 in [-127, 127] and scale (M, 1) float32, with
    ``scale = amax / 127`` and ``code = round_half_even(x * (127 / amax))``. The scale of a row that holds a NaN or
    an Inf is NaN and its codes are meaningless: the whole output row becomes NaN, which no later step can hide.
    """
    integer, mask = _MAGNITUDE_BITS[x.dtype]
    # Without the sign, bit patterns order like magnitudes, with Inf above every number and NaN above Inf.
    # Several times faster than abs().amax(), and it cannot lose a NaN.
    amax = x.view(integer).bitwise_and(mask).amax(dim=1, keepdim=True).view(x.dtype).to(torch.float32)
    scale, inverse = _scale_and_inverse(amax, QMAX)
    # The copy is a must: for fp32 the product would otherwise overwrite the caller's activations.
    return x.to(torch.float32, copy=True).mul_(inverse).round_().to(torch.int8), scale


def quantize_groups(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Symmetric dynamic e4m3, one scale per row and ``size`` columns.

    ``x``: (M, K) bf16, fp16 or fp32, K a multiple of ``size``. Returns codes (M, K) float8_e4m3fn and scale
    (M, K / size) float32, with ``scale = amax / 448`` and ``code = e4m3(x * (448 / amax))``, half to even. Of a group
    with a NaN or an Inf the scale is NaN, as in ``quantize_rows``.
    """
    groups = x.to(torch.float32).reshape(x.shape[0], x.shape[1] // size, size)
    scale, inverse = _scale_and_inverse(groups.abs().amax(dim=2, keepdim=True), E4M3_MAX)
    return (groups * inverse).to(torch.float8_e4m3fn).view(x.shape), scale.squeeze(2)


def _scale_and_inverse(amax: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    amax = torch.where(amax.isfinite(), amax.clamp_min(SMALLEST_AMAX), torch.nan)
    numbers = torch.full_like(amax, largest)
    return amax / numbers, numbers / amax


def rescale(y: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Row scale, then bias, then one rounding to ``dtype``. ``y``: (M, N) float32, overwritten."""
    y.mul_(scale)
    if bias is not None:
        y.add_(bias.to(torch.float32))
    return y.to(dtype)


def reference_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The oracle. ``x``: (M, K); ``weight``: (N, K) int8; ``weight_scale``: (N, 1) float32; ``bias``: (N,).

    Integers below 2**53 are exact in float64, so the matrix product is the exact integer sum.
    """
    codes, scale = quantize_rows(x)
    total = codes.to(torch.float64) @ weight.to(torch.float64).t()
    return rescale(total.to(torch.float32) * weight_scale.view(1, -1), scale, bias, x.dtype)
