"""How an analysis and a choice look: as text for people, as data for scripts, the choice also as a recipe's YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from omni_convert.converter.analyze import Analysis
from omni_convert.converter.choice import KEEP, Choice, ChosenUnit
from omni_convert.formats.text import finite, format_bytes, format_db, format_table

T = TypeVar("T")
_SHOWN = 20


def analysis_text(analysis: Analysis) -> str:
    """The worst layers, then for every method the mean and the size it would give."""
    rows = [["layers, worst first", "shape", *analysis.methods]]
    for item in analysis.layers[:_SHOWN]:
        shape = " x ".join(map(str, item.shape))
        rows.append([analysis.title(item.component, item.layer), shape, *_cells(item.sqnr_db, analysis.methods)])
    if (left := len(analysis.layers) - _SHOWN) > 0:
        rows.append([f"... and {left} more (--json lists all)", *[""] * (1 + len(analysis.methods))])
    means = [format_db(analysis.mean_sqnr_db(number)) for number in range(len(analysis.methods))]
    before = analysis.plans[0].bytes_before
    rows.append([f"mean of {len(analysis.layers)} layers", "", *means])
    rows.append(["layers quantized", "", *(str(len(errors)) for errors in analysis.errors)])
    rows.append([f"size (of {format_bytes(before)})", "", *(format_bytes(plan.bytes_after) for plan in analysis.plans)])
    rows.append(["size / before", "", *(f"{plan.bytes_after / before:.4f}" for plan in analysis.plans)])
    table = format_table(rows, right=range(2, 2 + len(analysis.methods)))
    return "\n".join([table, *(f"left out: {method}: {why}" for method, why in analysis.refused.items())])


def _cells(sqnr_db: Mapping[T, float], methods: Iterable[T]) -> list[str]:
    return [format_db(sqnr_db[method]) if method in sqnr_db else "kept" for method in methods]


def choice_text(choice: Choice) -> str:
    """What was chosen and why, the units that deviate from the usual method first; then what comes of it."""
    usual = choice.methods[choice.usual]
    measured = sorted({number for unit in choice.deviating for number in unit.options} - {KEEP})
    rows = [["layers", "become", "size before", "after", *(choice.methods[number] for number in measured)]]
    for unit in choice.deviating[:_SHOWN]:
        sqnr = {number: option.sqnr_db for number, option in unit.options.items()}
        sizes = [format_bytes(unit.options[KEEP].size), format_bytes(unit.chosen.size)]
        rows.append([choice.title(unit), choice.label(unit), *sizes, *_cells(sqnr, measured)])
    if (left := len(choice.deviating) - _SHOWN) > 0:
        rows.append([f"... and {left} more (--json lists all)", *[""] * (3 + len(measured))])
    summary = [
        ["chosen by", str(choice.conditions)],
        [usual, f"{sum(unit.number == choice.usual for unit in choice.units)} of {len(choice.units)} layers or groups"],
        ["size / before", f"{choice.share:.4f}"],
        ["lowest SQNR", format_db(choice.lowest_sqnr_db)],
        ["relative error", f"{choice.error:.3e} (mean square, over the weights that might be quantized)"],
    ]
    table = format_table(rows, right=range(2, 4 + len(measured)))
    text = format_table(summary, header=False)
    return f"{table}\n\n{text}" if choice.deviating else text


def choice_dict(choice: Choice) -> dict[str, Any]:
    """The same as data, with every unit, and the recipe."""
    return {
        "conditions": choice.conditions.flags,
        "recipe": choice.plan.recipe.to_dict(),
        "bytes_before": choice.plan.bytes_before,
        "bytes_after": choice.plan.bytes_after,
        "size": round(choice.share, 6),
        "relative_error": choice.error,
        "usual": choice.methods[choice.usual],
        "units": [_unit_dict(choice, unit) for unit in choice.units],
    }


def _unit_dict(choice: Choice, unit: ChosenUnit) -> dict[str, Any]:
    return {
        "component": unit.name.component,
        "name": unit.name.name,
        "layers": list(unit.formats),
        "becomes": choice.label(unit),
        "bytes_before": unit.options[KEEP].size,
        "bytes_after": unit.chosen.size,
        "lowest_sqnr_db": {
            choice.methods[number]: finite(option.sqnr_db) for number, option in unit.options.items() if number != KEEP
        },
    }


def recipe_yaml(choice: Choice) -> str:
    """What ``--recipe`` reads."""
    import yaml  # type: ignore[import-untyped]

    lines = [
        f"chosen by omni-convert analyze: {choice.conditions}",
        f"size / before {choice.share:.4f}, mean relative squared error {choice.error:.3e}",
    ]
    recipe = yaml.safe_dump(choice.plan.recipe.to_dict(), sort_keys=False, allow_unicode=True, width=1000)
    return "".join(f"# {line}\n" for line in lines) + str(recipe)
