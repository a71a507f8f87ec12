"""From measured errors to a plan: the choice for every unit, and the plain recipe that says the same."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from omni_convert.converter.choice_recipe import Formats, UnitName, chosen_plan
from omni_convert.converter.choose import Conditions, Option, SizeError, Unit, choose, total_error, total_size
from omni_convert.converter.measure import Errors
from omni_convert.converter.plan import Plan, TensorPlan
from omni_convert.formats.errors import UsageError
from omni_convert.formats.target import find_target

KEEP = -1
"""In place of a plan's number: the unit stays as it is."""


class ChosenUnit(NamedTuple):
    """``options``: by number of the plan. ``number``: the one that was chosen, or ``KEEP``."""

    name: UnitName
    layers: Sequence[str]
    weights: int
    options: Mapping[int, Option]
    number: int

    @property
    def chosen(self) -> Option:
        return self.options[self.number]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """``plan``: of the conversion, with the recipe that says what was chosen. ``usual``: the number of the measured
    plan from which ``units`` deviate. ``error``: mean relative squared error of the weights that might be quantized.
    """

    conditions: Conditions
    methods: tuple[str, ...]
    plan: Plan
    usual: int
    units: Sequence[ChosenUnit]

    @property
    def share(self) -> float:
        """Tensor bytes after / before."""
        return self.plan.bytes_after / self.plan.bytes_before

    @property
    def error(self) -> float:
        return math.fsum(unit.chosen.error for unit in self.units) / sum(unit.weights for unit in self.units)

    def label(self, unit: ChosenUnit) -> str:
        """What a unit becomes."""
        return "kept" if unit.number == KEEP else self.methods[unit.number]

    def title(self, unit: ChosenUnit) -> str:
        """A unit as reports name it."""
        return ".".join(unit.name) if len(self.plan.components) > 1 else unit.name.name

    @property
    def deviating(self) -> list[ChosenUnit]:
        """The units that do not have the usual method, those that lose most with it first."""
        found = [unit for unit in self.units if unit.number != self.usual]
        return sorted(found, key=lambda unit: (_worst(unit, self.usual), unit.name))


_Members: TypeAlias = Mapping[UnitName, Sequence[tuple[TensorPlan, ...]]]
"""The tensors of every unit, as each plan has them."""


def make_choice(
    methods: tuple[str, ...], plans: Sequence[Plan], errors: Sequence[Errors], conditions: Conditions
) -> Choice:
    """Choose among what ``plans`` make of every unit, or one of them for all if the target does not mix methods.

    Raises:
        UsageError: no choice holds the conditions, or the one that does quantizes nothing.
    """
    members = unit_members(plans)
    options = {name: _options(name, tensors, errors) for name, tensors in members.items()}
    numbers = range(len(plans))
    mixes = find_target(plans[0].recipe.target).mixes
    sets: Iterable[Sequence[int]] = [numbers] if mixes else [(number,) for number in numbers]
    tried = [_try(plans[0], options, conditions, allowed) for allowed in sets]
    found = [chosen for chosen in tried if not isinstance(chosen, SizeError)]
    if not found:
        raise min((error for error in tried if isinstance(error, SizeError)), key=lambda error: error.smallest)
    quantizing = [chosen for chosen in found if any(option.number != KEEP for option in chosen.values())]
    if not quantizing:
        raise UsageError(_nothing(conditions, options))
    rank = (total_error, total_size) if conditions.size is not None else (total_size, total_error)
    best = min(quantizing, key=lambda chosen: tuple(measure(chosen.values()) for measure in rank))
    usual = _usual(best, members)
    units = [
        ChosenUnit(name, [one[0].layer for one in members[name]], _weights(members[name]), options[name], option.number)
        for name, option in best.items()
    ]
    wanted = {name: _wanted(members[name], option.number) for name, option in best.items()}
    return Choice(
        conditions=conditions, methods=methods, plan=chosen_plan(plans[usual], wanted), usual=usual, units=units
    )


def unit_members(plans: Sequence[Plan]) -> _Members:
    """What may be quantized by some plan, unit by unit."""
    members: defaultdict[UnitName, list[tuple[TensorPlan, ...]]] = defaultdict(list)
    for parts in zip(*(plan.components for plan in plans), strict=True):
        for tensors in zip(*(part.tensors() for part in parts), strict=True):
            if any(tensor.decision.format for tensor in tensors):
                members[UnitName(parts[0].component.name, tensors[0].group or tensors[0].layer)].append(tensors)
    return members


def relative_error(errors: Errors, component: str, tensor: TensorPlan) -> float:
    """Noise / signal; 0 for a layer of zeros."""
    found = errors[component, tensor.layer]
    return found.noise / found.signal if found.signal else 0.0


def _options(name: UnitName, tensors: Sequence[tuple[TensorPlan, ...]], errors: Sequence[Errors]) -> dict[int, Option]:
    """By number of the plan, or ``KEEP``."""
    kept = sum(one[0].source.spec.nbytes for one in tensors)
    options = {KEEP: Option(KEEP, kept, 0.0, math.inf)}
    for number, found in enumerate(errors):
        own = [one[number] for one in tensors]
        if not all(tensor.decision.format for tensor in own):
            continue
        error = math.fsum(tensor.source.spec.numel * relative_error(found, name.component, tensor) for tensor in own)
        worst = min(found[name.component, tensor.layer].sqnr_db for tensor in own)
        options[number] = Option(number, sum(tensor.bytes_after for tensor in own), error, worst)
    return options


def _try(
    plan: Plan, options: Mapping[UnitName, Mapping[int, Option]], conditions: Conditions, numbers: Sequence[int]
) -> dict[UnitName, Option] | SizeError:
    """The best choice among the plans of these numbers; the error if there is none."""
    texts = {f"{name.component}\n{name.name}": name for name in options}
    units = [
        Unit(text, [option for number, option in options[name].items() if number == KEEP or number in numbers])
        for text, name in texts.items()
    ]
    fixed = plan.bytes_before - sum(unit.options[0].size for unit in units)
    try:
        chosen = choose(units, conditions, fixed=fixed, before=plan.bytes_before)
    except SizeError as error:
        return error
    return {texts[text]: option for text, option in chosen.items()}


def _nothing(conditions: Conditions, options: Mapping[UnitName, Mapping[int, Option]]) -> str:
    """Why nothing would be quantized."""
    if conditions.sqnr is None:
        return f"{conditions}: allows to keep everything as it is. Give less."
    best = max((option for found in options.values() for option in found.values() if option.number != KEEP), key=_db)
    return f"{conditions}: no layer has that, the best has {best.sqnr_db:.2f} dB. Give less, or other --methods."


def _db(option: Option) -> float:
    return option.sqnr_db


def _worst(unit: ChosenUnit, number: int) -> float:
    return unit.options[number].sqnr_db if number in unit.options else math.inf


def _wanted(tensors: Sequence[tuple[TensorPlan, ...]], number: int) -> Formats:
    return {one[0].layer: None if number == KEEP else one[number].decision.format for one in tensors}


def _weights(tensors: Sequence[tuple[TensorPlan, ...]]) -> int:
    return sum(one[0].source.spec.numel for one in tensors)


def _usual(chosen: Mapping[UnitName, Option], members: _Members) -> int:
    """The plan that most weights follow; of equal ones the first."""
    weights = Counter[int]()
    for name, option in chosen.items():
        if option.number != KEEP:
            weights[option.number] += _weights(members[name])
    return min(weights, key=lambda number: (-weights[number], number))
