"""Write a choice as a plain recipe: rules that people can read and edit, and that give the same plan again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from glob import escape as _escaped
from typing import Any, NamedTuple, TypeAlias

from omni_convert.converter.decide import View, natural_key
from omni_convert.converter.plan import ComponentPlan, Plan, make_plan
from omni_convert.converter.recipe import DEFAULT_PART, Recipe
from omni_convert.formats import format_options
from omni_convert.formats.base import Format
from omni_convert.formats.config import LayerRule, QuantizationConfig, exact_pattern
from omni_convert.formats.errors import UsageError
from omni_convert.formats.patterns import Pattern, parts_of_names
from omni_convert.formats.quant_config import with_rules
from omni_convert.formats.text import layer_patterns


class UnitName(NamedTuple):
    """A component, and the engine's name of what it fuses, or of the layer alone."""

    component: str
    name: str


Formats: TypeAlias = Mapping[str, Format | None]
"""What the layers of a unit are to become; None: they stay as they are."""


def chosen_plan(base: Plan, units: Mapping[UnitName, Formats]) -> Plan:
    """The plan in which every unit is what is wanted, by rules for those that ``base`` makes something else of.

    Raises:
        UsageError: nothing of a component would be quantized.
    """
    wanted = {
        (unit.component, layer): _written(fmt)
        for unit, formats in units.items()
        for layer, fmt in formats.items()
        if fmt
    }
    for part in base.components:
        name = part.component.name
        if not any(component == name for component, _ in wanted):
            raise UsageError(f"nothing of {name or 'the model'} would be quantized. Ask for less, or leave it out.")
    for is_exact in (False, True):
        plan = make_plan(base.checkpoint, _recipe(base, units, is_exact))
        if _formats(plan) == wanted:
            return plan
    raise AssertionError("exact names of layers mean these layers alone")


def _formats(plan: Plan) -> dict[tuple[str, str], Any]:
    """What every layer that is quantized becomes."""
    return {
        (part.component.name, tensor.layer): _written(tensor.decision.format)
        for part in plan.components
        for tensor in part.tensors()
        if tensor.decision.format
    }


def _written(fmt: Format) -> tuple[str, bool, dict[str, Any]]:
    """What tells formats of layers apart; ``fused_scale`` is of the component, and ``is_fused`` what comes of it."""
    return fmt.name, fmt.is_fused, {key: value for key, value in format_options(fmt).items() if key != "fused_scale"}


def _recipe(base: Plan, units: Mapping[UnitName, Formats], is_exact: bool) -> Recipe:
    """The recipe of ``base`` with rules, which go first; several components are named if they need any."""
    recipe, pipeline = base.recipe, base.checkpoint.pipeline_class
    parts: dict[str, QuantizationConfig] = {}
    for part in base.components:
        name = part.component.name
        view = View(part.component, recipe, pipeline)
        own = {unit.name: formats for unit, formats in units.items() if unit.component == name}
        config = view.config if len(base.components) == 1 else _meant(view)
        key = name if name in recipe.parts or len(base.components) > 1 else DEFAULT_PART
        parts[key] = _with_choice(config, list(_rules(part, view, own, is_exact)))
    if all(config.layers == recipe.part(key).layers for key, config in parts.items()) and all(
        config.ignored_layers == recipe.part(key).ignored_layers for key, config in parts.items()
    ):
        return recipe
    return replace(recipe, parts=parts)


def _meant(view: View) -> QuantizationConfig:
    """The config of a component, of its patterns those that mean something there."""
    config = view.config
    return replace(
        config,
        ignored_layers=tuple(filter(view.means, config.ignored_layers)),
        layers=tuple(rule for rule in config.layers if view.means(rule.name)),
    )


def _with_choice(config: QuantizationConfig, rules: Sequence[LayerRule]) -> QuantizationConfig:
    """Layers to keep are ignored, as one would write it, unless rules for single layers would go before that."""
    if config.layers or any(rule.format for rule in rules):
        return with_rules(config, (), tuple(rules))
    return with_rules(config, tuple(rule.name for rule in rules), ())


def _rules(part: ComponentPlan, view: View, units: Mapping[str, Formats], is_exact: bool) -> Iterator[LayerRule]:
    """A rule for every unit that the plan makes something else of, or one for all of like names, if they agree."""
    planned = {tensor.layer: tensor.decision.format for tensor in part.tensors()}
    deviating = {
        name: next(iter(formats.values()))  # of all: what stays stays whole, and engines that mix fuse nothing
        for name, formats in units.items()
        if any(fmt != planned[layer] for layer, fmt in formats.items())
    }
    if is_exact:
        for name, fmt in deviating.items():
            yield from (LayerRule(_exact(layer), fmt) for layer in units[name])
        return
    within = _parts_of_others(deviating, view.names)
    alike: dict[str, list[str]] = defaultdict(list)
    for name, pattern in layer_patterns(units.keys()).items():
        alike[pattern].append(name)
    for pattern, names in sorted(alike.items(), key=lambda item: natural_key(item[0])):
        found = [name for name in names if name in deviating]
        same = len({deviating[name] for name in found}) == 1
        if len(names) == len(found) > 1 and same and _means_only(pattern, names, units, view):
            yield LayerRule(pattern, deviating[names[0]])
            continue
        for name in sorted(found, key=natural_key):
            yield LayerRule(_exact(name) if name in within or _escaped(name) != name else name, deviating[name])


def _parts_of_others(candidates: Collection[str], names: Collection[str]) -> set[str]:
    """Those that are a part of a longer name."""
    return parts_of_names(candidates, {name[1:] for name in names} | {name[:-1] for name in names})


def _exact(name: str) -> str:
    """A pattern that matches this name alone."""
    escaped = _escaped(name)
    return escaped if escaped != name else exact_pattern(name)


def _means_only(text: str, names: Collection[str], units: Mapping[str, Formats], view: View) -> bool:
    """Whether a pattern matches no name but those of these units."""
    layers = [layer for name in names for layer in units[name]]
    own = {*names, *layers, *(view.runtime_names[layer] for layer in layers)}
    return not any(map(Pattern(text).matches, view.names - own))
