"""What the user asked for. Command line, Python API, recipe file and manifest all end in this one value."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from omni_convert.formats.base import Format
from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.formats.patterns import Pattern
from omni_convert.formats.quant_config import (
    Spec,
    build_quant_config,
    component_config,
    config_spec,
    parse_layer_rule,
    with_rules,
)
from omni_convert.formats.target import DEFAULT_TARGET, find_target

DEFAULT_PART = ""
"""Stands for the components that are quantized by default, and for a model that is no pipeline."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One conversion.

    ``parts``: how each component is quantized. ``input_scales``: the recorded scale of every layer's activations, by
    layer or ``component.layer`` (static activations only). ``target``: the engine that is to load the result.
    ``default_ignore``: whether layers that the target keeps by default are kept. ``ignore_whole_group``: whether all
    layers that it fuses with a kept one are.
    """

    parts: Mapping[str, QuantizationConfig]
    input_scales: Mapping[str, float] = field(default_factory=dict)
    target: str = DEFAULT_TARGET
    default_ignore: bool = True
    ignore_whole_group: bool = False

    def __post_init__(self) -> None:
        find_target(self.target)
        needed = any("input_scale" in fmt.needs for fmt in self.formats)
        if needed and not self.input_scales:
            raise UsageError(
                "--activation-scheme static writes an input_scale for every layer, and the source holds none. Give "
                "them with --activation-scales FILE: a JSON object of layer names and scales (the largest magnitude "
                "of the layer's input over representative prompts / 448). Or use --activation-scheme dynamic."
            )
        if self.input_scales and not needed:
            raise UsageError(
                "--activation-scales needs --activation-scheme static: with dynamic activations nothing is stored."
            )

        for layer, scale in self.input_scales.items():
            number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
            if not number or not 1e-38 < scale < 1e38:
                raise UsageError(
                    f"--activation-scales: the scale of {printable(layer)} is {printable(scale)}, expected a finite "
                    "positive number."
                )

    @property
    def formats(self) -> tuple[Format, ...]:
        """Every format that occurs."""
        return tuple(dict.fromkeys(fmt for part in self.parts.values() for fmt in part.formats))

    @property
    def components(self) -> tuple[str, ...]:
        """The components of a pipeline that are named; empty: the default ones."""
        return tuple(name for name in self.parts if name != DEFAULT_PART)

    def part(self, component: str) -> QuantizationConfig:
        """How a component is quantized."""
        return self.parts.get(component) or self.parts[DEFAULT_PART]

    def formats_of(self, component: str) -> tuple[Format, ...]:
        """Every format that occurs in a component; empty if it is not quantized."""
        known = component in self.parts or DEFAULT_PART in self.parts
        return self.part(component).formats if known else ()

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON or YAML hold it; also what ``--recipe`` reads."""
        specs = {name: config_spec(part) for name, part in self.parts.items()}
        return {
            **specs.get(DEFAULT_PART, {"components": specs}),
            "target": self.target,
            "default_ignore": self.default_ignore,
            "ignore_whole_group": self.ignore_whole_group,
            **({"input_scales": dict(self.input_scales)} if self.input_scales else {}),
        }

    def input_scale(self, component: str, layer: str) -> float | None:
        """The recorded scale of a layer's activations, if any; one under ``component.layer`` goes first."""
        return self.input_scales.get(f"{component}.{layer}", self.input_scales.get(layer))

    @classmethod
    def parse(cls, data: object) -> Recipe | None:
        """``from_dict`` of what a manifest holds; None if that is no recipe."""
        try:
            return cls.from_dict(cast("Mapping[str, Any]", data))
        except (OmniConvertError, KeyError, TypeError, ValueError, AttributeError):
            return None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], components: Sequence[str] = ()) -> Recipe:
        """The inverse of ``to_dict``; what is absent has its default. ``components``: as ``make_recipe`` takes them.

        Raises:
            UsageError: an unknown key or a value of the wrong kind.
        """
        choices = {key: value for key, value in data.items() if key in _CHOICES}
        for key in ("default_ignore", "ignore_whole_group"):
            if not isinstance(choices.get(key, True), bool):
                raise UsageError(f"{key} is {printable(choices[key])}, expected true or false.")
        if not isinstance(choices.get("input_scales", {}), Mapping):
            raise UsageError(f"input_scales is {printable(choices['input_scales'])}, expected layers and numbers.")
        spec = {key: value for key, value in data.items() if key not in _CHOICES}
        if "components" in spec and len(spec) > 1:
            other = next(key for key in spec if key != "components")
            raise UsageError(f"found {printable(other)} beside components, expected it in each component.")
        if not {"components", "method", "quant_method"} & spec.keys():
            raise UsageError("found neither method nor components, expected one of them.")
        return cls(parts=_parts(spec.get("components", spec), components), **choices)


_CHOICES = ("input_scales", "target", "default_ignore", "ignore_whole_group")


class Choices(TypedDict, total=False):
    """The keyword arguments of ``make_recipe``."""

    method: str | None
    recipe: Mapping[str, Any] | None
    granularity: str | None
    block_size: tuple[int, int] | None
    activation_scheme: str | None
    scale_rule: str | None
    quality: str | None
    fused_scale: str | None
    ignore: Sequence[str]
    layers: Sequence[str]
    components: Sequence[str]
    input_scales: Mapping[str, float] | None
    target: str | None
    default_ignore: bool
    ignore_whole_group: bool


def make_recipe(
    *,
    quantization: Spec = None,
    method: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    layers: Sequence[str] = (),
    components: Sequence[str] = (),
    input_scales: Mapping[str, float] | None = None,
    target: str | None = None,
    default_ignore: bool = True,
    ignore_whole_group: bool = False,
    **options: Any,
) -> Recipe:
    """A recipe from plain values.

    Args:
        quantization: as ``build_quant_config`` takes it; or ``method`` with ``options``, as ``make_format`` takes them.
        recipe: or what ``read_recipe`` returns; the other arguments are added to it.
        ignore: patterns of layers that stay unquantized; they and ``layers`` go before rules of the recipe.
        layers: ``PATTERN=METHOD``, or ``PATTERN=none``; the first match decides, before ``ignore``.
        components: ``NAME``, or ``NAME=METHOD`` for one that has a method of its own.

    Raises:
        UsageError: not exactly one of ``quantization``, ``method`` and ``recipe``, or what they refuse.
    """
    options = {name: value for name, value in options.items() if value is not None}
    _check_lists(ignore=ignore, layers=layers, components=components)
    if unknown := [name for name in options if name not in Choices.__annotations__]:
        raise UsageError(f"found the option {unknown[0]}, expected any of {', '.join(Choices.__annotations__)}.")
    if components and all(value is None for value in (quantization, method, recipe)):
        quantization, components = _own_methods(components), ()
    given = [value for value in (quantization, method, recipe) if value is not None]
    if len(given) != 1:
        raise UsageError(
            f"found {len(given) or 'nothing'} that {'say' if given else 'says'} how to quantize, expected one of "
            "--method and --recipe (from Python: a method or a dict)."
        )
    if options and method is None:
        flag = f"--{next(iter(options)).replace('_', '-')}"
        raise UsageError(f"{flag}: needs --method. Beside a recipe or a config, write it there.")
    added: dict[str, Any] = {"input_scales": input_scales, "target": target}
    added = {key: value for key, value in added.items() if value}
    added |= {} if default_ignore else {"default_ignore": False}
    added |= {"ignore_whole_group": True} if ignore_whole_group else {}
    if recipe is not None:
        made = _read(recipe, added, components)
    else:
        made = Recipe(parts=_parts(quantization or _spec(method, options), components), **added)
    rules = tuple(map(parse_layer_rule, layers))
    ignored = tuple(str(Pattern(text)) for text in ignore)
    return replace(made, parts={name: with_rules(part, ignored, rules) for name, part in made.parts.items()})


def _check_lists(**lists: Sequence[str]) -> None:
    for name, value in lists.items():
        if isinstance(value, str) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"{name} is {printable(value)}, expected a list of strings.")


def _read(recipe: Mapping[str, Any], added: Mapping[str, Any], components: Sequence[str]) -> Recipe:
    try:
        return Recipe.from_dict({**recipe, **added}, components)
    except UsageError as error:
        raise UsageError(f"--recipe: {error}") from error


def _own_methods(components: Sequence[str]) -> dict[str, str] | None:
    """``NAME=METHOD`` of every component; None if one has no method."""
    own = [text.partition("=") for text in components]
    return {name: method for name, _, method in own} if all(equals for _, equals, _ in own) else None


def _spec(method: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"weight_block_size" if name == "block_size" else name: value for name, value in options.items()}
    return {"method": method, **renamed}


def _parts(spec: Spec, components: Sequence[str]) -> dict[str, QuantizationConfig]:
    """The config of every component that is quantized."""
    built = build_quant_config(spec)
    if isinstance(built, dict):
        if components:
            raise UsageError(f"--component {components[0]}: the recipe names the components. Write it there.")
        parts = built
    else:
        parts = dict(_named_part(text, built) for text in components) or {DEFAULT_PART: built}
        if len(parts) < len(set(components)) and components:
            raise UsageError(f"--component: {', '.join(components)} give one two methods, expected one.")
    quantized = {name: part for name, part in parts.items() if part is not None}
    if not quantized:
        raise UsageError("nothing would be quantized: the method of every component is none.")
    if any(part.is_serialized for part in quantized.values()):
        raise UsageError(
            "the config says that the weights are quantized already, expected how to quantize them: leave out the key "
            "that says serialized."
        )
    return quantized


def _named_part(text: str, default: QuantizationConfig | None) -> tuple[str, QuantizationConfig | None]:
    """``NAME`` or ``NAME=METHOD``, with the rules of ``default``."""
    name, equals, method = text.partition("=")
    own = component_config(f"--component {text}", method) if equals else default
    if own is None or default is None:
        return name, own
    return name, replace(default, format=own.format)


_MERGE = "tag:yaml.org,2002:merge"


def read_recipe(path: Path) -> Mapping[str, Any]:
    """A recipe in YAML or JSON, or the one in a manifest.

    Raises:
        OmniConvertError: it cannot be read, names a key twice, or is no mapping.
    """
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses what YAML allows: that one key of a mapping silently replaces another."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
            if repeated := [key for place, key in enumerate(keys) if key in keys[:place]]:
                raise yaml.YAMLError(f"key {repeated[0]} twice{node.start_mark}")
            return super().construct_mapping(node, deep)

    try:
        data = yaml.load(path.read_text("utf-8"), Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        said = printable(" ".join(str(error).split()))
        raise OmniConvertError(f"{path}: cannot be read as YAML ({said}). Correct the file.") from error
    if isinstance(data, Mapping) and "omni_convert" in data:
        data = data.get("recipe")
    if not isinstance(data, Mapping):
        raise OmniConvertError(f"{path}: found {printable(data)}, expected a mapping with method or components.")
    return data


def read_input_scales(path: Path) -> dict[str, float]:
    """Layer -> scale of its activations, from a JSON object.

    Raises:
        OmniConvertError: it cannot be read, or is not a JSON object.
    """
    try:
        scales = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OmniConvertError(f"{path}: cannot be read as JSON ({printable(error)}). Correct the file.") from error
    if not isinstance(scales, dict):
        raise OmniConvertError(
            f"{path}: found a JSON {type(scales).__name__}, expected an object of layers and scales."
        )
    return scales


def check_patterns(
    flag: str, patterns: Iterable[str], layers: Collection[str], means: Callable[[str], bool] | None = None
) -> None:
    """Every pattern must match a layer. ``flag``: what it was given with. ``means``: whether it does, if not by name.

    Raises:
        UsageError: one matches nothing; shows the closest names.
    """
    for pattern in map(Pattern, patterns):
        if not (means(pattern.text) if means else any(map(pattern.matches, layers))):
            close = closest_names(pattern.text, layers)
            raise UsageError(
                f"{flag} {pattern}: no layer of the model matches. "
                + (f"The closest names are {', '.join(close)}. " if close else "")
                + "A pattern is a part of a layer's name, a glob over the whole name, or re:REGEX; "
                "--dry-run lists the layers."
            )


def closest_names(text: str, layers: Iterable[str], count: int = 3) -> list[str]:
    """The parts of layer names, or whole names with numbers as ``*``, that resemble ``text`` most."""
    candidates: set[str] = set()
    for layer in layers:
        candidates.add(re.sub(r"\d+", "*", layer))
        candidates.update(part for part in layer.split(".") if not part.isdigit())
    wanted = text.removeprefix("re:").removesuffix(".weight").casefold()
    by_folded = {candidate.casefold(): candidate for candidate in sorted(candidates)}
    return [by_folded[name] for name in difflib.get_close_matches(wanted, by_folded, n=count, cutoff=0)]
