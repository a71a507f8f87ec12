"""Plain-text tables and human units for the terminal."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from omni_convert.formats.errors import printable


def format_bytes(count: float) -> str:
    """Decimal units, as disks and progress bars count: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_db(value: float) -> str:
    """A signal-to-noise ratio; infinite where nothing was lost."""
    return f"{value:.2f} dB" if math.isfinite(value) else "exact"


def finite(value: float) -> float | None:
    """A signal-to-noise ratio for JSON, which has no infinity: None where nothing was lost."""
    return round(value, 2) if math.isfinite(value) else None


def recorded_db(value: float) -> float:
    """As manifests hold it: what is told during a conversion and what is read from its output must agree."""
    return round(value, 2)


def mean_db(values: Iterable[float]) -> float:
    """Mean over the layers that lost anything, as ``recorded_db`` has them; infinite if none did."""
    finite = [recorded_db(value) for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.inf


def format_table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), header: bool = True) -> str:
    """Columns padded to their widest cell; ``right`` names the columns that align right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def layer_patterns(layers: Collection[str]) -> dict[str, str]:
    """Every layer's name with ``*`` for the numbers that vary between layers of the same shape of name."""
    values: dict[tuple[str, int], set[str]] = defaultdict(set)
    parts = {layer: re.split(r"(?<![^.])(\d+)(?![^.])", layer) for layer in layers}  # odd places hold numbers
    skeletons = {layer: "*".join(split[::2]) for layer, split in parts.items()}
    for layer, split in parts.items():
        for place in range(1, len(split), 2):
            values[skeletons[layer], place].add(split[place])
    return {
        layer: "".join(
            "*" if place % 2 and len(values[skeletons[layer], place]) > 1 else piece
            for place, piece in enumerate(split)
        )
        for layer, split in parts.items()
    }
