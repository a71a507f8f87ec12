"""The three MX formats: bytes worked out by hand, the kernel against the readable reference, bit for bit, bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hostile.small import Tensor, to_bits, to_values
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import (
    DTYPES,
    INFINITY,
    SIGN,
    as_bytes,
    check_same_bits,
    from_torch,
    into_torch,
    run_kernel,
    weights,
)

from omni_convert.formats import FORMATS
from omni_convert.formats.base import Format, NonFinite
from omni_convert.formats.bits import OUTPUT_DTYPE
from omni_convert.formats.header import TensorSpec
from omni_convert.formats.mxfp4 import MXFP4
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.mxfp8 import MXFP8

DUAL = Mxfp4DualScale()
SINGLE: dict[str, Format] = {
    f"{fmt.name}-{rule}": replace(fmt, scale_rule=rule) for fmt in (MXFP8, MXFP4) for rule in ("floor", "even", "rceil")
}
KINDS: dict[str, Format] = {**SINGLE, DUAL.name: DUAL}
COLUMNS = (32, 64, 96, 448, 512, 544, 1088)
TAILS = (1, 2, 31, 33, 63, 65, 100)
SLACK = 1e-4

every = pytest.mark.parametrize("fmt", KINDS.values(), ids=KINDS.keys())
every_default = pytest.mark.parametrize("fmt", [MXFP8, MXFP4, DUAL], ids=lambda fmt: fmt.name)
single = pytest.mark.parametrize("fmt", SINGLE.values(), ids=SINGLE.keys())


def row(*values: float, columns: int = 32) -> list[float]:
    return [*values, *[0.0] * (columns - len(values))]


def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Normal weights, every row and every block of its own size."""
    rng = np.random.default_rng([seed, rows, columns])
    sizes = 2.0 ** rng.uniform(-4, 4, (rows, -(-columns // 32)))
    result: np.ndarray = rng.standard_normal((rows, columns)) * np.repeat(sizes, 32, axis=1)[:, :columns]
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp8_bytes_worked_out_by_hand(dtype: str) -> None:
    half = 2.0**-10  # of the smallest step
    values = [
        row(448, -448, 1, 0.5, -0.0, 17, 19, -2 * half, half, 3 * half, -half, 432, 416),  # exponent 0; ties to even
        row(450, -225, 8),  # beyond 448: exponent 1
        row(-(1.75 * 2.0**-14), 2.0**-14),  # 448 and 256 times 2**-22
        row(-0.0, -0.0),
    ]
    result = run_kernel(MXFP8, to_bits(values, dtype))
    assert [codes[:13].tobytes().hex() for codes in result.codes] == [
        "7efe383000585a81000200" + "7e7d",
        "76ee48" + 10 * "00",
        "fe78" + 11 * "00",
        13 * "00",
    ]
    assert not result.codes[:, 13:].any()
    assert result.scale.tolist() == [[127], [128], [105], [0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_bytes_worked_out_by_hand(dtype: str) -> None:
    values = [
        row(6, -6, 5, -3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.25, -0.0, 0.375, 4.5),  # exponent 0; ties to even
        row(6.75, -6.5, 2),  # below 7: saturate
        row(7, -3.5, 1),  # from 7 on: exponent 1
        row(-0.0, -0.0),
    ]
    result = run_kernel(MXFP4, to_bits(values, dtype))
    assert [codes[:13].tobytes().hex() for codes in result.codes] == [
        "4ccc48c8404038380000003048",
        "4ccc40" + 10 * "00",
        "48c030" + 10 * "00",
        13 * "00",
    ]
    assert not result.codes[:, 13:].any()
    assert result.scale.tolist() == [[127], [127], [128], [0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dual_scale_bytes_worked_out_by_hand(dtype: str) -> None:
    values = np.zeros((2, 576), np.float32)
    values[0, :3] = [12, -5, 4]  # coarse 2: 6, -2.5, 2 times 2**0
    values[0, 32:36] = [1, -0.875, 0.75, -0.0]  # 0.5 = 4 * 2**-3, -3.5 (a tie), 3
    values[1, 64 + 5] = -0.0
    values[1, 575] = 2.0**-8  # coarse 2**-8 / 6: 6
    result = run_kernel(DUAL, to_bits(values, dtype))
    assert result.codes[0, :3].tobytes().hex() == "4cc040"
    assert result.codes[0, 32:36].tobytes().hex() == "48c84400"
    assert np.flatnonzero(result.codes).tolist() == [0, 1, 2, 32, 33, 34, 576 + 575]
    assert result.codes[1, 575] == 0x4C
    assert result.scale.tolist() == [[127, 124, *[0] * 16], [0] * 17 + [127]]
    assert result.tensors["weight_dual_scale"].tolist() == [[[2], [1]], [[1], [np.float32(2.0**-8) / np.float32(6)]]]
    assert result.tensors["mul_scale"].tolist() == [1.0] * 576


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("columns", COLUMNS)
@every
def test_kernel_gives_the_bits_of_the_reference(fmt: Format, rows: int, columns: int, dtype: str) -> None:
    check_same_bits(fmt, to_bits(noise(rows, columns), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", TAILS)
@single
def test_kernel_takes_any_number_of_columns(fmt: Format, columns: int, dtype: str) -> None:
    check_same_bits(fmt, to_bits(noise(3, columns), dtype))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(KINDS)), weights((32, 64, 96, 544)))
def test_kernel_gives_the_bits_of_the_reference_for_any_exponent(kind: str, weight: Tensor) -> None:
    check_same_bits(KINDS[kind], weight)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(list(SINGLE)), weights(TAILS))
def test_kernel_gives_the_bits_of_the_reference_for_any_exponent_and_tail(kind: str, weight: Tensor) -> None:
    check_same_bits(SINGLE[kind], weight)


@pytest.mark.parametrize("dtype", DTYPES)
@every
def test_every_16_bit_pattern(fmt: Format, dtype: str) -> None:
    patterns = np.arange(INFINITY["F16"] if dtype == "F16" else 0x7F80, dtype=np.uint32)
    bits = (patterns << 16) if dtype == "F32" else patterns.astype("<u2")
    check_same_bits(fmt, Tensor(dtype, bits.reshape(-1, 64)))
    anchored = np.repeat(bits[31::32, None], 32, axis=1)  # beside the first of every 32 as the largest of the block
    anchored[:, 1:] = bits.reshape(-1, 32)[:, :31]
    check_same_bits(fmt, Tensor(dtype, anchored))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(KINDS)), weights((64, 96, 544)), st.integers(0, 4))
def test_rows_do_not_know_of_each_other(kind: str, weight: Tensor, cut: int) -> None:
    whole = run_kernel(KINDS[kind], weight)
    pieces = [bits for bits in (weight.bits[:cut], weight.bits[cut:]) if len(bits)]
    parts = [run_kernel(KINDS[kind], Tensor(weight.dtype, bits)) for bits in pieces]
    assert np.concatenate([part.power for part in parts]).tobytes() == whole.power.tobytes()
    for name in whole.tensors.keys() - set(KINDS[kind].whole_suffixes):
        joined = np.concatenate([part.tensors[name] for part in parts])
        assert joined.tobytes() == whole.tensors[name].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [32, 96, 544, 4096])
@every
def test_power_is_that_of_weight_and_error(fmt: Format, columns: int, dtype: str) -> None:
    weight = to_bits(noise(5, columns), dtype)
    result, values = run_kernel(fmt, weight), to_values(weight).astype(np.float64)
    error = fmt.dequantize(into_torch(result.tensors)).numpy() - values
    assert result.power[:, 0] == pytest.approx((values**2).sum(axis=1), rel=1e-5)
    assert result.power[:, 1] == pytest.approx((error**2).sum(axis=1), rel=1e-4)


@single
def test_power_with_a_tail(fmt: Format) -> None:
    weight = to_bits(noise(5, 75))
    result, values = run_kernel(fmt, weight), to_values(weight).astype(np.float64)
    error = fmt.dequantize_rows(result.tensors) - values
    assert result.power == pytest.approx(np.stack([(values**2).sum(axis=1), (error**2).sum(axis=1)], axis=1), rel=1e-4)


@single
def test_power_of_rows_with_the_smallest_scale(fmt: Format) -> None:
    weight = to_bits(np.random.default_rng(0).uniform(-1, 1, (3, 96)) * 2.0**-126, "F32")
    result, values = run_kernel(fmt, weight), to_values(weight).astype(np.float64)
    error = fmt.dequantize_rows(result.tensors) - values
    assert result.power[:, 0] == pytest.approx((values**2).sum(axis=1), rel=1e-4, abs=0)
    assert result.power[:, 1] == pytest.approx((error**2).sum(axis=1), rel=1e-4, abs=0)


@every
def test_power_of_zeros_is_zero_and_that_of_huge_weights_is_finite(fmt: Format) -> None:
    assert run_kernel(fmt, to_bits(np.zeros((2, 64)))).power.tolist() == [[0, 0], [0, 0]]
    assert np.isfinite(run_kernel(fmt, to_bits(np.full((2, 1024), 3e38))).power).all()


def test_power_of_subnormal_weights_beside_a_group_of_zeros() -> None:
    bits = np.zeros((1, 1024), "<u2")
    bits[0, 0] = 1  # the smallest BF16
    assert np.isfinite(run_kernel(DUAL, Tensor("BF16", bits)).power).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [0, 31, 32, 63, 511, 512, 575])
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "nan with sign and payload"])
@every_default
def test_first_nonfinite_is_found(fmt: Format, dtype: str, column: int, kind: str) -> None:
    weight = to_bits(np.ones((4, 576)), dtype)
    pattern = INFINITY[dtype] | (SIGN[dtype] if "-" in kind or "sign" in kind else 0) | (1 if "nan" in kind else 0)
    weight.bits[2, column] = pattern
    weight.bits[2, 575] = pattern
    weight.bits[3, 0] = pattern
    assert run_kernel(fmt, weight).bad == NonFinite(2, column)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(KINDS)), weights((64, 544)))
def test_zeros_are_positive_and_blocks_of_zeros_have_byte_0(kind: str, weight: Tensor) -> None:
    result, values = run_kernel(KINDS[kind], weight), to_values(weight)
    assert not np.any(result.codes == 0x80)
    assert not np.any(result.codes[values == 0])
    empty = ~values.reshape(len(values), -1, 32).any(axis=2)
    assert not np.any(result.scale[empty])
    if kind == DUAL.name:
        for group in range(-(-values.shape[1] // 512)):
            zeros = ~values[:, group * 512 : (group + 1) * 512].any(axis=1)
            assert np.all(result.tensors["weight_dual_scale"][zeros, group] == 1)


@pytest.mark.parametrize("columns", [96, 1088])
@every
def test_one_huge_outlier_in_a_row_of_zeros(fmt: Format, columns: int) -> None:
    values = np.zeros((columns, columns))
    np.fill_diagonal(values, -(2.0**100))
    weight = to_bits(values)
    result = check_same_bits(fmt, weight)
    assert [np.flatnonzero(codes).tolist() for codes in result.codes] == [[place] for place in range(columns)]
    assert [np.flatnonzero(scale).tolist() for scale in result.scale] == [[place // 32] for place in range(columns)]
    assert np.allclose(fmt.dequantize_rows(result.tensors), to_values(weight), rtol=1e-6, atol=0)
    if fmt is DUAL:
        coarse = result.tensors["weight_dual_scale"][:, :, 0]
        assert [np.flatnonzero(coarse[place] != 1).tolist() for place in range(columns)] == [
            [place // 512] for place in range(columns)
        ]


@every_default
def test_reference_takes_any_strides_and_leaves_the_weight_alone(fmt: Format) -> None:
    whole = torch.from_numpy(noise(128, 256)).to(torch.bfloat16)
    before = whole.clone()
    for weight in (whole.t(), whole[:, ::2], whole[::2], whole[1:, 64:192], whole[:1].expand(3, 256)):
        expected = fmt.quantize(weight.contiguous())
        for name, found in fmt.quantize(weight).items():
            assert torch.equal(as_bytes(found), as_bytes(expected[name]))
    assert torch.equal(whole, before)


@every_default
def test_kernel_takes_every_second_row(fmt: Format) -> None:
    bits = to_bits(noise(8, 128)).bits
    found, expected = (run_kernel(fmt, Tensor("BF16", part)) for part in (bits[::2], bits[::2].copy()))
    assert all(found.tensors[name].tobytes() == expected.tensors[name].tobytes() for name in found.tensors)


@every_default
def test_kernel_takes_every_second_column(fmt: Format) -> None:
    bits = to_bits(noise(4, 256)).bits[:, ::2]
    found, expected = (run_kernel(fmt, Tensor("BF16", part)) for part in (bits, bits.copy()))
    assert all(found.tensors[name].tobytes() == expected.tensors[name].tobytes() for name in found.tensors)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(KINDS)), weights((32, 64, 544), normal=True))
def test_dequantized_weight_is_within_the_tolerance(kind: str, weight: Tensor) -> None:
    fmt, values = KINDS[kind], to_values(weight).astype(np.float64)
    result = run_kernel(fmt, weight)
    error = np.abs(fmt.dequantize_rows(result.tensors) - values)
    assert np.all(error <= (1 + SLACK) * fmt.tolerance(result.tensors))


@every
def test_tolerance_is_no_larger_than_needed(fmt: Format) -> None:
    """Over many blocks, some weight comes close to every bound: to half a step, and to what saturation cuts off."""
    weight = to_bits(np.random.default_rng(1).standard_normal((512, 1024)), "F32")
    result = run_kernel(fmt, weight)
    share = np.abs(fmt.dequantize_rows(result.tensors) - to_values(weight)) / fmt.tolerance(result.tensors)
    for code in np.unique(result.codes).tolist():
        found = share[result.codes == code]
        assert len(found) < 1000 or found.max() > 0.9, hex(code)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(KINDS)), weights((32, 544), normal=True))
def test_both_dequantizers_agree(kind: str, weight: Tensor) -> None:
    result = run_kernel(KINDS[kind], weight)
    expected = KINDS[kind].dequantize(into_torch(result.tensors)).numpy()
    assert KINDS[kind].dequantize_rows(result.tensors).tobytes() == expected.tobytes()
    assert expected.shape == weight.bits.shape


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(SINGLE)), weights((32, 65)))
@pytest.mark.filterwarnings("ignore:overflow")
def test_both_dequantizers_agree_for_any_exponent(kind: str, weight: Tensor) -> None:
    result = run_kernel(SINGLE[kind], weight)
    expected = SINGLE[kind].dequantize(into_torch(result.tensors)).numpy()
    assert SINGLE[kind].dequantize_rows(result.tensors).tobytes() == expected.tobytes()


def test_both_dequantizers_agree_on_subnormal_weights() -> None:
    weight = Tensor("F32", np.array([[60] * 32 + [7] * 32], "<u4"))  # times 2**-149: coarse 10, 7 = 6 * 10 / 8
    result = run_kernel(DUAL, weight)
    expected = DUAL.dequantize(into_torch(result.tensors)).numpy()
    assert DUAL.dequantize_rows(result.tensors).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("fmt", [MXFP8, MXFP4], ids=lambda fmt: fmt.name)
def test_largest_finite_value_dequantizes_to_a_finite_one(fmt: Format, dtype: str) -> None:
    bits = np.full((1, 32), INFINITY[dtype] - 1, "<u2" if dtype == "BF16" else "<u4")
    assert np.isfinite(fmt.dequantize_rows(run_kernel(fmt, Tensor(dtype, bits)).tensors)).all()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_largest_finite_value_in_dual_scale(dtype: str) -> None:
    bits = np.full((1, 64), INFINITY[dtype] - 1, "<u2" if dtype == "BF16" else "<u4")
    weight = Tensor(dtype, bits)
    assert DUAL.dequantize_rows(check_same_bits(DUAL, weight).tensors) == pytest.approx(to_values(weight), rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 64), (1, 576), (7, 1088)], ids=str)
@every_default
def test_contract(fmt: Format, shape: tuple[int, int]) -> None:
    rows, columns = shape
    expected = {"weight": TensorSpec("F8_E4M3", shape), "weight_scale": TensorSpec("U8", (rows, columns // 32))}
    if fmt is DUAL:
        groups = {64: 1, 576: 2, 1088: 3}[columns]
        expected["weight_dual_scale"] = TensorSpec("F32", (rows, groups, 1))
        expected["mul_scale"] = TensorSpec("F32", (columns,))
    assert fmt.tensors(shape) == expected
    assert tuple(fmt.tensors(shape)) == tuple(fmt.suffixes)
    quantized = from_torch(fmt.quantize(torch.ones(shape, dtype=torch.bfloat16)))
    assert {name: (array.dtype, array.shape) for name, array in quantized.items()} == {
        name: (OUTPUT_DTYPE[spec.dtype], spec.shape) for name, spec in expected.items()
    }
    assert fmt.quantize(torch.ones(shape))["weight"].dtype == torch.float8_e4m3fn
    assert set(fmt.whole(shape)) == set(fmt.whole_suffixes) == ({"mul_scale"} if fmt is DUAL else set())


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("mxfp8", {"is_checkpoint_mxfp8_serialized": True}),
        ("mxfp4", {"is_checkpoint_mxfp4_serialized": True, "mxfp4_scale_alg": 2}),
        ("mxfp4_dualscale", {"is_checkpoint_serialized": True}),
    ],
)
def test_config_has_exactly_these_keys(name: str, rest: dict[str, object]) -> None:
    assert FORMATS[name].config(["a.b"]) == {"quant_method": name, "ignored_layers": ["a.b"], **rest}


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((4,), "needs a 2-D weight, this one has 1 dimensions"),
        ((), "needs a 2-D weight, this one has 0 dimensions"),
        ((2, 64, 64), "needs a 2-D weight, this one has 3 dimensions"),
        ((0, 64), "the weight is empty"),
        ((64, 0), "the weight is empty"),
        ((64, 48), "K is 48, {name} needs a multiple of {multiple}"),
        ((64, 1), "K is 1, {name} needs a multiple of {multiple}"),
    ],
)
@every_default
def test_shapes_that_cannot_be_held(fmt: Format, shape: tuple[int, ...], reason: str) -> None:
    multiple = 64 if fmt is DUAL else 32
    assert reason.format(name=fmt.name, multiple=multiple) in str(fmt.refusal(shape))


def test_shapes_that_can_be_held() -> None:
    assert [fmt.refusal((1, 32)) for fmt in (MXFP8, MXFP4)] == [None, None]
    assert [DUAL.refusal((1, columns)) is None for columns in (32, 64, 96, 448, 576)] == [
        False,
        True,
        False,
        True,
        True,
    ]
