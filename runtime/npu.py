"""Linears on Ascend NPUs: activations are quantized as they come, weights stay as the checkpoint has them.

Not measured, and not run: no NPU was at hand. The calls are those that the operators' documentation (CANN 9, torch-npu
2.13) asks for, they pass the shape functions of the real operators (``scripts/check_torch_npu.py``), and the tests run
them on stand-ins written from that documentation.

| kernel              | activations                               | weight and its scales, as the operator takes them  |
|---------------------|-------------------------------------------|----------------------------------------------------|
| npu_int8            | int8, float32 per token                   | (K, N) int8, float32 (N,)                          |
| npu_fp8             | e4m3, float32 per token                   | (K, N) e4m3, float32 (N,) or (1,)                  |
| npu_fp8, blocks     | e4m3, float32 per token and 128 columns   | (K, N) e4m3, float32 (ceil(K/128), ceil(N/128))    |
| npu_mxfp8           | e4m3, e8m0 per token and 32 columns       | (K, N) e4m3, e8m0 (ceil(K/64), N, 2)               |
| npu_mxfp4           | packed e2m1, e8m0 per token and 32        | (K/2, N) packed e2m1, e8m0 (ceil(K/64), N, 2)      |
| npu_mxfp4_dualscale | packed e2m1, e8m0 per 32, float32 per 512 | (N, K/2) packed e2m1 in NZ format,                 |
|                     |                                           | e8m0 (N, K/64, 2), float32 (ceil(K/512), N)        |

(K, N) and its scales are transposed views of what the checkpoint has, so they take no memory. Packed weights, which a
checkpoint does not have, are made at the first call and kept beside it (``prepared``). Recorded activation scales
(``input_scale``) are not used: a scale per token loses less.

A result is rounded to the dtype of the activations once, in FP8 once more for the bias. Operators take bf16 and fp16:
float32 activations are rounded to bf16, and so are their results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from omni_convert.formats.base import Format
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.fp8 import Fp8
from omni_convert.formats.microscaling import E2M1, E4M3_VALUES
from omni_convert.formats.mx import Mx
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.runtime.prepared import prepared

LARGEST_SIZE = 65535
"""Documented for the last dimensions in memory of ``npu_quant_matmul``, and kept to by both N and K: not every version
says which they are, and beyond it the operator fails at the first call."""
BLOCK_SIZE = (128, 128)

E4M3FN, E8M0FNU, E2M1FN_X2 = 292, 293, 296
"""How operators of torch-npu take dtypes; for the last they take no dtype of PyTorch."""
FRACTAL_NZ = 29

UOS_LARGEST = 7.25
"""What the largest of a block is scaled to with ``mxfp4_scale_alg`` 2, as vLLM-Omni does. Source: arXiv 2607.24377."""

CHUNK = 1 << 22
"""How many weights are packed at a time; of each, an index of 4 bytes exists."""


def refuse(fmt: Format, shape: tuple[int, int]) -> str | None:
    """Why the operator cannot run a weight of ``shape`` (N, K) in ``fmt``; None if it can."""
    if isinstance(fmt, Mxfp4DualScale):
        return None  # of its operator no limit is documented
    if max(shape) > LARGEST_SIZE:
        return f"N, K are {shape[0]}, {shape[1]}: npu_quant_matmul takes up to {LARGEST_SIZE}"
    if isinstance(fmt, Fp8) and fmt.block_size not in (None, BLOCK_SIZE):
        return f"blocks are {fmt.block_size}: npu_quant_matmul takes {BLOCK_SIZE}"
    return None


Linear = Callable[[Format, Tensor, Mapping[str, Tensor], "Tensor | None", Tensor], Tensor]


def _in_16_bits(linear: Linear) -> Linear:
    """``linear``, which takes some rows of bf16 or fp16, for any number of rows in any dtype of activations."""

    @functools.wraps(linear)
    def run(fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor) -> Tensor:
        if not len(x):
            return x.new_empty(0, len(tensors["weight"]))
        narrow = x if x.dtype in (torch.bfloat16, torch.float16) else x.to(torch.bfloat16)
        return linear(fmt, narrow, tensors, bias, handle).to(x.dtype)

    return run


@_in_16_bits
def int8_linear(fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor) -> Tensor:
    """Kernel ``npu_int8``. ``x``: (M, K); ``weight``: (N, K) int8; ``weight_scale``: (N, 1) float32; ``bias``: (N,)."""
    codes, scale = torch.ops.npu.npu_dynamic_quant(x)
    return _quant_matmul(x, codes, scale, tensors["weight"].t(), tensors["weight_scale"].view(-1), bias)


@_in_16_bits
def fp8_linear(fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor) -> Tensor:
    """Kernel ``npu_fp8``. ``weight``: (N, K) e4m3; ``weight_scale``: (N,) or (1,) float32, or that of blocks.

    The bias is added here: with blocks the operator takes none, and about other scales documents disagree on whether
    it scales the bias too.
    """
    assert isinstance(fmt, Fp8)
    weight = tensors["weight"].t()
    if fmt.block_size is None:
        codes, scale = torch.ops.npu.npu_dynamic_quant(x, dst_type=E4M3FN)
        y = _quant_matmul(x, codes, scale, weight, tensors["weight_scale"], None)
    else:
        codes, scale = torch.ops.npu.npu_dynamic_block_quant(
            x, dst_type=E4M3FN, row_block_size=1, col_block_size=fmt.block_size[1]
        )
        groups = [1, *fmt.block_size]
        y = _quant_matmul(x, codes, scale, weight, tensors["weight_scale_inv"].t(), None, group_sizes=groups)
    return y if bias is None else y.add_(bias)


@_in_16_bits
def mxfp8_linear(fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor) -> Tensor:
    """Kernel ``npu_mxfp8``. ``weight``: (N, K) e4m3; ``weight_scale``: (N, K / 32) e8m0 bytes."""
    codes, scale = torch.ops.npu.npu_dynamic_mx_quant(x, dst_type=E4M3FN)
    given = tensors["weight_scale"]
    even = prepared(handle, [given], lambda: _even(given)) if given.shape[1] % 2 else given
    return _mx_matmul(x, codes, scale, tensors["weight"].t(), even, bias)


@_in_16_bits
def mxfp4_linear(fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor) -> Tensor:
    """Kernel ``npu_mxfp4``. ``weight``: (N, K) e2m1 values in e4m3; ``weight_scale``: (N, K / 32) e8m0 bytes."""
    assert isinstance(fmt, Mx)
    algorithm = dict(fmt.settings).get("mxfp4_scale_alg", 0)
    codes, scale = torch.ops.npu.npu_dynamic_mx_quant(
        x, dst_type=E2M1FN_X2, scale_alg=algorithm, dst_type_max=UOS_LARGEST if algorithm == 2 else 0.0
    )
    weight, given = tensors["weight"], tensors["weight_scale"]
    odd = bool(given.shape[1] % 2)
    packed, padded = prepared(handle, [weight, given], lambda: (packed_e2m1(weight), _even(given) if odd else None))
    # A transposed view: the operator refuses a packed weight that is contiguous as (K / 2, N).
    even = padded if odd else given
    return _mx_matmul(x, codes, scale, packed.t(), even, bias, x1_dtype=E2M1FN_X2, x2_dtype=E2M1FN_X2)


@_in_16_bits
def dual_linear(fmt: Format, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, handle: Tensor) -> Tensor:
    """Kernel ``npu_mxfp4_dualscale``. ``weight_dual_scale``: (N, ceil(K / 512), 1) float32; ``mul_scale``: (K,).

    The weight is given as (N, K / 2), not transposed. ``mul_scale`` is given even where it is all ones: the operator
    failed without one on an Ascend 950PR (cann/ops-nn#1876).
    """
    weight, coarse = tensors["weight"], tensors["weight_dual_scale"]
    packed, level0 = prepared(
        handle, [weight, coarse], lambda: (_nz(packed_e2m1(weight)), coarse.squeeze(-1).t().contiguous())
    )
    codes, coarse_of_x, fine_of_x = torch.ops.npu.npu_dynamic_dual_level_mx_quant(
        x, smooth_scale=tensors["mul_scale"].to(x.dtype)
    )
    y: Tensor = torch.ops.npu.npu_dual_level_quant_matmul(
        codes, packed, coarse_of_x, level0, fine_of_x, _pairs(tensors["weight_scale"]),
        bias=_float32(bias), output_dtype=x.dtype,
    )  # fmt: skip
    return y


LINEARS: Mapping[str, Linear] = {
    "int8": int8_linear,
    "fp8": fp8_linear,
    "mxfp8": mxfp8_linear,
    "mxfp4": mxfp4_linear,
    "mxfp4_dualscale": dual_linear,
}
"""By the name of the format."""


def packed_e2m1(weight: Tensor) -> Tensor:
    """(N, K) e2m1 values in e4m3 -> (N, K / 2) uint8, the first of two in the low bits: sign, then magnitude.

    By means that every device has, in the place of ``npu_dtype_cast(weight, float4_e2m1fn_x2)``. Source of the order:
    the tests of Ascend's op-plugin, which pack what the operators multiply.

    Raises:
        OmniConvertError: another value.
    """
    rows, columns = weight.shape
    table, codes = _nibbles(weight.device), weight.detach().view(torch.uint8)
    packed = codes.new_empty(rows, columns // 2)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        index = codes[start : start + step].flatten().to(torch.int32)
        nibbles = table.index_select(0, index).view(-1, columns // 2, 2)
        if bool((nibbles > 15).any()):
            raise OmniConvertError(
                "a packed weight was to be made of values that e2m1 does not have, expected 0, 0.5, 1, 1.5, 2, 3, 4, 6 "
                "and their negatives. The checkpoint is damaged, or not mxfp4: run omni-convert verify on it."
            )
        packed[start : start + step] = nibbles[..., 0] + nibbles[..., 1] * 16
    return packed


@functools.cache
def _nibbles(device: torch.device) -> Tensor:
    """(256,) uint8: the e2m1 code of every e4m3 byte, 255 where there is none."""
    magnitudes = {value: code for code, value in enumerate(sorted(set(abs(E4M3_VALUES[E2M1.valid_codes]))))}
    codes = [magnitudes.get(abs(value), 255) | 8 * (byte >> 7) for byte, value in enumerate(E4M3_VALUES.tolist())]
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor(codes, dtype=torch.uint8, device=device)


def _nz(packed: Tensor) -> Tensor:
    """In the format that the product of two levels reads; the operator knows no packed dtype but int8."""
    nz: Tensor = torch.ops.npu.npu_format_cast(packed.view(torch.int8), FRACTAL_NZ, customize_dtype=torch.int8)
    return nz


def _even(scale: Tensor) -> Tensor:
    """(N, odd) bytes -> one more, 0: operators take them in pairs."""
    return torch.cat([scale, scale.new_zeros(len(scale), 1)], dim=1)


def _pairs(scale: Tensor) -> Tensor:
    """(N, groups) -> (N, groups / 2, 2)."""
    return scale.view(len(scale), -1, 2)


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(torch.float32)


def _mx_matmul(
    x: Tensor, codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, **dtypes: int
) -> Tensor:
    """``weight``: a transposed view; so its scales, (N, even number of groups), become one."""
    return _quant_matmul(
        x, codes, scale, weight, _pairs(weight_scale).transpose(0, 1), bias,
        scale_dtype=E8M0FNU, pertoken_scale_dtype=E8M0FNU, group_sizes=[1, 1, 32], **dtypes,
    )  # fmt: skip


def _quant_matmul(
    x: Tensor, codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, **others: Any
) -> Tensor:
    """(M, N) in the dtype of ``x``; without ``output_dtype`` the operator would give int8."""
    y: Tensor = torch.ops.npu.npu_quant_matmul(
        codes, weight, weight_scale, pertoken_scale=scale, bias=_float32(bias), output_dtype=x.dtype, **others
    )
    return y
