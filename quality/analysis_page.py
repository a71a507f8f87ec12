"""An analysis as a page: every layer under every method, and what each size would cost."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence

from omni_convert.converter.analyze import Analysis
from omni_convert.converter.choice import KEEP, Choice
from omni_convert.formats.quant_config import NONE, method_text
from omni_convert.formats.text import format_bytes, format_db
from omni_convert.quality import html
from omni_convert.quality.html import Column

_WIDE, _TALL = 640, 260
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_LEFT, _RIGHT, _TOP, _FOOT = 46, 16, 12, 40


def analysis_page(analysis: Analysis, choice: Choice | None = None) -> str:
    """A whole document. ``choice``: shown too, if one was made."""
    plan = analysis.plans[0]
    classes = ", ".join(dict.fromkeys(part.component.class_name for part in plan.components))
    lines = [f"{classes}, {format_bytes(plan.bytes_before)}, to be loaded by {plan.recipe.target}. Nothing converted."]
    lines += [f"Left out: {method}: {why}" for method, why in analysis.refused.items()]
    sections = [
        html.header(f"What methods would cost {analysis.name}", *lines),
        html.facts(_figures(analysis)),
        *([_chosen(choice)] if choice else []),
        *_sizes(analysis),
        _layers(analysis),
    ]
    return html.page(f"{analysis.name}: methods compared", *sections)


def _figures(analysis: Analysis) -> list[tuple[str, str]]:
    before = analysis.plans[0].bytes_before
    return [
        (method, f"{format_db(analysis.mean_sqnr_db(number))} at {plan.bytes_after / before:.1%}")
        for number, (method, plan) in enumerate(zip(analysis.methods, analysis.plans, strict=True))
    ]


def _chosen(choice: Choice) -> str:
    measured = [number for number in range(len(choice.methods)) if any(number in unit.options for unit in choice.units)]
    columns = [Column(title="layers"), Column(title="become"), Column(title="bytes before", digits=0, wide=True)]
    columns += [Column(title=choice.methods[number], digits=2) for number in measured]
    rows = [
        [
            choice.title(unit),
            choice.label(unit),
            unit.options[KEEP].size,
            *(_finite(unit.options[number].sqnr_db) if number in unit.options else None for number in measured),
        ]
        for unit in choice.deviating
    ]
    said = (
        f"{choice.methods[choice.usual]} for all layers but these: {choice.share:.2%} of the source's bytes, lowest "
        f"SQNR {format_db(choice.lowest_sqnr_db)}, mean relative squared error {choice.error:.3e}."
    )
    return html.section(f"Chosen by {choice.conditions}", html.paragraph(said), html.table("chosen", columns, rows))


def _sizes(analysis: Analysis) -> Iterator[str]:
    curve = analysis.curve()
    if not curve:
        return
    said = (
        "The best choice within every size: error is noise over signal, averaged over all weights that might be "
        "quantized, in dB (higher is better). Rings: each method with nothing kept."
    )
    columns = [
        Column(title="size"), Column(title="method"), Column(title="kept or other", digits=0),
        Column(title="error dB", digits=2), Column(title="lowest SQNR", digits=2, wide=True),
    ]  # fmt: skip
    rows = [
        [
            f"{choice.share:.2%}",
            choice.methods[choice.usual],
            len(choice.deviating),
            _finite(_decibels(choice.error)),
            _finite(choice.lowest_sqnr_db),
        ]
        for choice in curve
    ]
    middle = f"size<={math.ceil(curve[len(curve) // 2].share * 1000) / 1000:g}"
    options = _options(analysis)
    command = [html.copyable(f"{shlex.join([*options, '--budget', middle])} MODEL OUT")] if options else []
    parts = (html.paragraph(said), _chart(analysis, curve), *command, html.table("sizes", columns, rows))
    yield html.section("What a size costs", *parts)


def _options(analysis: Analysis) -> list[str]:
    """The conversion that chooses from the same; empty if options cannot say it: components differ."""
    recipe = analysis.plans[0].recipe
    methods = [{method_text(part.format) for part in plan.recipe.parts.values()} for plan in analysis.plans]
    rules, *others = ((part.layers, part.ignored_layers) for part in recipe.parts.values())
    if any(other != rules for other in others) or any(len(names) > 1 for names in methods):
        return []
    found = ["omni-convert", "--methods", ",".join(name for (name,) in methods), "--target", recipe.target]
    for flag, values in (
        ("--component", recipe.components),
        ("--layer", [f"{rule.name}={method_text(rule.format) if rule.format else NONE}" for rule in rules[0]]),
        ("--ignore", rules[1]),
    ):
        found += [text for value in values for text in (flag, value)]
    found += [] if recipe.default_ignore else ["--no-default-ignore"]
    return found + (["--ignore-whole-group"] if recipe.ignore_whole_group else [])


def _layers(analysis: Analysis) -> str:
    columns = [Column(title="layer"), Column(title="shape", wide=True)]
    columns += [Column(title=method, digits=2) for method in analysis.methods]
    rows = [
        [
            analysis.title(item.component, item.layer),
            " x ".join(map(str, item.shape)),
            *(_finite(item.sqnr_db.get(method, math.inf)) for method in analysis.methods),
        ]
        for item in analysis.layers
    ]
    said = (
        "SQNR in dB, as a conversion with that method would report it; first what is furthest below the means of the "
        "methods. A dash: the method keeps the layer, or loses nothing."
    )
    table = html.table("layers", columns, rows, hint="Filter layers, as img_mlp")
    return html.section("Every layer", html.paragraph(said), table)


def _chart(analysis: Analysis, curve: Sequence[Choice]) -> str:
    """Size against error, with a ring for every method alone."""
    line = [(choice.share, _decibels(choice.error), choice.methods[choice.usual]) for choice in curve]
    alone = [
        (choice.share, _decibels(choice.error), choice.methods[choice.usual])
        for choice in (analysis.alternatives.alone(number) for number in range(len(analysis.methods)))
    ]
    points = [point for point in (*line, *alone) if math.isfinite(point[1])]
    if len(points) < 2:
        return ""
    left, right = _span([x for x, _, _ in points])
    low, high = _span([y for _, y, _ in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - left) / (right - left) * (_WIDE - _LEFT - _RIGHT)
        return across, _TOP + (high - y) / (high - low) * (_TALL - _TOP - _FOOT)

    shapes = ""
    for y in _ticks(low, high):
        up = place(left, y)[1]
        shapes += f'<path d="M{_LEFT},{up:.1f}H{_WIDE - _RIGHT}" stroke="var(--line)"/>'
        shapes += f'<text x="{_LEFT - 6}" y="{up + 4:.1f}" text-anchor="end">{y:g}</text>'
    for x in _ticks(left, right):
        across = place(x, low)[0]
        shapes += f'<text x="{across:.1f}" y="{_TALL - _FOOT + 17}" text-anchor="middle">{x:.0%}</text>'
    drawn = [point for point in line if math.isfinite(point[1])]
    path = "L".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y, _ in drawn)
    shapes += f'<path d="M{path}" fill="none" stroke="var(--before)" stroke-width="2"/>' if path else ""
    for found, look in (
        (drawn, 'r="3.5" fill="var(--before)"'),
        (alone, 'r="6" fill="transparent" stroke="var(--after)"'),
    ):
        for x, y, method in found:
            across, up = place(x, y)
            tip = html.text(f"{method}: {x:.1%} of the bytes, {y:.1f} dB")
            shapes += f'<circle cx="{across:.1f}" cy="{up:.1f}" {look} stroke-width="2" data-tip="{tip}"/>'
    names = (
        f'<text x="{(_LEFT + _WIDE) / 2}" y="{_TALL - 6}" text-anchor="middle">size, of the source</text>'
        f'<text transform="translate(11 {(_TALL - _FOOT) / 2}) rotate(-90)" text-anchor="middle">'
        "signal to error, dB (higher is better)</text>"
    )
    box = f'viewBox="0 0 {_WIDE} {_TALL}" role="img" aria-label="Size and error"'
    return f"<figure><svg {box}>{shapes}{names}</svg></figure>"


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Even numbers on an axis, at most seven."""
    step = next((step for step in _STEPS if (high - low) / step <= 6), _STEPS[-1])
    return [round(place * step, 2) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decibels(error: float) -> float:
    return -10 * math.log10(error) if error else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
