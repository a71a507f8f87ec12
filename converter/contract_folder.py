"""An output folder as vLLM-Omni's loader finds it: configs, weight files, layers, and what becomes of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from omni_convert.converter.contract_methods import COMPANIONS, METHODS, Announced, understand
from omni_convert.converter.contract_models import EngineModel, Linear, find_model
from omni_convert.formats.header import DTYPE_BITS, StoredTensor
from omni_convert.formats.layout import CONFIG_NAME

QUANTIZATION = "quantization_config"
TRANSFORMERS = ("transformer", "transformer_2")
_CODES = re.compile(r"I8|F8_.*")


class Place(NamedTuple):
    """A tensor in a file."""

    tensor: StoredTensor
    path: Path


class Built(NamedTuple):
    """What a layer of the checkpoint becomes: decided by ``name``, stacked into ``param`` as shard number ``shard``."""

    name: str
    param: str
    shard: int
    linear: Linear

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter holds several logical matrices."""
        return len(self.linear.shards) > 1 or self.linear.widths > 1


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Tensors by suffix, and what the engine builds of them with the announced method; None: a linear without it."""

    name: str
    tensors: Mapping[str, Place]
    built: Built | None

    @property
    def dtype(self) -> str:
        return self.tensors["weight"].tensor.spec.dtype if "weight" in self.tensors else "absent"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors["weight"].tensor.spec.shape

    @property
    def is_quantized(self) -> bool:
        return DTYPE_BITS.get(self.dtype, 64) <= 8 and self.dtype != "BOOL"

    @property
    def is_linear(self) -> bool:
        return "weight" in self.tensors and len(self.shape) == 2

    @property
    def companions(self) -> list[str]:
        return sorted(self.tensors.keys() & COMPANIONS)


@dataclass(frozen=True)
class Ignored:
    """Which names a config's list makes the engine leave unquantized."""

    announced: Announced
    model: EngineModel | None

    @cached_property
    def entries(self) -> Mapping[str, str]:
        """As the engine sees them -> as listed."""
        model, entries = self.model, {}
        for listed in self.announced.ignored:
            names = [listed]
            if model and model.renames and self.announced.modelopt and re.search(r"[^.]\*$", listed):
                names = [listed[:-1], f"{listed[:-1]}.*"]
            for name in names:
                entries[_renamed(name, model) if model else name] = listed
        return entries

    def entry(self, name: str) -> str | None:
        """What in the list keeps the engine from building ``name`` quantized; None if nothing does."""
        found = self._exact(name)
        if found is None and self.announced.modelopt:
            shorter = name.removeprefix("language_model.")
            for entry, listed in self.entries.items():
                if entry in name or entry in shorter or fnmatchcase(name, entry):
                    return listed
        return found

    def _exact(self, name: str) -> str | None:
        head, _, last = name.rpartition(".")
        shards = self.model.packed.get(last) if self.model else None
        if name in self.entries:
            return self.entries[name]
        if shards:
            listed = [self.entries.get(f"{head}.{shard}") for shard in shards]
            return listed[0] if all(listed) else None
        if "experts" in name:  # routed experts: any longer name that holds theirs
            return next((listed for entry, listed in self.entries.items() if name in entry), None)
        return None


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model that the engine builds. ``name``: its folder in a pipeline, "" for a model that stands alone.

    ``file_problems``: why its weights would not be loaded as they lie there. ``lent``: the transformer's
    ``quantization_config``, of a text encoder that the engine builds with it instead of its own.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Place]
    file_problems: Sequence[str] = ()
    files: int = 0
    lent: Any = None

    @property
    def title(self) -> str:
        return self.name or "model"

    @property
    def where(self) -> str:
        """Of the config, for messages."""
        return f"{self.name}/{CONFIG_NAME}" if self.name else CONFIG_NAME

    @cached_property
    def model(self) -> EngineModel | None:
        return find_model(self.config)

    @cached_property
    def found(self) -> Any:
        """The ``quantization_config`` that the engine finds; None if it finds none."""
        return self.config.get(QUANTIZATION) if self.lent is None else self.lent

    @property
    def is_coded(self) -> bool:
        """Whether anything in it looks quantized."""
        return any(layer.is_quantized or layer.companions for layer in self.layers.values())

    @property
    def holds_codes(self) -> bool:
        """Whether it holds quantized layers beyond doubt: what lies beside a model may be anything."""
        return any(_CODES.fullmatch(layer.dtype) and layer.companions for layer in self.layers.values())

    @cached_property
    def announced(self) -> Announced:
        if self.found is None:
            return Announced()
        vllm, wan = (self.model.vllm, self.model.wan) if self.model else (False, False)
        return understand(self.found, vllm=vllm, wan=wan)

    @property
    def kind(self) -> str:
        return self.announced.kind or ""

    @property
    def is_forgiving(self) -> bool:
        """ModelOpt weights of a pipeline's transformer are dequantized where the engine has a BF16 parameter."""
        return self.announced.modelopt and self.name == "transformer"

    @cached_property
    def ignored(self) -> Ignored:
        return Ignored(self.announced, self.model)

    @cached_property
    def layers(self) -> Mapping[str, Layer]:
        grouped: dict[str, dict[str, Place]] = defaultdict(dict)
        for name, place in self.tensors.items():
            layer, _, suffix = name.rpartition(".")
            if suffix == "weight" or suffix in COMPANIONS:
                grouped[layer][suffix] = place
        return {name: Layer(name=name, tensors=found, built=self._built(name)) for name, found in grouped.items()}

    def _built(self, name: str) -> Built | None:
        for linear in self.model.linears if self.model else ():
            match = linear.pattern.fullmatch(name)
            if match and (not linear.methods or self.kind in linear.methods):
                decided = match.expand(linear.name)
                shard = list(linear.shards).index(match[match.re.groups]) if linear.shards else 0
                return Built(decided, match.expand(linear.param or linear.name), shard, linear)
        return None

    @cached_property
    def quantized(self) -> Sequence[Layer]:
        """Layers that hold codes, and that the engine may build for them."""
        return [layer for layer in self.layers.values() if layer.is_quantized and (layer.built or not self.model)]

    def grouped(self, by: str) -> Mapping[str, list[Layer]]:
        """Linears that take the config: ``name`` -> those decided by it, or ``param`` -> those stacked into it."""
        groups: dict[str, list[Layer]] = defaultdict(list)
        for layer in self.layers.values():
            if layer.built and layer.is_linear:
                groups[getattr(layer.built, by)].append(layer)
        for layers in groups.values():
            layers.sort(key=lambda layer: layer.built.shard if layer.built else 0)
        return groups

    @property
    def never_quantized(self) -> Iterator[Layer]:
        """Layers of the kind that the engine builds without a config."""
        if self.model and self.model.never:
            pattern = re.compile(self.model.never[0])
            yield from (layer for layer in self.layers.values() if pattern.fullmatch(layer.name))


@dataclass(frozen=True, kw_only=True)
class Folder:
    """``pipeline``: the class in ``model_index.json``; None without one. ``parts``: what the engine builds quantized.

    ``elsewhere``: other folders with quantized weights. ``problems``: with where configs lie.
    """

    root: Path
    pipeline: str | None
    index: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[Part] = ()
    elsewhere: Sequence[Part] = ()
    problems: Sequence[str] = ()

    @property
    def models(self) -> Sequence[Part]:
        """Parts whose config the engine understands, so that it is known what it expects."""
        return [part for part in self.parts if part.kind in METHODS]


def _renamed(name: str, model: EngineModel) -> str:
    """What the engine's mapper makes of a name in the list."""
    for found, put in model.renames_within.items():
        name = name.replace(found, put, 1)
    for found, put in model.renames.items():
        if name.startswith(found):
            name = name.replace(found, put, 1)
    return name
