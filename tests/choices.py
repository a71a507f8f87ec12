"""Every format with every choice that changes what it computes."""

from __future__ import annotations

from typing import Any

import pytest

from omni_convert.formats import format_label, make_format
from omni_convert.formats.base import Facts

FACTS = Facts(input_scale=0.25)
CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}),
    ("int8", {"quality": "balanced"}),
    ("int8", {"fused_scale": "per-channel"}),
    ("fp8", {}),
    ("fp8", {"activation_scheme": "static"}),
    ("fp8", {"granularity": "channel"}),
    ("fp8", {"granularity": "channel", "quality": "balanced"}),
    ("fp8", {"block_size": (2, 64)}),
    ("fp8", {"block_size": (2, 64), "quality": "balanced"}),
    ("mxfp8", {}),
    ("mxfp8", {"scale_rule": "floor"}),
    ("mxfp4", {}),
    ("mxfp4", {"quality": "balanced"}),
    ("mxfp4_dualscale", {}),
    ("mxfp4_dualscale", {"quality": "balanced"}),
]
MADE = [make_format(method, **options) for method, options in CHOICES]
FUSED = [make_format("int8").fused(), make_format("int8", quality="balanced").fused()]
every = pytest.mark.parametrize("fmt", MADE + FUSED, ids=format_label)
