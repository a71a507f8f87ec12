"""Small charts as SVG: drawn with the page's own colours, so that they follow light, dark and paper."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omni_convert.quality.html import text

_WIDTH = 320
_TOP, _FOOT = 6, 18


def histograms(before: Sequence[int] | None, after: Sequence[int], limit: float) -> str:
    """Two distributions from -``limit`` to ``limit``, on a logarithmic scale, so that outliers are seen: the first
    filled, if known, the second as a line."""
    tall, most = 110, max([*(before or ()), *after, 1])
    shapes = ""
    if before:
        shapes += f'<path d="{_steps(before, most, tall)}V{tall}H0Z" fill="var(--before)" fill-opacity="0.35"/>'
    shapes += f'<path d="{_steps(after, most, tall)}" fill="none" stroke="var(--after)" stroke-width="1.3"/>'
    labels = ((0, "start", f"-{limit:.3g}"), (_WIDTH / 2, "middle", "0"), (_WIDTH, "end", f"{limit:.3g}"))
    return _svg(tall, shapes, labels, "Histogram of weights")


def bars(counts: Sequence[int], low: str, high: str, title: str) -> str:
    """A distribution, with the names of its ends."""
    tall, most = 60, max([*counts, 1])
    wide = _WIDTH / len(counts)
    shapes = "".join(
        f'<rect x="{place * wide:.1f}" y="{tall - size:.1f}" width="{max(1, min(wide - 1, 40)):.1f}" '
        f'height="{size:.1f}" fill="var(--quiet)"/>'
        for place, count in enumerate(counts)
        if (size := (tall - _TOP) * count / most) > 0
    )
    return _svg(tall, shapes, ((0, "start", low), (_WIDTH, "end", high) if low != high else (0, "start", "")), title)


def line(points: Sequence[tuple[float, float, str]], across: str, up: str) -> str:
    """A line through points (x, y, what each is), y from 0, with axes in percent that are called ``across``, ``up``."""
    left, right, foot, tall, wide = 42, 10, 38, 260, 560
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    low, high = min(xs), max(max(xs), min(xs) + 1e-9)
    top = max(*ys, 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - low) / (high - low) * (wide - left - right), 10 + (1 - y / top) * (tall - 10 - foot)

    grid = ""
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(low + share * (high - low), share * top)
        grid += f'<path d="M{left},{y:.1f}H{wide - right}" stroke="var(--line)"/>'
        grid += f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{share * top:.0%}</text>'
        anchor = "end" if share == 1 else "middle"
        grid += (
            f'<text x="{x:.1f}" y="{tall - foot + 16}" text-anchor="{anchor}">{low + share * (high - low):.1%}</text>'
        )
    path = "L".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y, _ in points)
    dots = ""
    for x, y, tip in points:
        across_at, up_at = place(x, y)
        dots += f'<circle cx="{across_at:.1f}" cy="{up_at:.1f}" r="4" fill="var(--accent)" data-tip="{text(tip)}"/>'
    names = (
        f'<text x="{(wide + left) / 2}" y="{tall - 4}" text-anchor="middle">{text(across)}</text>'
        f'<text transform="translate(9 {(tall - foot) / 2}) rotate(-90)" text-anchor="middle">{text(up)}</text>'
    )
    drawn = f'<path d="M{path}" fill="none" stroke="var(--accent)" stroke-width="2"/>'
    return f'<svg viewBox="0 0 {wide} {tall}" role="img" aria-label="{text(up)}">{grid}{drawn}{dots}{names}</svg>'


def _steps(counts: Sequence[int], most: int, tall: int) -> str:
    """The outline of a histogram; heights are logarithms, and one weight is a fifth of a decade high."""
    wide, full = _WIDTH / len(counts), math.log10(most) + 0.2
    parts = []
    for place, count in enumerate(counts):
        size = (tall - _TOP) * (math.log10(count) + 0.2) / full if count else 0
        parts.append(f"{'V' if place else 'M0,'}{tall - size:.1f}H{(place + 1) * wide:.1f}")
    return "".join(parts)


def _svg(tall: int, shapes: str, labels: Sequence[tuple[float, str, str]], title: str) -> str:
    words = "".join(
        f'<text x="{x:.0f}" y="{tall + 13}" text-anchor="{anchor}">{text(label)}</text>' for x, anchor, label in labels
    )
    base = f'<path d="M0,{tall}H{_WIDTH}" stroke="var(--line)"/>'
    box = f'viewBox="0 0 {_WIDTH} {tall + _FOOT}" role="img" aria-label="{text(title)}"'
    return f"<svg {box}>{shapes}{base}{words}</svg>"
