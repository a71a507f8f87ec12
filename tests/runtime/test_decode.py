"""Decoding gives the bits of ``dequantize``, however the weight is cut; the linear on top is PyTorch's."""

from __future__ import annotations

import pytest
import torch
from kinds import KINDS

from omni_convert.formats import engine, make_format
from omni_convert.formats.base import Facts, Format
from omni_convert.runtime import decode, threads
from omni_convert.runtime.operator import format_text, quantized_linear
from omni_convert.runtime.prepared import new_handle

DECODED = KINDS | {
    "fp8 odd blocks": make_format("fp8", block_size=(3, 48)),
}
NO_HANDLE = torch.tensor(0)  # it prepares nothing
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 64), (70, 64), (130, 1088), (65, 131), (5, 7))
every = pytest.mark.parametrize("fmt", DECODED.values(), ids=DECODED)


@pytest.fixture(params=["kernel", "tables"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled kernels, and what runs on devices and where numba does not work."""
    if request.param == "tables":
        monkeypatch.setattr(engine, "_problems", ["there is no numba"])
    return str(request.param)


def same_numbers(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same bits, but any NaN is as good as another."""
    found, expected = found.nan_to_num(12345.0), expected.nan_to_num(12345.0)
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def tensors_of(fmt: Format, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """With rows of every size and, where there is one, an uneven ``mul_scale``."""
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator) * torch.logspace(-6, 3, shape[0]).unsqueeze(1)
    tensors = fmt.quantize(weight, Facts(input_scale=0.25))
    if "mul_scale" in tensors:
        tensors["mul_scale"] = torch.randn(shape[1], generator=generator).bfloat16().float()
    return tensors


@every
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16], ids=str)
def test_the_default_dtype_and_device_do_not_matter(fmt: Format, default: torch.dtype, way: str) -> None:
    tensors = tensors_of(fmt, (130, 1088))
    decode._values.cache_clear()
    decode._pairs.cache_clear()
    torch.set_default_dtype(default)
    torch.set_default_device("meta")
    try:
        found = decode.decode(fmt, tensors, torch.empty((130, 1088), dtype=torch.float16, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(found, fmt.dequantize(tensors).half())
    assert bool(engine._problems) == (way == "tables")


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("small", [False, True])
def test_decoded_is_dequantized(
    fmt: Format, shape: tuple[int, int], small: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fmt.refusal(shape) is not None:
        pytest.skip("the format holds no such weight")
    if small:  # many threads, many chunks
        monkeypatch.setattr(threads, "SMALL", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
        monkeypatch.setattr(decode, "CHUNK", 1000)
    tensors = tensors_of(fmt, shape)
    for dtype in DTYPES:
        found = decode.decode(fmt, tensors, torch.empty(shape, dtype=dtype))
        assert torch.equal(found, fmt.dequantize(tensors).to(dtype))


@every
@pytest.mark.parametrize("bias", [False, True])
def test_linear_in_blocks_of_rows(fmt: Format, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (200, 128)
    tensors, values = tensors_of(fmt, shape), torch.randn(200).bfloat16() if bias else None
    for dtype in DTYPES:
        x = torch.randn(5, 128).to(dtype)
        cast = None if values is None else values.to(dtype)
        expected = torch.nn.functional.linear(x, fmt.dequantize(tensors).to(dtype), cast)
        assert torch.equal(decode.decoded_linear(fmt, x, tensors, values, NO_HANDLE), expected)
        with monkeypatch.context() as patch:
            patch.setattr(decode, "BUFFER", 1)
            found = decode.decoded_linear(fmt, x, tensors, values, NO_HANDLE)
        error = (found - expected).abs().max() / expected.abs().max()
        assert error <= (1e-6 if dtype == torch.float32 else 0)  # the order of float32 sums is the library's


@pytest.mark.parametrize("columns", [256, 255])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code(columns: int, dtype: torch.dtype, way: str) -> None:
    """NaN stays one: what no conversion writes is not read as a number."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, :columns].view(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.ones(1)}
    found = decode.decode(KINDS["fp8 tensor"], tensors, torch.empty(3, columns, dtype=dtype))
    assert same_numbers(found, codes.to(dtype))


def test_codes_at_an_odd_place(way: str) -> None:
    codes = torch.randn(1 + 4 * 6).to(torch.float8_e4m3fn)[1:].view(4, 6)
    tensors = {"weight": codes, "weight_scale": torch.ones(4)}
    found = decode.decode(KINDS["fp8 channel"], tensors, torch.empty(4, 6))
    assert torch.equal(found, codes.to(torch.float32))
    turned = codes.view(torch.uint8).t().contiguous().t().view(torch.float8_e4m3fn)
    found = decode.decode(KINDS["fp8 channel"], tensors | {"weight": turned}, torch.empty(4, 6))
    assert torch.equal(found, codes.to(torch.float32))


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4"])
def test_every_exponent(kind: str, way: str) -> None:
    fmt, codes = KINDS[kind], torch.tensor([0.5, -6.0] * 16).to(torch.float8_e4m3fn).repeat(256, 1)
    tensors = {"weight": codes, "weight_scale": torch.arange(256, dtype=torch.uint8).unsqueeze(1)}
    for dtype in DTYPES:
        found = decode.decode(fmt, tensors, torch.empty(256, 32, dtype=dtype))
        assert torch.equal(found, fmt.dequantize(tensors).to(dtype))


@every
def test_operator_passes_torchs_own_checks(fmt: Format) -> None:
    tensors = tensors_of(fmt, (6, 64))
    weight, *scales = tensors.values()
    x, bias = torch.randn(3, 64, requires_grad=True), torch.randn(6, requires_grad=True)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    args = (x, weight, scales, bias, new_handle(weight), format_text(fmt))
    torch.library.opcheck(quantized_linear, args, test_utils=checks)  # (test_schema cannot multiply e4m3)
