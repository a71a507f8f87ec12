"""``quantization_config``: what a checkpoint says about itself. ``parse_config`` and ``to_dict`` are inverse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omni_convert.formats import FORMATS
from omni_convert.formats.base import Format
from omni_convert.formats.errors import OmniConvertError, printable


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """A serialized checkpoint's format and the layers that stay unquantized (exact names, no patterns)."""

    format: Format
    ignored_layers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``config.json``."""
        return self.format.config(self.ignored_layers)


def parse_config(data: object, where: str = "quantization_config") -> QuantizationConfig:
    """Read a ``quantization_config`` that announces one of our formats, already quantized on disk.

    Raises:
        OmniConvertError: unknown method, missing serialized flag, unknown key, or a value of the wrong kind.
    """
    if not isinstance(data, Mapping):
        raise OmniConvertError(f"{where}: found {printable(data)}, expected an object. Convert the checkpoint again.")
    method = data.get("quant_method", data.get("method"))
    if not isinstance(method, str) or method not in FORMATS:
        raise OmniConvertError(f"{where}: quant_method is {method!r}, expected one of {', '.join(FORMATS)}.")
    fmt = FORMATS[method]
    ignored = data.get("ignored_layers") or ()
    if not isinstance(ignored, (list, tuple)) or not all(isinstance(name, str) for name in ignored):
        raise OmniConvertError(f"{where}: ignored_layers is {ignored!r}, expected a list of layer names.")
    config = QuantizationConfig(format=fmt, ignored_layers=tuple(ignored))
    expected = config.to_dict()
    if data.get(fmt.serialized_flag, False) is not True:
        raise OmniConvertError(
            f"{where}: {fmt.serialized_flag} is {data.get(fmt.serialized_flag)!r}, expected true: "
            "engines would take the weights for unquantized ones. Convert the checkpoint again."
        )
    for key, value in data.items():
        if key == "ignored_layers":
            continue
        key = "quant_method" if key == "method" else key
        if key not in expected or value != expected[key]:
            raise OmniConvertError(
                f"{where}: found {key}={value!r}, expected "
                f"{f'{expected[key]!r}' if key in expected else 'no such key'}; {fmt.name} knows {', '.join(expected)}."
            )
    return config
