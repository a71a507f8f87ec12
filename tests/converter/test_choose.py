"""Conditions and the greedy choice, beside every choice there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_convert.converter.choose import (
    Conditions,
    Hulls,
    Option,
    SizeError,
    Unit,
    parse_conditions,
    total_error,
    total_size,
)
from omni_convert.formats.errors import UsageError

FIXED = 7


def unit(name: str, kept: int, *formats: tuple[int, float]) -> Unit:
    """``formats``: size and error; of 10 weights each."""
    options = [Option(-1, kept, 0.0, math.inf)]
    for number, (size, error) in enumerate(formats):
        options.append(Option(number, size, error, -10 * math.log10(error / 10) if error else math.inf))
    return Unit(name, options)


def choose(units: Sequence[Unit], conditions: Conditions, *, fixed: int, before: int) -> dict[str, Option]:
    hulls = Hulls(units, conditions.sqnr)
    chosen = hulls.choose(conditions, fixed=fixed, before=before)
    assert hulls.choose(conditions, fixed=fixed, before=before) == chosen
    return chosen


def before(units: Sequence[Unit]) -> int:
    return FIXED + sum(item.options[0].size for item in units)


def every_choice(units: Sequence[Unit], conditions: Conditions) -> list[tuple[Option, ...]]:
    """Those that hold the conditions."""
    limit = math.inf if conditions.size is None else conditions.size * before(units)
    lowest = 0 if conditions.sqnr is None else conditions.sqnr
    found = itertools.product(*(item.options for item in units))
    return [
        options
        for options in found
        if FIXED + sum(option.size for option in options) <= limit
        and all(option.number < 0 or option.sqnr_db >= lowest for option in options)
    ]


@st.composite
def models(draw: st.DrawFn) -> list[Unit]:
    units = []
    for number in range(draw(st.integers(1, 4))):
        kept = draw(st.integers(1, 40))
        sizes = draw(st.lists(st.integers(1, 40), max_size=3))
        errors = draw(st.lists(st.floats(0, 5, width=16), min_size=len(sizes), max_size=len(sizes)))
        units.append(unit(f"unit {number}", kept, *zip(sizes, errors, strict=True)))
    return units


conditions = st.builds(
    Conditions,
    sqnr=st.none() | st.fractions(0, 40, max_denominator=4),
    size=st.none() | st.fractions(0, 1, max_denominator=50).filter(bool),
)


@settings(max_examples=300, deadline=None)
@given(models(), conditions)
def test_beside_every_choice(units: list[Unit], asked: Conditions) -> None:
    possible = every_choice(units, asked)
    try:
        chosen = choose(units, asked, fixed=FIXED, before=before(units))
    except SizeError as error:
        assert not possible
        assert error.smallest == min(
            FIXED + sum(option.size for option in options)
            for options in every_choice(units, Conditions(sqnr=asked.sqnr))
        )
        return
    assert tuple(chosen[item.name] for item in units) in possible
    found = total_error(chosen.values())
    if asked.size is None:
        assert total_size(chosen.values()) == min(total_size(options) for options in possible)
        return
    best = min(total_error(options) for options in possible)
    largest = max(option.error for item in units for option in item.options)  # no step reduces more
    assert best - 1e-9 <= found <= best + largest + 1e-9


@settings(max_examples=200, deadline=None)
@given(models(), conditions)
def test_the_order_of_units_does_not_count(units: list[Unit], asked: Conditions) -> None:
    def found(order: Sequence[Unit]) -> object:
        try:
            return choose(order, asked, fixed=FIXED, before=before(units))
        except SizeError as error:
            return str(error)

    assert found(units) == found(units[::-1])


def test_the_worst_per_byte_are_kept_first() -> None:
    units = [unit("large", 200, (100, 4.0)), unit("bad", 20, (10, 3.0)), unit("good", 20, (10, 0.1))]
    kept = {}
    for size in (127, 137, 237, 247):
        chosen = choose(units, Conditions(size=Fraction(size, 247)), fixed=FIXED, before=247)
        kept[size] = {name for name, option in chosen.items() if option.number < 0}
    assert kept == {127: set(), 137: {"bad"}, 237: {"bad", "large"}, 247: {"bad", "large", "good"}}


def test_a_step_that_no_longer_fits_leaves_room_for_smaller_ones() -> None:
    units = [unit("large", 200, (100, 9.0)), unit("small", 20, (10, 0.1))]
    chosen = choose(units, Conditions(size=Fraction(130, 227)), fixed=FIXED, before=227)
    assert {name: option.number for name, option in chosen.items()} == {"large": 0, "small": -1}


def test_what_lies_above_a_step_that_does_not_fit_is_out_of_reach() -> None:
    units = [unit("a", 110, (10, 9.0), (100, 0.1))]  # the last step alone would fit
    chosen = choose(units, Conditions(size=Fraction(37, 117)), fixed=FIXED, before=117)
    assert chosen["a"].number == 0


def test_an_option_beside_the_hull_is_skipped() -> None:
    units = [unit("a", 30, (10, 3.0), (20, 2.9)), unit("b", 20, (10, 1.0))]
    chosen = choose(units, Conditions(size=Fraction(47, 57)), fixed=FIXED, before=57)
    assert {name: option.number for name, option in chosen.items()} == {"a": -1, "b": 0}


def test_equal_units_go_by_name() -> None:
    units = [unit(name, 20, (10, 1.0)) for name in ("b", "a", "c")]
    chosen = choose(units, Conditions(size=Fraction(47, 67)), fixed=FIXED, before=67)
    assert {name for name, option in chosen.items() if option.number < 0} == {"a"}


def test_the_cheapest_method_that_reaches_an_error() -> None:
    units = [unit("a", 40, (20, 0.001), (10, 1.0)), unit("b", 40, (20, 0.1), (10, 1.0))]
    chosen = choose(units, Conditions(sqnr=Fraction(30)), fixed=FIXED, before=before(units))
    assert {name: option.number for name, option in chosen.items()} == {"a": 0, "b": -1}
    both = Conditions(sqnr=Fraction(30), size=Fraction(1, 2))
    with pytest.raises(
        SizeError, match=r'--auto-ignore "sqnr>=30" and --budget "size<=0.5": .* 67 of .* 87 .*<=0.7702'
    ):
        choose(units, both, fixed=FIXED, before=before(units))


@pytest.mark.parametrize("text", ["sqnr>=30", " sqnr >= 30 ", "sqnr>=30.0"])
def test_conditions(text: str) -> None:
    found = parse_conditions(text, "size<=0.55")
    assert found == Conditions(sqnr=Fraction(30), size=Fraction(11, 20))
    assert str(found) == '--auto-ignore "sqnr>=30" and --budget "size<=0.55"'
    assert parse_conditions(None, None) is None


@pytest.mark.parametrize("text", ["sqnr>30", "sqnr<=30", "sqnr>=x", "sqnr>=-1", "30", "", "sqnr>=1e3", "size<=0.5"])
def test_other_spellings_of_auto_ignore(text: str) -> None:
    with pytest.raises(UsageError, match=r"--auto-ignore is .* expected sqnr>=DECIBELS, as in sqnr>=30"):
        parse_conditions(text, None)


@pytest.mark.parametrize("text", ["size<0.5", "size>=0.5", "0.5", "size<=55%", "size<=0", "size<=1.5", "sqnr>=3"])
def test_other_spellings_of_budget(text: str) -> None:
    with pytest.raises(UsageError, match=r"--budget is .* expected "):
        parse_conditions(None, text)
