"""Which layer names are found inside others."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from omni_convert.formats.patterns import Names, Pattern, parts_of_names

NAMES = st.lists(st.text("ab1.", min_size=1, max_size=12), max_size=6)


@given(NAMES, NAMES)
def test_parts_are_those_that_a_search_finds(candidates: list[str], names: list[str]) -> None:
    assert parts_of_names(candidates, names) == {part for part in candidates if any(part in name for name in names)}


def test_parts_of_long_names() -> None:
    name = ".".join(map(str, range(100)))
    parts = {name, name[:-1], name[1:], ".".join(map(str, range(20, 90)))}
    assert parts_of_names({*parts, f"{name}0", name.replace(".50.", ".5.")}, [name]) == parts


@settings(deadline=None)
@given(st.lists(st.text("ab.\n*", max_size=6), max_size=8), st.text("ab.\n*", min_size=1, max_size=3))
def test_many_names_at_once(names: list[str], text: str) -> None:
    pattern = Pattern(text)
    assert Names(names).matching(pattern) == sorted({name for name in names if pattern.matches(name)})
