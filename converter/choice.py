"""From measured errors to a plan: the choice for every unit, and the plain recipe that says the same."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from omni_convert.converter.choice_recipe import Formats, UnitName, chosen_plan
from omni_convert.converter.choose import Conditions, Hulls, Option, SizeError, Unit, total_error, total_size
from omni_convert.converter.layer_error import LayerError
from omni_convert.converter.measure import Errors
from omni_convert.converter.plan import Plan, TensorPlan
from omni_convert.formats.errors import UsageError
from omni_convert.formats.target import find_target

_NOTHING = "allows to keep everything as it is. Give less."
KEEP = -1
"""In place of a plan's number: the unit stays as it is."""


class ChosenUnit(NamedTuple):
    """``formats``: what its layers become. ``options``: by number of the plan. ``number``: the one that was chosen, or
    ``KEEP``."""

    name: UnitName
    formats: Formats
    weights: int
    options: Mapping[int, Option]
    number: int

    @property
    def chosen(self) -> Option:
        return self.options[self.number]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What becomes of every unit. ``base``: the plan of the usual method, from which ``units`` deviate, and ``usual``
    its number among ``methods``."""

    conditions: Conditions
    methods: tuple[str, ...]
    base: Plan
    usual: int
    units: Sequence[ChosenUnit]

    @cached_property
    def plan(self) -> Plan:
        """Of the conversion, with the recipe that says what was chosen.

        Raises:
            UsageError: nothing of a component would be quantized.
        """
        return chosen_plan(self.base, {unit.name: unit.formats for unit in self.units})

    @property
    def bytes_after(self) -> int:
        """Tensor bytes of the quantized components."""
        return self.base.bytes_before - sum(unit.options[KEEP].size - unit.chosen.size for unit in self.units)

    @property
    def share(self) -> float:
        """Tensor bytes after / before."""
        return self.bytes_after / self.base.bytes_before

    @property
    def lowest_sqnr_db(self) -> float:
        """Of all layers that are quantized."""
        return min(unit.chosen.sqnr_db for unit in self.units)

    @property
    def error(self) -> float:
        """Mean relative squared error of the weights that might be quantized."""
        return total_error(unit.chosen for unit in self.units) / sum(unit.weights for unit in self.units)

    def label(self, unit: ChosenUnit) -> str:
        """What a unit becomes."""
        return "kept" if unit.number == KEEP else self.methods[unit.number]

    def title(self, unit: ChosenUnit) -> str:
        """A unit as reports name it."""
        return ".".join(unit.name) if len(self.base.components) > 1 else unit.name.name

    @property
    def deviating(self) -> list[ChosenUnit]:
        """The units that do not have the usual method, those that lose most with it first."""
        found = [unit for unit in self.units if unit.number != self.usual]
        return sorted(found, key=lambda unit: (_worst(unit, self.usual), unit.name))


class Alternatives:
    """What each of several plans of one checkpoint would make of every unit, and at which error."""

    def __init__(self, methods: tuple[str, ...], plans: Sequence[Plan], errors: Sequence[Errors]) -> None:
        self.methods = methods
        self.plans = plans
        self.mixes = find_target(plans[0].recipe.target).mixes
        self._members = _find_members(plans)
        self._weights = {name: _weights(tensors) for name, tensors in self._members.items()}
        self._units: dict[tuple[UnitName, int], ChosenUnit] = {}
        self._hulls: dict[tuple[Fraction | None, tuple[int, ...]], Hulls] = {}
        self._options = {
            name: _find_options(name.component, tensors, errors) for name, tensors in self._members.items()
        }
        kept = sum(options[KEEP].size for options in self._options.values())
        self._fixed = plans[0].bytes_before - kept

    def choose(self, conditions: Conditions) -> Choice:
        """The best choice among all plans for every unit, or, if the target does not mix methods, one plan for all.

        Raises:
            UsageError: no choice holds the conditions, or the one that does quantizes nothing.
        """
        return self._best(conditions, self._sets)

    @property
    def smallest(self) -> int:
        """Bytes of the smallest choice there is."""

        def size(numbers: Sequence[int]) -> int:
            found = ([options[number].size for number in (KEEP, *numbers) if number in options] for options in units)
            return sum(map(min, found))

        units = self._options.values()
        return self._fixed + min(map(size, self._sets))

    @property
    def _sets(self) -> list[Sequence[int]]:
        """The plans that one choice may take from."""
        numbers = range(len(self.plans))
        return [numbers] if self.mixes else [(number,) for number in numbers]

    def alone(self, number: int) -> Choice:
        """One plan as it is, with nothing kept beyond what it keeps."""
        return self._best(Conditions(), [(number,)])

    def _best(self, conditions: Conditions, sets: Iterable[Sequence[int]]) -> Choice:
        tried = [self._try(conditions, allowed) for allowed in sets]
        found = [chosen for chosen in tried if not isinstance(chosen, SizeError)]
        if not found:
            raise min((error for error in tried if isinstance(error, SizeError)), key=lambda error: error.smallest)
        quantizing = [chosen for chosen in found if any(option.number != KEEP for option in chosen.values())]
        if not quantizing:
            raise UsageError(self._nothing(conditions))
        rank = (total_error, total_size) if conditions.size is not None else (total_size, total_error)
        best = min(quantizing, key=lambda chosen: tuple(measure(chosen.values()) for measure in rank))
        usual = self._usual(best)
        return Choice(
            conditions=conditions,
            methods=self.methods,
            base=self.plans[usual],
            usual=usual,
            units=[self._unit(name, option.number) for name, option in best.items()],
        )

    def _try(self, conditions: Conditions, numbers: Sequence[int]) -> dict[UnitName, Option] | SizeError:
        """The best choice among the plans of these numbers; the error if there is none."""
        hulls = self._hulls_of(conditions.sqnr, tuple(numbers))
        try:
            chosen = hulls.choose(conditions, fixed=self._fixed, before=self.plans[0].bytes_before)
        except SizeError as error:
            return error
        return {name: chosen[_key(name)] for name in self._options}

    def _hulls_of(self, sqnr: Fraction | None, numbers: tuple[int, ...]) -> Hulls:
        if (sqnr, numbers) not in self._hulls:
            units = [
                Unit(_key(name), [option for number, option in options.items() if number in (KEEP, *numbers)])
                for name, options in self._options.items()
            ]
            self._hulls[sqnr, numbers] = Hulls(units, sqnr)
        return self._hulls[sqnr, numbers]

    def _nothing(self, conditions: Conditions) -> str:
        """Why nothing would be quantized."""
        if self.smallest >= self.plans[0].bytes_before:
            return f"{conditions}: no method makes any of the model smaller. Convert without it."
        if conditions.sqnr is None:
            return f"{conditions}: {_NOTHING}"
        best = max(option.sqnr_db for options in self._options.values() for option in options.values() if option.error)
        return f"{conditions}: no layer has that, the best has {best:.2f} dB. Give less, or other --methods."

    def _usual(self, chosen: Mapping[UnitName, Option]) -> int:
        """The plan that most weights follow; of equal ones the first."""
        weights = Counter[int]()
        for name, option in chosen.items():
            if option.number != KEEP:
                weights[option.number] += self._weights[name]
        return min(weights, key=lambda number: (-weights[number], number))

    def _unit(self, name: UnitName, number: int) -> ChosenUnit:
        if (name, number) not in self._units:
            members = self._members[name]
            formats = {one[0].layer: None if number == KEEP else one[number].decision.format for one in members}
            self._units[name, number] = ChosenUnit(name, formats, self._weights[name], self._options[name], number)
        return self._units[name, number]


def _key(name: UnitName) -> str:
    """By which equal steps are sorted."""
    return f"{name.component}\n{name.name}"


def check_conditions(methods: tuple[str, ...], plans: Sequence[Plan], conditions: Conditions) -> None:
    """Refuse what no choice can hold, or only one that quantizes nothing, as far as headers tell.

    Raises:
        UsageError: says which.
    """
    if conditions == Conditions(size=Fraction(1)):
        raise UsageError(f"{conditions}: {_NOTHING}")
    unknown = defaultdict[tuple[str, str], LayerError](lambda: LayerError(signal=0.0, noise=0.0))
    Alternatives(methods, plans, [unknown] * len(plans)).choose(replace(conditions, sqnr=None))


def _find_members(plans: Sequence[Plan]) -> dict[UnitName, list[tuple[TensorPlan, ...]]]:
    """Of every unit that some plan quantizes, the tensors as each plan has them."""
    members: defaultdict[UnitName, list[tuple[TensorPlan, ...]]] = defaultdict(list)
    for parts in zip(*(plan.components for plan in plans), strict=True):
        for tensors in zip(*(part.tensors() for part in parts), strict=True):
            if any(tensor.decision.format for tensor in tensors):
                members[UnitName(parts[0].component.name, tensors[0].group or tensors[0].layer)].append(tensors)
    return dict(members)


def _find_options(
    component: str, tensors: Sequence[tuple[TensorPlan, ...]], errors: Sequence[Errors]
) -> dict[int, Option]:
    """By number of the plan, or ``KEEP``."""
    kept = sum(one[0].source.spec.nbytes for one in tensors)
    options = {KEEP: Option(KEEP, kept, 0.0, math.inf)}
    for number, measured in enumerate(errors):
        own = [one[number] for one in tensors]
        if not all(tensor.decision.format for tensor in own):
            continue
        found = [measured[component, tensor.layer] for tensor in own]
        error = math.fsum(
            tensor.source.spec.numel * layer.noise / layer.signal
            for tensor, layer in zip(own, found, strict=True)
            if layer.signal  # nothing is lost of zeros
        )
        size, worst = sum(tensor.bytes_after for tensor in own), min(layer.sqnr_db for layer in found)
        options[number] = Option(number, size, error, worst)
    return options


def _worst(unit: ChosenUnit, number: int) -> float:
    return unit.options[number].sqnr_db if number in unit.options else math.inf


def _weights(tensors: Sequence[tuple[TensorPlan, ...]]) -> int:
    return sum(one[0].source.spec.numel for one in tensors)
