"""Small charts and pictures of a comparison."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.quality.html import text

_WIDE, _TALL = 420, 170
_LEFT, _RIGHT, _TOP, _FOOT = 58, 10, 10, 34
_LARGEST_FACTOR = 64


def numbered_line(values: Sequence[float], title: str, across: str, *, first: int = 1, from_zero: bool = True) -> str:
    """A line through ``values``, numbered from ``first``, as SVG. What is not finite is left out of the line."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min([0.0, *finite] if from_zero else finite or [0.0]), max(finite, default=1.0)
    span = high - low or 1.0
    wide, tall = _WIDE - _LEFT - _RIGHT, _TALL - _TOP - _FOOT

    def place(number: int, value: float) -> tuple[float, float]:
        return _LEFT + wide * number / max(len(values) - 1, 1), _TOP + tall * (1 - (value - low) / span)

    grid = "".join(_grid_line(place(0, low + span * share)[1], low + span * share) for share in (0, 0.5, 1))
    points = [(place(n, value), n + first, value) for n, value in enumerate(values) if math.isfinite(value)]
    path = "L".join(f"{x:.1f},{y:.1f}" for (x, y), _, _ in points)
    tips = [text(f"{across} {number}: {value:.6g}") for _, number, value in points]
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--accent)" data-tip="{tip}"/>'
        for ((x, y), _, _), tip in zip(points, tips, strict=True)
    )
    ends = "".join(
        f'<text x="{place(n, low)[0]:.1f}" y="{_TALL - _FOOT + 15}" text-anchor="{anchor}">{n + first}</text>'
        for n, anchor in ([(0, "start"), (len(values) - 1, "end")] if len(values) > 1 else [(0, "start")])
    )
    name = f'<text x="{_LEFT + wide / 2}" y="{_TALL - 6}" text-anchor="middle">{text(across)}</text>'
    line = f'<path d="M{path}" fill="none" stroke="var(--accent)" stroke-width="2"/>' if points else ""
    svg = (
        f'<svg viewBox="0 0 {_WIDE} {_TALL}" role="img" aria-label="{text(title)}">{grid}{line}{dots}{ends}{name}</svg>'
    )
    return f"<figure><figcaption>{text(title)}</figcaption>{svg}</figure>"


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
