"""What a quantized weight is: one file per format, the config that announces it, the kernels that make it."""

from __future__ import annotations

from collections.abc import Mapping

from omni_convert.formats.base import Format
from omni_convert.formats.int8 import Int8
from omni_convert.formats.mxfp4 import MXFP4
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.mxfp8 import MXFP8

FORMATS: Mapping[str, Format] = {fmt.name: fmt for fmt in (Int8(), MXFP8, MXFP4, Mxfp4DualScale())}
"""Every format by its ``quant_method``."""
