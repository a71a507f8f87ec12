"""Stored bits as NumPy sees them: BF16 has no NumPy dtype, so weights travel as unsigned integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

NUMPY_DTYPE: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"), "F16": np.dtype("<u2"), "F32": np.dtype("<u4"),
}  # fmt: skip
"""The unsigned integer that carries a float dtype of a source weight."""

OUTPUT_DTYPE: Mapping[str, np.dtype[Any]] = {
    "I8": np.dtype("i1"), "U8": np.dtype("u1"), "F8_E4M3": np.dtype("u1"), "F32": np.dtype("<f4"),
}  # fmt: skip
"""How the tensors that formats write are held in NumPy (FP8 as its bytes)."""


def to_float32(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The values of stored ``bits`` (any shape) of safetensors dtype BF16, F16 or F32, exactly."""
    if dtype == "BF16":
        wide: NDArray[np.uint32] = bits.astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32)


def to_torch(bits: NDArray[Any], dtype: str) -> torch.Tensor:
    """Stored ``bits`` (any shape) as a tensor of their float dtype, in the same memory if that may be written to."""
    import torch

    writable = np.require(bits, requirements=["C", "W"])  # torch warns of any other
    return torch.from_numpy(writable.view(f"i{bits.itemsize}")).view(
        {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    )


def kernel_bits(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """``bits`` as kernels take them, contiguous BF16 or float32: half precision is exact in single precision."""
    bits = np.ascontiguousarray(bits)
    return bits.view(np.float16).astype(np.float32).view(np.uint32) if dtype == "F16" else bits


def first_nonfinite(bits: NDArray[Any], dtype: str) -> int:
    """Position of the first NaN or Inf of a row of stored bits that holds one."""
    return int(np.argmin(np.isfinite(to_float32(bits, dtype))))


def nonfinite_place(bits: NDArray[Any], dtype: str) -> tuple[int, int] | None:
    """Row and column of the first NaN or Inf of stored bits (n, K), if any."""
    finite = np.isfinite(to_float32(bits, dtype))
    if finite.all():
        return None
    row, column = np.unravel_index(int(np.argmin(finite)), finite.shape)
    return int(row), int(column)


def row_maxima(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Largest magnitude of every row of stored bits (n, K), not empty; NaN or Inf if one of them is.

    Among values of one sign the pattern grows with the magnitude: read as signed integers the largest is the largest
    of the positive values, read as unsigned ones the largest of the negative.
    """
    sign = 1 << (8 * bits.itemsize - 1)
    positive = bits.view(f"i{bits.itemsize}").max(axis=1).astype(np.int64)
    negative = bits.max(axis=1).astype(np.int64) - sign
    largest = np.maximum(np.maximum(positive, negative), 0)
    return to_float32(largest.astype(NUMPY_DTYPE[dtype]), dtype)
