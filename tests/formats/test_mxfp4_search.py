"""The search for MXFP4 scales: kernel and reference agree, and no power of two has less squared error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hostile.small import Tensor, to_bits, to_values
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import DTYPES, check_same_bits, run_kernel, weights

from omni_convert.formats import make_format, mxfp4_search
from omni_convert.formats import microscaling as mx
from omni_convert.formats.errors import UsageError

FMT, PLAIN = make_format("mxfp4", quality="balanced"), make_format("mxfp4")


def squared_errors(weight: Tensor) -> dict[int, np.ndarray]:
    """By distance from the byte of rule ``floor``: the squared error of every block, in float64."""
    blocks = torch.from_numpy(to_values(weight)).view(len(weight.bits), -1, 32)
    floor = mx.block_scales(blocks.abs().amax(dim=-1), mx.E2M1, "floor").to(torch.int32)
    result = {}
    for more in range(-2, 4):
        byte = (floor + more).clamp(0, 252).to(torch.uint8)
        values, _ = mx.quantize_blocks(blocks, mx.E2M1, "floor", byte)
        found = values.to(torch.float64) * mx.power_of_two(byte.to(torch.int32) - 127).unsqueeze(-1)
        result[more] = ((found - blocks) ** 2).sum(dim=-1).numpy()
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [32, 64, 96, 1088])
def test_kernel_gives_the_bits_of_the_reference(columns: int, dtype: str) -> None:
    rng = np.random.default_rng(columns)
    check_same_bits(FMT, to_bits(rng.standard_t(3, (9, columns)) * 10.0 ** rng.uniform(-3, 3, (9, 1)), dtype))


@settings(max_examples=150, deadline=None)
@given(weights((32, 64, 544)))
def test_kernel_gives_the_bits_of_the_reference_for_any_exponent(weight: Tensor) -> None:
    check_same_bits(FMT, weight)


@pytest.mark.parametrize("nu", [2, 5, 100])
def test_no_power_of_two_does_better(nu: int) -> None:
    weight = to_bits(np.random.default_rng(nu).standard_t(nu, (256, 512)))
    errors = squared_errors(weight)
    best = np.min(list(errors.values()), axis=0)
    found = run_kernel(FMT, weight).power[:, 1]
    assert found == pytest.approx(best.sum(axis=1), rel=1e-4)
    assert found.sum() < 0.995 * run_kernel(PLAIN, weight).power[:, 1].sum()


def test_by_hand() -> None:
    values = np.zeros((4, 32))
    values[0, 0] = 6.875  # 0.875 from 6; with byte 128 it is 3.4375, 0.4375 from 3: the same error, so the lower byte
    values[1, :2] = 7, 0.5  # 1 from 6, and 3.5 half a step from 4: 1 too; but 0.5 would become 0
    values[2, :3] = 7.5, 8, 8  # 4 and 4 with byte 129 are exact
    values[3, :3] = 7, 7, 3  # 6 with byte 127 loses what 8 with byte 128 does; rule even looks at the largest alone
    assert run_kernel(FMT, to_bits(values)).scale.tolist() == [[127], [127], [128], [127]]
    assert run_kernel(PLAIN, to_bits(values)).scale.tolist() == [[127], [128], [128], [128]]


def test_ends_of_float32_keep_the_plain_scale() -> None:
    for pattern in (1, 0x7F, 0x80, 0x7F7F, 0x7F00):
        weight = Tensor("BF16", np.full((2, 64), pattern, "<u2"))
        assert run_kernel(FMT, weight).scale.tolist() == run_kernel(PLAIN, weight).scale.tolist()


@settings(max_examples=40, deadline=None)
@given(weights((64, 96)), st.integers(0, 4))
def test_rows_do_not_know_of_each_other(weight: Tensor, cut: int) -> None:
    whole = run_kernel(FMT, weight)
    parts = [
        run_kernel(FMT, Tensor(weight.dtype, bits)) for bits in (weight.bits[:cut], weight.bits[cut:]) if len(bits)
    ]
    assert np.concatenate([part.scale for part in parts]).tobytes() == whole.scale.tobytes()


def test_not_finite() -> None:
    weight = to_bits(np.ones((3, 64)))
    weight.bits[1, 40] = 0x7F80
    assert mxfp4_search.mxfp4_scales(weight.bits, np.empty((3, 2), np.uint8)) == 1
    assert run_kernel(FMT, weight).bad == (1, 40)


def test_a_rule_beside_a_search_is_refused() -> None:
    with pytest.raises(UsageError, match="--scale-rule floor with --quality balanced"):
        make_format("mxfp4", scale_rule="floor", quality="balanced")
    assert make_format("mxfp8", scale_rule="floor", quality="balanced").name == "mxfp8"
