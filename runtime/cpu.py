"""INT8 linear on CPUs: oneDNN with a packed weight where VNNI exists, ``torch._int_mm`` where that one is exact.

oneDNN has a fast kernel for u8 activations only (s8 activations fall to its reference implementation, hundreds of
times slower), so codes are shifted by 128 and oneDNN subtracts the shift again through the zero point. It accepts
only one activation scale per call: it gets 1.0 and the row scales follow, and after them the bias.

Without VNNI, both go through 16-bit sums of two products that saturate, and nothing reports it. Whether a kernel is
exact is therefore tried once per process with the largest codes, not inferred from CPU flags alone: oneDNN can be
held back by ``ONEDNN_MAX_CPU_ISA``, which the flags do not show.

The packed weight (see ``prepared``) takes as much memory as the int8 weight, which stays for ``state_dict``: a running
model is as large as in BF16, on the CPU only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from omni_convert.formats import FORMATS
from omni_convert.formats.base import Format
from omni_convert.runtime.prepared import new_handle, prepared
from omni_convert.runtime.reference import quantize_rows, reference_linear, rescale

ROWS_PER_BLOCK = 256
"""Float32 temporaries of a block stay below the allocator's mmap threshold: larger ones page-fault on every call."""

MAX_COLUMNS_U8 = 2**31 // (255 * 128) - 1
MAX_COLUMNS_S8 = 2**31 // (128 * 128) - 1
"""Longest row whose worst-case sum of products still fits the int32 accumulator."""

_VNNI_QUERIES = ("_is_vnni_supported", "_is_avx512_vnni_supported")  # the name depends on the torch release
_SATURATES = "its sums saturate here (no VNNI, or oneDNN is held back by ONEDNN_MAX_CPU_ISA)"


def refuse_onednn(shape: tuple[int, int]) -> str | None:
    """Why the packed kernel cannot run a weight of ``shape`` (N, K) here; None if it can."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this PyTorch was built without oneDNN"
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return "this PyTorch has no onednn::qlinear_prepack"
    if not any(getattr(torch.cpu, name, bool)() for name in _VNNI_QUERIES):
        return "the CPU has no AVX-512 VNNI"
    if shape[1] > MAX_COLUMNS_U8:
        return f"K is {shape[1]}: the int32 accumulator is safe up to {MAX_COLUMNS_U8}"
    return None if _is_exact(onednn_linear) else _SATURATES


def refuse_int_mm(shape: tuple[int, int]) -> str | None:
    """Why ``torch._int_mm`` cannot run a weight of ``shape`` (N, K) on the CPU; None if it can."""
    if shape[1] == 1:
        return "K is 1: torch._int_mm misreads the strides of a transposed column and returns garbage"
    if shape[1] > MAX_COLUMNS_S8:
        return f"K is {shape[1]}: the int32 accumulator is safe up to {MAX_COLUMNS_S8}"
    return None if _is_exact(int_mm_linear) else _SATURATES


@functools.cache
def _is_exact(kernel: Callable[[Format, Tensor, Mapping[str, Tensor], Tensor | None, Tensor], Tensor]) -> bool:
    """Whether ``kernel`` survives the codes that overflow 16-bit sums of two products."""
    x = torch.ones(32, 64, dtype=torch.float32, device="cpu")
    weight = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    weight_scale = torch.ones(32, 1, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        tensors = {"weight": weight, "weight_scale": weight_scale}
        found = kernel(FORMATS["int8"], x, tensors, None, new_handle(weight))
        return torch.equal(found, reference_linear(x, weight, weight_scale, None))


def onednn_linear(fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor) -> Tensor:
    """Kernel ``onednn``. ``x``: (M, K); ``weight``: (N, K) int8; ``weight_scale``: (N, 1) float32; ``bias``: (N,)."""
    weight = tensors["weight"]
    packed = prepared(handle, [weight], lambda: torch.ops.onednn.qlinear_prepack(weight.detach().contiguous(), None))
    channel_scale = tensors["weight_scale"].view(-1)
    no_zero_points = torch.empty(0, dtype=torch.int64, device="cpu")
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, x.shape[0], ROWS_PER_BLOCK):
        rows = slice(start, start + ROWS_PER_BLOCK)
        codes, scale = quantize_rows(x[rows])
        shifted = codes.bitwise_xor_(-128).view(torch.uint8)  # flipping the sign bit of s8 is adding 128 in u8
        y = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, 128, packed, channel_scale, no_zero_points,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        out[rows] = rescale(y, scale, bias, x.dtype)
    return out


def int_mm_linear(fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor) -> Tensor:
    """Kernel ``int_mm``: the same bits as ``onednn`` without a packed weight."""
    weight, channel_scale = tensors["weight"], tensors["weight_scale"].view(1, -1)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, x.shape[0], ROWS_PER_BLOCK):
        rows = slice(start, start + ROWS_PER_BLOCK)
        codes, scale = quantize_rows(x[rows])
        y = torch._int_mm(codes, weight.t()).to(torch.float32).mul_(channel_scale)
        out[rows] = rescale(y, scale, bias, x.dtype)
    return out
