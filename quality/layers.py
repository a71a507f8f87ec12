"""A conversion layer by layer, from its manifest and headers alone: what every page and card about it starts from."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omni_convert.converter.checkpoint import Component, open_component
from omni_convert.converter.decide import View, holds_experts, natural_key
from omni_convert.converter.manifest import layer_formats, read_manifest
from omni_convert.converter.recipe import Recipe
from omni_convert.formats import format_label
from omni_convert.formats.base import Format
from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.formats.header import FLOAT_DTYPES, TensorSpec
from omni_convert.formats.layout import MANIFEST_NAME, PIPELINE_INDEX, read_json
from omni_convert.formats.text import layer_patterns

_MOST_DB = 1000
"""Beyond all that float32 can tell."""
_NUMBER = re.compile(r"(?<![^.])\d{1,9}(?![^.])")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight of a converted component.

    ``kind``: the name with ``*`` for the number of the ``block`` and whatever else varies. ``format``: its label, None
    if the weight is kept. ``group``: the engine's name of the layers that are quantized or kept together with this one,
    else its own. ``dtype``: in the source. ``sqnr_db``: infinite if exact, None if kept. ``shared_scale_db``: about
    what sharing a scale costs, None if it has its own.
    """

    component: str
    name: str
    kind: str
    block: int | None
    group: str
    format: str | None
    reason: str
    dtype: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None
    shared_scale_db: float | None

    @property
    def error(self) -> float:
        """Energy of the error as a share of the weight's: 10**(-SQNR / 10); 0 where nothing was lost."""
        return 0.0 if self.sqnr_db is None else 10 ** (-self.sqnr_db / 10)

    @property
    def full_name(self) -> str:
        """With the component's name in front, as ``--ignore`` takes it too."""
        return f"{self.component}.{self.name}" if self.component else self.name


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A finished output folder.

    ``source``: what the manifest says of the model that was converted. ``classes``: component -> model class.
    ``formats``: component -> layer -> format, of what is quantized. ``layers``: every weight of the components
    with at least two dimensions, in the order of their names. ``others``, ``other_bytes``, ``other_weights``: biases,
    norms and what else they hold.
    """

    path: Path
    version: str
    source: Mapping[str, Any]
    recipe: Recipe
    classes: Mapping[str, str]
    formats: Mapping[str, Mapping[str, Format]]
    layers: tuple[Layer, ...]
    others: int
    other_bytes: int
    other_weights: int

    def label(self, layer: Layer) -> str:
        """The name of a layer, with its component's where there are several."""
        return layer.full_name if len(self.classes) > 1 else layer.name

    @property
    def quantized(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.format)

    @property
    def bytes_before(self) -> int:
        """Tensor bytes of the quantized components in the source."""
        return self.other_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return self.other_bytes + sum(layer.bytes_after for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per source weight in the quantized components, scales and kept tensors included."""
        weights = self.other_weights + sum(math.prod(layer.shape) for layer in self.layers)
        return 8 * self.bytes_after / weights if weights else 0.0

    @cached_property
    def worst(self) -> tuple[Layer, ...]:
        """The layers that lost anything, lowest SQNR first."""
        lost = [layer for layer in self.quantized if layer.error]
        return tuple(sorted(lost, key=lambda layer: (-layer.error, natural_key(layer.full_name))))


def read_conversion(out: str | os.PathLike[str]) -> Conversion:
    """Every layer of a converted folder; no weight is read.

    Raises:
        OmniConvertError: ``out`` is not a finished conversion, or its manifest does not fit its files.
    """
    root = Path(os.path.abspath(out))
    manifest = read_manifest(root)
    if manifest is None:
        raise OmniConvertError(f"{root}: found no {MANIFEST_NAME}, expected a folder written by omni-convert.")
    recipe = Recipe.from_dict(manifest["recipe"])
    pipeline = read_json(root / PIPELINE_INDEX).get("_class_name") if (root / PIPELINE_INDEX).is_file() else None
    layers: list[Layer] = []
    others: list[TensorSpec] = []
    classes: dict[str, str] = {}
    formats: dict[str, dict[str, Format]] = {}
    for name, entry in manifest["components"].items():
        component = open_component(root, name)
        classes[name] = component.class_name
        view = View(component, recipe, pipeline)
        decisions = entry["tensors"]
        formats[name] = layer_formats(recipe, name, decisions)
        tensors = dict(_source_tensors(component, decisions, formats[name]))
        weights = {tensor: spec for tensor, spec in tensors.items() if is_weight(tensor, spec)}
        others += [spec for tensor, spec in tensors.items() if tensor not in weights]
        places = block_kinds([tensor.removesuffix(".weight") for tensor in weights])
        for tensor in sorted(weights, key=natural_key):
            layers.append(_layer(view, tensor, weights[tensor], decisions[tensor], formats[name], places))
    return Conversion(
        path=root,
        version=str(manifest["omni_convert"]),
        source=manifest["source"],
        recipe=recipe,
        classes=classes,
        formats=formats,
        layers=tuple(layers),
        others=len(others),
        other_bytes=sum(spec.nbytes for spec in others),
        other_weights=sum(spec.numel for spec in others),
    )


def is_weight(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor is told of as a layer: a weight with at least two dimensions, or experts."""
    return (name.endswith(".weight") and len(spec.shape) > 1) or holds_experts(name, spec)


def block_kinds(layers: Sequence[str]) -> dict[str, tuple[str, int | None]]:
    """Every layer's kind and block: its name with ``*`` for what varies, and the first number of its path, if any.

    ``blocks.3.attn.to_out.0`` is block 3 of ``blocks.*.attn.to_out.0``.
    """
    patterns = layer_patterns(layers)
    found: dict[str, tuple[str, int | None]] = {}
    for layer, pattern in patterns.items():
        number = _NUMBER.search(layer)
        if number and pattern[number.start()] != "*":  # the only block
            pattern = f"{pattern[: number.start()]}*{pattern[number.end() :]}"
        found[layer] = pattern, int(number.group()) if number else None
    return found


def _source_tensors(
    component: Component, decisions: Mapping[str, Mapping[str, Any]], formats: Mapping[str, Format]
) -> Iterator[tuple[str, TensorSpec]]:
    """Dtype and shape in the source of every tensor that the manifest tells of."""
    stored = {name: tensor.spec for name, tensor, _ in component.tensors()}
    expected = decisions.keys() | {f"{layer}.{suffix}" for layer, fmt in formats.items() for suffix in fmt.suffixes}
    for name in sorted(expected ^ stored.keys()):
        found = "holds {}, which its manifest does not name" if name in stored else "lacks {}, which its manifest names"
        raise OmniConvertError(
            f"{component.folder}: {found.format(printable(name))}. Check it with: omni-convert verify."
        )
    for name, entry in decisions.items():
        quantized = entry["action"] != "keep"
        dtype = entry.get("dtype") if quantized else stored[name].dtype
        if quantized and dtype not in FLOAT_DTYPES:
            raise OmniConvertError(
                f"{component.folder}: the manifest says that {printable(name)} was {printable(str(dtype))}, expected "
                "BF16, F16 or F32. Convert again."
            )
        yield name, TensorSpec(str(dtype), stored[name].shape)


def _layer(
    view: View,
    tensor: str,
    spec: TensorSpec,
    entry: Mapping[str, Any],
    formats: Mapping[str, Format],
    places: Mapping[str, tuple[str, int | None]],
) -> Layer:
    name = tensor.removesuffix(".weight")
    kind, block = places[name]
    fmt = formats.get(name)
    after = fmt.tensors(spec.shape).values() if fmt else [spec]
    return Layer(
        component=view.component.name,
        name=name,
        kind=kind,
        block=block,
        group=view.group(tensor) or name,
        format=format_label(fmt) if fmt else None,
        reason=str(entry["why"]),
        dtype=spec.dtype,
        shape=spec.shape,
        bytes_before=spec.nbytes,
        bytes_after=sum(part.nbytes for part in after),
        sqnr_db=_decibel(view, tensor, entry, "sqnr_db", math.inf) if fmt else None,
        shared_scale_db=_decibel(view, tensor, entry, "shared_scale_db", None) if fmt else None,
    )


def _decibel(view: View, tensor: str, entry: Mapping[str, Any], key: str, otherwise: float | None) -> float | None:
    """``otherwise``: what stands for null, and for nothing."""
    value = entry.get(key)
    if value is None:
        return otherwise
    if type(value) in (int, float) and abs(value) <= _MOST_DB:  # a NaN is not
        return float(value)
    raise OmniConvertError(
        f"{view.component.folder}: the manifest has {key} {printable(value)} for {printable(tensor)}, expected a "
        f"number from -{_MOST_DB} to {_MOST_DB}, or null. Convert again."
    )
