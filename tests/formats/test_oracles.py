"""The MX formats against public libraries, bit for bit.

| oracle             | scales                        | codes                            |
|--------------------|-------------------------------|----------------------------------|
| torchao            | floor, even, rceil            | both elements                    |
| compressed-tensors | mxfp4 even, mxfp8 near rceil; coarse scales of 512 | both elements |
| gfloat             | floor, even                   | both elements, under our scales  |
| ml_dtypes          |                               | both elements, under our scales  |

What differs, and not by accident. torchao keeps the sign of zero, takes no float16, and at the lowest scale bytes
clamps or ignores the scale; its rceil takes a float32 logarithm, so that a largest value one unit in the last place
above the element's is taken for the element's. compressed-tensors keeps the sign of zero too, has its smallest scale
1.2e-7 for a group of 512 zeros, and for MXFP8 one more where the largest weight is 448 times a power of two, so that
it becomes 224. None of that is met by the weights below, except zeros and 448.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hostile.small import Tensor, to_bits, to_values
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from quantized import BINADE, ONE, SIGN, Quantized, as_bytes, run_kernel, to_torch

from omni_convert.formats import microscaling as mx
from omni_convert.formats.base import SCALE_RULES
from omni_convert.formats.mxfp4 import MXFP4
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.mxfp8 import MXFP8

Values = NDArray[np.float32]
NAMES = ["mxfp8", "mxfp4"]
FORMATS = {"mxfp8": MXFP8, "mxfp4": MXFP4}
ELEMENTS = {"mxfp8": mx.E4M3, "mxfp4": mx.E2M1}
TIES = [1.0, 1.25, 1.5, 1.75, 1.8125, 1.875, 1.9375, 1.96875]

each_format = pytest.mark.parametrize("name", NAMES)
each_rule = pytest.mark.parametrize("rule", SCALE_RULES)


def tie_grid() -> NDArray[np.float32]:
    """Blocks whose values sit on and around the midpoints of both elements, under every threshold of the scale."""
    rng = np.random.default_rng(0)
    grid = np.arange(1, 129) / 8 * 2.0 ** rng.integers(-4, 5, (96, 1))
    grid[:, ::32] = np.resize(TIES, (96, 4)) * 16 * 2.0 ** rng.integers(-2, 3, (96, 1))
    result: NDArray[np.float32] = (grid * rng.choice([-1, 1], grid.shape)).astype(np.float32)
    return result


def samples() -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    sparse = rng.standard_normal((64, 512)) * (rng.random((64, 512)) < 0.05)
    return {
        "normal": to_bits(rng.standard_normal((256, 1024)) * 0.02),
        "normal float32": to_bits(rng.standard_normal((256, 1024)) * 0.02, "F32"),
        "student t": to_bits(rng.standard_t(2, (256, 1024)), "F32"),
        "ties": to_bits(tie_grid()),
        "sparse": to_bits(sparse),
        "every exponent": to_bits(rng.standard_normal((64, 256)) * 2.0 ** rng.uniform(-90, 90, (64, 1)), "F32"),
    }


SAMPLES = samples()
each_sample = pytest.mark.parametrize("sample", SAMPLES)


@st.composite
def bf16_weights(draw: st.DrawFn) -> Tensor:
    """(n, 64) of a few exponents around any between 2**-90 and 2**90."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    start = ONE["BF16"] + draw(st.integers(-90, 90)) * BINADE["BF16"]
    span = draw(st.sampled_from([2, 20, BINADE["BF16"], 12 * BINADE["BF16"]]))
    patterns = rng.integers(start, start + span, (4, 64)) | SIGN["BF16"] * rng.integers(0, 2, (4, 64))
    return Tensor("BF16", patterns.astype("<u2"))


def torchao_blocks(weight: torch.Tensor, name: str, rule: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """torchao's codes as e4m3 bytes without a sign at zero, and scale bytes; zeros have scale byte 0 there too."""
    module = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    dtype = torch.float8_e4m3fn if name == "mxfp8" else torch.float4_e2m1fn_x2
    mode = module.ScaleCalculationMode(rule)
    scale, codes = module.to_mx(weight.contiguous(), dtype, 32, mode)
    raw = codes.view(torch.uint8).numpy()
    if name == "mxfp4":  # two to a byte, the even one low
        raw = np.stack([raw & 15, raw >> 4], axis=-1).reshape(weight.shape)
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[raw & 7]
        raw = as_bytes(torch.from_numpy(values).to(torch.float8_e4m3fn)).numpy() | (raw >> 3 << 7)
    raw = np.where(raw == 0x80, 0, raw)
    return raw.reshape(weight.shape), scale.view(torch.uint8).numpy().reshape(len(weight), -1)


def check_torchao(weight: Tensor, name: str, rule: str) -> None:
    found = run_kernel(replace(FORMATS[name], scale_rule=rule), weight)
    codes, scale = torchao_blocks(to_torch(weight), name, rule)
    assert np.array_equal(found.scale, scale)
    assert np.array_equal(found.codes, codes)


@each_sample
@each_rule
@each_format
def test_torchao(name: str, rule: str, sample: str) -> None:
    check_torchao(SAMPLES[sample], name, rule)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(SCALE_RULES), bf16_weights())
def test_torchao_for_any_exponent(name: str, rule: str, weight: Tensor) -> None:
    check_torchao(weight, name, rule)


@each_sample
def test_dual_scale_is_torchao_even_below_a_coarse_scale(sample: str) -> None:
    found = run_kernel(Mxfp4DualScale(), SAMPLES[sample])
    scaled = divided_by_coarse(SAMPLES[sample], found)
    codes, scale = torchao_blocks(torch.from_numpy(scaled), "mxfp4", "even")
    assert np.array_equal(found.scale, scale)
    assert np.array_equal(found.codes, codes)


def divided_by_coarse(weight: Tensor, found: Quantized) -> NDArray[np.float32]:
    """w / coarse, after checking coarse against float64."""
    values, coarse = to_values(weight), found.tensors["weight_dual_scale"][:, :, 0]
    parts = np.array_split(values, range(512, values.shape[1], 512), axis=1)
    for group, part in enumerate(parts):
        expected = (np.abs(part).max(axis=1).astype(np.float64) / 6).astype(np.float32)
        assert np.array_equal(coarse[:, group], np.where(expected == 0, np.float32(1), expected))
    scaled = [part / coarse[:, group, None] for group, part in enumerate(parts)]
    return np.concatenate(scaled, axis=1)


def compressed_tensors(values: Values, group: int, bits: int, **scale: Any) -> tuple[Values, Values]:
    """Element values, zeros positive, and scales, for groups along K of floats of so many ``bits``."""
    library = importlib.import_module("compressed_tensors.quantization")
    from compressed_tensors.quantization.utils import calculate_qparams

    args = library.QuantizationArgs(num_bits=bits, type="float", strategy="group", group_size=group, **scale)
    weight = torch.from_numpy(values)
    groups = weight.unflatten(1, (-1, group))
    scales, _ = calculate_qparams(groups.amin(dim=-1), groups.amax(dim=-1), args)
    codes = library.quantize(weight, scales, None, args)
    return codes.numpy() + np.float32(0), scales.numpy()


def compressed_tensors_blocks(values: Values, name: str) -> tuple[Values, NDArray[np.int64]]:
    """Element values and scale bytes."""
    codes, scales = compressed_tensors(values, 32, 8 if name == "mxfp8" else 4, scale_dtype=torch.uint8)
    return codes, np.frexp(scales)[1].astype(np.int64) + 126


def check_compressed_tensors(weight: Tensor, name: str) -> None:
    values, found = to_values(weight), run_kernel(FORMATS[name], weight)
    codes, scale = compressed_tensors_blocks(values, name)
    amax = np.abs(values).reshape(len(values), -1, 32).max(axis=-1)
    bumped = (np.frexp(amax)[0] == 1.75 / 2) & (name == "mxfp8")
    assert np.array_equal(found.scale, scale - bumped)
    same = np.repeat(~bumped, 32, axis=1)
    assert np.array_equal(as_values(found.codes)[same], codes[same])


@each_sample
@each_format
def test_compressed_tensors(name: str, sample: str) -> None:
    check_compressed_tensors(SAMPLES[sample], name)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), bf16_weights())
def test_compressed_tensors_for_any_exponent(name: str, weight: Tensor) -> None:
    check_compressed_tensors(weight, name)


def check_dual_scale(weight: Tensor) -> None:
    """compressed-tensors' FP4 in groups of 512 for the coarse scales, its MXFP4 of the quotients for the rest."""
    found = run_kernel(Mxfp4DualScale(), weight)
    values = np.pad(to_values(weight), ((0, 0), (0, -weight.bits.shape[1] % 512)))
    _, coarse = compressed_tensors(values, 512, 4)
    coarse = np.where(values.reshape(*coarse.shape, 512).any(axis=-1), coarse, np.float32(1))
    codes, scale = compressed_tensors_blocks(values / np.repeat(coarse, 512, axis=1), "mxfp4")
    assert np.array_equal(found.tensors["weight_dual_scale"][:, :, 0], coarse)
    assert np.array_equal(found.scale, scale[:, : found.scale.shape[1]])
    assert np.array_equal(as_values(found.codes), codes[:, : found.codes.shape[1]])


@each_sample
def test_dual_scale_is_compressed_tensors_twice(sample: str) -> None:
    check_dual_scale(SAMPLES[sample])


@settings(max_examples=150, deadline=None)
@given(bf16_weights())
def test_dual_scale_is_compressed_tensors_twice_for_any_exponent(weight: Tensor) -> None:
    check_dual_scale(weight)


def scaled_blocks(weight: Tensor, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights divided by the scales that our format chose, and the values that it made of them."""
    fmt = {**FORMATS, "mxfp4_dualscale": Mxfp4DualScale()}[name]
    found = run_kernel(fmt, weight)
    values = divided_by_coarse(weight, found) if name == "mxfp4_dualscale" else to_values(weight)
    powers = np.ldexp(1.0, found.scale.astype(int) - 127)
    scaled = (values / np.repeat(powers, 32, axis=1)).astype(np.float32)
    return scaled, as_values(found.codes)


def as_values(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    return values


def ml_dtypes_cast(values: NDArray[Any], name: str) -> NDArray[np.float32]:
    ml_dtypes = importlib.import_module("ml_dtypes")
    largest, dtype = (448, ml_dtypes.float8_e4m3fn) if name == "mxfp8" else (6, ml_dtypes.float4_e2m1fn)
    result: NDArray[np.float32] = np.clip(values, -largest, largest).astype(dtype).astype(np.float32)
    return result


def gfloat_cast(values: NDArray[Any], name: str) -> NDArray[np.float32]:
    importlib.import_module("gfloat")
    from gfloat import round_ndarray
    from gfloat.formats import format_info_ocp_e2m1, format_info_ocp_e4m3

    info = format_info_ocp_e4m3 if name == "mxfp8" else format_info_ocp_e2m1
    return round_ndarray(info, values.astype(np.float64), sat=True).astype(np.float32)


@pytest.mark.parametrize("cast", [ml_dtypes_cast, gfloat_cast])
@each_sample
@pytest.mark.parametrize("name", [*NAMES, "mxfp4_dualscale"])
def test_elements_under_our_scales(name: str, sample: str, cast: Any) -> None:
    scaled, found = scaled_blocks(SAMPLES[sample], name)
    assert np.array_equal(found, cast(scaled, name))


@pytest.mark.parametrize("cast", [ml_dtypes_cast, gfloat_cast])
@each_format
def test_every_bf16_pattern(name: str, cast: Any) -> None:
    values = to_values(Tensor("BF16", np.arange(1 << 16, dtype="<u2")))
    values = values[np.isfinite(values)]
    found = mx.round_elements(torch.from_numpy(values), ELEMENTS[name]).numpy()
    assert np.array_equal(found, cast(values, name))
    assert not np.signbit(found[found == 0]).any()


def gfloat_scales(blocks: NDArray[np.float64], name: str, rule: str) -> list[int]:
    """Scale bytes. Rule even is rule floor of magnitudes rounded to as many bits as the element has."""
    module = importlib.import_module("gfloat.block")
    from gfloat import round_ndarray
    from gfloat.formats import format_info_binary32

    element = ELEMENTS[name]
    if rule == "even":
        bits = element.mantissa_bits
        short = replace(format_info_binary32, k=9 + bits, precision=1 + bits, num_high_nans=2**bits - 1)
        blocks = round_ndarray(short, blocks)
    scales = [module.compute_scale_amax(element.emax, values) for values in blocks]
    return [int(np.log2(scale)) + 127 for scale in scales]


def check_gfloat_scales(weight: Tensor, name: str, rule: str) -> None:
    found = run_kernel(replace(FORMATS[name], scale_rule=rule), weight)
    blocks = to_values(weight).astype(np.float64).reshape(-1, 32)
    assert found.scale.ravel().tolist() == gfloat_scales(blocks, name, rule)


@each_sample
@pytest.mark.parametrize("rule", ["floor", "even"])
@each_format
def test_gfloat_chooses_the_same_scales(name: str, rule: str, sample: str) -> None:
    check_gfloat_scales(SAMPLES[sample], name, rule)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(["floor", "even"]), bf16_weights())
def test_gfloat_chooses_the_same_scales_for_any_exponent(name: str, rule: str, weight: Tensor) -> None:
    check_gfloat_scales(weight, name, rule)


@each_sample
def test_gfloat_chooses_the_same_fine_scales_below_a_coarse_one(sample: str) -> None:
    found = run_kernel(Mxfp4DualScale(), SAMPLES[sample])
    scaled = divided_by_coarse(SAMPLES[sample], found).astype(np.float64).reshape(-1, 32)
    assert found.scale.ravel().tolist() == gfloat_scales(scaled, "mxfp4", "even")
