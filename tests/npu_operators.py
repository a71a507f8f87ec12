"""Stand-ins for the operators of torch-npu, on the CPU, written from their documentation and as strict as it is.

What they are given in another rank, dtype, order or storage format than the documentation says is an error or gives
another number. Source: the pages ``torch_npu.npu_*`` of torch-npu 2.13 and ``aclnn*`` of CANN 9, for Ascend 950, and
the reference results in the tests of Ascend's op-plugin. Schemas are those of the wheel, which
``scripts/check_torch_npu.py`` compares.

MX scales are e8m0 bytes. Packed e2m1 has the first of two values in the low bits. NZ ("fractal") storage of bytes is
tiles of 16 x 32, down before across.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from torch import Tensor

SCHEMAS = (
    "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
    'str quant_mode="pertoken", float dst_type_max=0.0) -> (Tensor, Tensor)',
    'npu_dynamic_block_quant(Tensor x, *, float min_scale=0.0, str round_mode="rint", int dst_type=1, '
    "int row_block_size=1, int col_block_size=128, float dst_type_max=0.0) -> (Tensor y, Tensor scale)",
    'npu_dynamic_mx_quant(Tensor input, *, int axis=-1, str round_mode="rint", int dst_type=296, int block_size=32, '
    "int? scale_alg=0, float dst_type_max=0.0, float max_low_bound=0.0) -> (Tensor y, Tensor mxscale)",
    'npu_dynamic_dual_level_mx_quant(Tensor input, *, Tensor? smooth_scale=None, str round_mode="rint") -> '
    "(Tensor y, Tensor level0_scale, Tensor level1_scale)",
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
    "Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
    "int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
    "npu_dual_level_quant_matmul(Tensor x1, Tensor x2, Tensor x1_level0_scale, Tensor x2_level0_scale, "
    "Tensor x1_level1_scale, Tensor x2_level1_scale, *, Tensor? bias=None, int output_dtype=15) -> Tensor",
    "npu_format_cast(Tensor input, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) -> Tensor",
)
INT8, E4M3, E8M0, E2M1 = 1, 292, 293, 296
FLOATS = {5: torch.float16, 15: torch.bfloat16}
NZ = 29
TILE = (16, 32)
MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


@contextmanager
def operators() -> Iterator[None]:
    """``torch.ops.npu``, as long as this lasts."""
    with torch.library._scoped_library("npu", "FRAGMENT") as library:
        for schema in SCHEMAS:
            library.define(schema)
            name = schema.partition("(")[0]
            library.impl(name, globals()[name], "CPU")
        yield


def npu_dynamic_quant(
    input: Tensor,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _check_activations(input)
    assert (smooth_scales, group_index, quant_mode, dst_type_max) == (None, None, "pertoken", 0.0)
    largest = {None: 127.0, INT8: 127.0, E4M3: 448.0}[dst_type]
    scale = input.float().abs().amax(dim=-1) / largest
    codes = input.float() / scale.unsqueeze(-1)
    return (codes.clamp(-448, 448).to(torch.float8_e4m3fn) if dst_type == E4M3 else codes.round().to(torch.int8)), scale


def npu_dynamic_block_quant(
    x: Tensor,
    min_scale: float = 0.0,
    round_mode: str = "rint",
    dst_type: int = 1,
    row_block_size: int = 1,
    col_block_size: int = 128,
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _check_activations(x)
    assert (min_scale, round_mode, dst_type, row_block_size, dst_type_max) == (0.0, "rint", E4M3, 1, 0.0)
    assert col_block_size in (64, 128, 192, 256)
    parts = x.float().split(col_block_size, dim=1)
    scales = torch.stack([part.abs().amax(dim=1) / 448 for part in parts], dim=1)
    codes = [part / scales[:, [index]] for index, part in enumerate(parts)]
    return torch.cat(codes, dim=1).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def npu_dynamic_mx_quant(
    input: Tensor,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = 296,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _check_activations(input)
    assert (axis, round_mode, block_size, max_low_bound) == (-1, "rint", 32, 0.0)
    assert (dst_type, scale_alg, dst_type_max) in ((E4M3, 0, 0.0), (E2M1, 0, 0.0), (E2M1, 2, 7.25))
    values, exponents = _mx_values(input, {E4M3: 8, E2M1: 2}[dst_type], dst_type_max)
    bytes_ = _paired(exponents)
    if dst_type == E4M3:
        return values.clamp(-448, 448).float().to(torch.float8_e4m3fn), bytes_
    return _packed(values), bytes_


def npu_dynamic_dual_level_mx_quant(
    input: Tensor, smooth_scale: Tensor | None = None, round_mode: str = "rint"
) -> tuple[Tensor, Tensor, Tensor]:
    _check_activations(input)
    assert round_mode == "rint"
    assert smooth_scale is not None, "Inner Error"  # of an Ascend 950PR: cann/ops-nn#1876
    assert (smooth_scale.dtype, smooth_scale.shape) == (input.dtype, input.shape[-1:])
    groups = (input * smooth_scale).float().split(512, dim=1)
    level0 = torch.stack([group.abs().amax(dim=1) / 6 for group in groups], dim=1)
    scaled = torch.cat([group / level0[:, [index]] for index, group in enumerate(groups)], dim=1)
    values, exponents = _mx_values(scaled.to(input.dtype), 2, 0.0)
    return _packed(values), level0, _paired(exponents)


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    assert (offset, y_scale) == (None, None)
    assert pertoken_scale is not None
    assert x1.numel() and x1.is_contiguous() and x1.dim() == x2.dim() == 2
    assert x1.shape[1] == x2.shape[0], "k mismatch"
    assert max(x1.shape[1], x2.shape[1]) <= 65535, "x1 and x2: the last dimension is above 65535"
    assert x1.dtype == x2.dtype
    transposed = _is_transposed(x2)
    if group_sizes is None:
        assert (x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype) == (None,) * 4
        assert bias is None or x1.dtype == torch.int8, "bias: documents disagree on what e4m3 does with it"
        out = _per_token(x1, x2, scale, pertoken_scale)
    elif group_sizes == [1, 128, 128]:
        assert (x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype) == (None,) * 4
        assert bias is None, "bias: not with e4m3 in blocks"
        out = _per_block(x1, x2, scale, pertoken_scale, transposed)
    else:
        assert (group_sizes, scale_dtype, pertoken_scale_dtype) == ([1, 1, 32], E8M0, E8M0)
        assert x1_dtype == x2_dtype and x1_dtype in (None, E2M1)
        if x1_dtype == E2M1:
            assert x1.dtype == torch.uint8 and transposed, "x2: packed e2m1 must be a transposed view"
            x1, x2 = _unpacked(x1), _unpacked(x2.t()).t()
        else:
            assert x1.dtype == torch.float8_e4m3fn
        out = _microscaled(x1, x2, scale, pertoken_scale, transposed)
    bias_dtypes = (torch.float32,) if x1.dtype != torch.int8 else (torch.float32, FLOATS.get(output_dtype or 0))
    return _finish(out, bias, bias_dtypes, output_dtype)


def npu_dual_level_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    bias: Tensor | None = None,
    output_dtype: int = 15,
) -> Tensor:
    assert x1.numel() and x1.is_contiguous() and x1.dtype in (torch.uint8, torch.int8)
    rows, columns = len(x2), 2 * x1.shape[1]
    assert (x2.dtype, 2 * x2.shape[1]) == (torch.int8, columns)
    level0, level1 = ceil(columns / 512), columns // 64
    assert all(scale.is_contiguous() for scale in (x1_level0_scale, x2_level0_scale, x1_level1_scale, x2_level1_scale))
    assert (x1_level0_scale.dtype, x1_level0_scale.shape) == (torch.float32, (len(x1), level0))
    assert (x2_level0_scale.dtype, x2_level0_scale.shape) == (torch.float32, (level0, rows))
    assert (x1_level1_scale.dtype, x1_level1_scale.shape) == (torch.uint8, (len(x1), level1, 2))
    assert (x2_level1_scale.dtype, x2_level1_scale.shape) == (torch.uint8, (rows, level1, 2))
    coarse = [scale.double().repeat_interleave(512, 1)[:, :columns] for scale in (x1_level0_scale, x2_level0_scale.t())]
    fine = [_exp2(scale.flatten(1)).repeat_interleave(32, 1) for scale in (x1_level1_scale, x2_level1_scale)]
    left, right = _unpacked(x1) * fine[0] * coarse[0], _unpacked(_from_nz(x2)) * fine[1] * coarse[1]
    return _finish(left @ right.t(), bias, (torch.float32,), output_dtype)


def npu_format_cast(
    input: Tensor, acl_format: int, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The shape stays, the storage becomes whole tiles."""
    assert (acl_format, customize_dtype, input_dtype) == (NZ, INT8, None)
    assert input.dtype == torch.int8 and input.is_contiguous()
    rows, columns = input.shape
    down, across = ceil(rows / TILE[0]), ceil(columns / TILE[1])
    padded = torch.nn.functional.pad(input, (0, across * TILE[1] - columns, 0, down * TILE[0] - rows))
    tiles = padded.view(down, TILE[0], across, TILE[1]).permute(2, 0, 1, 3).contiguous()
    return tiles.as_strided((rows, columns), (columns, 1))


def _from_nz(tensor: Tensor) -> Tensor:
    rows, columns = tensor.shape
    down, across = ceil(rows / TILE[0]), ceil(columns / TILE[1])
    assert tensor.is_contiguous() and tensor.storage_offset() == 0
    assert tensor.untyped_storage().nbytes() == down * across * TILE[0] * TILE[1], "x2: not in NZ format"
    tiles = tensor.as_strided((across, down, *TILE), (down * TILE[0] * TILE[1], TILE[0] * TILE[1], TILE[1], 1))
    return tiles.permute(1, 2, 0, 3).reshape(down * TILE[0], across * TILE[1])[:rows, :columns]


def _per_token(x1: Tensor, x2: Tensor, scale: Tensor, pertoken_scale: Tensor) -> Tensor:
    assert x1.dtype in (torch.int8, torch.float8_e4m3fn)
    assert scale.dtype == pertoken_scale.dtype == torch.float32
    assert scale.shape in ((1,), (x2.shape[1],)) and pertoken_scale.shape == (len(x1),)
    return (_double(x1) @ _double(x2)) * scale.double() * pertoken_scale.double().unsqueeze(1)


def _per_block(x1: Tensor, x2: Tensor, scale: Tensor, pertoken_scale: Tensor, transposed: bool) -> Tensor:
    (rows, columns), outputs = x1.shape, x2.shape[1]
    down, across = ceil(columns / 128), ceil(outputs / 128)
    assert x1.dtype == torch.float8_e4m3fn and scale.dtype == pertoken_scale.dtype == torch.float32
    assert (scale.shape, pertoken_scale.shape) == ((down, across), (rows, down)) and pertoken_scale.is_contiguous()
    assert (scale.t() if transposed else scale).is_contiguous(), "scale: not transposed as x2 is"
    left = _double(x1) * pertoken_scale.double().repeat_interleave(128, 1)[:, :columns]
    blocks = scale.double().repeat_interleave(128, 0)[:columns].repeat_interleave(128, 1)[:, :outputs]
    return left @ (_double(x2) * blocks)


def _microscaled(x1: Tensor, x2: Tensor, scale: Tensor, pertoken_scale: Tensor, transposed: bool) -> Tensor:
    (rows, columns), outputs = x1.shape, x2.shape[1]
    groups = ceil(columns / 64)
    assert scale.dtype == pertoken_scale.dtype == torch.uint8
    assert (scale.shape, pertoken_scale.shape) == ((groups, outputs, 2), (rows, groups, 2))
    assert pertoken_scale.is_contiguous()
    by_output = scale.transpose(0, 1)
    assert (by_output if transposed else scale).is_contiguous(), "scale: not transposed as x2 is"
    scales = [_exp2(part.flatten(1)).repeat_interleave(32, 1)[:, :columns] for part in (pertoken_scale, by_output)]
    return (_double(x1) * scales[0]) @ (_double(x2) * scales[1].t())


def _finish(out: Tensor, bias: Tensor | None, bias_dtypes: tuple[Any, ...], output_dtype: int | None) -> Tensor:
    if bias is not None:
        assert bias.dtype in bias_dtypes and bias.shape == out.shape[1:], "bias"
        out = out + bias.double()
    return out.float().to(torch.int8 if output_dtype is None else FLOATS[output_dtype])


def _check_activations(x: Tensor) -> None:
    assert x.dtype in (torch.float16, torch.bfloat16), f"activations of {x.dtype}"
    assert x.dim() == 2 and x.numel()


def _is_transposed(x2: Tensor) -> bool:
    assert x2.is_contiguous() or x2.t().is_contiguous()
    return x2.t().is_contiguous()


def _double(values: Tensor) -> Tensor:
    return values.to(torch.float32).double()


def _exp2(bytes_: Tensor) -> Tensor:
    return torch.exp2(bytes_.double() - 127)


def _mx_values(x: Tensor, emax: int, dst_type_max: float) -> tuple[Tensor, Tensor]:
    """Float64 values divided by their block's power of two, rounded to nothing yet, and the exponents."""
    blocks = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % 32)).view(len(x), -1, 32)
    amax = blocks.abs().amax(dim=-1)
    if dst_type_max:  # the quotient, rounded up to a power of two
        mantissa, exponents = torch.frexp(amax / dst_type_max)
        exponents = exponents - (mantissa == 0.5).int()
    else:  # the power of two below the largest
        exponents = torch.frexp(amax)[1] - 1 - emax
    exponents = torch.where(amax == 0, -127, exponents).clamp(min=-127)
    values = blocks / torch.exp2(exponents.double()).unsqueeze(-1)
    return values.flatten(1)[:, : x.shape[1]], exponents


def _paired(exponents: Tensor) -> Tensor:
    """(M, groups) -> e8m0 bytes (M, ceil(groups / 2), 2), an odd one with 0 beside it."""
    bytes_ = (exponents + 127).to(torch.uint8)
    return torch.nn.functional.pad(bytes_, (0, bytes_.shape[1] % 2)).view(len(bytes_), -1, 2)


def _packed(values: Tensor) -> Tensor:
    """Nearest e2m1, of two equally near the one with an even code; two in a byte."""
    magnitude, between = values.abs(), (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    codes = (magnitude.unsqueeze(-1) > between).sum(dim=-1)
    codes += ((magnitude == between[codes.clamp(max=6)]) & (codes % 2 == 1)).long()
    codes += 8 * torch.signbit(values).long()
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """(rows, K / 2) bytes -> float64 (rows, K)."""
    codes = packed.contiguous().view(torch.uint8).long()
    codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    return MAGNITUDES[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
