"""The INT8 linear in plain PyTorch: the definition that every kernel has to match bit for bit.

    y[m, n] = (sum_k q[m, k] * weight[n, k]) * weight_scale[n] * scale[m] + bias[n]

``q`` and ``scale`` come from ``quantize_rows``. The sum is an exact integer; the products and the sum with the
bias are float32, in this order, each rounded once; the result is rounded once more to the dtype of ``x``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

QMAX = 127.0

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
    amax = torch.where(amax.isfinite(), amax.clamp_min(SMALLEST_AMAX), torch.nan)
    # The copy is a must: for fp32 the product would otherwise overwrite the caller's activations.
    codes = x.to(torch.float32, copy=True).mul_(QMAX / amax).round_().to(torch.int8)
    return codes, amax / QMAX


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
