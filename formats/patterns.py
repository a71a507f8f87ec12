"""Rules over layer names, as people write them."""

from __future__ import annotations

import fnmatch
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from omni_convert.formats.errors import UsageError

_CORE = 8


def parts_of_names(candidates: Collection[str], names: Collection[str]) -> set[str]:
    """Those of ``candidates`` that are a part of any of ``names``: anywhere, also within a word.

    What lies between the dots of a candidate must lie between dots of the name, so that only few are compared.
    """
    by_core: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for candidate in candidates:
        by_core[tuple(candidate.split(".")[1:-1][:_CORE])].append(candidate)
    text = "\n".join(names)
    found = {candidate for candidate in by_core.pop((), ()) if candidate in text}
    for name in names if by_core else ():
        inner = name.split(".")[1:-1]
        for start in range(len(inner)):
            for stop in range(start + 1, min(start + _CORE, len(inner)) + 1):
                found.update(part for part in by_core.get(tuple(inner[start:stop]), ()) if part in name)
    return found


@dataclass(frozen=True)
class Pattern:
    """A rule over layer names: ``re:`` regular expression (searched), glob (whole name), or substring.

    ``str(Pattern(text)) == text``.
    """

    text: str
    _regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.text or self.text == "re:":
            raise UsageError("found an empty pattern, expected a part of a layer name, such as img_mlp.")
        object.__setattr__(self, "_regex", self._compile())

    def __str__(self) -> str:
        return self.text

    @property
    def is_plain(self) -> bool:
        """Whether it is a part of a name, as it stands."""
        return not self.text.startswith("re:") and not any(char in self.text for char in "*?[")

    def matches(self, name: str) -> bool:
        return self._regex.search(name) is not None

    def _compile(self) -> re.Pattern[str]:
        if self.text.startswith("re:"):
            try:
                return re.compile(self.text[3:])
            except re.error as error:
                raise UsageError(f"pattern {self.text}: not a regular expression ({error}).") from error
        if self.is_plain:
            return re.compile(re.escape(self.text))
        return re.compile(rf"\A{fnmatch.translate(self.text)}")


class Names:
    """Names to match patterns with: thousands of plain ones, as a recipe may have, cost no more than a text search."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted(set(names))
        self._text = "\n".join(self._names)
        self._starts = [0, *accumulate(len(name) + 1 for name in self._names)]

    def matching(self, pattern: Pattern) -> list[str]:
        """Those that it matches."""
        if not pattern.is_plain:
            return [name for name in self._names if pattern.matches(name)]
        found = []
        at = self._text.find(pattern.text)
        while at >= 0:
            place = bisect_right(self._starts, at) - 1
            if pattern.text in self._names[place]:  # and does not reach into the next
                found.append(self._names[place])
            at = self._text.find(pattern.text, self._starts[place + 1])
        return found
