"""Choose what to make of every unit of a model: the least error within a size, or the least size within an error.

A unit is what an engine quantizes as a whole or not at all: a layer, or all that it fuses. Its options are to stay as
it is, and the formats that it may have. The error of a choice is the mean, over all weights that might be quantized, of
their layer's relative squared error: noise / signal, 10**(-SQNR / 10). How large weights are does not count, since what
follows a layer is scaled to it; how many there are does. So what a byte saves is a layer's relative error itself, and
bytes go to the worst layers, large or small.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from omni_convert.formats.errors import UsageError, printable

_SQNR = re.compile(r"sqnr>=(\d+(?:\.\d+)?)", re.ASCII)
_SIZE = re.compile(r"size<=(\d+(?:\.\d+)?)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a choice must hold: ``sqnr``, the least dB of every layer that is quantized; ``size``, the most tensor bytes
    of the quantized components, as a share of the source's."""

    sqnr: Fraction | None = None
    size: Fraction | None = None

    def __str__(self) -> str:
        return " and ".join(self.flags)

    @property
    def flags(self) -> list[str]:
        """As they are typed."""
        found = [f'--auto-ignore "sqnr>={_decimal(self.sqnr)}"'] if self.sqnr is not None else []
        return found + ([f'--budget "size<={_decimal(self.size)}"'] if self.size is not None else [])


class SizeError(UsageError):
    """No choice is as small as asked. ``smallest``: bytes of the smallest there is."""

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


class Option(NamedTuple):
    """One thing that a unit may become. ``number``: of the format, or -1 to stay. ``error``: of ``Unit``'s weights the
    sum of their relative squared errors. ``sqnr_db``: of its worst layer."""

    number: int
    size: int
    error: float
    sqnr_db: float


class Unit(NamedTuple):
    """``options``: the first is to stay as it is, without error."""

    name: str
    options: Sequence[Option]


class _Step(NamedTuple):
    """From one option of a unit to a larger one with less error; sorted, the best error reduction per byte first."""

    cost: float
    name: str
    size: int
    option: Option


def parse_conditions(auto_ignore: str | None, budget: str | None) -> Conditions | None:
    """``sqnr>=DECIBELS`` and ``size<=SHARE``; None without either.

    Raises:
        UsageError: one is spelled otherwise.
    """
    if auto_ignore is None and budget is None:
        return None
    sqnr = _number("--auto-ignore", auto_ignore, _SQNR, "sqnr>=DECIBELS, as in sqnr>=30")
    size = _number("--budget", budget, _SIZE, "size<=SHARE of the source's bytes, as in size<=0.55")
    if size is not None and not 0 < size <= 1:
        raise UsageError(f"--budget is {budget!r}, expected a share of the source's bytes above 0 and up to 1.")
    return Conditions(sqnr=sqnr, size=size)


class Hulls:
    """What every unit may become, with an SQNR or without: its options on the convex hull of size and error.

    Asked for several sizes, it sorts the steps once.
    """

    def __init__(self, units: Iterable[Unit], sqnr: Fraction | None) -> None:
        self._hulls = {unit.name: _allowed(unit, sqnr) for unit in units}

    @cached_property
    def _steps(self) -> list[_Step]:
        return sorted(step for name, hull in self._hulls.items() for step in _steps(name, hull))

    def choose(self, conditions: Conditions, *, fixed: int, before: int) -> dict[str, Option]:
        """Unit -> option, such that all ``conditions`` hold, whose SQNR is that of the hulls.

        Every unit begins with its smallest option. Within a size, steps up each unit's hull are then taken, the best
        error reduction per byte first (of equal ones by name); one that no longer fits is left out, with all after it
        of that unit. The error is at most that of the best choice there is plus the reduction of the first step that
        was left out.

        Args:
            fixed: bytes of the quantized components that are in no unit.
            before: all of their bytes in the source.

        Raises:
            SizeError: the smallest choice is larger than the size.
        """
        chosen = {name: hull[0] for name, hull in self._hulls.items()}
        if conditions.size is None:
            return chosen
        smallest = fixed + sum(option.size for option in chosen.values())
        left = math.floor(conditions.size * before) - smallest
        if left < 0:
            given = " in which every quantized layer has that SQNR" if conditions.sqnr is not None else ""
            raise SizeError(
                f"{conditions}: the smallest choice{given} takes {smallest} of the source's {before} bytes "
                f"(size<={_rounded_up(smallest, before)}). Allow more, ignore less, or give --methods that are "
                "smaller.",
                smallest,
            )
        closed: set[str] = set()
        for step in self._steps:
            if step.name in closed or step.size > left:
                closed.add(step.name)
                continue
            left -= step.size
            chosen[step.name] = step.option
        return chosen


def total_error(chosen: Iterable[Option]) -> float:
    """Sum over the weights of their relative squared errors."""
    return math.fsum(option.error for option in chosen)


def total_size(chosen: Iterable[Option]) -> int:
    return sum(option.size for option in chosen)


def _allowed(unit: Unit, sqnr: Fraction | None) -> list[Option]:
    """Options that have the SQNR, on the lower convex hull of size and error: the smallest first."""
    good = [option for option in unit.options if sqnr is None or option.number < 0 or option.sqnr_db >= sqnr]
    hull: list[Option] = []
    for option in sorted(good, key=lambda option: (option.size, option.error, option.number < 0, option.number)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _cost(hull[-2], hull[-1]) >= _cost(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _cost(lower: Option, upper: Option) -> float:
    """Error per byte of a step up, negative: it is less."""
    return (upper.error - lower.error) / (upper.size - lower.size)


def _steps(name: str, hull: Sequence[Option]) -> Iterator[_Step]:
    for lower, upper in pairwise(hull):
        yield _Step(_cost(lower, upper), name, upper.size - lower.size, upper)


def _number(flag: str, text: str | None, pattern: re.Pattern[str], expected: str) -> Fraction | None:
    if text is None:
        return None
    match = pattern.fullmatch("".join(text.split())) if isinstance(text, str) else None
    if match is None:
        raise UsageError(f"{flag} is {printable(text)!r}, expected {expected}.")
    return Fraction(match[1])


def _decimal(number: Fraction) -> str:
    """All digits of what was typed as a decimal."""
    with localcontext(Context(prec=100)):
        return f"{Decimal(number.numerator) / number.denominator:f}"


def _rounded_up(part: int, whole: int) -> str:
    """A share with four digits that is no less."""
    return f"{math.ceil(Fraction(part, whole) * 10_000) / 10_000:g}"
