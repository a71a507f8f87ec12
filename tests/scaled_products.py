"""What stands in for PyTorch's scaled matrix products where there is no GPU.

Every call is first made with fake CUDA tensors of the same shapes, strides and dtypes, so that PyTorch's own checks are
passed; then its value is computed in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.functional import ScalingType
from torchao.prototype.mx_formats.utils import from_blocked

REAL = {"scaled_mm": functional.scaled_mm, "_scaled_mm": torch._scaled_mm}


def check(name: str, *args: Any, **options: Any) -> None:
    """PyTorch's checks of a call on CUDA, and those that it leaves to the device."""
    bias, out = options.get("bias"), options.get("output_dtype", options.get("out_dtype"))
    assert out in (torch.bfloat16, torch.float32)
    assert bias is None or (bias.dtype == out == torch.bfloat16)
    with FakeTensorMode():
        fake = [_fake(value) for value in args]
        result = REAL[name](*fake, **{key: _fake(value) for key, value in options.items()})
    assert (result.shape, result.dtype) == ((args[0].shape[0], args[1].shape[1]), out)


def _fake(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, recipe_a: ScalingType, scale_b: Tensor, recipe_b: ScalingType, **options: Any
) -> Tensor:
    """Of ``torch.nn.functional``."""
    check("scaled_mm", a, b, scale_a, recipe_a, scale_b, recipe_b, **options)
    left = _expand(scale_a, recipe_a, a.shape)
    right = _expand(scale_b if recipe_b == ScalingType.BlockWise1x32 else scale_b.t(), recipe_b, b.t().shape)
    return _product(a, b, left, right.t(), options.get("bias"), options["output_dtype"])


def torch_scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
    """Of ``torch``, with one scale for each operand."""
    check("_scaled_mm", a, b, scale_a, scale_b, **options)
    assert scale_a.numel() == scale_b.numel() == 1
    return _product(a, b, scale_a.double(), scale_b.double(), options.get("bias"), options["out_dtype"])


def _expand(scale: Tensor, recipe: ScalingType, shape: torch.Size) -> Tensor:
    """For every element of a matrix (rows, K) in float64."""
    rows, columns = shape
    if recipe == ScalingType.RowWise:
        return scale.double()
    if recipe == ScalingType.BlockWise1x32:
        plain = from_blocked(scale.view(torch.uint8), rows, columns // 32)
        powers = torch.where(plain == 255, torch.nan, torch.exp2(plain.double() - 127))
        return powers.repeat_interleave(32, 1)
    wide = scale[:, : columns // 128].double().repeat_interleave(128, 1)
    return wide if recipe == ScalingType.BlockWise1x128 else wide.repeat_interleave(128, 0)


def _product(a: Tensor, b: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = (a.double() * left) @ (b.double() * right)
    return (y if bias is None else y + bias.double()).to(dtype)
