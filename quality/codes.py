"""The codes and scales of a converted layer, as a report looks at them: some rows dequantized, and the scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.checkpoint import Component
from omni_convert.converter.compare import stored_rows
from omni_convert.formats.base import Format, row_slice
from omni_convert.formats.header import Header, StoredTensor
from omni_convert.formats.microscaling import e8m0_values

_BINS = 24
_OF_ACTIVATIONS = ("input_scale", "mul_scale")
_NARROW = 1e-3
"""Scales whose logarithms differ by less are one scale to look at."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The distribution of one kind of scale of a layer. ``counts``: in even steps of log2 from ``smallest`` to
    ``largest``."""

    name: str
    number: int
    smallest: float
    largest: float
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A quantized layer on disk. ``parts``: by suffix."""

    format: Format
    parts: Mapping[str, tuple[StoredTensor, Header]]

    def values(self, rows: Iterable[int]) -> NDArray[np.float32]:
        """Some rows, dequantized."""
        whole = {suffix: stored_rows(*self.parts[suffix]) for suffix in self.format.whole_suffixes}
        return np.concatenate([self.format.dequantize_rows(whole | self._row(row)) for row in rows])

    def _row(self, row: int) -> dict[str, NDArray[Any]]:
        scales = row_slice(self.format, row - row % self.format.rows_per_scale, row + 1)
        places = {"weight": slice(row, row + 1)}
        return {
            suffix: stored_rows(*part, places.get(suffix, scales))
            for suffix, part in self.parts.items()
            if suffix not in self.format.whole_suffixes
        }

    def scales(self) -> list[Scales]:
        """Every kind of scale that the weight has."""
        names = [suffix for suffix in self.parts if suffix not in ("weight", *_OF_ACTIVATIONS)]
        return [_distribution(name, stored_rows(*self.parts[name])) for name in names]


def open_codes(component: Component, layers: Mapping[str, Format]) -> dict[str, Codes]:
    """The codes of quantized layers of a component."""
    stored = {name: (tensor, shard) for name, tensor, shard in component.tensors()}
    return {
        layer: Codes(format=fmt, parts={suffix: stored[f"{layer}.{suffix}"] for suffix in fmt.suffixes})
        for layer, fmt in layers.items()
    }


def _distribution(name: str, stored: NDArray[Any]) -> Scales:
    if stored.dtype == np.uint8:  # powers of two: one bin for each
        exponents = np.bincount(stored.ravel(), minlength=256)
        used = np.flatnonzero(exponents)
        low, high = int(used[0]), int(used[-1])
        ends = e8m0_values(np.array([low, high], np.uint8))
        counts = exponents[low : high + 1]
    else:
        ends = np.array([stored.min(), stored.max()], np.float32)
        with np.errstate(divide="ignore"):  # a scale of 0 is legal; it is left out
            logs = np.log2(stored[stored > 0].astype(np.float64))
        wide = len(logs) and float(np.ptp(logs)) > _NARROW
        counts = np.histogram(logs, _BINS)[0] if wide else np.array([len(logs)])
    return Scales(
        name=name,
        number=stored.size,
        smallest=float(ends[0]),
        largest=float(ends[1]),
        counts=tuple(map(int, counts)),
    )
