"""How a model is quantized: what a checkpoint says about itself. ``parse_config`` and ``to_dict`` are inverse."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from omni_convert.formats import FORMATS
from omni_convert.formats.base import Format
from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.formats.fp8 import Fp8
from omni_convert.formats.mxfp4 import MXFP4

MIXED = "omni_convert"
"""``quant_method`` of a checkpoint whose layers have several formats: only our own loader reads it."""


class LayerRule(NamedTuple):
    """The format of some layers; None: they stay unquantized. ``name``: a pattern, or on disk a layer's exact name."""

    name: str
    format: Format | None


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the linears of a model are quantized: all to ``format``, except what is named.

    ``layers``: in order, the first that matches decides, before ``ignored_layers``, which stay unquantized. Names are
    patterns (see ``patterns``); of weights that are quantized already (``is_serialized``) they are exact.
    """

    format: Format
    ignored_layers: tuple[str, ...] = ()
    layers: tuple[LayerRule, ...] = ()
    is_serialized: bool = False

    def __post_init__(self) -> None:
        """Layers that an engine fuses share or keep their scales all alike, so rules have the default's choice."""
        choice = getattr(self.format, "fused_scale", None)
        rules = (
            rule._replace(format=replace(rule.format, fused_scale=choice))  # type: ignore[type-var]
            if choice and hasattr(rule.format, "fused_scale")
            else rule
            for rule in self.layers
        )
        object.__setattr__(self, "layers", tuple(rules))

    @property
    def formats(self) -> tuple[Format, ...]:
        """Every format that occurs, the default first."""
        return tuple(dict.fromkeys((self.format, *(rule.format for rule in self.layers if rule.format))))

    @property
    def is_mixed(self) -> bool:
        """Whether a config of one method cannot say it: qualities may differ, what is on disk may not."""
        return any(fmt.config(()) != self.format.config(()) for fmt in self.formats)

    def format_on_disk(self, layer: str) -> Format:
        """The format of a quantized layer of a serialized checkpoint."""
        return self._by_name.get(layer, self.format)

    @cached_property
    def _by_name(self) -> Mapping[str, Format]:
        return {rule.name: rule.format for rule in self.layers if rule.format}

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``config.json``, of serialized weights.

        With several formats: ``formats``, the configs of each without ignored layers, all but the first with the
        ``layers`` that have it.
        """
        if not self.layers:
            return self.format.config(self.ignored_layers)
        formats = []
        for fmt in self.formats:
            entry = {key: value for key, value in fmt.config(()).items() if key not in _NAMES_KEYS}
            named = [rule.name for rule in self.layers if rule.format == fmt]
            formats.append({**entry, "layers": named} if fmt != self.format else entry)
        return {"quant_method": MIXED, "formats": formats, "ignored_layers": list(self.ignored_layers)}


def stored_config(config: Mapping[str, Any] | None, key: str = "quantization_config") -> Any:
    """The quantization config in a model's config or in a part of it (``thinker_config``); None if there is none."""
    parts = [config] if config else []
    while parts:
        part = parts.pop(0)
        if part.get(key):
            return part[key]
        parts += [value for name, value in part.items() if name.endswith("_config") and isinstance(value, Mapping)]
    return config.get(key) if config else None


def asks_online(data: object) -> bool:
    """Whether a ``quantization_config`` has engines quantize plain weights while they load: one of our methods, without
    the flag that says they are quantized already."""
    if not isinstance(data, Mapping):
        return False
    fmt = FORMATS.get(str(data.get("quant_method", data.get("method"))))
    return fmt is not None and fmt.serialized_flag is not None and data.get(fmt.serialized_flag, False) is False


def without_asking(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A model's config without what ``asks_online``."""
    if config is None:
        return None
    return {
        name: without_asking(value) if name.endswith("_config") and isinstance(value, Mapping) else value
        for name, value in config.items()
        if name != "quantization_config" or not asks_online(value)
    }


def parse_config(data: object, where: str = "quantization_config") -> QuantizationConfig:
    """Read a ``quantization_config`` that announces one of our formats, already quantized on disk.

    Raises:
        OmniConvertError: unknown method, missing serialized flag, unknown key, or a value of the wrong kind.
    """
    if not isinstance(data, Mapping):
        raise OmniConvertError(f"{where}: found {printable(data)}, expected an object. Convert the checkpoint again.")
    if data.get("quant_method") == MIXED:
        return _parse_mixed(data, where)
    fmt = _announced_format(data, where)
    names_key = "ignore" if "ignore" in fmt.config(()) else "ignored_layers"
    ignored = _names(data.get(names_key) or (), names_key, where)
    names = map(_plain_name, ignored) if fmt.ignores_parts else ignored
    config = QuantizationConfig(format=fmt, ignored_layers=tuple(names), is_serialized=True)
    expected = config.to_dict()
    flag = fmt.serialized_flag
    if flag and data.get(flag, False) is not True:
        raise OmniConvertError(
            f"{where}: {flag} is {data.get(flag)!r}, expected true: "
            "engines would take the weights for unquantized ones. Convert the checkpoint again. "
            "If they are unquantized, omni_convert.load(FOLDER) quantizes them while it loads."
        )
    for key, value in data.items():
        if key == names_key or (fmt.name, key) == _ONLINE_ONLY:
            continue
        key = "quant_method" if key == "method" else key
        if key not in expected or value != expected[key]:
            raise OmniConvertError(
                f"{where}: found {key}={value!r}, expected "
                f"{f'{expected[key]!r}' if key in expected else 'no such key'}; {fmt.name} knows {', '.join(expected)}."
            )
    return config


def is_ours(data: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is one that we write: its method alone may also be another package's."""
    method = data.get("quant_method", data.get("method"))
    if method == _MODELOPT:
        return bool(data.get("quant_algo") == _PER_CHANNEL)
    fmt = FORMATS.get(method) if isinstance(method, str) else None
    return method == MIXED or (fmt is not None and fmt.serialized_flag in data)


def _parse_mixed(data: Mapping[str, Any], where: str) -> QuantizationConfig:
    entries = data.get("formats")
    if not isinstance(entries, list) or len(entries) < 2 or not all(isinstance(entry, dict) for entry in entries):
        raise OmniConvertError(
            f"{where}: formats is {printable(entries)}, expected a list of at least two objects. "
            "Convert the checkpoint again."
        )
    if unknown := data.keys() - {"quant_method", "formats", "ignored_layers"}:
        raise OmniConvertError(f"{where}: found {sorted(unknown)[0]}, expected no such key.")
    formats, rules = [], []
    for place, entry in enumerate(entries):
        plain = {key: value for key, value in entry.items() if key != "layers"}
        formats.append(parse_config(plain, f"{where}: formats[{place}]").format)
        layers = _names(entry.get("layers", ()), "layers", f"{where}: formats[{place}]")
        if bool(layers) != bool(place):
            raise OmniConvertError(
                f"{where}: formats[{place}] names {len(layers)} layers, expected none for the first format and some "
                "for every other. Convert the checkpoint again."
            )
        rules += [LayerRule(name, formats[-1]) for name in layers]
    ignored = _names(data.get("ignored_layers") or (), "ignored_layers", where)
    repeated = [name for name, count in Counter([*(rule.name for rule in rules), *ignored]).items() if count > 1]
    if repeated or len(set(formats)) < len(formats):
        what = f"layer {repeated[0]}" if repeated else "a format"
        raise OmniConvertError(f"{where}: names {what} twice, expected once. Convert the checkpoint again.")
    return QuantizationConfig(format=formats[0], ignored_layers=tuple(ignored), layers=tuple(rules), is_serialized=True)


def _names(value: object, key: str, where: str) -> Sequence[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise OmniConvertError(f"{where}: {key} is {value!r}, expected a list of layer names.")
    return value


_MODELOPT, _PER_CHANNEL = (Fp8(granularity="channel").config(())[key] for key in ("quant_method", "quant_algo"))
METHODS = (MIXED, *FORMATS, _MODELOPT)
"""Every ``quant_method`` that we write."""
_NAMES_KEYS = ("ignored_layers", "ignore")
_ONLINE_ONLY = ("mxfp4_dualscale", "num_bf16_fallback_layers")
"""A method and a key of it that means nothing of weights that are quantized already."""


def exact_pattern(name: str) -> str:
    """``name`` for engines that take a plain name for a part of one, but a pattern for a whole one."""
    return f"[{name[0]}]{name[1:]}"


def _plain_name(pattern: str) -> str:
    """The inverse of ``exact_pattern``; other names stay."""
    return re.sub(r"^\[(.)\]", r"\1", pattern)


def _announced_format(data: Mapping[str, Any], where: str) -> Format:
    """The format of the announced method, with the options that its keys spell."""
    method = data.get("quant_method", data.get("method"))
    if method == _MODELOPT and data.get("quant_algo") == _PER_CHANNEL:
        return Fp8(granularity="channel")
    if not isinstance(method, str) or method not in FORMATS:
        algorithm = f" with quant_algo {printable(data.get('quant_algo'))}" if method == _MODELOPT else ""
        raise OmniConvertError(f"{where}: quant_method is {method!r}{algorithm}, expected one of {', '.join(FORMATS)}.")
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
