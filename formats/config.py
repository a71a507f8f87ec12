"""``quantization_config``: what a checkpoint says about itself. ``parse_config`` and ``to_dict`` are inverse."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from omni_convert.formats import FORMATS
from omni_convert.formats.base import Format
from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.formats.fp8 import Fp8
from omni_convert.formats.mxfp4 import MXFP4


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """A serialized checkpoint's format and the layers that stay unquantized (exact names, no patterns)."""

    format: Format
    ignored_layers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``config.json``."""
        return self.format.config(self.ignored_layers)


def stored_config(config: Mapping[str, Any] | None, key: str = "quantization_config") -> Any:
    """The quantization config in a model's config or in a part of it (``thinker_config``); None if there is none."""
    parts = [config] if config else []
    while parts:
        part = parts.pop(0)
        if part.get(key):
            return part[key]
        parts += [value for name, value in part.items() if name.endswith("_config") and isinstance(value, Mapping)]
    return config.get(key) if config else None


def parse_config(data: object, where: str = "quantization_config") -> QuantizationConfig:
    """Read a ``quantization_config`` that announces one of our formats, already quantized on disk.

    Raises:
        OmniConvertError: unknown method, missing serialized flag, unknown key, or a value of the wrong kind.
    """
    if not isinstance(data, Mapping):
        raise OmniConvertError(f"{where}: found {printable(data)}, expected an object. Convert the checkpoint again.")
    fmt = _announced_format(data, where)
    names_key = "ignore" if "ignore" in fmt.config(()) else "ignored_layers"
    ignored = data.get(names_key) or ()
    if not isinstance(ignored, (list, tuple)) or not all(isinstance(name, str) for name in ignored):
        raise OmniConvertError(f"{where}: {names_key} is {ignored!r}, expected a list of layer names.")
    names = map(_plain_name, ignored) if fmt.ignores_parts else ignored
    config = QuantizationConfig(format=fmt, ignored_layers=tuple(names))
    expected = config.to_dict()
    flag = fmt.serialized_flag
    if flag and data.get(flag, False) is not True:
        raise OmniConvertError(
            f"{where}: {flag} is {data.get(flag)!r}, expected true: "
            "engines would take the weights for unquantized ones. Convert the checkpoint again."
        )
    for key, value in data.items():
        if key == names_key:
            continue
        key = "quant_method" if key == "method" else key
        if key not in expected or value != expected[key]:
            raise OmniConvertError(
                f"{where}: found {key}={value!r}, expected "
                f"{f'{expected[key]!r}' if key in expected else 'no such key'}; {fmt.name} knows {', '.join(expected)}."
            )
    return config


def exact_pattern(name: str) -> str:
    """``name`` for engines that take a plain name for a part of one, but a pattern for a whole one."""
    return f"[{name[0]}]{name[1:]}"


def _plain_name(pattern: str) -> str:
    """The inverse of ``exact_pattern``; other names stay."""
    return re.sub(r"^\[(.)\]", r"\1", pattern)


def _announced_format(data: Mapping[str, Any], where: str) -> Format:
    """The format of the announced method, with the options that its keys spell."""
    method = data.get("quant_method", data.get("method"))
    if method == "modelopt" and data.get("quant_algo") == "FP8_PER_CHANNEL_PER_TOKEN":
        return Fp8(granularity="channel")
    if not isinstance(method, str) or method not in FORMATS:
        raise OmniConvertError(f"{where}: quant_method is {method!r}, expected one of {', '.join(FORMATS)}.")
    if method == "mxfp4" and data.get("mxfp4_scale_alg", 0) == 0:  # what engines assume where the key is absent
        return replace(MXFP4, settings=tuple((key, 0) for key in data if key == "mxfp4_scale_alg"))
    if method != "fp8":
        return FORMATS[method]
    block = data.get("weight_block_size")
    try:
        return Fp8(
            granularity="tensor" if block is None else "block",
            block_size=None if block is None else tuple(block),
            activation_scheme=data.get("activation_scheme", "dynamic"),
        )
    except (UsageError, TypeError) as error:
        raise OmniConvertError(
            f"{where}: weight_block_size is {printable(block)} with activation_scheme "
            f"{printable(data.get('activation_scheme'))}, expected nothing or two numbers, blocks with dynamic "
            "activations. Convert the checkpoint again."
        ) from error
