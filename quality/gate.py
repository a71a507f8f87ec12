"""Gates: thresholds that single metrics must meet. There is no score that consolidates them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omni_convert.formats.errors import UsageError
from omni_convert.quality.similarity import GENERATION, LANGUAGE, METRICS, PERCEPTUAL

GATES: Mapping[str, str] = {
    "smoke": "psnr_db>=20,mae<=12,cosine_similarity>=0.98,relative_l2<=0.20",
    "strict": "psnr_db>=25,mae<=6,cosine_similarity>=0.995,relative_l2<=0.08",
}
"""Starting points for pictures of one seed, as vLLM-Omni's guide recommends them. Tune them by model and method."""

_KNOWN = {**METRICS, **PERCEPTUAL, **LANGUAGE, **GENERATION}
_CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=)\s*([-+.\w]+)\s*")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """``str`` is what ``parse_gate`` reads."""

    metric: str
    limit: float

    @property
    def sign(self) -> str:
        return ">=" if _KNOWN[self.metric].higher_is_better else "<="

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.limit:g}"

    def check(self, value: float, where: str) -> Checked:
        """``where``: what has this value, such as a prompt."""
        return Checked(condition=self, value=value, where=where)


@dataclass(frozen=True, kw_only=True)
class Checked:
    condition: Condition
    value: float
    where: str

    @property
    def margin(self) -> float:
        """By how much the limit is met; negative: missed."""
        over = self.value - self.condition.limit
        return over if self.condition.sign == ">=" else -over

    @property
    def ok(self) -> bool:
        return self.margin >= 0

    def __str__(self) -> str:
        verb = "meets" if self.ok else "misses"
        value = "unknown" if math.isnan(self.value) else f"{self.value:.6g}"
        text = f"{self.condition.metric} {value} {verb} {self.condition.sign} {self.condition.limit:g}"
        margin = f" by {abs(self.margin):.3g}" if math.isfinite(self.margin) else ""
        return f"{text}{margin} ({self.where})"

    def to_dict(self) -> dict[str, Any]:
        value, margin = (number if math.isfinite(number) else None for number in (self.value, self.margin))
        return {"condition": str(self.condition), "where": self.where, "value": value, "margin": margin, "ok": self.ok}


def parse_gate(text: str) -> tuple[Condition, ...]:
    """Conditions such as ``psnr_db>=25,mae<=6``, and the names in ``GATES``, separated by commas.

    Raises:
        UsageError: an unknown name or metric, no number, or a comparison that a better value would fail.
    """
    conditions: list[Condition] = []
    for part in text.split(","):
        if part.strip() in GATES:
            conditions += parse_gate(GATES[part.strip()])
        else:
            conditions.append(_condition(part))
    return tuple(conditions)


def _condition(text: str) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--gate has {text.strip()!r}, expected {' or '.join(GATES)}, or conditions such as psnr_db>=25,mae<=6."
        )
    name, sign, number = match.groups()
    if name not in _KNOWN:
        raise UsageError(f"--gate has the metric {name!r}, expected one of {', '.join(_KNOWN)}.")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise UsageError(f"--gate compares {name} with {number!r}, expected a number.")
    condition = Condition(metric=name, limit=limit)
    if sign != condition.sign:
        better = "higher" if condition.sign == ">=" else "lower"
        raise UsageError(f"--gate has {text.strip()!r}, expected {condition}: {name} is better when it is {better}.")
    return condition
