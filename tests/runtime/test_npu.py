"""Ascend kernels give what the documented arithmetic does, through operators that refuse any other layout.

None of it runs on an NPU: see ``npu_operators``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import npu_operators
import numpy as np
import pytest
import torch
from kinds import KINDS

from omni_convert.formats import FORMATS, make_format
from omni_convert.formats import microscaling as mx
from omni_convert.formats.base import Facts, Format
from omni_convert.formats.config import parse_config
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.fp8 import Fp8
from omni_convert.runtime import kernels, npu, operator
from omni_convert.runtime.kernels import Device, choose
from omni_convert.runtime.linear import QuantizedLinear
from omni_convert.runtime.prepared import new_handle, prepared_bytes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN_MXFP4 = parse_config({"quant_method": "mxfp4", "is_checkpoint_mxfp4_serialized": True}).format
ON_NPU = {kind: fmt for kind, fmt in KINDS.items() if kind != "fp8 block"} | {
    "fp8 block": make_format("fp8", granularity="block"),
    "mxfp4 floor": PLAIN_MXFP4,
}
SHAPES = ((48, 128), (1, 64), (40, 96), (130, 1088), (3, 200))
"""With an odd number of groups, blocks that are not whole, and a single output; some formats refuse the last."""
every = pytest.mark.parametrize("fmt", ON_NPU.values(), ids=ON_NPU)


@pytest.fixture(scope="module", autouse=True)
def _operators() -> Iterator[None]:
    if hasattr(torch.ops.npu, "npu_quant_matmul"):
        pytest.skip("torch-npu is loaded, and its operators do not run on a CPU")
    with npu_operators.operators():
        yield


def tensors_of(fmt: Format, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Rows and columns of every size, so that no scale can stand in for another, and an uneven ``mul_scale``."""
    generator = torch.Generator().manual_seed(shape[0])
    rows, columns = (2.0 ** torch.randint(-7, 1, (size,), generator=generator) for size in shape)
    weight = torch.randn(shape, generator=generator) * rows.unsqueeze(1) * columns
    tensors = fmt.quantize(weight, Facts(input_scale=0.25))
    if "mul_scale" in tensors:
        tensors["mul_scale"] = 2.0 ** torch.randint(-1, 2, shape[1:], generator=generator)
    return {suffix: tensor.contiguous() for suffix, tensor in tensors.items()}  # as those of a layer are


def activations(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    sizes = [2.0 ** torch.randint(-3, 4, size, generator=generator) for size in ((rows, 1), (columns,))]
    return (torch.randn(rows, columns, generator=generator) * sizes[0] * sizes[1]).to(dtype)


def absmax(x: torch.Tensor, largest: float) -> torch.Tensor:
    """What activations are after quantization with one scale per row."""
    scale = x.abs().amax(dim=1, keepdim=True) / largest
    codes = (x / scale).round() if largest == 127 else mx.round_elements(x / scale, mx.E4M3)
    return codes * scale


def microscaled(x: torch.Tensor, element: mx.Element, largest: float | None = None) -> torch.Tensor:
    blocks, scale = mx.to_blocks(x), None
    if largest is not None:
        quotients = blocks.double().abs().amax(dim=-1) / largest
        scale = (quotients.log2().ceil() + 127).to(torch.uint8)
    values, scale = mx.quantize_blocks(blocks, element, "floor", scale)
    return (values * mx.power_of_two(scale.to(torch.int32) - 127).unsqueeze(-1)).flatten(1)[:, : x.shape[1]]


def quantized(fmt: Format, x: torch.Tensor, mul_scale: torch.Tensor | None) -> torch.Tensor:
    """The values that ``x``, bf16 or fp16, has after quantization as the operators document it, float32."""
    if fmt.name == "int8":
        return absmax(x.float(), 127)
    if isinstance(fmt, Fp8):
        parts = x.float().split(fmt.block_size[1] if fmt.block_size else x.shape[1], dim=1)
        return torch.cat([absmax(part, 448) for part in parts], dim=1)
    if fmt.name == "mxfp8":
        return microscaled(x.float(), mx.E4M3)
    if mul_scale is None:
        return microscaled(x.float(), mx.E2M1, None if fmt is PLAIN_MXFP4 else 7.25)
    values = []
    for part in (x * mul_scale.to(x.dtype)).float().split(512, dim=1):
        coarse = part.abs().amax(dim=1, keepdim=True) / 6
        values.append(microscaled((part / coarse).to(x.dtype).float(), mx.E2M1) * coarse)
    return torch.cat(values, dim=1)


def expected_output(
    fmt: Format, x: torch.Tensor, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    narrow = x if x.dtype != torch.float32 else x.bfloat16()
    mul_scale = tensors.get("mul_scale")
    weight = fmt.dequantize(tensors if mul_scale is None else {**tensors, "mul_scale": torch.ones_like(mul_scale)})
    y = quantized(fmt, narrow, mul_scale).double() @ weight.double().t()
    return y if bias is None else y + bias.double()


def assert_close(
    found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Up to rounding the result, and what the bias is added to, to the dtype of ``x``, and sums to float32."""
    step = 2**-10 if x.dtype == torch.float16 else 2**-7
    assert (found.dtype, found.shape) == (x.dtype, expected.shape)
    before = expected if bias is None else expected - bias.double()
    error = (found.double() - expected).abs()
    assert bool((error <= step * torch.maximum(expected.abs(), before.abs()) + 1e-5 * before.abs().amax()).all())


def run(fmt: Format, x: torch.Tensor, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    return npu.LINEARS[fmt.name](fmt, x, tensors, bias, new_handle(x))


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_documented_arithmetic(fmt: Format, shape: tuple[int, int]) -> None:
    if fmt.refusal(shape) is not None:
        pytest.skip("the format holds no such weight")
    tensors = tensors_of(fmt, shape)
    for dtype in DTYPES:
        for rows in (1, 5):
            x = activations(rows, shape[1], dtype)
            bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(0)).to(dtype)
            for b in (None, bias):
                assert_close(run(fmt, x, tensors, b), expected_output(fmt, x, tensors, b), x, b)


@every
def test_rows_that_are_none_or_scattered(fmt: Format) -> None:
    tensors = tensors_of(fmt, (48, 128))
    x = activations(6, 128, torch.bfloat16)
    assert run(fmt, x[:0], tensors, None).shape == (0, 48)
    assert torch.equal(run(fmt, x[::2], tensors, None), run(fmt, x[::2].contiguous(), tensors, None))


@every
def test_quantizing_costs_no_more_than_it_should(fmt: Format) -> None:
    tensors = tensors_of(fmt, (48, 1024))
    x = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() @ fmt.dequantize(tensors).double().t()
    error = (run(fmt, x, tensors, None).double() - exact).norm() / exact.norm()
    assert error < {"int8": 0.015, "fp8": 0.04, "mxfp8": 0.04}.get(fmt.name, 0.17)


@pytest.mark.parametrize(("name", "columns"), [("mxfp4", 96), ("mxfp4", 128), ("mxfp4_dualscale", 576)])
def test_packed_weight_is_made_once_and_again_after_a_change(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, made = FORMATS[name], []
    monkeypatch.setattr(npu, "packed_e2m1", lambda weight, pack=npu.packed_e2m1: made.append(weight) or pack(weight))
    tensors, other = tensors_of(fmt, (40, columns)), tensors_of(fmt, (41, columns))
    before = {suffix: tensor.clone() for suffix, tensor in tensors.items()}
    x = activations(3, columns, torch.bfloat16)
    handle = new_handle(x)
    for _ in range(2):
        npu.LINEARS[name](fmt, x, tensors, None, handle)
    assert len(made) == 1
    assert all(torch.equal(before[suffix].view(torch.uint8), tensors[suffix].view(torch.uint8)) for suffix in before)
    scales = {("mxfp4", 96): 40 * 4, ("mxfp4_dualscale", 576): 40 * 2 * 4}.get((name, columns), 0)
    assert prepared_bytes(handle) == 40 * columns // 2 + scales
    for suffix, tensor in tensors.items():
        tensor.copy_(other[suffix][: len(tensor)])
        found = npu.LINEARS[name](fmt, x, tensors, None, handle)
        assert_close(found, expected_output(fmt, x, tensors, None), x)


@pytest.mark.parametrize("kind", ["int8", "fp8 tensor", "fp8 channel", "fp8 block", "mxfp8"])
def test_other_weights_take_no_memory_beside_the_checkpoint(kind: str) -> None:
    fmt, x = ON_NPU[kind], activations(3, 128, torch.bfloat16)
    handle = new_handle(x)
    npu.LINEARS[fmt.name](fmt, x, tensors_of(fmt, (48, 128)), None, handle)
    assert prepared_bytes(handle) == 0


@pytest.mark.parametrize("chunk", [1, 200, npu.CHUNK])
def test_packing_is_that_of_ml_dtypes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu, "CHUNK", chunk)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    weight = values[torch.randint(16, (37, 64), generator=torch.Generator().manual_seed(0))]
    codes = weight.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    packed = npu.packed_e2m1(weight.to(torch.float8_e4m3fn))
    assert np.array_equal(packed.numpy(), codes[:, 0::2] | codes[:, 1::2] << 4)


@pytest.mark.parametrize("value", [0.25, 5.0, 448.0, -0.001953125, float("nan")])
def test_values_that_cannot_be_packed_are_refused(value: float) -> None:
    weight = torch.zeros(4, 64)
    weight[3, 63] = value
    with pytest.raises(OmniConvertError, match="values that e2m1 does not have"):
        npu.packed_e2m1(weight.to(torch.float8_e4m3fn))


@every
def test_module_runs_it(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the operator, its choice of a kernel and its gradients, on a device that passes for an Ascend 950."""
    monkeypatch.setattr(operator, "device_of", lambda device: Device("npu", soc=260))
    layer = QuantizedLinear(128, 48, fmt=fmt)
    tensors = tensors_of(fmt, (48, 128))
    layer.load_state_dict({**tensors, "bias": torch.randn(48)})
    x = activations(6, 128, torch.float32).view(2, 3, 128).requires_grad_()
    y = layer(x)
    bias = layer.bias.detach()
    assert_close(y.detach().view(6, 48), expected_output(fmt, x.detach().view(6, 128), tensors, bias), x, bias)
    y.sum().backward()
    assert torch.allclose(x.grad[0, 0], fmt.dequantize(tensors).sum(dim=0), rtol=1e-4, atol=1e-4)


def test_layers_that_the_operators_do_not_take_are_decoded() -> None:
    npu_950 = Device("npu", soc=260)
    for kind, fmt in ON_NPU.items():
        choice = choose(fmt, (64, 128), npu_950)
        assert (choice.kernel.name, choice.rejected) == (f"npu_{fmt.name}", {}), kind
        assert "not measured" in choice.kernel.note
        for shape in ((65536, 64), (64, 65536)):
            choice = choose(fmt, shape, npu_950)
            if fmt.name == "mxfp4_dualscale":
                assert choice.kernel.name == "npu_mxfp4_dualscale"
            else:
                assert choice.kernel is kernels.DECODE
                assert "takes up to 65535" in choice.rejected[f"npu_{fmt.name}"]
    choice = choose(make_format("fp8", block_size=(16, 32)), (64, 64), npu_950)
    assert choice.kernel is kernels.DECODE
    assert "blocks are (16, 32): npu_quant_matmul takes (128, 128)" in choice.rejected["npu_fp8"]


def refusal(fmt: Format, soc: int | None) -> str | None:
    try:
        choose(fmt, (64, 64), Device("npu", soc=soc))
    except OmniConvertError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("soc", "product", "formats"),
    [
        (104, "Ascend 910 or 310P", ()),
        (202, "Ascend 910 or 310P", ()),
        (220, "Ascend 910B (Atlas A2)", ("int8",)),
        (225, "Ascend 910B (Atlas A2)", ("int8",)),
        (240, "Ascend 310B", ()),
        (255, "Ascend 910C (Atlas A3)", ("int8",)),
        (260, "", tuple(FORMATS)),
        (300, "", tuple(FORMATS)),
        (-1, "", tuple(FORMATS)),
        (None, "", tuple(FORMATS)),
    ],
)
def test_formats_by_generation(soc: int | None, product: str, formats: tuple[str, ...]) -> None:
    refused: dict[str, Any] = {name: message for name, fmt in FORMATS.items() if (message := refusal(fmt, soc))}
    assert set(refused) == set(FORMATS) - set(formats)
    for name, message in refused.items():
        assert f"found an {name} layer on an {product}, expected an " in message
        assert "Ascend 950, which has operators for it: " in message
        assert ("Ascend 910B (Atlas A2) or Ascend 910C (Atlas A3) or " in message) == (name == "int8")
        assert ("--method int8" in message) == bool(formats)
        assert "device='cpu'" in message
