"""Which weights are linears that an engine can run quantized: how a model class is described, and a heuristic.

A description lists layer names as they stand in the checkpoint, with ``N`` for a number, and what the engine calls
them where that differs. The descriptions themselves are in the ``tables_*`` files; ``target`` says which engine each
belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple


class Role(NamedTuple):
    """Whether a weight may be quantized, and why."""

    is_linear: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Block:
    """Linears below a repeated prefix.

    ``linears``: layer names that the engine builds as they are. ``fused``: name of a matrix that the engine makes of
    several layers -> those layers. ``merged``: those of ``linears`` that the engine takes for several matrices in one
    tensor -> how many of equal height; 0: of other heights. ``renamed``: layer or fused matrix -> the name by which
    the engine decides about its quantization, where that is another; layers that share one are quantized or kept
    together. ``methods``: with which these linears are quantized; empty: with any.
    """

    prefixes: Sequence[str]
    linears: Sequence[str] = ()
    fused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    merged: Mapping[str, int] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    methods: Sequence[str] = ()

    @cached_property
    def group_of(self) -> Mapping[str, str]:
        """Layer -> the fused matrix that it is part of."""
        return {member: group for group, members in self.fused.items() for member in members}

    @cached_property
    def members(self) -> frozenset[str]:
        """Every layer that may be quantized."""
        return frozenset((*self.linears, *self.group_of))

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        prefixes = "|".join(_NUMBER_SIGN.sub(r"\\d+", re.escape(prefix)) for prefix in self.prefixes)
        return re.compile(rf"({prefixes})\.(.+)")


class _Place(NamedTuple):
    """A layer in a block: the prefix with its numbers, the name below it as the table writes it, and its numbers."""

    block: Block
    prefix: str
    name: str
    numbers: Sequence[str]

    def filled(self, name: str) -> str:
        """``name`` of the table below the same prefix, with the same numbers."""
        if not self.numbers:
            return f"{self.prefix}.{name}"
        numbers = iter(self.numbers)
        return f"{self.prefix}.{_NUMBER_SIGN.sub(lambda _: next(numbers), name)}"


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder that the engine builds with the transformer's quantization config.

    ``layers``: what the engine calls its linears. ``count``: the key of its config that says how many ``N`` there are.
    ``may_be_quantized``: they are the checkpoint's linears under the same names, so that they may be quantized too.
    """

    component: str
    layers: Sequence[str]
    count: Sequence[str]
    may_be_quantized: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model class as one engine sees it, and how to know it.

    ``classes``: diffusers' ``_class_name`` or transformers' ``model_type``. ``pipelines`` and ``config`` tell variants
    of a class apart: the pipeline's class, and values in the model's config. ``unique``: no other class has these
    layer names, so that weights without a config are known by them. ``runtime_prefix``: what a checkpoint's names
    begin with, and what the engine puts there. ``config_at``: the object in config.json that takes
    ``quantization_config`` too, beside its top. ``other_stages``: patterns of what the engine builds with the same
    config under names that no layer of the checkpoint has.
    """

    name: str
    classes: Sequence[str]
    blocks: Sequence[Block] = ()
    pipelines: Sequence[str] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    unique: bool = False
    runtime_prefix: tuple[str, str] = ("", "")
    config_at: Sequence[str] = ()
    other_stages: Sequence[str] = ()
    text_encoder: TextEncoder | None = None

    def layer(self, name: str) -> Layer:
        """What this description says of a layer, by its name in the checkpoint."""
        return Layer(self, name, tuple(self._places(name)))

    def is_class(self, config: Mapping[str, object], pipeline: str | None) -> bool:
        """Whether a model's config and its pipeline's class are of this variant."""
        names = (config.get("_class_name"), config.get("model_type"))
        return (
            any(isinstance(name, str) and name in self.classes for name in names)
            and (not self.pipelines or pipeline in self.pipelines)
            and all(config.get(key) == value for key, value in self.config.items())
        )

    def describes(self, layers: Collection[str]) -> bool:
        """Whether no other class has these names, and every linear of the table occurs in some block."""
        if not self.unique:
            return False
        found = {place.name for layer in layers for place in self._places(layer)}
        return all(found.issuperset(block.members) for block in self.blocks)

    def _places(self, layer: str) -> Iterator[_Place]:
        for block in self.blocks:
            match = block.pattern.fullmatch(layer)
            if match:
                name = match[2]
                if name not in block.members and name not in block.renamed:
                    name = _NUMBER.sub("N", name)
                yield _Place(block, match[1], name, _NUMBER.findall(match[2]))


class Layer(NamedTuple):
    """One layer as an architecture describes it; what several blocks say of it counts in their order."""

    architecture: Architecture
    name: str
    places: Sequence[_Place]

    def role(self, method: str) -> Role:
        for place in self.places:
            if place.name in place.block.members and (not place.block.methods or method in place.block.methods):
                return Role(True, f"linear of {self.architecture.name}")
        return Role(False, f"not a quantizable linear of {self.architecture.name}")

    def group(self) -> tuple[str, tuple[str, ...]] | None:
        """The fused matrix that it is part of, below the checkpoint's prefix, and its member layers."""
        for place in self.places:
            group = place.block.group_of.get(place.name)
            if group:
                return place.filled(group), tuple(map(place.filled, place.block.fused[group]))
        return None

    def is_fused(self) -> bool:
        """Whether the engine makes one matrix of it and others, or takes it for several matrices."""
        return any(place.name in place.block.group_of or place.name in place.block.merged for place in self.places)

    def merged(self) -> int:
        """How many matrices of equal height the engine takes it for."""
        return max((place.block.merged.get(place.name, 1) for place in self.places), default=1)

    def runtime_name(self) -> str:
        """What the engine calls it, or the fused matrix that it is part of: names in ``ignored_layers``."""
        name = self.name
        for place in self.places:
            group = place.block.group_of.get(place.name, place.name)
            if group in place.block.renamed or place.name in place.block.members:
                name = place.filled(place.block.renamed.get(group, group))
                break
        found, put = self.architecture.runtime_prefix
        return put + name.removeprefix(found) if name.startswith(found) else name


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_NUMBER_SIGN = re.compile(r"(?<![^.])N(?![^.])")
_INNER_NUMBER = re.compile(r"\.\d+(?![^.])")

_HEURISTIC: Sequence[tuple[str, re.Pattern[str]]] = (
    (
        "embedding",
        re.compile(r"embed|(^|[._])emb([._]|$)|(^|\.)(wte|wpe|shared|relative_attention_bias)(\.|$)|patchify"),
    ),
    ("norm", re.compile(r"norm|adaln|modulation|(^|[._])(ln|mod)([._]|$)", re.IGNORECASE)),
    # Libraries merge experts when they load, and engines run them unquantized with int8.
    ("routed-expert", re.compile(r"(^|\.)experts(\.|$)")),
    # Mamba's module reads this weight itself, past the layer.
    ("time-step", re.compile(r"(^|\.)dt_proj$")),
    ("router", re.compile(r"router|(^|\.)(gate|wg|gate_inp|shared_expert_gate)$")),
    # Engines build the ends of a multi-token-prediction layer without a quantization config.
    ("prediction-head", re.compile(r"(^|\.)(eh_proj|shared_head|mtp\.fc)(\.|$)")),
    ("output-head", re.compile(r"(^|\.)(lm_head|classifier|score|pooler)(\.|$)|^(\w+\.)?(head|cls|qa_outputs)(\.|$)")),
    ("output-head", re.compile(r"^(proj_out|final_layer|final_linear|output|out_proj|out)(\.|$)")),
    ("input-projection", re.compile(r"^(\w+_in|proj_in)(\.|$)")),
)


def guess_role(layer: str) -> Role:
    """For unknown classes: a matrix is a linear unless its name gives it the role of something else."""
    return _guess_role(_INNER_NUMBER.sub(".0", layer))


@lru_cache(maxsize=1024)
def _guess_role(layer: str) -> Role:
    """No pattern looks at a number that is a whole part of a name, unless it is the first part."""
    for role, pattern in _HEURISTIC:
        match = pattern.search(layer)
        if match:
            return Role(False, f"{role} role ({match[0].strip('.')!r} in its name)")
    return Role(True, "2-D weight with no other role in its name")
