"""How a comparison looks: as text for people, as data for scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omni_convert.formats.text import format_db, format_table
from omni_convert.quality.pair import Pair, Step
from omni_convert.quality.similarity import GENERATION, LANGUAGE, METRICS, PERCEPTUAL
from omni_convert.quality.trace import LayerTrace, by_kind

if TYPE_CHECKING:
    from omni_convert.quality.compare import Comparison, Model

_BARS = "▁▂▃▄▅▆▇█"
_WORST = 10
"""Kinds of traced layers that the text shows."""


def comparison_dict(comparison: Comparison) -> dict[str, Any]:
    """``output_metrics``: over all prompts, and ``identical``, which tells why ``psnr_db`` is None."""
    request = comparison.request.to_dict()
    return {
        "task": request.pop("task"),
        "reference": _model_dict(comparison.reference),
        "candidate": _model_dict(comparison.candidate),
        "request": request,
        "output_metrics": _numbers(comparison.metrics),
        "reference_generation": comparison.reference_generation.to_dict(),
        "candidate_generation": comparison.candidate_generation.to_dict(),
        "prompts": [_pair_dict(pair) for pair in comparison.pairs],
        "gate": {"ok": comparison.ok, "conditions": [checked.to_dict() for checked in comparison.gate]},
        "notes": list(comparison.notes),
        "trace": None if comparison.trace is None else [layer.to_dict() for layer in comparison.trace],
    }


def _model_dict(model: Model) -> dict[str, Any]:
    return {"model": model.name, "quantization": model.quantization}


def _pair_dict(pair: Pair) -> dict[str, Any]:
    return {
        "prompt": pair.prompt,
        "output": pair.reference.kind,
        "shape": list(pair.reference.output.shape),
        "output_metrics": _numbers(pair.metrics),
        "frames": [_numbers(frame) for frame in pair.frames],
        "steps": [{"step": step.number, **_finite(_drift(step))} for step in pair.drift],
    }


def _drift(step: Step) -> dict[str, float]:
    return {"cosine_similarity": step.cosine_similarity, "relative_l2": step.relative_l2}


def _numbers(metrics: Mapping[str, float]) -> dict[str, Any]:
    return {**_finite(metrics), "identical": metrics["max_abs"] == 0}


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def comparison_text(comparison: Comparison) -> str:
    models = [(side, model_text(getattr(comparison, side))) for side in ("reference", "candidate")]
    blocks = [format_table(models, header=False), _metrics_text(comparison), _generation_text(comparison)]
    blocks += [_drift_text(pair, number) for number, pair in enumerate(comparison.pairs, 1) if pair.drift]
    if comparison.trace is not None:
        blocks.append(trace_text(comparison.trace))
    blocks += ["\n".join(f"Note: {note}." for note in comparison.notes)] if comparison.notes else []
    blocks += [gate_text(comparison)] if comparison.gate else []
    return "\n\n".join(blocks)


def model_text(model: Model) -> str:
    return f"{model.name}{f', quantized to {model.quantization}' if model.quantization else ''}"


def metric_rows(comparison: Comparison) -> list[list[str]]:
    """The table of metrics, with its head: a column for every prompt; with several, one for all of them."""
    metrics = {**METRICS, **PERCEPTUAL, **LANGUAGE}
    columns = [("all prompts", comparison.metrics)] if len(comparison.pairs) > 1 else []
    columns += [(f"prompt {n}" if columns else "value", pair.metrics) for n, pair in enumerate(comparison.pairs, 1)]
    rows = [["metric", *(name for name, _ in columns), "better", "what it is"]]
    for name in columns[0][1]:
        better = "higher" if metrics[name].higher_is_better else "lower"
        values = [format_number(found[name]) for _, found in columns]
        rows.append([name, *values, better, metrics[name].meaning])
    return rows


def _metrics_text(comparison: Comparison) -> str:
    rows = metric_rows(comparison)
    return format_table(rows, right=range(1, len(rows[0]) - 2))


def format_number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.5g}" if math.isfinite(value) else "infinite"


def _generation_text(comparison: Comparison) -> str:
    sides = [comparison.reference_generation.to_dict(), comparison.candidate_generation.to_dict()]
    rows = [["generation", "reference", "candidate", "what it is"]]
    for name, metric in GENERATION.items():
        meaning = f"{metric.meaning}: {sides[0]['memory']}" if "memory" in name else metric.meaning
        rows.append([name, *(format_number(side[name]) for side in sides), meaning])
    return format_table(rows, right=(1, 2))


def _drift_text(pair: Pair, number: int) -> str:
    """A line of bars: the relative L2 of the latents after every step."""
    values = [step.relative_l2 for step in pair.drift]
    first, last = pair.drift[0], pair.drift[-1]
    return "\n".join(
        [
            f"drift of the latents over {len(values)} steps, prompt {number}: {sparkline(values)}",
            f"relative L2 {first.relative_l2:.4g} after the first, {last.relative_l2:.4g} after the last; "
            f"1 - cosine {1 - first.cosine_similarity:.3g} and {1 - last.cosine_similarity:.3g}",
        ]
    )


def sparkline(values: Sequence[float]) -> str:
    """Bars from 0 to the largest finite value; what is infinite or NaN, ``!``."""
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    scale = (len(_BARS) - 1) / largest if largest else 0.0
    return "".join(_BARS[round(value * scale)] if math.isfinite(value) else "!" for value in values)


def trace_text(layers: Sequence[LayerTrace]) -> str:
    """A row for every kind of layer, and the worst layer."""
    kinds = by_kind(layers)
    rows = [["layers, their own output error", "count", "format", "relative L2", "SQNR"]]
    for kind, count in kinds[:_WORST]:
        rows.append([kind.layer, str(count), kind.format, f"{kind.relative_l2:.4g}", format_db(kind.sqnr_db)])
    lines = [format_table(rows, right=(1, 3, 4))]
    if len(kinds) > _WORST:
        lines.append(f"and {len(kinds) - _WORST} kinds that lose less")
    if layers:
        lines.append(f"worst layer: {layers[0].layer}, {format_db(layers[0].sqnr_db)}")
    return "\n".join(lines)


def gate_text(comparison: Comparison) -> str:
    rows = "\n".join(f"{'ok  ' if checked.ok else 'MISS'}  {checked}" for checked in comparison.gate)
    missed = sum(not checked.ok for checked in comparison.gate)
    return f"{rows}\ngate: {f'{missed} of {len(comparison.gate)} missed' if missed else 'met'}"
