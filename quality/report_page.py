"""The layer report as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omni_convert.converter.statistics import LayerStatistics
from omni_convert.formats.errors import printable
from omni_convert.formats.text import format_bytes, format_db
from omni_convert.quality import charts, html
from omni_convert.quality.heat import Shades, heat_maps
from omni_convert.quality.html import Column, text
from omni_convert.quality.layers import Layer
from omni_convert.quality.report import Detail, LayerReport, Step, title

SQNR = (
    "SQNR is the energy of a layer's weights over that of their rounding error, in dB: higher is better, 10 dB more is "
    "a tenth of the error's energy, 6 dB more is half the error."
)
_DOTS = 48


def report_page(report: LayerReport) -> str:
    """The whole page."""
    done = report.conversion
    name = title(done)
    classes = ", ".join(dict.fromkeys(done.classes.values()))
    sections = [
        html.header(f"What quantization cost {name}", f"{classes}, converted by omni-convert {done.version}."),
        html.facts(report.summary()),
        html.section("SQNR of every layer", html.paragraph(SQNR, report.origin), *heat_maps(done)),
    ]
    if report.details:
        sections += [_worst(report), _keeping(report)]
    return html.page(f"{name}: layer report", *sections, _table(report))


def _worst(report: LayerReport) -> str:
    shades = Shades.of(report.conversion.layers)
    lead = (
        "Filled: the weights before. Line: after, dequantized. Heights are logarithmic, so that single outliers show. "
        "Of a sample of rows; errors are of all weights. The line below each layer keeps it as it is in the source: "
        "add it to the command of the next conversion, a --layer before all others. What other methods would cost it, "
        "omni-convert analyze MODEL measures."
    )
    cards = "".join(_card(detail, report, shades) for detail in report.details)
    return html.section("The worst layers", html.paragraph(lead), f'<div class="cards">{cards}</div>')


def _card(detail: Detail, report: LayerReport, shades: Shades) -> str:
    layer, found, done = detail.layer, detail.statistics, report.conversion
    shape = " x ".join(map(str, layer.shape))
    kept = layer.bytes_before - layer.bytes_after
    fused = f", together with {layer.group}" if layer.group != layer.name else ""
    lines = _channels(found, layer)
    if (traced := report.outputs.get(layer.full_name)) is not None:
        lines.insert(0, f"its output on real activations: {format_db(traced)}")
    parts = [
        f'<h3>{html.name(done.label(layer))}</h3><p class="db"><i class="{shades.css(layer)}"></i>'
        f"<b>{text(format_db(layer.sqnr_db or 0.0))}</b> {text(f'{layer.format}, {shape}')}</p>",
        f"<figure>{charts.histograms(found.counts if found else None, detail.after, detail.limit)}</figure>",
        *(
            _scales(scales.name, scales.number, scales.smallest, scales.largest, scales.counts)
            for scales in detail.scales
        ),
        f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>",
        html.copyable(detail.keep),
        f"<small>{text(f'keeps it{fused}: {format_bytes(kept)} more of this layer')}</small>",
    ]
    return f'<article class="card">{"".join(parts)}</article>'


def _scales(name: str, number: int, smallest: float, largest: float, counts: Sequence[int]) -> str:
    if number == 1 or len(counts) == 1:
        return f"<figure><figcaption>{text(f'{name}: {smallest:.3g}, one for all')}</figcaption></figure>"
    caption = f"<figcaption>{text(f'{number:,} values of {name}, by powers of two')}</figcaption>"
    return f"<figure>{caption}{charts.bars(counts, f'{smallest:.3g}', f'{largest:.3g}', name)}</figure>"


def _channels(found: LayerStatistics | None, layer: Layer) -> list[str]:
    """What stands out among a layer's channels."""
    lines = []
    if found and found.channel_db:
        low, _, middle, _, high = found.channel_db
        lines.append(f"output channels: {low:.1f} dB lowest, {middle:.1f} median, {high:.1f} highest")
        lines.append("worst: " + ", ".join(f"{row} ({db:.1f} dB)" for row, db in found.worst_channels[:3]))
    for what, outliers in (("output", found.large_rows), ("input", found.large_columns)) if found else ():
        if outliers:
            listed = ", ".join(f"{place} ({ratio:.1f} times)" for place, ratio in outliers[:3])
            lines.append(f"outlier {what} channels, RMS against the median: {listed}")
    if layer.shared_scale_db:
        lines.append(f"sharing a scale with what it is fused with costs about {layer.shared_scale_db:.1f} dB")
    return lines


def _keeping(report: LayerReport) -> str:
    lead = (
        "Keeping layers unquantized, worst first and whole fused groups at a time. The error is the sum of all layers' "
        "relative errors (energy of the error over energy of the weights), as a share of what it is now."
    )
    before = report.conversion.bytes_before
    points = [
        (step.bytes_after / before, step.error, _step_text(step, report.conversion.bytes_after))
        for step in thinned(report.curve, _DOTS)
    ]
    chart = charts.line(points, "size, of the original", "error left")
    return html.section(
        "What keeping the worst layers costs", html.paragraph(lead), f'<figure class="curve">{chart}</figure>'
    )


def _step_text(step: Step, now: int) -> str:
    if not step.kept:
        return f"as it is: {format_bytes(now)}"
    more = format_bytes(step.bytes_after - now)
    return (
        f"keep the worst {step.kept}: {more} more, {1 - step.error:.1%} of the error gone; last {printable(step.group)}"
    )


def thinned(steps: Sequence[Step], most: int) -> list[Step]:
    """At most ``most`` of the steps, close together at the start, where it matters, with both ends."""
    if len(steps) <= most:
        return list(steps)
    growth = (len(steps) - 1) ** (1 / (most - 1))
    places = {round(growth**power) for power in range(most)} | {0, len(steps) - 1}
    return [steps[place] for place in sorted(places) if place < len(steps)]


def _table(report: LayerReport) -> str:
    columns = [
        Column(title="layer"),
        Column(title="format"),
        Column(title="SQNR dB", digits=2),
        *([Column(title="output dB", digits=2)] if report.outputs else []),
        Column(title="worst channel", digits=1, wide=True),
        Column(title="sharing dB", digits=2, wide=True),
        Column(title="MB before", digits=2, wide=True),
        Column(title="MB after", digits=2),
        Column(title="shape", wide=True),
        Column(title="why", wide=True),
    ]
    rows = []
    for layer in report.conversion.layers:
        found = report.statistics.get((layer.component, layer.name))
        rows.append(
            [
                report.conversion.label(layer),
                layer.format or f"keep {layer.dtype}",
                _shown(layer.sqnr_db),
                *([_shown(report.outputs.get(layer.full_name))] if report.outputs else []),
                found.channel_db[0] if found and found.channel_db else None,
                layer.shared_scale_db,
                layer.bytes_before / 1e6,
                layer.bytes_after / 1e6,
                "x".join(map(str, layer.shape)),
                layer.reason,
            ]
        )
    lead = html.paragraph(
        "Sort by a column, filter by words. A dash is what was kept, lost nothing, or is not known. MB are millions of "
        f"bytes; {report.conversion.others} biases, norms and other tensors are not listed."
    )
    if report.outputs:
        lead += html.paragraph("Output dB: the same ratio of the layer's output, on the activations that were traced.")
    return html.section("All layers", lead, html.table("layers", columns, rows, hint=_hint(report)))


def _hint(report: LayerReport) -> str:
    """Words that find the worst layers of the same kind, as an example; layers without a loss have none."""
    if not report.details:
        return "Filter"
    worst = report.details[0].layer
    parts = [part for part in worst.kind.split(".") if any(map(str.isalpha, part)) and "*" not in part]
    return f"Filter, for example: {parts[-1] if parts else ''} {worst.format}"


def _shown(value: float | None) -> float | None:
    """None, which is a dash, for what is infinite or not known."""
    return None if value is None or not math.isfinite(value) else value
