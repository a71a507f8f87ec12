"""What ``compare --trace-layers --output-json`` wrote, read back for the layer report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_convert.formats.errors import OmniConvertError, printable
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
        formats = {str(entry["layer"]): str(entry["format"]) for entry in entries or ()}
    except (TypeError, KeyError, ValueError) as error:
        raise OmniConvertError(
            f"{path}: its trace is damaged ({error!r}), expected layers with their sqnr_db. Run compare again."
        ) from error
    expected = "expected the result of compare --trace-layers --output-json with this conversion, or with its method"
    if not found.keys() & {layer.full_name for layer in done.quantized}:
        raise OmniConvertError(f"{path}: traces no quantized layer of {done.path}, {expected}, as the candidate.")
    if unknown := sorted(found.keys() - {layer.full_name for layer in done.layers}):
        raise OmniConvertError(
            f"{path}: traces {len(unknown)} layers that {done.path} does not have, as {printable(unknown[0])}, "
            f"{expected}, as the candidate."
        )
    for layer in done.quantized:
        traced = formats.get(layer.full_name, str(layer.format))
        if _kind(traced) != _kind(str(layer.format)):
            raise OmniConvertError(
                f"{path}: traces {layer.full_name} in {printable(traced)}, but {done.path} has it in "
                f"{layer.format}, {expected}, as the candidate."
            )
    return found


def _kind(label: str) -> str:
    """Of a format's label what a checkpoint tells: not how scales were chosen or shared."""
    method, _, options = label.partition(" ")
    return " ".join([method, *re.findall(r"channel|tensor|block \d+x\d+", options)])


def _sqnr(entry: Mapping[str, Any]) -> float:
    value = entry["sqnr_db"]
    return math.inf if value is None else float(value)
