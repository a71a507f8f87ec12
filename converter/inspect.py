"""What is in a checkpoint, from its headers and configs alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omni_convert.converter.checkpoint import Component, find_components, open_checkpoint, open_component
from omni_convert.converter.hub_source import HubSource, find_repo
from omni_convert.converter.recipe import Recipe
from omni_convert.formats import format_label
from omni_convert.formats.base import Format
from omni_convert.formats.config import parse_config, stored_config
from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.formats.layout import MANIFEST_NAME, MARKER_NAME, read_json
from omni_convert.formats.text import format_bytes, format_table


@dataclass(frozen=True, kw_only=True)
class DtypeTotal:
    """How much of a component is stored in one dtype."""

    dtype: str
    tensors: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ComponentSummary:
    """One component. ``method`` is None for unquantized weights; ``bits_per_weight`` counts scales as overhead."""

    name: str
    model_class: str
    method: str | None
    shards: int
    quantized_layers: int
    kept_layers: int
    weights: int
    bytes: int
    bits_per_weight: float
    dtypes: tuple[DtypeTotal, ...]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A whole checkpoint. ``made_by``: the version in its manifest, if it has one."""

    path: str
    made_by: str | None
    components: tuple[ComponentSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        origin = f"converted by omni-convert {self.made_by}" if self.made_by else "no omni-convert manifest"
        rows = [["component", "method", "layers", "kept", "weights", "size", "bits/weight"]]
        notes = []
        for item in self.components:
            layers = (str(item.quantized_layers), str(item.kept_layers), _count(item.weights))
            sizes = (format_bytes(item.bytes), f"{item.bits_per_weight:.2f}")
            rows.append([item.name or ".", item.method or "none", *layers, *sizes])
            dtypes = ", ".join(f"{total.dtype} {format_bytes(total.bytes)}" for total in item.dtypes)
            notes.append(f"{item.name or '.'}: {printable(item.model_class)}; {dtypes}")
        table = format_table(rows, right=(2, 3, 4, 5, 6))
        return "\n".join([f"{self.path} ({origin})", table, *notes])


def inspect(path: str | os.PathLike[str]) -> Summary:
    """Summarize a checkpoint folder or file, or a repository on the Hub: ``org/name[@revision]``.

    Raises:
        OmniConvertError: nothing there, unfinished, or malformed.
    """
    if repo := find_repo(path):
        hub = HubSource(repo)
        with hub.naming():
            return replace(inspect(hub.root), path=str(hub))
    root = Path(os.path.abspath(path))
    if not root.is_dir():
        (component,) = open_checkpoint(root).components
        return Summary(path=str(root), made_by=None, components=(_summarize(component),))
    if (root / MARKER_NAME).exists():
        raise OmniConvertError(f"{root}: is the unfinished output of a conversion. Run that conversion again.")
    manifest = read_json(root / MANIFEST_NAME) if (root / MANIFEST_NAME).is_file() else {}
    made_by = str(manifest.get("omni_convert")) if manifest else None
    recipe = Recipe.parse(manifest.get("recipe"))  # with what no config says: the scale rule and the quality
    components = tuple(_summarize(open_component(root, name), recipe) for name in find_components(root))
    return Summary(path=str(root), made_by=made_by, components=components)


def quantized_layers(component: Component, suffixes: tuple[str, ...]) -> set[str]:
    """Layers that hold every tensor of a format."""
    names = {name for name, _, _ in component.tensors()}
    layers = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    return {layer for layer in layers if all(f"{layer}.{suffix}" in names for suffix in suffixes)}


def quant_method(component: Component) -> str | None:
    """The method that a component's config announces."""
    config = stored_config(component.config)
    return str(config.get("quant_method")) if isinstance(config, dict) else None


def _foreign_scales(component: Component) -> list[str]:
    """What a quantized checkpoint that is none of ours calls the scale of a weight."""
    found = {name.rpartition(".")[2] for name, _, _ in component.tensors()}
    return sorted(found & {"weight_scale", "weight_scale_inv"})[:1]


def announced_formats(component: Component) -> Sequence[Format]:
    """The formats that a component's config announces, if it is one of ours."""
    try:
        return parse_config(stored_config(component.config)).formats
    except OmniConvertError:
        return ()


def _method(component: Component, recipe: Recipe | None) -> str | None:
    """What to call the formats of a component: with what no config says, if its recipe is known."""
    formats = announced_formats(component)
    made_as = recipe.formats_of(component.name) if recipe else ()
    labels = [
        format_label(next((known for known in made_as if known.config(()) == fmt.config(())), fmt)) for fmt in formats
    ]
    return " + ".join(labels) or quant_method(component)


def _summarize(component: Component, recipe: Recipe | None = None) -> ComponentSummary:
    formats = announced_formats(component)
    method = _method(component, recipe)
    quantized, side = set[str](), set[str]()
    for suffixes in [fmt.suffixes for fmt in formats] or [("weight", *_foreign_scales(component))]:
        found = quantized_layers(component, tuple(suffixes)) if len(suffixes) > 1 else set()
        quantized |= found
        side |= {f"{layer}.{suffix}" for layer in found for suffix in suffixes if suffix != "weight"}
    tensors, sizes, weights, kept = Counter[str](), Counter[str](), 0, 0
    for name, tensor, _ in component.tensors():
        tensors[tensor.spec.dtype] += 1
        sizes[tensor.spec.dtype] += tensor.spec.nbytes
        weights += 0 if name in side else tensor.spec.numel
        matrix = name.endswith(".weight") and len(tensor.spec.shape) == 2
        kept += matrix and name.removesuffix(".weight") not in quantized
    total = sum(sizes.values())
    return ComponentSummary(
        name=component.name,
        model_class=component.class_name,
        method=method,
        shards=len(component.shards.headers),
        quantized_layers=len(quantized),
        kept_layers=kept,
        weights=weights,
        bytes=total,
        bits_per_weight=8 * total / weights if weights else 0.0,
        dtypes=tuple(
            DtypeTotal(dtype=dtype, tensors=tensors[dtype], bytes=size) for dtype, size in sizes.most_common()
        ),
    )


def _count(number: float) -> str:
    """1.23 k, M, B: as parameters are counted."""
    for unit in ("", " k", " M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} B"
