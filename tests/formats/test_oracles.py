"""The MX formats against public libraries, bit for bit: torchao quantizes whole blocks, ml_dtypes and gfloat elements.

What differs, and not by accident: torchao keeps the sign of zero, takes no float16, and at the lowest scale bytes
clamps or ignores the scale; its rceil takes a float32 logarithm, so that a largest value one unit in the last place
above the element's is taken for the element's. None of that is met by the weights below, except zeros.
"""

from __future__ import annotations

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
    module = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
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
    ml_dtypes = pytest.importorskip("ml_dtypes")
    largest, dtype = (448, ml_dtypes.float8_e4m3fn) if name == "mxfp8" else (6, ml_dtypes.float4_e2m1fn)
    result: NDArray[np.float32] = np.clip(values, -largest, largest).astype(dtype).astype(np.float32)
    return result


def gfloat_cast(values: NDArray[Any], name: str) -> NDArray[np.float32]:
    pytest.importorskip("gfloat")
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


@each_sample
@each_format
def test_gfloat_chooses_the_scales_of_rule_floor(name: str, sample: str) -> None:
    block = pytest.importorskip("gfloat.block")
    found = run_kernel(replace(FORMATS[name], scale_rule="floor"), SAMPLES[sample])
    blocks = to_values(SAMPLES[sample]).astype(np.float64).reshape(-1, 32)
    scales = [block.compute_scale_amax(ELEMENTS[name].emax, values) for values in blocks]
    assert found.scale.ravel().tolist() == [int(np.log2(scale)) + 127 for scale in scales]
