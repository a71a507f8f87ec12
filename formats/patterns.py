"""Rules over layer names, as people write them."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field

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
            raise UsageError("found an empty pattern, expected a part of a layer name, such as img_mlp.")
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
                raise UsageError(f"pattern {self.text}: not a regular expression ({error}).") from error
        if any(char in self.text for char in "*?["):
            return re.compile(rf"\A{fnmatch.translate(self.text)}")
        return re.compile(re.escape(self.text))
