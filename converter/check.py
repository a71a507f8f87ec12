"""One property of an output, checked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One property, and every way in which it does not hold."""

    name: str
    checked: str
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems
