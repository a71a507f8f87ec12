"""What ``compare --trace-layers --output-json`` wrote, read back for the layer report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.layout import read_json
from omni_convert.quality.layers import Conversion


def read_trace(path: Path, done: Conversion) -> dict[str, float]:
    """``Layer.full_name`` -> SQNR of its output on real activations, in dB; infinite if exact.

    Raises:
        OmniConvertError: no such file, or not a trace of this conversion's layers.
    """
    if not path.is_file():
        raise OmniConvertError(f"{path}: is not a file, expected the result of compare --trace-layers --output-json.")
    entries = read_json(path).get("trace")
    try:
        found = {str(entry["layer"]): _sqnr(entry) for entry in entries or ()}
    except (TypeError, KeyError, ValueError) as error:
        raise OmniConvertError(
            f"{path}: its trace is damaged ({error!r}), expected layers with their sqnr_db. Run compare again."
        ) from error
    if not found.keys() & {layer.full_name for layer in done.quantized}:
        raise OmniConvertError(
            f"{path}: traces no quantized layer of {done.path}, expected the result of compare --trace-layers "
            "--output-json with this conversion, or with its method, as the candidate."
        )
    return found


def _sqnr(entry: Mapping[str, Any]) -> float:
    value = entry["sqnr_db"]
    return math.inf if value is None else float(value)
