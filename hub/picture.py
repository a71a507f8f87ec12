"""A small picture for a model card: the error of every quantized layer over the blocks of the model."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from omni_convert.formats.errors import printable
from omni_convert.quality.layers import block_kinds

_COLOURS = ("#0a5fa8", "#d9530b", "#2f7d32", "#8e3a9d", "#b38600", "#00838f", "#c2185b", "#5d4037")
_MARKS = ("o", "s", "^", "D")
_MOST = 16
"""Kinds of layers that can be told apart."""


def draw_picture(manifest: Mapping[str, Any]) -> bytes | None:
    """PNG of the SQNR over the blocks, a line for every kind of layer, from a manifest; the same bytes every time.

    None if Matplotlib is not installed, or there are no blocks.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    name, lines = _lines(manifest)
    if not lines:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 1.6 + 0.16 * max(12, len(lines))), layout="constrained")
        axes = figure.subplots()
        for place, (kind, points) in enumerate(lines.items()):
            colour, mark = _COLOURS[place % len(_COLOURS)], _MARKS[place // len(_COLOURS) % len(_MARKS)]
            blocks, values = zip(*sorted(points), strict=True)
            axes.plot(blocks, values, label=_label(kind), color=colour, marker=mark, markersize=3, linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel=f"block of {_label(name)}" if name else "block", ylabel="SQNR (dB)")
        axes.grid(axis="y", color="#e5e2dc")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7)
        file = io.BytesIO()
        figure.savefig(file, dpi=120, metadata={"Software": None})  # no version
    return file.getvalue()


def _lines(manifest: Mapping[str, Any]) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """The component with the most quantized layers, and of every kind of them the block and SQNR."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, part in manifest["components"].items():
        values = {
            tensor.removesuffix(".weight"): float(entry["sqnr_db"])
            for tensor, entry in part["tensors"].items()
            if isinstance(entry.get("sqnr_db"), (int, float)) and math.isfinite(entry["sqnr_db"])
        }
        kinds: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for layer, (kind, block) in block_kinds(list(values)).items():
            if block is not None:
                kinds[kind].append((block, values[layer]))
        worst = sorted(kinds, key=lambda kind: (min(value for _, value in kinds[kind]), kind))[:_MOST]
        found[name] = {kind: kinds[kind] for kind in sorted(worst)}
    return max(found.items(), key=lambda item: sum(map(len, item[1].values())), default=("", {}))


def _label(text: str) -> str:
    """A name without meaning to Matplotlib, which takes $ for mathematics and hides labels that begin with _."""
    return printable(text, 60).replace("$", r"\$").lstrip("_") or "layer"
