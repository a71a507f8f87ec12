"""Small charts and pictures of a comparison."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.quality.html import text

_WIDE, _TALL = 420, 170
_LEFT, _RIGHT, _TOP, _FOOT = 58, 10, 10, 34
_LARGEST_FACTOR = 64


def numbered_line(
    values: Sequence[float], title: str, across: str, *, first: int = 1, logarithmic: bool = False
) -> str:
    """A line through ``values``, numbered from ``first``, as SVG, from zero or over whole decades. What is not finite,
    or has no logarithm, is left out of the line."""
    shown = [(n, value) for n, value in enumerate(values) if math.isfinite(value) and (value > 0 or not logarithmic)]
    ticks = (_decades if logarithmic else _halves)([value for _, value in shown])
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    low, high = scale(ticks[0]), scale(ticks[-1])
    wide, tall = _WIDE - _LEFT - _RIGHT, _TALL - _TOP - _FOOT

    def place(number: int, value: float) -> tuple[float, float]:
        across_at = _LEFT + wide * number / max(len(values) - 1, 1)
        return across_at, _TOP + tall * (1 - (scale(value) - low) / (high - low))

    grid = "".join(_grid_line(place(0, tick)[1], tick) for tick in ticks)
    points = [(*place(n, value), f"{across} {n + first}: {value:.6g}") for n, value in shown]
    path = "L".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--accent)" data-tip="{text(tip)}"/>'
        for x, y, tip in points
    )
    ends = "".join(
        f'<text x="{place(n, ticks[0])[0]:.1f}" y="{_TALL - _FOOT + 15}" text-anchor="{anchor}">{n + first}</text>'
        for n, anchor in ([(0, "start"), (len(values) - 1, "end")] if len(values) > 1 else [(0, "start")])
    )
    name = f'<text x="{_LEFT + wide / 2}" y="{_TALL - 6}" text-anchor="middle">{text(across)}</text>'
    line = f'<path d="M{path}" fill="none" stroke="var(--accent)" stroke-width="2"/>' if points else ""
    svg = (
        f'<svg viewBox="0 0 {_WIDE} {_TALL}" role="img" aria-label="{text(title)}">{grid}{line}{dots}{ends}{name}</svg>'
    )
    return f"<figure><figcaption>{text(title)}</figcaption>{svg}</figure>"


def _halves(values: Sequence[float]) -> list[float]:
    """From zero to the largest."""
    largest = max(values, default=0.0) or 1.0
    return [0.0, largest / 2, largest]


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten around all values, at most six."""
    low, high = math.floor(math.log10(min(values, default=1.0))), math.ceil(math.log10(max(values, default=1.0)))
    high = max(high, low + 1)
    step = math.ceil((high - low) / 5)
    return [10.0**power for power in range(low, high + step, step)]


def _grid_line(y: float, value: float) -> str:
    line = f'<path d="M{_LEFT},{y:.1f}H{_WIDE - _RIGHT}" stroke="var(--line)"/>'
    return f'{line}<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text(f"{value:.4g}")}</text>'


def png(pixels: NDArray[np.uint8]) -> str:
    """(height, width, 3) as a ``data:`` address."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def difference(reference: NDArray[Any], candidate: NDArray[Any]) -> tuple[NDArray[np.uint8], int]:
    """|candidate - reference| of uint8 pixels, amplified by a power of two that drives hardly one in 200 values beyond
    white, and that factor."""
    distance = np.abs(candidate.astype(np.int32) - reference.astype(np.int32))
    bright = max(1.0, float(np.quantile(distance, 0.995)))
    factor = min(_LARGEST_FACTOR, 1 << int(math.log2(255 / bright)))
    return np.clip(distance * factor, 0, 255).astype(np.uint8), factor
