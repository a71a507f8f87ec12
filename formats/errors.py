"""The one error root of the package."""

from __future__ import annotations


class OmniConvertError(Exception):
    """Something the user can act on: names the file or tensor, what was found, what was expected, what to do."""


class UsageError(OmniConvertError):
    """The request itself is wrong (an option, a pattern, a combination): the command line exits with 2."""


class SourceError(OmniConvertError):
    """The source holds what no run can convert, or changes meanwhile: what was written of it is of no use."""


def printable(value: object, limit: int = 120) -> str:
    """Text from a file that is not trusted, fit for one line of a message: escaped where it cannot be printed, and cut
    after ``limit``."""
    text = value if isinstance(value, str) else repr(value)
    if not text.isprintable():
        text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
