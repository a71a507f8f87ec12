"""INT8 and FP8 against public libraries, bit for bit: scales from the weights alone, codes under our scales.

| oracle             | scales                              | codes                                             |
|--------------------|-------------------------------------|---------------------------------------------------|
| onnx               |                                     | QuantizeLinear: NumPy's rint, ml_dtypes' cast     |
| compressed-tensors | fp8                                 | torch's division, round and cast                  |
| gfloat             |                                     | its own rounding, of the float32 quotients        |
| torch.ao           | int8, fp8: PerChannelMinMaxObserver |                                                   |
| torchao            | int8, fp8                           | fp8                                               |

What differs, and not by accident: the libraries keep the sign of an FP8 zero, ours are positive; zeros alone have a
tiny scale there or none, ours is 1.0; at the ends of float32 ours moves by one unit in the last place where theirs
clip or overflow, so that only codes are compared there. compressed-tensors divides by 127.5 for INT8, to use code
-128. torchao multiplies INT8 weights by the rounded reciprocal of the scale: beside ties that is another code.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hostile.small import Tensor, to_bits, to_values
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from quantized import Quantized, run_kernel, weights

from omni_convert.formats.fp8 import Fp8
from omni_convert.formats.int8 import Int8

Weights = NDArray[np.float32]
KINDS: dict[str, Int8 | Fp8] = {
    "int8": Int8(),
    "fp8 tensor": Fp8(),
    "fp8 channel": Fp8(granularity="channel"),
    "fp8 block": Fp8(granularity="block"),
    "fp8 small blocks": Fp8(granularity="block", block_size=(3, 16)),
}
COLUMNS = (1, 5, 33, 64, 129, 300)


def near_ties(codes: NDArray[np.float32]) -> Weights:
    """Rows of many exponents; the largest value is the largest code, the others lie on midpoints and beside them."""
    middles = (codes[1:] + codes[:-1]) / 2
    around = [np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)]
    row = np.concatenate([codes[-1:], middles, *around])
    result: Weights = (row * 2.0 ** np.arange(-20, 20)[:, None]).astype(np.float32)
    return result


def samples() -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    positive = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    ties = {"int8": near_ties(np.arange(128, dtype=np.float32)), "fp8": near_ties(positive)}
    wide = rng.standard_normal((130, 300)) * 2.0 ** rng.uniform(-90, 90, (130, 1))
    return {
        "normal": to_bits(rng.standard_normal((200, 1000)) * 0.02),
        "normal float16": to_bits(rng.standard_normal((200, 1000)) * 0.02, "F16"),
        "normal float32": to_bits(rng.standard_normal((200, 1000)) * 0.02, "F32"),
        "student t": to_bits(rng.standard_t(2, (200, 1000)), "F32"),
        "sparse": to_bits(rng.standard_normal((64, 512)) * (rng.random((64, 512)) < 0.05)),
        "every exponent": to_bits(wide, "F32"),
        "ties of int8": to_bits(ties["int8"], "F32"),
        "ties of int8 below zero": to_bits(-ties["int8"]),
        "ties of fp8": to_bits(ties["fp8"], "F32"),
        "ties of fp8 below zero": to_bits(-ties["fp8"]),
    }


SAMPLES = samples()
each_sample = pytest.mark.parametrize("sample", SAMPLES)
each_kind = pytest.mark.parametrize("kind", KINDS)


def granularity(fmt: Int8 | Fp8) -> str:
    return "channel" if isinstance(fmt, Int8) else fmt.granularity


def block_of(fmt: Int8 | Fp8, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    if isinstance(fmt, Fp8) and fmt.block_size:
        return fmt.block_size
    return (shape[0] if granularity(fmt) == "tensor" else 1, shape[1])


def per_block(fmt: Int8 | Fp8, found: Quantized) -> Weights:
    """The stored scales in two dimensions, one for every block."""
    stored = found.tensors[fmt.suffixes[1]]
    return stored if stored.ndim == 2 else stored.reshape(-1, 1)


def per_weight(fmt: Int8 | Fp8, scale: Weights, shape: tuple[int, ...]) -> Weights:
    high, wide = block_of(fmt, shape)
    return np.repeat(np.repeat(scale, high, axis=0)[: shape[0]], wide, axis=1)[:, : shape[1]]


def blocks(fmt: Int8 | Fp8, values: Weights) -> Weights:
    """(down, across, weights of a block); blocks at the edges are filled up with zeros."""
    high, wide = block_of(fmt, values.shape)
    padded = np.pad(values, ((0, -values.shape[0] % high), (0, -values.shape[1] % wide)))
    grid = padded.reshape(len(padded) // high, high, -1, wide).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(grid.reshape(*grid.shape[:2], high * wide))


@cache
def onnx_graph(number: str, settings: tuple[tuple[str, int], ...]) -> Any:
    onnx = importlib.import_module("onnx")
    from onnx.reference import ReferenceEvaluator

    make, to = onnx.helper, getattr(onnx.TensorProto, number)
    node = make.make_node("QuantizeLinear", ["x", "scale"], ["y"], output_dtype=to, **dict(settings))
    inputs = [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "scale")]
    graph = make.make_graph([node], "quantize", inputs, [make.make_tensor_value_info("y", to, None)])
    return ReferenceEvaluator(make.make_model(graph, opset_imports=[make.make_opsetid("", 21)]))


def onnx_codes(fmt: Int8 | Fp8, values: Weights, scale: Weights) -> NDArray[Any]:
    """ONNX has blocks along one axis only, so that every row gets the scales of its block."""
    high, wide = block_of(fmt, values.shape)
    known: dict[str, tuple[dict[str, int], NDArray[Any]]] = {
        "tensor": ({}, scale[0, 0]),
        "channel": ({"axis": 0}, scale[:, 0]),
        "block": ({"axis": 1, "block_size": wide}, np.repeat(scale, high, axis=0)[: len(values)]),
    }
    how, scales = known[granularity(fmt)]
    graph = onnx_graph("INT8" if isinstance(fmt, Int8) else "FLOAT8E4M3FN", tuple(how.items()))
    codes: NDArray[Any] = graph.run(None, {"x": values, "scale": np.asarray(scales)})[0]
    return codes if isinstance(fmt, Int8) else codes.view(np.uint8)


def compressed_tensors_args(fmt: Int8 | Fp8) -> Any:
    library = importlib.import_module("compressed_tensors.quantization")
    structure = list(fmt.block_size) if isinstance(fmt, Fp8) and fmt.block_size else None
    number = "int" if isinstance(fmt, Int8) else "float"
    return library.QuantizationArgs(num_bits=8, type=number, strategy=granularity(fmt), block_structure=structure)


def compressed_tensors_codes(fmt: Int8 | Fp8, values: Weights, scale: Weights) -> NDArray[Any]:
    args = compressed_tensors_args(fmt)
    from compressed_tensors.quantization import quantize

    dtype = torch.int8 if isinstance(fmt, Int8) else torch.float8_e4m3fn
    codes = quantize(torch.from_numpy(values), torch.from_numpy(scale), None, args, dtype)
    result: NDArray[Any] = codes.view(torch.int8 if isinstance(fmt, Int8) else torch.uint8).numpy()
    return result


def gfloat_codes(fmt: Int8 | Fp8, values: Weights, scale: Weights) -> NDArray[Any]:
    """A value of OCP INT8 is its code / 64."""
    importlib.import_module("gfloat")
    from gfloat import encode_ndarray, round_ndarray
    from gfloat.formats import format_info_ocp_e4m3, format_info_ocp_int8

    quotients = (values / per_weight(fmt, scale, values.shape)).astype(np.float64)
    if isinstance(fmt, Int8):
        return (round_ndarray(format_info_ocp_int8, quotients / 64, sat=True) * 64).astype(np.int8)
    rounded = round_ndarray(format_info_ocp_e4m3, quotients, sat=True)
    return encode_ndarray(format_info_ocp_e4m3, rounded).astype(np.uint8)


def torchao_codes(fmt: Int8 | Fp8, values: Weights, scale: Weights) -> NDArray[Any]:
    library = importlib.import_module("torchao.quantization.quant_primitives")
    scales = torch.from_numpy(per_weight(fmt, scale, values.shape))
    codes = library._quantize_affine_float8(torch.from_numpy(values), scales)
    result: NDArray[Any] = codes.view(torch.uint8).numpy()
    return result


CODES: dict[str, Callable[[Int8 | Fp8, Weights, Weights], NDArray[Any]]] = {
    "onnx": onnx_codes,
    "compressed-tensors": compressed_tensors_codes,
    "gfloat": gfloat_codes,
    "torchao": torchao_codes,
}
CODE_CASES = [(oracle, kind) for oracle in CODES for kind in KINDS if (oracle, kind) != ("torchao", "int8")]


def check_codes(oracle: str, kind: str, weight: Tensor) -> None:
    fmt, values = KINDS[kind], to_values(weight)
    found = run_kernel(fmt, weight)
    expected = CODES[oracle](fmt, values, per_block(fmt, found))
    if isinstance(fmt, Fp8):
        expected = np.where(expected == 0x80, 0, expected)
    assert found.bad is None
    assert np.array_equal(found.codes, expected)


@each_sample
@pytest.mark.parametrize(("oracle", "kind"), CODE_CASES)
def test_codes(oracle: str, kind: str, sample: str) -> None:
    check_codes(oracle, kind, SAMPLES[sample])


@pytest.mark.parametrize("oracle", CODES)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_codes_for_any_exponent(oracle: str, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([kind for name, kind in CODE_CASES if name == oracle]))
    check_codes(oracle, kind, data.draw(weights(COLUMNS)))


def compressed_tensors_scales(fmt: Int8 | Fp8, values: Weights) -> NDArray[Any]:
    args = compressed_tensors_args(fmt)
    from compressed_tensors.quantization.utils import calculate_qparams

    parts = torch.from_numpy(blocks(fmt, values))
    result: NDArray[Any] = calculate_qparams(parts.amin(dim=-1), parts.amax(dim=-1), args)[0].numpy()
    return result


def torch_scales(fmt: Int8 | Fp8, values: Weights) -> NDArray[Any]:
    """Every block is a row of torch's observer, whose range of codes can be chosen."""
    observer = importlib.import_module("torch.ao.quantization.observer")
    dtype, largest = (torch.qint8, 127) if isinstance(fmt, Int8) else (torch.float8_e4m3fn, 448)
    parts = torch.from_numpy(blocks(fmt, values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        watch = observer.PerChannelMinMaxObserver(
            dtype=dtype, qscheme=torch.per_channel_symmetric, quant_min=-largest, quant_max=largest, eps=0.0
        )
    watch(parts.flatten(0, 1))
    result: NDArray[Any] = watch.calculate_qparams()[0].view(parts.shape[:2]).numpy()
    return result


def torchao_scales(fmt: Int8 | Fp8, values: Weights) -> NDArray[Any]:
    """Every block is a row, one zero longer: a row of one weight would be taken for part of the next."""
    library = importlib.import_module("torchao.quantization.quant_primitives")
    parts = blocks(fmt, values)
    rows = torch.nn.functional.pad(torch.from_numpy(parts).flatten(0, 1), (0, 1))
    block = [1, rows.shape[1]]
    if isinstance(fmt, Int8):
        kind = library.MappingType.SYMMETRIC
        scale, _ = library.choose_qparams_affine(rows, kind, block, torch.int8, -127, 127, 0.0, torch.float32)
    else:
        scale = library._choose_scale_float8(rows, block)
    result: NDArray[Any] = scale.view(parts.shape[:2]).numpy()
    return result


SCALES: dict[str, Callable[[Int8 | Fp8, Weights], NDArray[Any]]] = {
    "compressed-tensors": compressed_tensors_scales,
    "torch": torch_scales,
    "torchao": torchao_scales,
}
SCALE_CASES = [
    (oracle, kind) for oracle in SCALES for kind in KINDS if (oracle, kind) != ("compressed-tensors", "int8")
]


def check_scales(oracle: str, kind: str, weight: Tensor) -> None:
    fmt, values = KINDS[kind], to_values(weight)
    expected = SCALES[oracle](fmt, values)
    zeros = ~blocks(fmt, values).any(axis=-1)
    assert np.array_equal(per_block(fmt, run_kernel(fmt, weight)), np.where(zeros, np.float32(1), expected))


@each_sample
@pytest.mark.parametrize(("oracle", "kind"), SCALE_CASES)
def test_scales(oracle: str, kind: str, sample: str) -> None:
    check_scales(oracle, kind, SAMPLES[sample])


@pytest.mark.parametrize("oracle", SCALES)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_scales_for_any_exponent(oracle: str, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([kind for name, kind in SCALE_CASES if name == oracle]))
    check_scales(oracle, kind, data.draw(weights(COLUMNS, normal=True)))
