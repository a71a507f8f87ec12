"""Every kind of format, by what engines call it."""

from __future__ import annotations

from typing import Any

from omni_convert.formats import make_format
from omni_convert.formats.base import Format

CHOICES: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "fp8 tensor": {"method": "fp8"},
    "fp8 static": {"method": "fp8", "activation_scheme": "static"},
    "fp8 channel": {"method": "fp8", "granularity": "channel"},
    "fp8 block": {"method": "fp8", "block_size": (16, 32)},
    "mxfp8": {"method": "mxfp8"},
    "mxfp4": {"method": "mxfp4"},
    "mxfp4_dualscale": {"method": "mxfp4_dualscale"},
}
KINDS: dict[str, Format] = {kind: make_format(**choices) for kind, choices in CHOICES.items()}
