"""The one error root of the package."""

from __future__ import annotations


class OmniConvertError(Exception):
    """Something the user can act on: names the file or tensor, what was found, what was expected, what to do."""


class UsageError(OmniConvertError):
    """The request itself is wrong (an option, a pattern, a combination): the command line exits with 2."""
