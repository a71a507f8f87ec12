"""Signal-to-quantization-noise ratios of weights, in dB: a format that loses more than it must has a bug.

The figures were measured once over other random draws, with readable float32 code that is not in this repository.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile.small import Tensor
from quantized import run_kernel

from omni_convert.formats.base import Format
from omni_convert.formats.int8 import Int8
from omni_convert.formats.mxfp4 import MXFP4
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.mxfp8 import MXFP8

SIGMA = 0.02  # a scale that is a power of two makes the figures depend on where in a binade the weights lie
MATRIX = re.compile(r"encoder\.layer\.\d+\..*(query|key|value|dense)\.weight")


def to_bf16(weight: torch.Tensor) -> Tensor:
    return Tensor("BF16", weight.to(torch.bfloat16).view(torch.int16).numpy().view("<u2"))


def sqnr(fmt: Format, weight: Tensor) -> float:
    signal, noise = run_kernel(fmt, weight).power.sum(axis=0)
    return float(10 * np.log10(signal / noise))


@pytest.fixture(scope="module")
def normal() -> Tensor:
    return to_bf16(torch.from_numpy(np.random.default_rng(1).standard_normal((1024, 4096)) * SIGMA))


@pytest.fixture(scope="module")
def heavy_tails() -> Tensor:
    return to_bf16(torch.from_numpy(np.random.default_rng(1).standard_t(4, (1024, 4096)) * SIGMA))


@pytest.fixture(scope="module")
def trained(minilm: Path) -> list[Tensor]:
    from safetensors.torch import load_file

    stored = load_file(minilm / "model.safetensors")
    return [to_bf16(weight) for name, weight in stored.items() if MATRIX.fullmatch(name)]


@pytest.mark.parametrize(
    ("fmt", "expected", "tolerance"),
    [
        (Int8(), 41.235, 0.03),  # one largest value per row: draws differ by more than those of blocks
        (MXFP8, 31.504, 0.02),
        (replace(MXFP8, scale_rule="even"), 31.105, 0.02),
        (replace(MXFP8, scale_rule="floor"), 30.686, 0.02),
        (MXFP4, 19.005, 0.02),
        (replace(MXFP4, scale_rule="rceil"), 18.533, 0.02),
        (replace(MXFP4, scale_rule="floor"), 18.866, 0.02),
        (Mxfp4DualScale(), 19.063, 0.02),
    ],
    ids=str,
)
def test_normal_weights(normal: Tensor, fmt: Format, expected: float, tolerance: float) -> None:
    assert sqnr(fmt, normal) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(("fmt", "expected"), [(MXFP8, 31.507), (MXFP4, 17.791), (Mxfp4DualScale(), 18.256)], ids=str)
def test_heavy_tails(heavy_tails: Tensor, fmt: Format, expected: float) -> None:
    """Student's t, nu = 4. Not int8: its figure hangs on the few largest values, 0.4 dB from draw to draw."""
    assert sqnr(fmt, heavy_tails) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        (Int8(), 41.129),
        (MXFP8, 31.508),
        (replace(MXFP8, scale_rule="even"), 31.033),
        (replace(MXFP8, scale_rule="floor"), 30.375),
        (MXFP4, 18.862),
        (replace(MXFP4, scale_rule="rceil"), 18.462),
        (replace(MXFP4, scale_rule="floor"), 18.624),
        (Mxfp4DualScale(), 19.015),
    ],
    ids=str,
)
def test_trained_weights(trained: list[Tensor], fmt: Format, expected: float) -> None:
    """The same weights as those measured, so the same figure."""
    assert len(trained) == 36
    assert np.mean([sqnr(fmt, weight) for weight in trained]) == pytest.approx(expected, abs=1e-3)
