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
from omni_convert.converter.statistics import LayerStatistics, layer_statistics, sample_rows, sample_step

BYTES_PER_ROW = 8 + 8 + 4
"""Sum of squares of the weight, of its error, and the largest magnitude."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Sums of squares of a weight and of its quantization error.

    ``own_noise``: about the error that it would have with scales of its own; None if it has them. ``statistics``: if
    they were asked for.
    """

    signal: float
    noise: float
    own_noise: float | None = None
    statistics: LayerStatistics | None = None

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
    """Of some rows of a layer, from ``start``: sums of squares of the weight and of its error (n, 2), the largest
    magnitudes (n,) if its format asks for them, and the values of those in the sample, if statistics are asked for."""

    tensor: TensorPlan
    start: int
    power: NDArray[np.float64]
    maxima: NDArray[np.float32] | None
    sample: NDArray[np.float32] | None = None


class _Gathered:
    """The rows of one layer so far."""

    def __init__(self, rows: Rows) -> None:
        shape = rows.tensor.source.spec.shape
        count = shape[0]
        self._power = np.empty((count, 2))
        self._maxima = None if rows.maxima is None else np.empty(count, np.float32)
        self._sample = None if rows.sample is None else np.empty((len(sample_rows(shape)), shape[1]), np.float32)
        self._tensor, self._first, self.left = rows.tensor, rows.start, count

    def add(self, rows: Rows) -> None:
        place = slice(rows.start, rows.start + len(rows.power))
        self._power[place] = rows.power
        if self._maxima is not None and rows.maxima is not None:
            self._maxima[place] = rows.maxima
        if self._sample is not None and rows.sample is not None:
            self._sample[self._sampled(place)] = rows.sample
        self._first = min(self._first, rows.start)
        self.left -= len(rows.power)

    def rows(self) -> Rows:
        """Those that are there; they follow each other."""
        place = slice(self._first, self._first + len(self._power) - self.left)
        maxima = None if self._maxima is None else self._maxima[place]
        sample = None if self._sample is None else self._sample[self._sampled(place)]
        return Rows(self._tensor, self._first, self._power[place], maxima, sample)

    def _sampled(self, rows: slice) -> slice:
        """Where the sample holds what it has of some rows."""
        step = sample_step(self._tensor.source.spec.shape)
        return slice(-(-rows.start // step), -(-rows.stop // step))


class LayerErrors:
    """The errors of one file's layers. Rows may come in any order, from any thread; they are added up in one."""

    def __init__(self) -> None:
        self.finished: dict[str, LayerError] = {}
        self._gathered: dict[str, _Gathered] = {}
        self._lock = Lock()

    def add(self, rows: Rows) -> None:
        layer = rows.tensor.layer
        if len(rows.power) < rows.tensor.source.spec.shape[0]:
            with self._lock:
                found = self._gathered.get(layer)
                if found is None:
                    found = self._gathered[layer] = _Gathered(rows)
                found.add(rows)
                if found.left:
                    return
                del self._gathered[layer]
                rows = found.rows()
        self.finished[layer] = _layer_error(rows)

    def unfinished(self) -> Iterator[Rows]:
        """The rows so far of the other layers, for somebody who has the rest."""
        for found in self._gathered.values():
            yield found.rows()


def _layer_error(rows: Rows) -> LayerError:
    """``rows``: all of a layer."""
    fmt = rows.tensor.decision.format
    assert fmt is not None
    signal, noise = rows.power.sum(axis=0).tolist()
    own = None if rows.maxima is None else fmt.own_noise(rows.maxima, rows.tensor.source.spec.shape[1])
    statistics = None if rows.sample is None else layer_statistics(rows.power, rows.sample)
    return LayerError(signal=signal, noise=noise, own_noise=own, statistics=statistics)
