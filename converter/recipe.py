"""What the user asked for. Command line, Python API and manifest all end in this one value."""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from omni_convert.formats import format_options, make_format
from omni_convert.formats.base import Format
from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.formats.target import DEFAULT_TARGET, find_target


@dataclass(frozen=True)
class Pattern:
    """A rule over layer names: ``re:`` regular expression (searched), glob (whole name), or substring.

    ``str(Pattern(text)) == text``.
    """

    text: str
    _regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.text or self.text == "re:":
            raise UsageError("--ignore got an empty pattern, expected a part of a layer name, such as img_mlp.")
        object.__setattr__(self, "_regex", self._compile())

    def __str__(self) -> str:
        return self.text

    def matches(self, name: str) -> bool:
        return self._regex.search(name) is not None

    def _compile(self) -> re.Pattern[str]:
        if self.text.startswith("re:"):
            try:
                return re.compile(self.text[3:])
            except re.error as error:
                raise UsageError(f"--ignore {self.text}: not a regular expression ({error}).") from error
        if any(char in self.text for char in "*?["):
            return re.compile(rf"\A{fnmatch.translate(self.text)}")
        return re.compile(re.escape(self.text))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One conversion: the format, the layers to keep, the pipeline components to quantize (empty: the default).

    ``input_scales``: the recorded scale of every layer's activations, by layer or ``component.layer`` (static
    activations only). ``target``: the engine that is to load the result. ``default_ignore``: whether layers that the
    target keeps by default are kept. ``ignore_whole_group``: whether all layers that it fuses with a kept one are.
    """

    format: Format
    ignore: tuple[Pattern, ...] = ()
    components: tuple[str, ...] = ()
    input_scales: Mapping[str, float] = field(default_factory=dict)
    target: str = DEFAULT_TARGET
    default_ignore: bool = True
    ignore_whole_group: bool = False

    def __post_init__(self) -> None:
        find_target(self.target)
        needed = "input_scale" in self.format.needs
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
    def method(self) -> str:
        return self.format.name

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "options": format_options(self.format),
            "ignore": [str(pattern) for pattern in self.ignore],
            "components": list(self.components),
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
        """``from_dict`` of what a file holds; None if that is no recipe."""
        try:
            return cls.from_dict(cast("Mapping[str, Any]", data))
        except (OmniConvertError, KeyError, TypeError, ValueError, AttributeError):
            return None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of ``to_dict``."""
        options = dict(data["options"])
        if "block_size" in options:
            options["block_size"] = tuple(options["block_size"])
        return cls(
            format=make_format(data["method"], **options),
            ignore=tuple(map(Pattern, data["ignore"])),
            components=tuple(data["components"]),
            input_scales=data.get("input_scales", {}),
            target=data["target"],
            default_ignore=data["default_ignore"],
            ignore_whole_group=data["ignore_whole_group"],
        )


class _Method(TypedDict):
    method: str


class Choices(_Method, total=False):
    """The keyword arguments of ``make_recipe``."""

    granularity: str | None
    block_size: tuple[int, int] | None
    activation_scheme: str | None
    scale_rule: str | None
    quality: str | None
    fused_scale: str | None
    ignore: Sequence[str]
    components: Sequence[str]
    input_scales: Mapping[str, float] | None
    target: str
    default_ignore: bool
    ignore_whole_group: bool


def make_recipe(
    *,
    ignore: Sequence[str] = (),
    components: Sequence[str] = (),
    input_scales: Mapping[str, float] | None = None,
    target: str = DEFAULT_TARGET,
    default_ignore: bool = True,
    ignore_whole_group: bool = False,
    **options: Any,
) -> Recipe:
    """A recipe from plain values; ``options`` as ``make_format`` takes them."""
    return Recipe(
        format=make_format(**options),
        ignore=tuple(map(Pattern, ignore)),
        components=tuple(components),
        input_scales=input_scales or {},
        target=target,
        default_ignore=default_ignore,
        ignore_whole_group=ignore_whole_group,
    )


def parse_block_size(text: str) -> tuple[int, int]:
    """``128x128`` -> (128, 128): rows and columns of a block."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if not match:
        raise UsageError(f"--block-size is {text!r}, expected rows and columns, as in 128x128.")
    return int(match[1]), int(match[2])


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


def check_patterns(patterns: Iterable[Pattern], layers: Collection[str]) -> None:
    """Every pattern must match a layer.

    Raises:
        UsageError: one matches nothing; shows the closest names.
    """
    for pattern in patterns:
        if not any(pattern.matches(layer) for layer in layers):
            close = closest_names(pattern.text, layers)
            raise UsageError(
                f"--ignore {pattern}: no layer of the model matches. "
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
