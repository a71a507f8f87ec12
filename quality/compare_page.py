"""The page of a comparison: pairs under a slider, their difference, metrics, drift, layers. One file, no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.quality import html
from omni_convert.quality.compare_charts import difference, numbered_line, png
from omni_convert.quality.compare_show import format_number, metric_rows, model_text
from omni_convert.quality.pair import Pair
from omni_convert.quality.request import FRAMES
from omni_convert.quality.trace import LayerTrace, keeping_lines

if TYPE_CHECKING:
    from omni_convert.quality.compare import Comparison

_HERE = Path(__file__).parent
_SHOWN_FRAMES = 6
"""Of a video, spread evenly: every frame would make a page too heavy for a phone."""
_SMALL = 256
"""Pixels of a side: below, a picture is shown larger than it is, with visible pixels."""
_WORST = 3
"""Kinds of layers, with what they are fused with, that have a line to copy."""


def comparison_page(comparison: Comparison) -> str:
    """A whole HTML document."""
    title = f"What changed: {comparison.candidate.quantization or Path(comparison.candidate.name).name}"
    lines = [f"{side}: {model_text(getattr(comparison, side))}" for side in ("reference", "candidate")]
    sections = [html.header(title, *lines, _asked(comparison)), _facts(comparison)]
    sections += [_answers(pair, number) for number, pair in enumerate(comparison.pairs, 1)]
    sections += [_metrics(comparison)]
    drifts = [_drift(pair, number) for number, pair in enumerate(comparison.pairs, 1) if pair.drift]
    if drifts:
        sections.append(html.section("Drift of the latents", _DRIFT, _charts(*drifts)))
    if comparison.trace is not None:
        sections.append(_layers(comparison.trace))
    style, script = (_HERE / "compare.css").read_text(), (_HERE / "compare.js").read_text()
    return html.page(title, *sections, style=style, script=script)


_DRIFT = html.paragraph(
    "How far the candidate's latents are from the reference's after every denoising step: by length (L2 distance over",
    "the reference's norm) and by direction (1 - cosine). Lower is better. What the first steps get wrong, all others",
    "work on.",
)


def _charts(*charts: str) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _asked(comparison: Comparison) -> str:
    request = {key: value for key, value in comparison.request.to_dict().items() if value is not None}
    names = ("task", "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "cfg_scale", "seed")
    return ", ".join(f"{name.replace('_', ' ')} {request[name]}" for name in names if name in request)


def _facts(comparison: Comparison) -> str:
    sides = [comparison.reference_generation.to_dict(), comparison.candidate_generation.to_dict()]
    rows = [
        (f"{title}, {side}", f"{format_number(found[key])} {unit}")
        for title, key, unit in (("time", "avg_generation_time_s", "s"), ("peak memory", "max_peak_memory_mb", "MB"))
        for side, found in zip(("reference", "candidate"), sides, strict=True)
    ]
    if comparison.gate:
        missed = sum(not checked.ok for checked in comparison.gate)
        rows.insert(0, ("gate", f"{missed} of {len(comparison.gate)} missed" if missed else "met"))
    return html.facts(rows)


def _answers(pair: Pair, number: int) -> str:
    heading = f"Prompt {number}: {pair.prompt}"
    if not pair.reference.is_pixels:
        return html.section(heading, _tokens(pair, number))
    shown = _spread(len(pair.reference.output))
    parts = [_pictures(pair, frame) for frame in shown]
    if pair.reference.kind != FRAMES:
        return html.section(heading, *parts)
    counted = html.paragraph(f"{len(shown)} of {len(pair.reference.output)} frames are shown.")
    values = [frame["relative_l2"] for frame in pair.frames]
    return html.section(
        heading, counted, *parts, _charts(numbered_line(values, "relative L2 of pixels", "frame", first=0))
    )


def _spread(count: int) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, _SHOWN_FRAMES))})


def _pictures(pair: Pair, frame: int) -> str:
    reference, candidate = pair.reference.output[frame], pair.candidate.output[frame]
    distance, factor = difference(reference, candidate)
    name = f"frame {frame}" if pair.reference.kind == FRAMES else "picture"
    psnr = pair.sums[frame].metrics(pixels=True)["psnr_db"]
    caption = f"{name}: identical" if math.isinf(psnr) else f"{name}: PSNR {psnr:.2f} dB"
    slider = (
        f'<div class="slider">{_image(reference, f"{name} of the reference")}'
        f"{_image(candidate, f'{name} of the candidate', 'above')}"
        '<span class="left">reference</span><span class="right">candidate</span>'
        f'<input type="range" min="0" max="100" step="0.5" value="50" aria-label="Show more of the reference, {name}">'
        "</div>"
    )
    amplified = f"difference, {factor} times" if factor > 1 else "difference"
    return (
        f'<div class="pairs"><figure>{slider}<figcaption>{html.text(caption)}</figcaption></figure>'
        f"<figure>{_image(distance, f'difference of the {name}')}"
        f"<figcaption>{amplified}</figcaption></figure></div>"
    )


def _image(pixels: NDArray[Any], alt: str, classes: str = "") -> str:
    height, width, _ = pixels.shape
    names = " ".join(filter(None, (classes, "small" if max(height, width) < _SMALL else "")))
    return f'<img src="{png(pixels)}" width="{width}" height="{height}" class="{names}" alt="{html.text(alt)}">'


def _tokens(pair: Pair, number: int) -> str:
    """What each token of the prompt is answered with."""
    values = [part.relative_l2 for part in pair.sums]
    chart = numbered_line(values, f"relative L2 of the {pair.reference.kind} after each token", "token")
    says = [pair.reference.best, pair.candidate.best]
    columns = [html.Column(title="#", digits=0), html.Column(title="token"), html.Column(title="relative L2", digits=5)]
    columns += [html.Column(title=f"next, {side}") for side in ("reference", "candidate") if all(says)]
    rows = [
        (float(place), token, value if math.isfinite(value) else None, *(best[place - 1] for best in says if all(says)))
        for place, (token, value) in enumerate(zip(pair.reference.tokens, values, strict=True), 1)
    ]
    return _charts(chart) + html.table(f"tokens-{number}", columns, rows, hint="Filter tokens")


def _metrics(comparison: Comparison) -> str:
    head, *rows = metric_rows(comparison)
    wide = [""] * (len(head) - 2) + [' class="wide"'] * 2  # direction and meaning, for which phones have no room
    cells = "".join(
        f"<tr>{''.join(f'<td{kind}>{html.text(cell)}</td>' for cell, kind in zip(row, wide, strict=True))}</tr>"
        for row in rows
    )
    heads = "".join(f'<th scope="col"{kind}>{html.text(cell)}</th>' for cell, kind in zip(head, wide, strict=True))
    parts = [f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>']
    if comparison.gate:
        items = "".join(
            f"<li{'' if checked.ok else ' class=missed'}>{html.text(checked)}</li>" for checked in comparison.gate
        )
        parts.insert(0, f'<ul class="gate">{items}</ul>')
    return html.section("Metrics", *parts, *(html.paragraph(f"{note}.") for note in comparison.notes))


def _drift(pair: Pair, number: int) -> str:
    distance = [step.relative_l2 for step in pair.drift]
    turned = [1 - step.cosine_similarity for step in pair.drift]
    return numbered_line(distance, f"relative L2, prompt {number}", "step") + numbered_line(
        turned, f"1 - cosine, logarithmic, prompt {number}", "step", logarithmic=True
    )


def _layers(trace: Sequence[LayerTrace]) -> str:
    columns = [
        html.Column(title="layer"), html.Column(title="format", wide=True),
        html.Column(title="calls", digits=0, wide=True), html.Column(title="relative L2", digits=5),
        html.Column(title="SQNR dB", digits=2),
    ]  # fmt: skip
    text = html.paragraph(
        "The reference ran; every quantized layer got the same input as the layer that it stands for, and this is its",
        "own error, of weights and activations. To keep the worst kinds of layers, with what engines fuse with them:",
    )
    table = html.table("layers", columns, _layer_rows(trace), hint="Filter layers, as in: img_mlp")
    lines = [html.copyable(line) for line in keeping_lines(trace, _WORST)]
    return html.section("Layers on real activations", text, *lines, table)


def _layer_rows(trace: Sequence[LayerTrace]) -> Iterator[tuple[str | float | None, ...]]:
    for layer in trace:
        numbers = (layer.relative_l2, layer.sqnr_db)
        yield layer.layer, layer.format, layer.calls, *(n if math.isfinite(n) else None for n in numbers)
