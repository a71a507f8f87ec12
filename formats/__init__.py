"""What a quantized weight is: one file per format, the config that announces it, the kernels that make it."""

from __future__ import annotations

from collections.abc import Mapping

from omni_convert.formats.base import Format
from omni_convert.formats.int8 import Int8

FORMATS: Mapping[str, Format] = {fmt.name: fmt for fmt in (Int8(),)}
"""Every format by its ``quant_method``."""
