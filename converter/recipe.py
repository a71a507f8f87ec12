"""What the user asked for. Command line, Python API and manifest all end in this one value."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from omni_convert.formats import FORMATS
from omni_convert.formats.base import Format
from omni_convert.formats.errors import UsageError


@dataclass(frozen=True)
class Pattern:
    """A rule over layer names: ``re:`` regular expression (searched), glob (whole name), or substring.

    ``str(Pattern(text)) == text``.
    """

    text: str
    _regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.text or self.text == "re:":
            raise UsageError("--ignore got an empty pattern, expected a part of a layer name, such as img_mlp.")
        object.__setattr__(self, "_regex", self._compile())

    def __str__(self) -> str:
        return self.text

    def matches(self, name: str) -> bool:
        return self._regex.search(name) is not None

    def _compile(self) -> re.Pattern[str]:
        if self.text.startswith("re:"):
            try:
                return re.compile(self.text[3:])
            except re.error as error:
                raise UsageError(f"--ignore {self.text}: not a regular expression ({error}).") from error
        if any(char in self.text for char in "*?["):
            return re.compile(rf"\A{fnmatch.translate(self.text)}")
        return re.compile(re.escape(self.text))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One conversion: the format, the layers to keep, the pipeline components to quantize (empty: the default)."""

    method: str
    ignore: tuple[Pattern, ...] = ()
    components: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in FORMATS:
            raise UsageError(f"--method is {self.method!r}, expected one of {', '.join(FORMATS)}.")

    @property
    def format(self) -> Format:
        return FORMATS[self.method]

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "ignore": [str(pattern) for pattern in self.ignore],
            "components": list(self.components),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        return cls(
            method=data["method"],
            ignore=tuple(map(Pattern, data["ignore"])),
            components=tuple(data["components"]),
        )


def check_patterns(patterns: Iterable[Pattern], layers: Collection[str]) -> None:
    """Every pattern must match a layer.

    Raises:
        UsageError: one matches nothing; shows the closest names.
    """
    for pattern in patterns:
        if not any(pattern.matches(layer) for layer in layers):
            close = closest_names(pattern.text, layers)
            raise UsageError(
                f"--ignore {pattern}: no layer of the model matches. "
                + (f"The closest names are {', '.join(close)}. " if close else "")
                + "A pattern is a part of a layer's name, a glob over the whole name, or re:REGEX; "
                "--dry-run lists the layers."
            )


def closest_names(text: str, layers: Iterable[str], count: int = 3) -> list[str]:
    """The parts of layer names, or whole names with numbers as ``*``, that resemble ``text`` most."""
    candidates: set[str] = set()
    for layer in layers:
        candidates.add(re.sub(r"\d+", "*", layer))
        candidates.update(part for part in layer.split(".") if not part.isdigit())
    wanted = text.removeprefix("re:").removesuffix(".weight").casefold()
    by_folded = {candidate.casefold(): candidate for candidate in sorted(candidates)}
    return [by_folded[name] for name in difflib.get_close_matches(wanted, by_folded, n=count, cutoff=0)]
