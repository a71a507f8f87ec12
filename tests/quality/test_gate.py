"""Gates: what they read, what they refuse, and what they say of a miss."""

from __future__ import annotations

import math

import pytest

from omni_convert import UsageError
from omni_convert.quality.gate import GATES, parse_gate

SMOKE = {"psnr_db": 20.0, "mae": 12.0, "cosine_similarity": 0.98, "relative_l2": 0.20}
STRICT = {"psnr_db": 25.0, "mae": 6.0, "cosine_similarity": 0.995, "relative_l2": 0.08}


@pytest.mark.parametrize(("name", "limits"), [("smoke", SMOKE), ("strict", STRICT)])
def test_named_gates(name: str, limits: dict[str, float]) -> None:
    assert {condition.metric: condition.limit for condition in parse_gate(name)} == limits


def test_conditions() -> None:
    found = parse_gate(" psnr_db >= 25 ,mae<=6,max_peak_memory_mb<=1e4")
    assert [str(condition) for condition in found] == ["psnr_db>=25", "mae<=6", "max_peak_memory_mb<=10000"]
    assert parse_gate(",".join(map(str, found))) == found
    assert parse_gate("smoke,lpips<=0.1") == (*parse_gate(GATES["smoke"]), *parse_gate("lpips<=0.1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected smoke or strict"),
        ("psnr_db", "expected smoke or strict"),
        ("psnr_db>25", "expected smoke or strict"),
        ("quality>=1", "metric 'quality', expected one of psnr_db"),
        ("psnr_db>=high", "psnr_db with 'high', expected a number"),
        ("mae<=nan", "mae with 'nan', expected a number"),
        ("psnr_db<=25", "expected psnr_db>=25: psnr_db is better when it is higher"),
        ("mae>=6", "expected mae<=6: mae is better when it is lower"),
    ],
)
def test_wrong_gates_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_gate(text)


@pytest.mark.parametrize(
    ("text", "value", "ok", "says"),
    [
        ("psnr_db>=25", 25.0, True, "psnr_db 25 meets >= 25 by 0 (prompt 1)"),
        ("psnr_db>=25", 22.5, False, "psnr_db 22.5 misses >= 25 by 2.5 (prompt 1)"),
        ("psnr_db>=25", math.inf, True, "psnr_db inf meets >= 25 (prompt 1)"),
        ("mae<=6", 7.25, False, "mae 7.25 misses <= 6 by 1.25 (prompt 1)"),
        ("mae<=6", 0.0, True, "mae 0 meets <= 6 by 6 (prompt 1)"),
        ("max_peak_memory_mb<=6", math.nan, False, "max_peak_memory_mb unknown misses <= 6 (prompt 1)"),
    ],
)
def test_checks_say_by_how_much(text: str, value: float, ok: bool, says: str) -> None:
    (condition,) = parse_gate(text)
    checked = condition.check(value, "prompt 1")
    assert (checked.ok, str(checked)) == (ok, says)
    assert checked.to_dict()["value"] == (value if math.isfinite(value) else None)
