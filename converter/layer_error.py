"""What quantization does to a layer, gathered row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.plan import TensorPlan

SUMS = 3
"""Per row: sum of squares of the weight, of its error, and the largest magnitude."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Sums of squares of a weight and of its quantization error.

    ``own_noise``: about the error that it would have with scales of its own; None if it has them.
    """

    signal: float
    noise: float
    own_noise: float | None = None

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB; infinite for an exact layer."""
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf

    @property
    def shared_scale_db(self) -> float | None:
        """About how many dB a shared scale costs this layer; None if it has its own."""
        if self.own_noise is None:
            return None
        return max(0.0, 10 * math.log10(self.noise / self.own_noise)) if self.noise and self.own_noise else 0.0


class Rows(NamedTuple):
    """The sums of some rows of a layer, from ``start``."""

    tensor: TensorPlan
    start: int
    sums: NDArray[np.float64]


@dataclass
class _Gathered:
    tensor: TensorPlan
    sums: NDArray[np.float64]
    first: int
    count: int = 0


class LayerErrors:
    """The errors of one file's layers. Rows may come in any order, from any thread; they are added up in one."""

    def __init__(self) -> None:
        self.finished: dict[str, LayerError] = {}
        self._gathered: dict[str, _Gathered] = {}
        self._lock = Lock()

    def add(self, rows: Rows) -> None:
        layer, count = rows.tensor.layer, len(rows.sums)
        shape = rows.tensor.source.spec.shape
        if count == shape[0]:
            self.finished[layer] = _layer_error(rows.tensor, rows.sums)
            return
        with self._lock:
            found = self._gathered.get(layer)
            if found is None:
                found = _Gathered(rows.tensor, np.empty((shape[0], SUMS)), rows.start)
                self._gathered[layer] = found
            found.sums[rows.start : rows.start + count] = rows.sums
            found.count += count
            found.first = min(found.first, rows.start)
            if found.count < shape[0]:
                return
            del self._gathered[layer]
            self.finished[layer] = _layer_error(rows.tensor, found.sums)

    def unfinished(self) -> Iterator[Rows]:
        """The rows so far of the other layers, for somebody who has the rest; they follow each other."""
        for found in self._gathered.values():
            yield Rows(found.tensor, found.first, found.sums[found.first : found.first + found.count])


def _layer_error(tensor: TensorPlan, sums: NDArray[np.float64]) -> LayerError:
    fmt = tensor.decision.format
    assert fmt is not None
    signal, noise = sums[:, :2].sum(axis=0)
    own = fmt.own_noise(sums[:, 2].astype(np.float32), tensor.source.spec.shape[1])
    return LayerError(signal=float(signal), noise=float(noise), own_noise=own)
