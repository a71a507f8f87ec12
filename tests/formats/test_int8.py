"""INT8: bytes worked out by hand, an exact oracle, and the kernel against the readable reference, bit for bit."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hostile.small import Tensor, to_bits, to_values
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from omni_convert.formats.base import NonFinite
from omni_convert.formats.header import TensorSpec
from omni_convert.formats.int8 import Int8

FMT = Int8()
DTYPES = ["BF16", "F16", "F32"]
SIGN = {"BF16": 0x8000, "F16": 0x8000, "F32": 0x80000000}
EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
SHAPES = [(1, 1), (1, 7), (5, 1), (3, 63), (3, 64), (3, 65), (2, 127), (2, 128), (2, 129), (17, 200)]


class Result(NamedTuple):
    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    power: NDArray[np.float64]
    bad: NonFinite | None

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        return {"weight": self.codes, "weight_scale": self.scale}


def run_kernel(weight: Tensor, *, power: bool = True) -> Result:
    rows, columns = weight.bits.shape
    result = Result(
        np.full((rows, columns), 99, np.int8), np.full((rows, 1), 99, np.float32), np.full((rows, 2), 99.0), None
    )
    bad = FMT.quantize_rows(weight.bits, weight.dtype, result.tensors, result.power if power else None)
    return result._replace(bad=bad)


def to_torch(weight: Tensor) -> torch.Tensor:
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[weight.dtype]
    return torch.from_numpy(weight.bits.view(f"i{weight.bits.itemsize}").copy()).view(dtype)


def exact_scale(amax: np.float32) -> np.float32:
    """amax / 127, moved by one unit in the last place where float32 ends."""
    if amax == 0:
        return np.float32(1)
    step = amax / np.float32(127)
    if Fraction(float(amax)) > Fraction(255, 2) * Fraction(float(step)):
        return np.nextafter(step, np.float32(np.inf))
    if 127 * Fraction(float(step)) > Fraction(float(np.finfo(np.float32).max)):
        return np.nextafter(step, np.float32(0))
    return step


def check_same_bits(weight: Tensor) -> None:
    result, expected = run_kernel(weight), FMT.quantize(to_torch(weight))
    for found in (result, run_kernel(weight, power=False)):
        assert found.bad is None
        assert found.codes.tobytes() == expected["weight"].numpy().tobytes()
        assert found.scale.tobytes() == expected["weight_scale"].numpy().tobytes()


@st.composite
def weights(draw: st.DrawFn, dtypes: list[str] = DTYPES) -> Tensor:
    """Finite bits of any exponent, or of a narrow band of exponents, with rows of zeros and outliers."""
    dtype = draw(st.sampled_from(dtypes))
    shape = (draw(st.integers(1, 6)), draw(st.one_of(st.integers(1, 9), st.integers(60, 70), st.integers(120, 140))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    highest = EXPONENT[dtype]  # the smallest pattern that is not finite
    one = highest & ~(highest >> 1)
    start = draw(st.sampled_from([0, 1, highest // 16, one, highest - highest // 16]))
    span = draw(st.sampled_from([2, 300, highest // 16, highest]))
    patterns = rng.integers(start, min(start + span, highest), shape) | SIGN[dtype] * rng.integers(0, 2, shape)
    bits = patterns.astype("<u4" if dtype == "F32" else "<u2")
    if draw(st.booleans()):
        bits[0] = SIGN[dtype] * rng.integers(0, 2, shape[1])  # zeros of both signs
    if draw(st.booleans()):
        bits[-1] = 0
        bits[-1, rng.integers(shape[1])] = highest - 1  # the largest finite value alone in its row
    return Tensor(dtype, bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_worked_out_by_hand(dtype: str) -> None:
    values = [
        [127.0, -63.5, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5],  # step 1: halves go to the even neighbour
        [0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # zeros: step 1
        [1.0, 3.0, 5.0, -254.0, 0.0, -0.0, -3.0, 2.0],  # step 2
        [0.0, 0.0, 0.0, 2**-8, 0.0, 0.0, 0.0, -(2**-16)],  # step 2**-8 / 127
    ]
    result = run_kernel(to_bits(values, dtype))
    assert result.codes.tobytes().hex(" ", 8) == "7fc000020200fe7e 0000000000000000 000202810000fe01 0000007f00000000"
    assert result.scale.tobytes().hex(" ", 4) == "0000803f 0000803f 00000040 04020138"


@settings(max_examples=60, deadline=None)
@given(weights())
def test_codes_are_the_exactly_rounded_quotients(weight: Tensor) -> None:
    values, result = to_values(weight), run_kernel(weight)
    for row, codes, (scale,) in zip(values, result.codes, result.scale, strict=True):
        assert scale == exact_scale(np.max(np.abs(row)))
        quotients = [Fraction(float(quotient)) for quotient in row / scale]  # round() takes halves to even
        assert codes.tolist() == [max(-127, min(127, round(quotient))) for quotient in quotients]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_gives_the_bits_of_the_reference(shape: tuple[int, int], dtype: str) -> None:
    rng = np.random.default_rng(shape)
    check_same_bits(to_bits(rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, (shape[0], 1)), dtype))


@settings(max_examples=150, deadline=None)
@given(weights())
def test_kernel_gives_the_bits_of_the_reference_for_any_exponent(weight: Tensor) -> None:
    check_same_bits(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_pattern(dtype: str) -> None:
    """Beside a given largest value in its row, so that all ties and all quotients of that step are met."""
    patterns = np.arange(EXPONENT[dtype] if dtype != "F32" else 0x7F80, dtype=np.uint32)
    bits = (patterns << 16) if dtype == "F32" else patterns.astype("<u2")
    check_same_bits(Tensor(dtype, bits.reshape(-1, 64)))
    check_same_bits(Tensor(dtype, bits.reshape(-1, 1)))


@settings(max_examples=60, deadline=None)
@given(weights(), st.data())
def test_rows_do_not_know_of_each_other(weight: Tensor, data: st.DataObject) -> None:
    whole = run_kernel(weight)
    cut = data.draw(st.integers(0, len(weight.bits)))
    parts = [run_kernel(Tensor(weight.dtype, bits)) for bits in (weight.bits[:cut], weight.bits[cut:]) if len(bits)]
    for name in ("codes", "scale", "power"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert joined.tobytes() == getattr(whole, name).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_power_is_that_of_weight_and_error(shape: tuple[int, int], dtype: str) -> None:
    weight = to_bits(np.random.default_rng(shape).standard_normal(shape), dtype)
    result, values = run_kernel(weight), to_values(weight).astype(np.float64)
    error = result.codes * result.scale.astype(np.float64) - values
    assert result.power[:, 0] == pytest.approx((values**2).sum(axis=1), rel=1e-5)
    bound = (result.scale[:, 0] ** 2) * shape[1] * 1e-5  # rounding of float32 sums, in units of the step
    assert np.all(np.abs(result.power[:, 1] - (error**2).sum(axis=1)) <= 1e-3 * (error**2).sum(axis=1) + bound)


def test_power_of_a_known_row() -> None:
    result = run_kernel(to_bits([[127.0, 0.5, -0.25, 2.0] + [0.0] * 64]))
    assert result.power.tolist() == [[127**2 + 0.25 + 0.0625 + 4, 0.25 + 0.0625]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [0, 1, 63, 64, 66])
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "nan with sign and payload"])
def test_first_nonfinite_is_found(dtype: str, column: int, kind: str) -> None:
    weight = to_bits(np.ones((4, 67)), dtype)
    pattern = EXPONENT[dtype] | (SIGN[dtype] if "-" in kind or "sign" in kind else 0) | (1 if "nan" in kind else 0)
    weight.bits[2, column] = pattern
    weight.bits[2, 66] = pattern
    weight.bits[3, 0] = pattern
    assert run_kernel(weight).bad == NonFinite(2, column)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_finite_values_are_finite(dtype: str) -> None:
    bits = np.full((1, 5), EXPONENT[dtype] - 1, "<u4" if dtype == "F32" else "<u2")
    bits[0, 1] |= bits.dtype.type(SIGN[dtype])
    result = run_kernel(Tensor(dtype, bits))
    assert result.bad is None
    assert result.codes.tolist() == [[127, -127, 127, 127, 127]]
    assert np.isfinite(result.power).all()


@settings(max_examples=100, deadline=None)
@given(weights())
def test_dequantized_weight_is_within_half_a_step(weight: Tensor) -> None:
    values, result = to_values(weight).astype(np.float64), run_kernel(weight)
    error = np.abs(FMT.dequantize_rows(result.tensors) - values)
    assert np.all(error <= (1 + 1e-4) * FMT.tolerance(result.tensors).astype(np.float64))


def test_rows_too_small_for_a_normal_scale_are_within_half_a_step() -> None:
    weight = Tensor("F32", np.arange(1, 6001, dtype="<u4").reshape(-1, 3))  # multiples of the smallest float32
    check_same_bits(weight)
    result = run_kernel(weight)
    error = np.abs(FMT.dequantize_rows(result.tensors) - to_values(weight).astype(np.float64))
    assert np.all(error <= (0.5 + 1e-4) * result.scale.astype(np.float64))


def test_largest_float32_dequantizes_to_a_finite_value() -> None:
    weight = Tensor("F32", np.array([[0x7F7FFFFF, 0xFF7FFFFF]], "<u4"))
    check_same_bits(weight)
    values = FMT.dequantize_rows(run_kernel(weight).tensors)
    assert np.isfinite(values).all()
    assert values == pytest.approx(to_values(weight), rel=1e-6)


def test_row_whose_scale_would_underflow_is_exact() -> None:
    weight = Tensor("F32", np.array([[1, 0x80000002, 63]], "<u4"))
    result = run_kernel(weight)
    assert result.codes.tolist() == [[1, -2, 63]]
    assert FMT.dequantize_rows(result.tensors).tobytes() == weight.bits.tobytes()


@settings(max_examples=40, deadline=None)
@given(weights())
def test_both_dequantizers_agree(weight: Tensor) -> None:
    result = run_kernel(weight)
    expected = FMT.dequantize({name: torch.from_numpy(array) for name, array in result.tensors.items()})
    assert FMT.dequantize_rows(result.tensors).tobytes() == expected.numpy().tobytes()


def test_contract() -> None:
    assert FMT.tensors((3, 5)) == {"weight": TensorSpec("I8", (3, 5)), "weight_scale": TensorSpec("F32", (3, 1))}
    assert tuple(FMT.tensors((3, 5))) == tuple(FMT.suffixes)
    assert FMT.config(["a.b"]) == {
        "quant_method": "int8",
        "is_checkpoint_int8_serialized": True,
        "activation_scheme": "dynamic",
        "ignored_layers": ["a.b"],
    }


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2), (), (0, 4), (4, 0)])
def test_shapes_that_cannot_be_held(shape: tuple[int, ...]) -> None:
    assert FMT.refusal(shape)
    assert FMT.refusal((1, 1)) is None
