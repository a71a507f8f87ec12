"""Every kernel gives the bits of the reference, on every shape and dtype; the choice between them is explained."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from omni_convert.formats import FORMATS, make_format
from omni_convert.formats.errors import OmniConvertError
from omni_convert.runtime import cpu, cuda, decode, kernels, reference
from omni_convert.runtime.kernels import Device, Run, choose
from omni_convert.runtime.linear import QuantizedLinear
from omni_convert.runtime.operator import format_text, quantized_linear
from omni_convert.runtime.prepared import new_handle

INT8 = FORMATS["int8"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = {"onednn": (cpu.onednn_linear, cpu.refuse_onednn), "int_mm": (cpu.int_mm_linear, cpu.refuse_int_mm)}


def operands(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    weight = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(shape[0], 1, generator=generator) / 100
    return x, weight, scale, torch.randn(shape[0], generator=generator).to(dtype)


def run_kernel(
    run: Run, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return run(INT8, x, {"weight": weight, "weight_scale": scale}, bias, new_handle(weight))


def textbook_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> np.ndarray:
    """The formulas in the docstring of ``reference`` with NumPy and Python integers, independent of PyTorch."""
    values = x.to(torch.float32).numpy()
    out = np.empty((len(values), len(weight)), np.float32)
    for m, row in enumerate(values):
        amax = np.abs(row).max()
        row_scale, inverse = np.float32(amax / np.float32(127)), np.float32(np.float32(127) / amax)
        codes = [round(Fraction(float(value))) for value in row * inverse]
        for n, codes_n in enumerate(weight.tolist()):
            total = np.float32(sum(a * b for a, b in zip(codes, codes_n, strict=True)))
            product = np.float32(np.float32(total * scale[n, 0].numpy()) * row_scale)
            out[m, n] = product + np.float32(bias[n].item())
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_textbook(dtype: torch.dtype) -> None:
    x, weight, scale, bias = operands(4, (7, 33), dtype)
    expected = torch.from_numpy(textbook_linear(x, weight, scale, bias)).to(dtype)
    assert torch.equal(reference.reference_linear(x, weight, scale, bias), expected)


def test_quotients_are_rounded_once() -> None:
    """A product with a rounded reciprocal is another number in one of a hundred thousand codes, and on some devices."""
    x = torch.randn(4000, 256, generator=torch.Generator().manual_seed(0))
    amax = np.abs(x.numpy()).max(axis=1, keepdims=True)
    for largest, (codes, scale) in ((127, reference.quantize_rows(x)), (448, reference.quantize_groups(x, 256))):
        assert np.array_equal(scale.numpy(), amax / np.float32(largest))
        values = x.numpy() * (np.float32(largest) / amax)
        rounded = np.rint(values) if largest == 127 else values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        assert np.array_equal(codes.to(torch.float32).numpy(), rounded)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_groups_have_scales_of_their_own(size: int) -> None:
    x = torch.randn(5, 16).bfloat16()
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    codes, scale = reference.quantize_groups(x, size)
    for start in range(0, 16, size):
        group, group_scale = reference.quantize_groups(x[:, start : start + size], size)
        assert torch.equal(group.view(torch.uint8), codes[:, start : start + size].view(torch.uint8))
        torch.testing.assert_close(
            group_scale, scale[:, start // size : start // size + 1], rtol=0, atol=0, equal_nan=True
        )
    assert scale.isnan().nonzero().tolist() == [[1, 3 // size], [2, 4 // size]]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 3, 17, 64, 257])
def test_kernel_is_the_reference(name: str, dtype: torch.dtype, rows: int) -> None:
    run, refuse = KERNELS[name]
    for shape in ((1, 7), (7, 1), (64, 64), (33, 131), (129, 1000)):
        if refuse(shape) is None:
            x, weight, scale, bias = operands(rows, shape, dtype)
            for b in (None, bias):
                found = run_kernel(run, x, weight, scale, b)
                assert found.dtype == dtype
                assert torch.equal(found, reference.reference_linear(x, weight, scale, b)), (shape, b is None)


@pytest.mark.parametrize("name", KERNELS)
def test_largest_codes_do_not_saturate(name: str) -> None:
    run, refuse = KERNELS[name]
    if refuse((40, 600)) is not None:
        pytest.skip("this CPU cannot run it")
    x = torch.ones(40, 600) * torch.tensor([1.0, -1.0]).repeat(20)[:, None]
    weight = torch.full((40, 600), -127, dtype=torch.int8)
    found = run_kernel(run, x, weight, torch.ones(40, 1), None)
    assert torch.allclose(found.abs(), torch.tensor(127.0 * 600), rtol=1e-6)


def test_kernels_that_saturate_are_refused() -> None:
    """oneDNN without VNNI adds pairs of products in 16 bits, in both operators; nothing reports it."""
    code = (  # a process of its own: oneDNN reads the variable once
        "from omni_convert.formats import FORMATS; from omni_convert.runtime.kernels import Device, choose\n"
        "choice = choose(FORMATS['int8'], (64, 64), Device('cpu')); print(choice.kernel.name, len(choice.rejected))"
    )
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() in (["decode", "2"], ["int_mm", "1"])  # the latter where PyTorch has its own
    assert "runs on kernel" in found.stderr


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float16, "cpu"), (torch.float32, "meta")]
)
def test_the_first_choice_does_not_depend_on_defaults(dtype: torch.dtype, device: str) -> None:
    code = (  # a process of its own: what a kernel can do is found out once
        f"import torch; torch.set_default_dtype({dtype}); torch.set_default_device({device!r})\n"
        "from omni_convert.formats import FORMATS; from omni_convert.runtime.kernels import Device, choose\n"
        "print(choose(FORMATS['int8'], (64, 64), Device('cpu')).kernel.name)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == choose(FORMATS["int8"], (64, 64), Device("cpu")).kernel.name


def test_choice_names_its_reasons() -> None:
    choice = choose(INT8, (8, 200_000), Device("cpu"))
    assert choice.kernel.name == "decode"
    assert choice.rejected.keys() == {"onednn", "int_mm"}
    for fmt in (INT8, FORMATS["mxfp8"], make_format("fp8", granularity="block")):
        choice = choose(fmt, (64, 64), Device("mps"))
        assert (choice.kernel.name, choice.rejected) == ("decode", {})
        assert choice.kernel.note.startswith("weight-only")


def test_slower_kernel_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    kernels.choose.cache_clear()
    with caplog.at_level("WARNING"):
        choose(INT8, (8, 200_000), Device("cpu"))
    assert "int8 (8, 200000) on cpu runs on kernel 'decode' (onednn: " in caplog.text


def test_column_weight_is_kept_from_int_mm() -> None:
    assert "garbage" in (cpu.refuse_int_mm((64, 1)) or "")


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 64])
def test_cuda_arithmetic_on_cpu(rows: int) -> None:
    """Same operators, other device: what padding and scaling do can be checked without one."""
    if cpu.refuse_int_mm((64, 64)) is not None:
        pytest.skip("torch._int_mm is not exact on this CPU")
    x, weight, scale, bias = operands(rows, (24, 64), torch.bfloat16)
    found = run_kernel(cuda.int_mm_linear, x, weight, scale, bias)
    assert torch.equal(found, reference.reference_linear(x, weight, scale, bias))


def test_weight_only_is_close() -> None:
    x, weight, scale, bias = operands(9, (24, 64), torch.float32)
    found = run_kernel(decode.decoded_linear, x, weight, scale, bias)
    expected = reference.reference_linear(x, weight, scale, bias)
    assert (found - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_row_becomes_nan_and_only_that_row(name: str, dtype: torch.dtype, poison: float) -> None:
    x, weight, scale, bias = operands(3, (5, 8), dtype)
    x[1, 4] = poison
    assert reference.quantize_rows(x)[1].isnan().flatten().tolist() == [False, True, False]
    run, refuse = KERNELS[name]
    if refuse((5, 8)) is None:
        found = run_kernel(run, x, weight, scale, bias)
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_extremes(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 8, dtype=dtype)
    x[1] = torch.finfo(dtype).tiny
    x[2] = torch.finfo(dtype).smallest_normal / 2  # subnormal
    x[3] = torch.finfo(dtype).max
    before = x.clone()
    codes, scale = reference.quantize_rows(x)
    assert torch.equal(x, before)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert (codes[0] == 0).all()
    assert (codes[3] == 127).all()
    layer = QuantizedLinear(8, 2, dtype=dtype, fmt=INT8)
    layer.bias.data.fill_(0.5)
    assert (layer(x[:1]) == 0.5).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 8, dtype=torch.int8), "activations of torch.int8"),
        (torch.ones(2, 8, dtype=torch.float64), "activations of torch.float64"),
        (torch.ones(8, 4), "last dimension to be 8"),
        (torch.tensor(1.0), "last dimension to be 8"),
    ],
)
def test_wrong_input_is_refused(x: Any, message: str) -> None:
    with pytest.raises(OmniConvertError, match=message):
        QuantizedLinear(8, 4, fmt=INT8)(x)


def test_scale_of_another_shape_is_refused() -> None:
    layer = QuantizedLinear(8, 4, fmt=INT8)
    layer.weight_scale = torch.ones(2, 1)
    with pytest.raises(
        OmniConvertError, match=r"weight_scale torch.float32 \(2, 1\), expected torch.float32 and \(4, 1\)"
    ):
        layer(torch.ones(1, 8))


def test_operator_passes_torchs_own_checks() -> None:
    x, weight, scale, bias = operands(3, (8, 16), torch.float32)
    args = (x.requires_grad_(), weight, [scale], bias.requires_grad_(), new_handle(weight), format_text(INT8))
    torch.library.opcheck(quantized_linear, args)
    with torch.autocast("cpu", torch.bfloat16):
        torch.library.opcheck(quantized_linear, args)
