"""``build_quant_config``: how a model is to be quantized, from whatever people write: a name, a dict, a recipe."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from omni_convert.formats import FORMATS, format_options, make_format
from omni_convert.formats.base import Format
from omni_convert.formats.config import METHODS, LayerRule, QuantizationConfig, parse_config
from omni_convert.formats.errors import UsageError, printable
from omni_convert.formats.patterns import Pattern

NONE = "none"
"""As a method: stays unquantized."""

_METHOD_KEYS = ("method", "quant_method")
_OPTIONS = ("granularity", "activation_scheme", "scale_rule", "quality", "fused_scale")
_KEYS = ("method", *_OPTIONS, "weight_block_size", "ignored_layers", "layers")

Spec = str | Mapping[str, Any] | QuantizationConfig | None
ComponentConfigs = dict[str, QuantizationConfig | None]


def build_quant_config(spec: Spec, **options: Any) -> QuantizationConfig | ComponentConfigs | None:
    """How a model, or each component of a pipeline, is to be quantized.

    Args:
        spec: a method (``"int8"``, also with options, see ``parse_method``); a dict with ``method`` and any of the keys
            below; a dict of components and their specs (``{"transformer": {"method": "fp8"}, "vae": None}``); a
            ``quantization_config`` of a checkpoint; a config, which is returned; ``None`` or ``"none"``: nothing is
            quantized.
        options: further keys.

    The keys, all optional but the first:

    | key | |
    |---|---|
    | ``method`` | ``int8``, ``fp8``, ``mxfp8``, ``mxfp4``, ``mxfp4_dualscale`` (also spelled ``quant_method``) |
    | ``activation_scheme`` | ``"dynamic"``; fp8 per weight also ``"static"`` |
    | ``ignored_layers`` | ``[]``: patterns of layers that stay unquantized |
    | ``weight_block_size`` | ``None``; fp8: ``[128, 128]``, rows and columns |
    | ``granularity`` | fp8: ``"tensor"``, ``"channel"`` or ``"block"`` |
    | ``scale_rule``, ``quality``, ``fused_scale`` | as ``make_format`` takes them |
    | ``layers`` | ``[]``: ``{pattern: spec}``, layers with a format of their own, the first match decides |
    | ``is_checkpoint_int8_serialized`` and its siblings | ``False``; true: names are exact, weights quantized already |

    Raises:
        UsageError: an unknown method or key, or a value that the method does not have.
        OmniConvertError: a serialized config that engines would not read.
    """
    if spec is None or spec == NONE:
        return None
    if isinstance(spec, str):
        return _from_dict({**parse_method(spec), **options})
    if isinstance(spec, QuantizationConfig):
        return _without_options(spec, options)
    if not isinstance(spec, Mapping):
        raise UsageError(f"found {printable(spec)}, expected a method, a dict, a quantization config or None.")
    if any(key in spec for key in _METHOD_KEYS):
        return _from_dict({**spec, **options})
    _without_options(None, options)
    return {str(name): component_config(str(name), part) for name, part in spec.items()}


def component_config(name: str, spec: Spec) -> QuantizationConfig | None:
    """The config of one component or layer.

    Raises:
        UsageError: ``spec`` is one of several components.
    """
    if isinstance(spec, Mapping) and not any(key in spec for key in _METHOD_KEYS):
        raise UsageError(f"{name}: found {printable(spec)}, expected a method, or a dict with a method.")
    if isinstance(spec, bool):
        raise UsageError(f"{name}: found {spec} (no and yes in YAML), expected a method, or none.")
    try:
        return cast("QuantizationConfig | None", build_quant_config(spec))
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error


def parse_method(text: str) -> dict[str, Any]:
    """``METHOD[:OPTION]...`` as typed, options by their values alone (``fp8:channel``, ``fp8:64x64:balanced``) -> the
    keys of a spec. ``method_text`` is the inverse.

    Raises:
        UsageError: the method has no such option.
    """
    method, *words = text.split(":")
    spec: dict[str, Any] = {"method": method}
    options = FORMATS[method].options if method in FORMATS else {}
    values = {value: option for option, choices in options.items() for value in choices}
    for word in words:
        if word in values:
            spec[values[word]] = word
        elif "block_size" in options and word[:1].isdigit():
            spec["weight_block_size"] = parse_block_size(word)
        else:
            raise UsageError(
                f"the method is {printable(text)!r}, expected a format and its options, as in fp8:channel"
                + (f"; {method} knows {', '.join(values)}." if values else f", of {', '.join(FORMATS)}.")
            )
    return spec


def method_text(fmt: Format) -> str:
    """``fmt`` as ``parse_method`` reads it: its name, and the options that are not the default."""
    default = format_options(FORMATS[fmt.name])
    chosen = {option: value for option, value in format_options(fmt).items() if value != default.get(option)}
    if "block_size" in chosen:
        del chosen["granularity"]
        chosen["block_size"] = "x".join(map(str, chosen["block_size"]))
    return ":".join([fmt.name, *map(str, chosen.values())])


def parse_block_size(text: str) -> tuple[int, int]:
    """``128x128`` -> (128, 128): rows and columns of a block."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if not match:
        raise UsageError(f"--block-size is {text!r}, expected rows and columns, as in 128x128.")
    return int(match[1]), int(match[2])


def parse_layer_rule(text: str) -> LayerRule:
    """``PATTERN=METHOD`` as typed; the method may be ``none``."""
    pattern, equals, method = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--layer is {text!r}, expected PATTERN=METHOD, as in txt_mlp=fp8 or img_mlp=none.")
    return _layer_rule(pattern, method, f"--layer {text}")


def config_spec(config: QuantizationConfig) -> dict[str, Any]:
    """What ``build_quant_config`` makes the same config from, as JSON or YAML hold it."""
    layers = [{rule.name: _rule_spec(rule.format)} for rule in config.layers]
    spec = {**_format_spec(config.format), "ignored_layers": list(config.ignored_layers)}
    return {**spec, "layers": layers} if layers else spec


def _rule_spec(fmt: Format | None) -> dict[str, Any] | None:
    """Without what is one for the whole component."""
    return {key: value for key, value in _format_spec(fmt).items() if key != "fused_scale"} if fmt else None


def _format_spec(fmt: Format) -> dict[str, Any]:
    options = format_options(fmt)
    if "block_size" in options:
        options["weight_block_size"] = options.pop("block_size")
    return {"method": fmt.name, **options}


def _from_dict(data: Mapping[str, Any]) -> QuantizationConfig | None:
    flags = {key: data[key] for key in data if _is_flag(key)}
    if any(value is True for value in flags.values()) or _says_serialized(data.get("quant_method")):
        return parse_config(data)
    if len({str(data[key]) for key in _METHOD_KEYS if key in data}) > 1:
        raise UsageError(
            f"found method {printable(data['method'])} and quant_method {printable(data['quant_method'])}, expected "
            "one of them."
        )
    known = {"method" if key in _METHOD_KEYS else key: value for key, value in data.items() if key not in flags}
    if wrong := [key for key, value in flags.items() if value is not False]:
        raise UsageError(f"{wrong[0]} is {data[wrong[0]]!r}, expected true or false.")
    if unknown := sorted(set(map(str, known)).difference(_KEYS)):
        close = difflib.get_close_matches(unknown[0], _KEYS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(f"found the key {printable(unknown[0])}, expected any of {', '.join(_KEYS)}.{hint}")
    if known["method"] is None or known["method"] == NONE:
        return None
    if not isinstance(known["method"], str):
        raise UsageError(f"method is {printable(known['method'])}, expected one of {', '.join(FORMATS)}.")
    block = known.get("weight_block_size")
    fmt = make_format(
        known["method"],
        block_size=None if block is None else tuple(_list(block, "weight_block_size")),
        **{option: known.get(option) for option in _OPTIONS},
    )
    ignored = _list(known.get("ignored_layers") or (), "ignored_layers")
    layers = _list(known.get("layers") or (), "layers")
    return QuantizationConfig(
        format=fmt,
        ignored_layers=tuple(str(Pattern(_text(name, "ignored_layers"))) for name in ignored),
        layers=tuple(rule for item in layers for rule in _layer_rules(item)),
    )


def _layer_rules(item: object) -> list[LayerRule]:
    if not isinstance(item, Mapping):
        raise UsageError(f"layers holds {printable(item)}, expected a pattern and its method, as in {{txt_mlp: fp8}}.")
    return [_layer_rule(_text(pattern, "layers"), spec) for pattern, spec in item.items()]


def _layer_rule(pattern: str, spec: Spec, where: str = "") -> LayerRule:
    where = where or f"layers: {pattern}"
    config = component_config(where, spec)
    if config and (config.ignored_layers or config.layers or config.is_serialized):
        raise UsageError(f"{where} has layers of its own or is serialized, expected a method and its options.")
    if isinstance(spec, Mapping) and "fused_scale" in spec:
        raise UsageError(f"{where}: fused_scale is one for the whole component, expected it beside its method.")
    return LayerRule(str(Pattern(pattern)), config.format if config else None)


def _says_serialized(method: object) -> bool:
    """Whether this ``quant_method`` occurs on disk only."""
    return isinstance(method, str) and method in METHODS and method not in FORMATS


def _is_flag(key: object) -> bool:
    return key in {fmt.serialized_flag for fmt in FORMATS.values()}


def _list(value: object, key: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{key} is {printable(value)}, expected a list.")
    return list(value)


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{key} holds {printable(value)}, expected a pattern over layer names.")
    return value


def _without_options(config: QuantizationConfig | None, options: Mapping[str, Any]) -> QuantizationConfig | None:
    if options:
        raise UsageError(f"found the key {sorted(options)[0]} beside a finished config, expected it inside.")
    return config


def with_rules(
    config: QuantizationConfig, ignored_layers: tuple[str, ...], layers: tuple[LayerRule, ...]
) -> QuantizationConfig:
    """``config`` with more rules, which go first."""
    return replace(
        config,
        ignored_layers=tuple(dict.fromkeys((*ignored_layers, *config.ignored_layers))),
        layers=(*layers, *config.layers),
    )
