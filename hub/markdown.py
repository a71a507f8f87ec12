"""Names and texts of files in Markdown, without a meaning there."""

from __future__ import annotations

import re

from omni_convert.formats.errors import printable


def as_code(text: str) -> str:
    """Text of a file as code in a cell; it can end neither."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def as_text(text: str) -> str:
    """Text of a file as text in a cell, without meaning to Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~&])", r"\\\1", printable(text, 300))
