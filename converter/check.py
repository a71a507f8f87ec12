"""One property of an output, checked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One property, and every way in which it does not hold. ``known``: False if it could not be judged."""

    name: str
    checked: str
    problems: tuple[str, ...]
    known: bool = True

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def result(self) -> str:
        """In one or two words."""
        if not self.ok:
            return "FAILED"
        return "ok" if self.known else "not known"
