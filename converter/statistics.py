"""What a report tells of a layer beyond its SQNR: gathered while its rows pass by, kept as about a kilobyte.

Errors are of all rows, exact. Values are of a sample: every n-th row, the same for any cut into pieces, threads or
machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.formats.bits import to_float32

BINS = 64
_SAMPLE = 1 << 16
_LEAST_ROWS = 16
_TOLD = 5
OUTLIER = 3.0
"""Times the median RMS from which on a channel is told of as an outlier."""
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Of one weight (N, K), N output channels.

    ``channel_db``: ``QUANTILES`` of the SQNR of the output channels that lost anything; None if none did.
    ``worst_channels``: (row, SQNR in dB), lowest first. ``large_rows``, ``large_columns``: (index, RMS over the median
    RMS) of output and input channels from ``OUTLIER`` on, largest first; columns by the sample.
    ``counts``: weights of the sample in ``BINS`` even bins from -``limit`` to ``limit``, its largest magnitude.
    ``sampled_rows``: how many rows the sample has.
    """

    channel_db: tuple[float, ...] | None
    worst_channels: tuple[tuple[int, float], ...]
    large_rows: tuple[tuple[int, float], ...]
    large_columns: tuple[tuple[int, float], ...]
    limit: float
    counts: tuple[int, ...]
    sampled_rows: int

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> LayerStatistics:
        """The inverse of ``dataclasses.asdict``, also after a way through JSON."""
        pairs = {
            name: tuple((int(index), float(value)) for index, value in data[name])
            for name in ("worst_channels", "large_rows", "large_columns")
        }
        db = data["channel_db"]
        return cls(
            channel_db=None if db is None else tuple(map(float, db)),
            **pairs,
            limit=float(data["limit"]),
            counts=tuple(map(int, data["counts"])),
            sampled_rows=int(data["sampled_rows"]),
        )


def sample_step(shape: tuple[int, ...]) -> int:
    """Every how many rows of a weight (N, K) one is in the sample."""
    return max(1, shape[0] // max(_LEAST_ROWS, _SAMPLE // shape[1]))


def sample_rows(shape: tuple[int, ...]) -> range:
    """The rows of the sample."""
    return range(0, shape[0], sample_step(shape))


def sample_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a whole sample."""
    return 4 * len(sample_rows(shape)) * shape[1]


def take_sample(rows: NDArray[Any], dtype: str, start: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The values of what is in the sample of stored ``rows`` (n, K), from row ``start``, of a weight of ``shape``."""
    step = sample_step(shape)
    values = to_float32(rows[-start % step :: step], dtype)
    return values.copy() if np.may_share_memory(values, rows) else values


def layer_statistics(power: NDArray[np.float64], sample: NDArray[np.float32]) -> LayerStatistics:
    """``power``: (N, 2) sums of squares of every row and of its error. ``sample``: the values of the sample's rows."""
    channels = _channel_db(power)
    lost = channels[np.isfinite(channels)]
    worst = np.argsort(channels, kind="stable")[:_TOLD]
    limit = float(np.abs(sample).max())
    return LayerStatistics(
        channel_db=tuple(_quantiles(lost).round(2).tolist()) if len(lost) else None,
        worst_channels=tuple((int(row), round(float(channels[row]), 2)) for row in worst if np.isfinite(channels[row])),
        large_rows=_outliers(power[:, 0]),
        large_columns=_outliers(np.einsum("nk,nk->k", sample, sample, dtype=np.float64)),
        limit=limit,
        counts=histogram(sample, limit),
        sampled_rows=len(sample),
    )


def histogram(values: NDArray[np.float32], limit: float) -> tuple[int, ...]:
    """Counts in ``BINS`` even bins from -``limit`` to ``limit``; what lies beyond is in the first and the last."""
    if not limit:
        return tuple(values.size if place == BINS // 2 else 0 for place in range(BINS))
    places = ((values.ravel() / np.float32(limit) + np.float32(1)) * np.float32(BINS / 2)).astype(np.int32)
    counts = np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)
    return tuple(map(int, counts))


def _channel_db(power: NDArray[np.float64]) -> NDArray[np.float64]:
    """SQNR of every row; infinite where nothing was lost."""
    signal, noise = power.T
    lost = (signal > 0) & (noise > 0)
    ratio = np.divide(signal, noise, out=np.ones(len(power)), where=lost)
    decibel: NDArray[np.float64] = np.where(lost, 10 * np.log10(ratio), np.inf)
    return decibel


def _quantiles(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """``QUANTILES``, as numpy.quantile has them, without the overhead that thousands of small layers would feel."""
    ordered = np.sort(values)
    places = np.asarray(QUANTILES) * (len(values) - 1)
    below = places.astype(np.int64)
    above = np.minimum(below + 1, len(values) - 1)
    found: NDArray[np.float64] = ordered[below] + (ordered[above] - ordered[below]) * (places - below)
    return found


def _outliers(energy: NDArray[np.float64]) -> tuple[tuple[int, float], ...]:
    """Channels whose RMS is far above the median, by their sums of squares."""
    ordered = np.sort(energy)
    middle = (ordered[(len(energy) - 1) // 2] + ordered[len(energy) // 2]) / 2
    if not middle:
        return ()
    far = np.flatnonzero(energy >= OUTLIER**2 * middle)
    ratio = np.sqrt(energy[far] / middle)
    largest = np.argsort(-ratio, kind="stable")[:_TOLD]
    return tuple((int(far[place]), round(float(ratio[place]), 2)) for place in largest)
