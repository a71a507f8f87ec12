"""What it costs that layers which an engine fuses have one scale in place of one per row."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from omni_convert.converter.plan import Plan, TensorPlan

_QUANTILES = 64


@dataclass(frozen=True, kw_only=True)
class SharedScales:
    """The layers that share a scale. ``expected_db``: lost on average, were the weights normally distributed."""

    layers: Sequence[str]
    groups: int
    expected_db: float

    def to_dict(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "groups": self.groups, "expected_db": round(self.expected_db, 2)}

    def to_text(self) -> str:
        """One line of the plan's table."""
        return (
            f"{len(self.layers)} layers in {self.groups} fused groups: about {self.expected_db:.1f} dB less if weights "
            "are normal (not on NPUs alone: --fused-scale per-channel)"
        )


def shared_scales(plan: Plan) -> SharedScales | None:
    """The layers of a plan that share a scale; None if there are none."""
    groups: dict[tuple[str, str], list[TensorPlan]] = defaultdict(list)
    for part in plan.components:
        for tensor in part.tensors():
            if tensor.decision.format and tensor.decision.format.is_fused:
                groups[part.component.name, tensor.scale_group or tensor.layer].append(tensor)
    if not groups:
        return None
    costs = [_expected_db(tensors) for tensors in groups.values()]
    layers = [tensor.layer for tensors in groups.values() for tensor in tensors]
    return SharedScales(layers=layers, groups=len(groups), expected_db=sum(costs) / len(costs))


def _expected_db(tensors: Iterable[TensorPlan]) -> float:
    """Noise grows with the square of the scale: from the largest weight of a row to that of the group."""
    shapes = [tensor.source.spec.shape for tensor in tensors]
    columns = shapes[0][1]
    return 10 * math.log10(_largest_square(sum(rows for rows, _ in shapes) * columns) / _largest_square(columns))


@cache
def _largest_square(count: int) -> float:
    """Mean square of the largest magnitude of ``count`` normally distributed numbers."""
    from statistics import NormalDist

    quantiles = ((place + 0.5) / _QUANTILES for place in range(_QUANTILES))
    return sum(NormalDist().inv_cdf((1 + q ** (1 / count)) / 2) ** 2 for q in quantiles) / _QUANTILES
