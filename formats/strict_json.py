"""JSON from files that are not trusted, read member by member.

A parser that builds a whole document first takes thirty times its size for nothing but brackets, and of a name that
appears twice it forgets one. Here the caller says what each value may be before it is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from omni_convert.formats.errors import printable

ReadValue = Callable[[str, str, int], tuple[Any, int]]
"""Given a member's name, the text, and where its value starts: the value, and where it ends."""

_SPACE = re.compile(r"[ \t\n\r]*")


def parse_object(text: str, read: ReadValue) -> dict[str, Any]:
    """The JSON object that is all of ``text``, its values read by ``read``.

    Raises:
        ValueError: not JSON, not an object, or a name appears twice.
        RecursionError: nested too deeply.
    """
    found, end = read_object(text, _skip(text, 0), read)
    if _skip(text, end) != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return found


def read_object(text: str, place: int, read: ReadValue) -> tuple[dict[str, Any], int]:
    """The object that starts at ``place``, and where it ends; raises as ``parse_object`` does."""
    found: dict[str, Any] = {}
    place = _take("{", text, place)
    if text.startswith("}", place):
        return found, place + 1
    while True:
        name, place = read_text("", text, place)
        if name in found:
            raise ValueError(f"the name {printable(name)} appears twice")
        place = _take(":", text, _skip(text, place))
        value, place = read(name, text, place)
        found[name] = value
        place = _skip(text, place)
        if text.startswith("}", place):
            return found, place + 1
        place = _take(",", text, place)


def read_text(_: str, text: str, place: int) -> tuple[str, int]:
    """A ``ReadValue`` for text alone."""
    if not text.startswith('"', place):
        raise json.JSONDecodeError("Expecting text in double quotes", text, place)
    value, end = _DECODER.raw_decode(text, place)
    return value, end


def read_value(_: str, text: str, place: int) -> tuple[Any, int]:
    """A ``ReadValue`` for whatever is JSON."""
    return _DECODER.raw_decode(text, place)


def _skip(text: str, place: int) -> int:
    """Where the next character stands that is no white space."""
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _take(char: str, text: str, place: int) -> int:
    """Where the next token starts after ``char``, which must stand at ``place``."""
    if not text.startswith(char, place):
        raise json.JSONDecodeError(f"Expecting '{char}'", text, place)
    return _skip(text, place + 1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"one of the names {printable(', '.join(found))} appears twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
