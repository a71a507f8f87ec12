"""How alike two outputs are: the metrics, their directions and their meaning.

For a reference r and a candidate c of n elements, in float64, with d = c - r:

    cosine_similarity   r.c / (|r| |c|); 1 if both are zero, 0 if one is
    mae                 sum |d| / n
    mse, rmse           sum d^2 / n, and its square root
    max_abs             max |d|
    l2                  |d|
    relative_l2         |d| / |r|; 0 if both are zero, infinite if only r is
    psnr_db             20 log10(255) - 10 log10(mse), of uint8 pixels; infinite if they are equal

Pixels are compared as uint8, so that ``mae`` and ``max_abs`` count its steps; logits, hidden states and latents as they
are, and they have no ``psnr_db``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PEAK = 255.0
_ROWS = 1 << 22
"""Elements that are float64 at a time."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    higher_is_better: bool
    meaning: str


PIXELS = "psnr_db"
METRICS: Mapping[str, Metric] = {
    "psnr_db": Metric(higher_is_better=True, meaning="signal-to-noise ratio of uint8 pixels, in dB"),
    "mae": Metric(higher_is_better=False, meaning="mean absolute error; of pixels in steps of uint8"),
    "cosine_similarity": Metric(higher_is_better=True, meaning="direction of all values as one vector"),
    "relative_l2": Metric(higher_is_better=False, meaning="L2 distance divided by the norm of the reference"),
    "mse": Metric(higher_is_better=False, meaning="mean squared error: large local differences weigh more"),
    "rmse": Metric(higher_is_better=False, meaning="its square root"),
    "max_abs": Metric(higher_is_better=False, meaning="worst single value: a hint at outliers, not a gate"),
    "l2": Metric(higher_is_better=False, meaning="L2 distance"),
}
PERCEPTUAL: Mapping[str, Metric] = {
    "ssim": Metric(higher_is_better=True, meaning="structural similarity, mean over images or frames"),
    "lpips": Metric(higher_is_better=False, meaning="learned perceptual distance (AlexNet), likewise"),
}
LANGUAGE: Mapping[str, Metric] = {
    "top1_agreement": Metric(higher_is_better=True, meaning="positions whose most probable token is the same"),
    "kl_divergence": Metric(higher_is_better=False, meaning="KL(reference || candidate) per position, in nats"),
}
GENERATION: Mapping[str, Metric] = {
    "avg_generation_time_s": Metric(higher_is_better=False, meaning="wall-clock time, mean of the measured runs"),
    "max_peak_memory_mb": Metric(higher_is_better=False, meaning="peak memory in 10^6 bytes, largest of those runs"),
}


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What the metrics are made of. Added, the sums of parts are those of the whole."""

    count: int = 0
    absolute: float = 0.0
    squares: float = 0.0
    largest: float = 0.0
    reference: float = 0.0
    candidate: float = 0.0
    product: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        both = {key: value + getattr(other, key) for key, value in vars(self).items()}
        return Sums(**both | {"largest": max(self.largest, other.largest)})

    @property
    def relative_l2(self) -> float:
        if not self.reference:
            return math.inf if self.squares else 0.0
        return math.sqrt(self.squares / self.reference)

    @property
    def cosine_similarity(self) -> float:
        if not self.reference or not self.candidate:
            return float(self.reference == self.candidate)
        cosine = self.product / (math.sqrt(self.reference) * math.sqrt(self.candidate))
        return max(-1.0, min(1.0, cosine)) if self.squares else 1.0

    def metrics(self, *, pixels: bool) -> dict[str, float]:
        """The metrics by name; ``psnr_db`` only of pixels."""
        mse = self.squares / self.count
        psnr = 20 * math.log10(PEAK) - 10 * math.log10(mse) if mse else math.inf
        return {
            **({PIXELS: psnr} if pixels else {}),
            "mae": self.absolute / self.count,
            "cosine_similarity": self.cosine_similarity,
            "relative_l2": self.relative_l2,
            "mse": mse,
            "rmse": math.sqrt(mse),
            "max_abs": self.largest,
            "l2": math.sqrt(self.squares),
        }


def sums(reference: NDArray[Any], candidate: NDArray[Any]) -> Sums:
    """Of two arrays of the same shape, of uint8 or floating-point numbers."""
    assert reference.shape == candidate.shape, (reference.shape, candidate.shape)
    flat = reference.reshape(-1), candidate.reshape(-1)
    starts = range(0, flat[0].size, _ROWS)
    return total(_sums(*(array[start : start + _ROWS].astype("float64") for array in flat)) for start in starts)


def total(parts: Iterable[Sums]) -> Sums:
    return reduce(add, parts, Sums())


def _sums(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> Sums:
    difference = candidate - reference
    return Sums(
        count=reference.size,
        absolute=float(abs(difference).sum()),
        squares=float(difference @ difference),
        largest=float(abs(difference).max()),
        reference=float(reference @ reference),
        candidate=float(candidate @ candidate),
        product=float(reference @ candidate),
    )
