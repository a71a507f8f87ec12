"""What CUDA kernels compute: run by ``test_cuda_arithmetic``, on a GPU or in Triton's interpreter.

Not collected by itself, because Triton decides at its import whether it interprets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scaled_products
import torch
from kinds import KINDS
from torchao.prototype.mx_formats.utils import from_blocked, to_blocked

from omni_convert.formats import make_format
from omni_convert.formats import microscaling as mx
from omni_convert.formats.base import Facts, Format
from omni_convert.runtime import cuda, cuda_fp8, cuda_quantize, kernels, reference
from omni_convert.runtime.cuda_device import missing_triton
from omni_convert.runtime.linear import QuantizedLinear
from omni_convert.runtime.operator import format_text
from omni_convert.runtime.prepared import new_handle, prepared_bytes

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MANY = 257 if GPU else 17
"""Rows that fp8 has row scales for."""
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = make_format("fp8", granularity="block")
SCALED = (
    ("fp8 tensor", (9, 0), "scaled_mm"),
    ("fp8 tensor", (12, 0), "unscaled_mm"),
    ("fp8 static", (8, 9), "scaled_mm"),
    ("fp8 channel", (9, 0), "scaled_mm"),
    ("fp8 128x128", (9, 0), "scaled_mm"),
    ("mxfp8", (10, 0), "mx_scaled_mm"),
    ("mxfp4", (12, 0), "mx_scaled_mm"),
)


@pytest.fixture(autouse=True)
def casts_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 to bf16 and rounds halves of e4m3 up; devices round both half to even."""
    if GPU:
        return
    from triton.runtime import interpreter

    theirs = interpreter._convert_float
    targets = {"bf16": (torch.bfloat16, torch.int16), "fp8e4nv": (E4M3, torch.uint8)}

    def convert(values: Any, given: Any, wanted: Any, rounding: Any) -> Any:
        if given.name != "fp32" or wanted.name not in targets:
            return theirs(values, given, wanted, rounding)
        dtype, bits = targets[wanted.name]
        return torch.from_numpy(values.astype(np.float32)).to(dtype).view(bits).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True)
def scaled_products_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_products.scaled_mm)
        monkeypatch.setattr(torch, "_scaled_mm", scaled_products.torch_scaled_mm)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_quantize, "missing_triton", lambda: "Triton is not installed")


def activations(rows: int, columns: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    """Rows of very different size."""
    generator = torch.Generator().manual_seed(1000 * rows + columns + seed)
    sizes = torch.logspace(-3, 1, rows)[torch.randperm(rows, generator=generator)]
    return (torch.randn(rows, columns, generator=generator) * sizes[:, None]).to(dtype).to(DEVICE)


def extreme_rows(columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of zeros, of the smallest and largest numbers, of ties, and with something that is none, at either end."""
    info = torch.finfo(dtype)
    x = torch.randn(9, columns).to(dtype)
    x[0], x[1], x[2], x[3], x[4] = 0, info.tiny, info.smallest_normal / 2, info.max, -info.max
    x[5] = torch.tensor([127.0, 0.5, -0.5, 1.5, -2.5]).repeat(columns)[:columns].to(dtype)
    x[6, -1], x[7, 0], x[8, columns // 2] = float("nan"), float("inf"), float("-inf")
    return x.to(DEVICE)


def assert_same_codes(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Scales to the bit; codes where the scale is a number."""
    codes, scale = expected
    torch.testing.assert_close(found[1], scale, rtol=0, atol=0, equal_nan=True)
    finite = scale.isfinite().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    assert found[0].dtype == codes.dtype
    differ = (found[0].view(torch.uint8) != codes.view(torch.uint8)) & finite
    assert not differ.any(), differ.nonzero()[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", [torch.int8, E4M3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 64), (17, 131), (5, 3072), (2, 4097), (2, 12288)], ids=str)
def test_rows_are_quantized_by_the_definition(shape: tuple[int, int], code: torch.dtype, dtype: torch.dtype) -> None:
    whole = shape[1]
    for x in (activations(*shape, dtype), extreme_rows(whole, dtype)):
        expected = reference.quantize_rows(x) if code == torch.int8 else reference.quantize_groups(x, whole)
        assert_same_codes(cuda_quantize.quantize_rows(x, code), expected)


def test_rows_at_any_distance() -> None:
    wide = activations(6, 300)
    for x in (wide[:, 100:170], wide[::2], wide.t(), wide[:1].expand(4, 300)):
        assert_same_codes(cuda_quantize.quantize_rows(x, torch.int8), reference.quantize_rows(x))
        columns = x.shape[1]
        assert_same_codes(cuda_quantize.quantize_rows(x, E4M3), reference.quantize_groups(x, columns))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (5, 384), (17, 1152), (3, 3072)], ids=str)
def test_groups_are_quantized_by_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for x in (activations(*shape, dtype), extreme_rows(shape[1], dtype), activations(*shape, dtype).flip(1)):
        rows, padded = len(x), -(-len(x) // 16) * 16
        codes, scale = cuda_quantize.quantize_groups(x, 128, padded)
        assert (codes.shape, scale.shape, scale.stride()) == (
            (padded, shape[1]),
            (padded, shape[1] // 128),
            (1, padded),
        )
        assert_same_codes((codes[:rows], scale[:rows]), reference.quantize_groups(x, 128))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 32), torch.float16), ((5, 96), torch.float32), ((130, 1056), BF16)], ids=str
)
def test_mx_blocks_are_quantized_as_weights_are(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = shape
    x = activations(*shape, dtype)
    x[0] *= 2.0**-20  # subnormal where the dtype has few exponents
    x[-1, ::32] = 0
    x[-1, :32] = 0
    codes, scale = cuda_quantize.quantize_mx(x)
    expected, exponents = mx.quantize_blocks(mx.to_blocks(x.cpu()), mx.E4M3, "rceil")
    assert torch.equal(scale.view(torch.uint8).cpu(), to_blocked(exponents))
    assert torch.equal(codes.to(torch.float32).cpu(), expected.view(rows, columns))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_mx_block_becomes_nan(poison: float) -> None:
    x = activations(3, 128)
    x[1, 40] = poison
    _, scale = cuda_quantize.quantize_mx(x)
    plain = from_blocked(scale.view(torch.uint8), 3, 4)
    assert (plain == 255).nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (128, 4), (129, 5), (300, 96)], ids=str)
def test_swizzle_is_that_of_torchao(shape: tuple[int, int]) -> None:
    scale = torch.randint(0, 255, shape, dtype=torch.uint8)
    assert torch.equal(cuda_quantize.swizzle(scale).view(torch.uint8), to_blocked(scale))


def int8_operands(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator).to(DEVICE)
    scale = (torch.rand(shape[0], 1, generator=generator) / 100).to(DEVICE)
    bias = torch.randn(shape[0], generator=generator).to(dtype).to(DEVICE)
    return activations(rows, shape[1], dtype), weight, scale, bias


def assert_int8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    tensors = {"weight": weight, "weight_scale": scale}
    found = cuda.triton_linear(KINDS["int8"], x, tensors, bias, new_handle(weight))
    expected = reference.reference_linear(x, weight, scale, bias)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 16])
def test_int8_is_the_reference(rows: int, dtype: torch.dtype) -> None:
    for shape, has_bias in (((1, 7), True), ((7, 1), False), ((64, 64), False), ((33, 131), True), ((300, 520), True)):
        x, weight, scale, bias = int8_operands(rows, shape, dtype)
        assert_int8(x, weight, scale, bias if has_bias else None)


@pytest.mark.parametrize("shape", [(40, 131), (300, 200)], ids=str)
@pytest.mark.parametrize("rows", [17, 65, 257, 1100] if GPU else [17, 65, 257])
def test_int8_of_larger_tiles(rows: int, shape: tuple[int, int]) -> None:
    assert_int8(*int8_operands(rows, shape, BF16))


def test_int8_of_the_largest_codes() -> None:
    x = torch.ones(6, 3000, device=DEVICE) * torch.tensor([1.0, -1.0], device=DEVICE).repeat(3)[:, None]
    weight = torch.full((40, 3000), -128, dtype=torch.int8, device=DEVICE)
    assert_int8(x, weight, torch.ones(40, 1, device=DEVICE), None)


def test_int8_of_strange_rows_and_strides() -> None:
    x, weight, scale, bias = int8_operands(9, (24, 64), BF16)
    assert_int8(extreme_rows(64, BF16), weight, scale, bias)
    assert_int8(x, weight.t().contiguous().t(), scale, bias.float())
    assert_int8(x.repeat(1, 2)[::2, :64], weight.repeat(1, 2)[:, 64:], scale.expand(24, 2)[:, :1], bias)


def format_of(kind: str) -> Format:
    return BLOCKS if kind == "fp8 128x128" else KINDS[kind]


def layer_of(kind: str, rows: int, columns: int, bias: bool, dtype: torch.dtype) -> QuantizedLinear:
    fmt = format_of(kind)
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 1, rows)[:, None]
    layer = QuantizedLinear(columns, rows, bias=bias, dtype=dtype, fmt=fmt)
    state = fmt.quantize(weight, Facts(input_scale=0.25))
    layer.load_state_dict(state | ({"bias": torch.randn(rows, generator=generator).to(dtype)} if bias else {}))
    return layer.to(DEVICE)


def quantized_activations(fmt: Format, x: torch.Tensor) -> torch.Tensor:
    """The numbers that codes and scales of ``x`` stand for, in float64."""
    if fmt.name.startswith("mxfp"):
        values, exponents = mx.quantize_blocks(mx.to_blocks(x.cpu()), mx.E4M3, "rceil")
        return (values.double() * torch.exp2(exponents.double() - 127)[:, :, None]).view(x.shape).to(DEVICE)
    size = x.shape[1] if fmt != BLOCKS else 128
    codes, scale = reference.quantize_groups(x, size)
    return codes.double() * scale.double().repeat_interleave(size, 1)


@pytest.fixture(params=SCALED, ids=str)
def scaled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, bool]:
    """A kind of format, and whether its kernel quantizes activations.

    Layers take CPU tensors for those of a GPU that has the kernel; on a GPU, it is that one, and what it has.
    """
    kind, capability, expected = request.param
    device = kernels.device_of(torch.device("cuda")) if GPU else kernels.Device("cuda", capability)
    monkeypatch.setattr("omni_convert.runtime.operator.device_of", lambda _: device)
    if not GPU:
        monkeypatch.setattr(cuda_fp8, "SMALL", MANY - 1)  # rows take the interpreter long
    name = kernels.choose(format_of(kind), (384, 640), device).kernel.name
    assert GPU or name == expected
    return kind, name != "decode"


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_multiply_quantized_activations(scaled: tuple[str, bool], dtype: torch.dtype) -> None:
    kind, quantizes = scaled
    for bias in (False, True):
        layer = layer_of(kind, 384, 640, bias, dtype)
        assert layer(activations(0, 640, dtype)).shape == (0, 384)
        for rows in (5, MANY) if bias else (1,):
            x = activations(rows, 640, dtype)
            found = layer(x)
            assert (found.dtype, found.shape) == (dtype, (rows, 384))
            given = quantized_activations(layer.format, x) if quantizes else x.double()
            expected = given @ layer.format.dequantize(layer.tensors()).double().t()
            expected = expected if layer.bias is None else expected + layer.bias.double()
            size = expected.abs().amax(dim=1, keepdim=True)
            step = {torch.float32: 1e-5, torch.float16: 2e-3, BF16: 1e-2}[dtype]
            assert ((found.double() - expected).abs() <= step * size).all(), rows


def test_nonfinite_row_becomes_nan_and_only_that_row(scaled: tuple[str, bool]) -> None:
    layer = layer_of(scaled[0], 384, 640, True, BF16)
    for rows in (5, MANY):
        x = activations(rows, 640)
        x[1, 200] = float("inf")
        found = layer(x)
        assert found[[0, *range(2, rows)]].isfinite().all()
        if scaled[1]:
            assert found[1].isnan().all()


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize("fmt", [KINDS["fp8 channel"], KINDS["fp8 tensor"], BLOCKS], ids=format_text)
def test_without_triton_the_bits_are_the_same(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {key: value.to(DEVICE) for key, value in fmt.quantize(torch.randn(128, 256)).items()}
    monkeypatch.setattr(cuda_fp8, "SMALL", 8)
    for rows in (3, 9):
        x = activations(rows, 256)
        found = [cuda_fp8.scaled_mm_linear(fmt, x, tensors, None, new_handle(fmt))]
        with monkeypatch.context() as patch:
            patch.setattr(cuda_quantize, "missing_triton", missing_triton)
            found.append(cuda_fp8.scaled_mm_linear(fmt, x, tensors, None, new_handle(fmt)))
        assert torch.equal(found[0], found[1])


@pytest.mark.skipif(GPU, reason="a GPU is of one capability only")
def test_what_is_prepared_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_convert.runtime.operator.device_of", lambda _: kernels.Device("cuda", (10, 0)))
    layer = layer_of("mxfp4", 384, 640, True, BF16)
    before = layer(activations(3, 640))
    assert prepared_bytes(layer._handle) == 384 * 640 // 32
    layer.weight_scale += 1
    assert not torch.equal(layer(activations(3, 640)), before)
