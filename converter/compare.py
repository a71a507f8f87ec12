"""A quantized component beside its source: the dequantized error of every layer, and that the rest is unchanged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.checkpoint import Component
from omni_convert.converter.files import processors
from omni_convert.formats.base import Format, row_slice
from omni_convert.formats.bits import NUMPY_DTYPE, OUTPUT_DTYPE, to_float32
from omni_convert.formats.header import Header, StoredTensor

PIECE_BYTES = 4 << 20
ROUNDING_SLACK = 1e-4
"""float32 division and multiplication move a value by at most about 1e-5 of a step beyond the half."""


@dataclass(frozen=True, kw_only=True)
class LayerComparison:
    """``sqnr_db``: signal-to-quantization-noise ratio. ``max_error``: largest error as a share of what the format
    may leave there, such as half the distance between two codes."""

    layer: str
    sqnr_db: float
    max_error: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else None}


def compare_component(
    source: Component, out: Component, formats: Mapping[str, Format]
) -> tuple[list[LayerComparison], list[str]]:
    """Every layer's error, and every tensor that is not what the source makes it. ``formats``: by quantized layer."""
    stored = {name: (tensor, shard) for name, tensor, shard in out.tensors()}
    originals = source.tensors()
    with ThreadPoolExecutor(processors()) as pool:
        tasks = [pool.submit(_compare_tensor, *original, stored, formats) for original in originals]
        results = [task.result() for task in tasks]
    layers = [result for result in results if isinstance(result, LayerComparison)]
    problems = [result for result in results if isinstance(result, str)]
    problems += [
        f"{item.layer}: its largest error is {item.max_error:.3f} times what rounding may leave, expected at most 1."
        for item in layers
        if not item.max_error <= 1 + ROUNDING_SLACK
    ]
    return layers, problems


def _compare_tensor(
    name: str,
    tensor: StoredTensor,
    shard: Header,
    stored: dict[str, tuple[StoredTensor, Header]],
    formats: Mapping[str, Format],
) -> LayerComparison | str | None:
    layer = name.removesuffix(".weight")
    fmt = formats.get(layer) if name.endswith(".weight") else None
    if fmt:
        parts = {suffix: stored.get(f"{layer}.{suffix}") for suffix in fmt.suffixes}
        return _compare_layer(layer, tensor, shard, {key: part for key, part in parts.items() if part}, fmt)
    if name not in stored:
        return f"{name}: is missing in the output."
    other, other_shard = stored[name]
    if other.spec != tensor.spec:
        return f"{name}: is {other.spec}, expected {tensor.spec} as in the source."
    for start in range(0, tensor.spec.nbytes, PIECE_BYTES):
        size = min(PIECE_BYTES, tensor.spec.nbytes - start)
        ours = np.fromfile(other_shard.path, np.uint8, size, offset=other.start + start)
        if not np.array_equal(ours, np.fromfile(shard.path, np.uint8, size, offset=tensor.start + start)):
            return f"{name}: differs from the source, expected it unchanged."
    return None


def _compare_layer(
    layer: str, tensor: StoredTensor, shard: Header, parts: Mapping[str, tuple[StoredTensor, Header]], fmt: Format
) -> LayerComparison:
    signal = noise = largest = 0.0
    for _, weight, error, ours in compared_rows(tensor, shard, parts, fmt):
        largest = float(np.maximum(largest, np.max(_share(np.abs(error), fmt.tolerance(ours)))))  # NaN stays NaN
        signal += float(np.sum(np.square(weight, dtype=np.float64)))
        noise += float(np.sum(np.square(error, dtype=np.float64)))
    sqnr = 10 * math.log10(signal / noise) if signal and noise else math.inf
    return LayerComparison(layer=layer, sqnr_db=sqnr, max_error=largest)


def compared_rows(
    tensor: StoredTensor, shard: Header, parts: Mapping[str, tuple[StoredTensor, Header]], fmt: Format
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32], dict[str, NDArray[Any]]]]:
    """A quantized weight beside its source, some rows at a time: the first row, the weight, the dequantized error
    (valid until the next), and the stored tensors. ``parts``: by suffix."""
    rows = tensor.spec.shape[0]
    together = fmt.rows_per_scale
    step = max(1, PIECE_BYTES * rows // tensor.spec.nbytes // together) * together
    whole = {suffix: stored_rows(*parts[suffix]) for suffix in fmt.whole_suffixes if suffix in parts}
    values = np.empty((min(step, rows), *tensor.spec.shape[1:]), np.float32)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        rows_here, scales = slice(start, stop), row_slice(fmt, start, stop)
        weight = source_rows(tensor, shard, rows_here)
        ours = whole | {
            suffix: stored_rows(part, header, rows_here if suffix == "weight" else scales)
            for suffix, (part, header) in parts.items()
            if suffix not in whole
        }
        error = fmt.dequantize_rows(ours, values[: stop - start])
        error -= weight
        yield start, weight, error, ours


def _share(error: NDArray[np.float32], tolerance: NDArray[np.float32]) -> NDArray[np.float32]:
    """error / tolerance, 0 where there is no error: at the end of float32 a tolerance underflows to 0."""
    bound = np.broadcast_to(tolerance, error.shape)
    with np.errstate(divide="ignore", over="ignore"):
        share: NDArray[np.float32] = np.divide(error, bound, out=np.zeros_like(error), where=error != 0)
    return share


def source_rows(tensor: StoredTensor, shard: Header, rows: slice) -> NDArray[np.float32]:
    """The values of some rows of a source's weight."""
    return to_float32(_rows(tensor, shard, rows, NUMPY_DTYPE[tensor.spec.dtype]), tensor.spec.dtype)


def stored_rows(tensor: StoredTensor, shard: Header, rows: slice | None = None) -> NDArray[Any]:
    """Some rows, or all, of a tensor that a format writes."""
    return _rows(tensor, shard, rows or slice(0, tensor.spec.shape[0]), OUTPUT_DTYPE[tensor.spec.dtype])


def _rows(tensor: StoredTensor, shard: Header, rows: slice, dtype: np.dtype[Any]) -> NDArray[Any]:
    """``rows`` of the first dimension."""
    row_bytes = tensor.spec.nbytes // tensor.spec.shape[0]
    count = (rows.stop - rows.start) * row_bytes // dtype.itemsize
    values: NDArray[Any] = np.fromfile(shard.path, dtype, count, offset=tensor.start + rows.start * row_bytes)
    return values.reshape((rows.stop - rows.start, *tensor.spec.shape[1:]))
