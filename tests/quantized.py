"""One weight through a format's kernel and through its torch reference, and weights that make the two differ."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from hostile.small import Tensor
from hypothesis import strategies as st
from numpy.typing import NDArray

from omni_convert.formats.base import Facts, Format, NonFinite
from omni_convert.formats.bits import OUTPUT_DTYPE, row_maxima

DTYPES = ["BF16", "F16", "F32"]
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SIGN = {"BF16": 0x8000, "F16": 0x8000, "F32": 0x80000000}
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
BINADE = {"BF16": 1 << 7, "F16": 1 << 10, "F32": 1 << 23}
ONE = {"BF16": 0x3F80, "F16": 0x3C00, "F32": 0x3F800000}


class Quantized(NamedTuple):
    tensors: dict[str, NDArray[Any]]
    """FP8 as its bytes."""
    power: NDArray[np.float64]
    bad: NonFinite | None = None

    @property
    def codes(self) -> NDArray[np.uint8]:
        return self.tensors["weight"]

    @property
    def scale(self) -> NDArray[np.uint8]:
        return self.tensors["weight_scale"]


def run_kernel(fmt: Format, weight: Tensor, *, power: bool = True) -> Quantized:
    """The compiled kernel, into arrays full of rubbish; with the error sums or without."""
    shape = weight.bits.shape
    facts = Facts(amax=float(row_maxima(weight.bits, weight.dtype).max()), input_scale=0.25)
    whole = fmt.whole(shape, facts)
    outputs = {name: spec for name, spec in fmt.tensors(shape).items() if name not in whole}
    out = {name: np.full(spec.shape, 99, OUTPUT_DTYPE[spec.dtype]) for name, spec in outputs.items()}
    sums = np.full((shape[0], 2), 99.0)
    bad = fmt.quantize_rows(weight.bits, weight.dtype, out, sums if power else None, facts)
    return Quantized(out | whole, sums, bad)


def to_torch(weight: Tensor) -> torch.Tensor:
    return torch.from_numpy(weight.bits.view(f"i{weight.bits.itemsize}").copy()).view(TORCH[weight.dtype])


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def from_torch(tensors: dict[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    return {name: as_bytes(tensor).numpy() for name, tensor in tensors.items()}


def into_torch(tensors: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    """Kernel output as ``dequantize`` takes it."""
    result = {name: torch.from_numpy(array) for name, array in tensors.items()}
    return result | {"weight": result["weight"].view(torch.float8_e4m3fn)}


def check_same_bits(fmt: Format, weight: Tensor) -> Quantized:
    result, expected = run_kernel(fmt, weight), from_torch(fmt.quantize(to_torch(weight), Facts(input_scale=0.25)))
    for found in (result, run_kernel(fmt, weight, power=False)):
        assert found.bad is None
        assert found.tensors.keys() == expected.keys()
        for name, array in found.tensors.items():
            assert array.shape == expected[name].shape, name
            assert array.tobytes() == expected[name].tobytes(), name
    return result


@st.composite
def weights(draw: st.DrawFn, columns: tuple[int, ...], *, normal: bool = False) -> Tensor:
    """Finite bits of any exponent, or of a narrow band of exponents, with rows of zeros and outliers.

    ``normal``: of magnitude 2**-100 to 2**126 (F16: any normal), or zero.
    """
    dtype = draw(st.sampled_from(DTYPES))
    shape = (draw(st.integers(1, 4)), draw(st.sampled_from(columns)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    infinity, binade = INFINITY[dtype], BINADE[dtype]
    lowest, highest = 0, infinity
    if normal:
        lowest = binade if dtype == "F16" else ONE[dtype] - 100 * binade
        highest = infinity - binade
    start = draw(st.sampled_from([lowest, lowest + 1, ONE[dtype], highest - binade, highest - infinity // 16]))
    span = draw(st.sampled_from([2, 300, binade, infinity // 16, infinity]))
    patterns = rng.integers(start, min(start + span, highest), shape) | SIGN[dtype] * rng.integers(0, 2, shape)
    if draw(st.booleans()):
        patterns[rng.random(shape) < 0.2] = 0
    if draw(st.booleans()):
        patterns[:, : shape[1] // 2] = SIGN[dtype] * rng.integers(0, 2)  # zeros of one sign
    if draw(st.booleans()):
        patterns[-1] = 0
        patterns[-1, rng.integers(shape[1])] = highest - 1  # a huge value alone in its row
    return Tensor(dtype, patterns.astype("<u4" if dtype == "F32" else "<u2"))
