"""FP8: bytes worked out by hand, scales against exact arithmetic, the kernel against the readable reference."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hostile.small import Tensor, to_bits, to_values
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import DTYPES, INFINITY, SIGN, as_bytes, check_same_bits, into_torch, run_kernel, weights

from omni_convert.formats.base import Facts, NonFinite
from omni_convert.formats.bits import row_maxima
from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.formats.fp8 import Fp8
from omni_convert.formats.header import TensorSpec

TENSOR, CHANNEL, BLOCK = Fp8(), Fp8(granularity="channel"), Fp8(granularity="block")
STATIC = Fp8(activation_scheme="static")
KINDS = {
    "tensor": TENSOR,
    "channel": CHANNEL,
    "block": BLOCK,
    "small blocks": Fp8(granularity="block", block_size=(3, 16)),
    "wide blocks": Fp8(granularity="block", block_size=(2, 1008)),
    "static": STATIC,
}
SHAPES = [(1, 1), (1, 7), (5, 1), (3, 63), (128, 128), (129, 257), (2, 1000), (300, 40)]
COLUMNS = (1, 5, 33, 64, 129, 300)
SLACK = 1e-4

every = pytest.mark.parametrize("fmt", KINDS.values(), ids=KINDS.keys())


def scales(fmt: Fp8, tensors: dict[str, Any]) -> Any:
    return tensors["weight_scale_inv" if fmt.granularity == "block" else "weight_scale"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", [TENSOR, CHANNEL, BLOCK, STATIC], ids=repr)
def test_bytes_worked_out_by_hand(fmt: Fp8, dtype: str) -> None:
    half = 2.0**-10  # of the smallest step; ties go to the even code
    values = [[448, -448, 1, 0.5, -0.0, 17, 19, -2 * half, half, 3 * half, -half, 432, 416]]
    result = run_kernel(fmt, to_bits(values, dtype))
    assert result.codes.tobytes().hex() == "7efe383000585a810002007e7d"
    assert scales(fmt, result.tensors).ravel().tolist() == [1]


def test_scales_belong_to_what_the_granularity_says() -> None:
    values = np.zeros((130, 260), np.float32)
    values[0, 0], values[129, 129], values[5, 259] = 448, -896, 224
    found = {name: scales(fmt, run_kernel(fmt, to_bits(values)).tensors) for name, fmt in KINDS.items()}
    assert found["tensor"].tolist() == found["static"].tolist() == [2]
    assert found["block"].tolist() == [[1, 1, 0.5], [1, 2, 1]]
    assert found["channel"].tolist() == [1, 1, 1, 1, 1, 0.5, *[1] * 123, 2]
    assert np.argwhere(found["wide blocks"] != 1).tolist() == [[2, 0], [64, 0]]
    assert np.argwhere(found["small blocks"] != 1).tolist() == [[1, 16], [43, 8]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every
def test_kernel_gives_the_bits_of_the_reference(fmt: Fp8, shape: tuple[int, int], dtype: str) -> None:
    rng = np.random.default_rng(shape)
    check_same_bits(fmt, to_bits(rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, (shape[0], 1)), dtype))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(KINDS)), weights(COLUMNS))
def test_kernel_gives_the_bits_of_the_reference_for_any_exponent(kind: str, weight: Tensor) -> None:
    check_same_bits(KINDS[kind], weight)


@pytest.mark.parametrize("dtype", DTYPES)
@every
def test_every_16_bit_pattern(fmt: Fp8, dtype: str) -> None:
    patterns = np.arange(INFINITY["F16"] if dtype == "F16" else 0x7F80, dtype=np.uint32)
    bits = (patterns << 16) if dtype == "F32" else patterns.astype("<u2")
    check_same_bits(fmt, Tensor(dtype, bits.reshape(-1, 64)))
    anchored = np.repeat(bits[31::32, None], 32, axis=1)  # beside the first of every 32 as the largest of the row
    anchored[:, 1:] = bits.reshape(-1, 32)[:, :31] | SIGN[dtype]
    check_same_bits(fmt, Tensor(dtype, anchored))


@settings(max_examples=100, deadline=None)
@given(weights(COLUMNS))
def test_codes_are_the_exactly_rounded_quotients(weight: Tensor) -> None:
    """By search among all values of e4m3, in exact arithmetic, of the float32 quotient."""
    values, result = to_values(weight), run_kernel(CHANNEL, weight)
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    for row, codes, scale in zip(values, result.codes, scales(CHANNEL, result.tensors), strict=True):
        quotients = np.abs(row / scale).astype(np.float64)
        above = np.minimum(np.searchsorted(table, quotients), 126)
        below = np.maximum(above - 1, 0)
        nearer = table[above] - quotients < quotients - table[below]
        tie = table[above] - quotients == quotients - table[below]
        expected = np.where(nearer | (tie & (above % 2 == 0)), above, below)
        assert np.array_equal(codes & 127, expected)
        assert np.array_equal(codes >> 7, (row < 0) & (expected > 0))


@settings(max_examples=100, deadline=None)
@given(weights(COLUMNS))
def test_scales_in_exact_arithmetic(weight: Tensor) -> None:
    for row, scale in zip(to_values(weight), scales(CHANNEL, run_kernel(CHANNEL, weight).tensors), strict=True):
        largest = np.max(np.abs(row))
        expected = largest / np.float32(448) if largest else np.float32(1)
        if Fraction(float(largest)) > 464 * Fraction(float(expected)):
            expected = np.nextafter(expected, np.float32(np.inf))
        if 448 * Fraction(float(expected)) > Fraction(float(np.finfo(np.float32).max)):
            expected = np.nextafter(expected, np.float32(0))
        assert scale == expected
        assert largest <= 464 * Fraction(float(scale))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(KINDS)), weights(COLUMNS), st.integers(0, 3))
def test_pieces_of_whole_blocks_do_not_know_of_each_other(kind: str, weight: Tensor, blocks: int) -> None:
    fmt = KINDS[kind]
    cut = blocks * fmt.rows_per_scale
    facts = Facts(amax=float(row_maxima(weight.bits, weight.dtype).max()), input_scale=0.25)
    whole, joined = run_kernel(fmt, weight), []
    for bits in (weight.bits[:cut], weight.bits[cut:]):
        if len(bits):
            specs = {name: spec for name, spec in fmt.tensors(bits.shape).items() if name not in fmt.whole_suffixes}
            out = {n: np.empty(s.shape, np.uint8 if n == "weight" else np.float32) for n, s in specs.items()}
            assert fmt.quantize_rows(bits, weight.dtype, out, None, facts) is None
            joined.append(out)
    for name in joined[0]:
        assert np.concatenate([out[name] for out in joined]).tobytes() == whole.tensors[name].tobytes(), name


@every
def test_power_is_that_of_weight_and_error(fmt: Fp8) -> None:
    rng = np.random.default_rng(0)
    weight = to_bits(rng.standard_normal((130, 700)) * 10.0 ** rng.uniform(-2, 2, (130, 1)))
    result, values = run_kernel(fmt, weight), to_values(weight).astype(np.float64)
    error = fmt.dequantize(into_torch(result.tensors)).numpy() - values
    assert result.power[:, 0] == pytest.approx((values**2).sum(axis=1), rel=1e-5)
    assert result.power[:, 1] == pytest.approx((error**2).sum(axis=1), rel=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(KINDS)), weights(COLUMNS, normal=True))
def test_dequantized_weight_is_within_the_tolerance(kind: str, weight: Tensor) -> None:
    fmt, values = KINDS[kind], to_values(weight).astype(np.float64)
    result = run_kernel(fmt, weight)
    found = fmt.dequantize_rows(result.tensors)
    assert found.tobytes() == fmt.dequantize(into_torch(result.tensors)).numpy().tobytes()
    assert np.all(np.abs(found - values) <= (1 + SLACK) * fmt.tolerance(result.tensors))


@pytest.mark.parametrize("column", [0, 31, 128, 299])
@pytest.mark.parametrize("dtype", DTYPES)
@every
def test_first_nonfinite_is_found(fmt: Fp8, dtype: str, column: int) -> None:
    weight = to_bits(np.ones((4, 300)), dtype)
    weight.bits[2, column] = INFINITY[dtype] | SIGN[dtype]
    weight.bits[2, 299] = weight.bits[3, 0] = INFINITY[dtype] | 1
    assert run_kernel(fmt, weight).bad == NonFinite(2, column)


@every
def test_zeros_have_scale_one(fmt: Fp8) -> None:
    result = check_same_bits(fmt, Tensor("BF16", np.full((5, 70), 0x8000, "<u2")))
    assert np.all(scales(fmt, result.tensors) == 1)
    assert not result.codes.any()
    assert not result.power.any()


@pytest.mark.parametrize("pattern", [1, 0x7F7F], ids=["smallest", "largest"])
@every
def test_ends_of_bf16(fmt: Fp8, pattern: int) -> None:
    weight = Tensor("BF16", np.full((4, 64), pattern, "<u2"))
    result = check_same_bits(fmt, weight)
    assert fmt.dequantize_rows(result.tensors) == pytest.approx(to_values(weight), rel=1e-6)


@every
def test_any_strides_and_the_weight_stays_alone(fmt: Fp8) -> None:
    whole = torch.randn(130, 256).to(torch.bfloat16)
    before, facts = whole.clone(), Facts(input_scale=1.0)
    for weight in (whole.t(), whole[:, ::2], whole[::2], whole[:1].expand(3, 256)):
        expected = fmt.quantize(weight.contiguous(), facts)
        for name, found in fmt.quantize(weight, facts).items():
            assert torch.equal(as_bytes(found), as_bytes(expected[name]))
    assert torch.equal(whole, before)


@pytest.mark.parametrize("shape", [(3, 64), (1, 576), (300, 130)], ids=str)
def test_contract(shape: tuple[int, int]) -> None:
    rows, columns = shape
    codes, one = {"weight": TensorSpec("F8_E4M3", shape)}, TensorSpec("F32", (1,))
    assert TENSOR.tensors(shape) == codes | {"weight_scale": one}
    assert STATIC.tensors(shape) == codes | {"weight_scale": one, "input_scale": one}
    assert CHANNEL.tensors(shape) == codes | {"weight_scale": TensorSpec("F32", (rows,))}
    blocks = (-(-rows // 128), -(-columns // 128))
    assert BLOCK.tensors(shape) == codes | {"weight_scale_inv": TensorSpec("F32", blocks)}
    for fmt in KINDS.values():
        found = fmt.quantize(torch.ones(shape), Facts(input_scale=0.5))
        assert tuple(found) == tuple(fmt.suffixes) == tuple(fmt.tensors(shape))
        for name, spec in fmt.tensors(shape).items():
            assert tuple(found[name].shape) == spec.shape
            assert found[name].dtype == (torch.float8_e4m3fn if name == "weight" else torch.float32)


def test_config_has_exactly_the_keys_of_the_contract() -> None:
    flags = {"quant_method": "fp8", "is_checkpoint_fp8_serialized": True}
    assert TENSOR.config(["a"]) == flags | {"activation_scheme": "dynamic", "ignored_layers": ["a"]}
    assert STATIC.config([]) == flags | {"activation_scheme": "static", "ignored_layers": []}
    assert BLOCK.config([]) == TENSOR.config([]) | {"weight_block_size": [128, 128]}
    channel = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ["a"]}
    assert CHANNEL.config(["a"]) == channel


def test_static_needs_a_recorded_scale() -> None:
    with pytest.raises(OmniConvertError, match="input_scale"):
        STATIC.quantize(torch.ones(2, 2))
    assert STATIC.quantize(torch.ones(2, 2), Facts(input_scale=0.125))["input_scale"].tolist() == [0.125]
    assert STATIC.whole((2, 2), Facts(amax=896, input_scale=0.125))["input_scale"].tolist() == [0.125]


def test_a_given_amax_is_shared() -> None:
    found = TENSOR.quantize(torch.tensor([[224.0, 2.0]]), Facts(amax=448))
    assert found["weight_scale"].tolist() == [1]
    assert found["weight"].to(torch.float32).tolist() == [[224, 2]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"granularity": "channel", "activation_scheme": "static"}, "per channel with dynamic"),
        ({"granularity": "block", "activation_scheme": "static"}, "per block with dynamic"),
        ({"block_size": (128, 128)}, "--block-size needs --granularity block"),
        ({"granularity": "block", "block_size": (0, 128)}, "two numbers from 1 to 1024"),
        ({"granularity": "block", "block_size": (2048, 128)}, "two numbers from 1 to 1024"),
        ({"granularity": "block", "block_size": (128,)}, "two numbers from 1 to 1024"),
        ({"granularity": "block", "block_size": (128, 40)}, "40 columns, expected a multiple of 16"),
        ({"granularity": "block", "block_size": (128, 2048)}, "2048 columns, expected a multiple of 16"),
    ],
)
def test_what_no_engine_knows(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Fp8(**options)
