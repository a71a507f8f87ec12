"""The report as PNG pictures, for model cards and other places that show no pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_convert.converter.statistics import BINS
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.text import format_db
from omni_convert.quality.heat import NARROW, Family, Shades, families
from omni_convert.quality.report import LayerReport, title

_INK, _QUIET, _BEFORE, _AFTER, _KEPT = "#1d1c1a", "#65625c", "#0a5fa8", "#d9530b", "#dedbd4"
_SHADES = ("#fde7a9", "#feb67c", "#fb8560", "#ea5661", "#c43c75", "#992d80", "#6e1e81", "#451077", "#1a1042")
"""Those of the page on paper."""
_SHOWN = 6
_DPI = 144


def write_pictures(report: LayerReport, folder: Path) -> Iterator[Path]:
    """Write ``sqnr.png``, ``worst-layers.png`` and ``size-error.png`` into ``folder``, which is made if need be, and
    name each that is there; those for which there is nothing to show are left out.

    Raises:
        OmniConvertError: Matplotlib is not installed.
        OSError: a picture cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise OmniConvertError(
            "--pictures: Matplotlib is not installed, which draws them. Install it: pip install 'omni-convert[report]'."
        ) from error
    matplotlib.use("agg", force=False)
    style = {
        "font.size": 9, "text.color": _INK, "axes.labelcolor": _QUIET, "xtick.color": _QUIET, "ytick.color": _QUIET,
        "axes.edgecolor": _KEPT, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white",
    }  # fmt: skip
    drawings = {"sqnr.png": _heat_maps, "worst-layers.png": _worst, "size-error.png": _curve}
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(style):
        for name, draw in drawings.items():
            if figure := draw(report):
                figure.savefig(folder / name, dpi=_DPI, metadata={"Software": None})  # no version: the same bytes
                yield folder / name


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _heat_maps(report: LayerReport) -> Any:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    done = report.conversion
    found = families(done.layers)
    if not found or not done.quantized:
        return None
    shades = Shades.of(done.layers)
    rows = [len(family.kinds) for family in found]
    figure = _figure(8, 1.1 + 0.24 * sum(rows) + 0.5 * len(rows))
    bounds = [shades.best - shade * shades.step for shade in range(shades.shade(shades.worst) + 1, -1, -1)]
    colours = ListedColormap(list(reversed(_SHADES[: len(bounds) - 1])))
    norm = BoundaryNorm(bounds, colours.N)
    axes = figure.subplots(len(found), 1, gridspec_kw={"height_ratios": rows}, squeeze=False)[:, 0]
    for family, place in zip(found, axes, strict=True):
        _heat_map(family, place, colours, norm)
    figure.suptitle(f"{title(done)}, {report.methods}: SQNR in dB (grey: kept)", x=0.01, ha="left", weight="bold")
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, colours), ax=list(axes), shrink=0.8, aspect=30, ticks=bounds)
    bar.outline.set_visible(False)
    return figure


def _heat_map(family: Family, place: Any, colours: Any, norm: Any) -> None:
    values = np.full((len(family.kinds), len(family.blocks)), np.nan)
    kept = np.full(values.shape, np.nan)
    columns = {block: column for column, block in enumerate(family.blocks)}
    for row, by_block in enumerate(family.kinds.values()):
        for block, layers in by_block.items():
            lost = [layer.sqnr_db for layer in layers if layer.sqnr_db is not None]
            column = columns[block]
            values[row, column] = min(*lost, norm.vmax - 1e-9) if lost else np.nan
            kept[row, column] = np.nan if lost else 1
    from matplotlib.colors import ListedColormap

    edges = {} if len(family.blocks) > NARROW else {"edgecolors": "white", "linewidth": 1}
    place.pcolormesh(kept, cmap=ListedColormap([_KEPT]), **edges)
    place.pcolormesh(values, cmap=colours, norm=norm, **edges)
    place.set_yticks(np.arange(len(family.kinds)) + 0.5, list(family.kinds))
    steps = range(0, len(family.blocks), max(1, len(family.blocks) // 12))
    place.set_xticks([step + 0.5 for step in steps], [str(family.blocks[step]) for step in steps])
    place.set_title(family.prefix, loc="left", fontsize=9, color=_QUIET)
    place.invert_yaxis()
    place.tick_params(length=0)
    for spine in place.spines.values():
        spine.set_visible(False)


def _worst(report: LayerReport) -> Any:
    details = report.details[:_SHOWN]
    if not details:
        return None
    figure = _figure(9, 2.3 * -(-len(details) // 3))
    axes: Sequence[Any] = figure.subplots(-(-len(details) // 3), 3, squeeze=False).ravel()
    for place in axes[len(details) :]:
        place.set_visible(False)
    for detail, place in zip(details, axes, strict=False):
        edges = np.linspace(-detail.limit, detail.limit, BINS + 1)
        if detail.statistics:
            place.stairs(detail.statistics.counts, edges, fill=True, color=_BEFORE, alpha=0.35, label="before")
        place.stairs(detail.after, edges, color=_AFTER, linewidth=1, label="after")
        place.set_yscale("log")
        place.set_yticks([])
        place.minorticks_off()
        name = report.conversion.label(detail.layer)
        place.set_title(f"{name}\n{format_db(detail.layer.sqnr_db or 0.0)}", fontsize=7.5, loc="left")
    axes[0].legend(frameon=False, fontsize=7.5, loc="upper right")
    return figure


def _curve(report: LayerReport) -> Any:
    if len(report.curve) < 2:
        return None
    from matplotlib.ticker import PercentFormatter

    figure = _figure(6, 3.4)
    place = figure.subplots()
    before = report.conversion.bytes_before
    sizes, errors = [step.bytes_after / before for step in report.curve], [step.error for step in report.curve]
    place.plot(sizes, errors, color=_BEFORE, linewidth=2, marker="o" if len(sizes) < 60 else None, markersize=3.5)
    place.set_xlabel("size, of the original")
    place.set_ylabel("error left")
    place.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    place.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    place.grid(axis="y", color=_KEPT)
    place.set_ylim(0)
    place.set_title("Keeping the worst layers unquantized", loc="left", weight="bold")
    return figure
