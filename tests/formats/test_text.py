"""Tables and units."""

from __future__ import annotations

import pytest

from omni_convert.formats.errors import printable
from omni_convert.formats.text import format_bytes, format_table


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.54 kB"), (40_860_000_000, "40.9 GB"), (2e15, "2e+03 TB")],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_format_table() -> None:
    rows = [["name", "size"], ["a", "1 B"], ["longer", "999 kB"]]
    assert format_table(rows, right=[1]).splitlines() == [
        "name      size",
        "------  ------",
        "a          1 B",
        "longer  999 kB",
    ]
    assert format_table(rows[1:], header=False).splitlines() == ["a       1 B", "longer  999 kB"]


def test_only_what_cannot_be_printed_is_escaped() -> None:
    assert printable("湯\u3000気\n\u202e\udcff é") == "湯\\u3000気\\n\\u202e\\udcff é"
    assert printable("é" * 200, 10) == f"{'é' * 10}... (200 characters)"
