"""The plan: what happens to every tensor, computed from headers alone. Everything later reads this one value."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omni_convert.converter.checkpoint import Checkpoint, Component
from omni_convert.converter.recipe import Pattern, Recipe, check_patterns, closest_names
from omni_convert.formats.architectures import Architecture, find_architecture, guess_role
from omni_convert.formats.base import Format
from omni_convert.formats.config import exact_pattern
from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.formats.header import FLOAT_DTYPES, Header, StoredTensor, TensorSpec, aligned_order, encode_header

_QUANTIZED_NAME = re.compile(
    r"(^|\.)(weight_scale|weight_scale_inv|weight_scale_2|weight_dual_scale|weight_packed|qweight|qzeros|scales|"
    r"wscales|weight_zero_point|input_scale|mul_scale|pre_quant_scale|quant_state|SCB|absmax)$"
)
_CODE_DTYPES = re.compile(r"^(I8|U8|F8_|F4|F6_)")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What happens to one tensor: quantized to ``format``, or kept (None), and why."""

    format: Format | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    name: str
    source: StoredTensor
    decision: Decision
    group: str | None = None
    """The name under which an engine fuses this layer with others."""
    input_scale: float | None = None
    """Of the layer's activations, recorded beforehand."""

    @property
    def layer(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def is_matrix(self) -> bool:
        """A weight matrix, or a stack of those of experts, whose parameters some classes do not call weight."""
        sides = len(self.source.spec.shape)
        return (sides == 2 and self.name.endswith(".weight")) or (sides == 3 and ".experts." in self.name)

    @cached_property
    def outputs(self) -> dict[str, TensorSpec]:
        """Name -> dtype and shape of every tensor that this one becomes."""
        fmt = self.decision.format
        if fmt is None:
            return {self.name: self.source.spec}
        return {f"{self.layer}.{suffix}": spec for suffix, spec in fmt.tensors(self.source.spec.shape).items()}

    @property
    def bytes_after(self) -> int:
        return sum(spec.nbytes for spec in self.outputs.values())


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One input shard and the output shard of the same name. ``layout`` is the order of the output's tensors."""

    source: Header
    tensors: tuple[TensorPlan, ...]
    layout: Mapping[str, TensorSpec]
    header: bytes

    @property
    def size(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.layout.values())


@dataclass(frozen=True, kw_only=True)
class ComponentPlan:
    component: Component
    shards: tuple[ShardPlan, ...]
    format: Format
    ignored_layers: tuple[str, ...]
    architecture: str | None

    def tensors(self) -> Iterator[TensorPlan]:
        for shard in self.shards:
            yield from shard.tensors

    @property
    def config_bytes(self) -> bytes:
        """``config.json`` of the output: the source's keys in their order, then ``quantization_config``."""
        config = dict(self.component.config or {})
        config["quantization_config"] = self.format.config(self.ignored_layers)
        return encode_json(config)

    @property
    def index_bytes(self) -> bytes:
        """The index of the output."""
        total = sum(spec.nbytes for shard in self.shards for spec in shard.layout.values())
        weight_map = {name: shard.source.path.name for shard in self.shards for name in shard.layout}
        metadata = {**self.component.shards.index_metadata, "total_size": total}
        return encode_json({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


@dataclass(frozen=True, kw_only=True)
class Plan:
    checkpoint: Checkpoint
    recipe: Recipe
    components: tuple[ComponentPlan, ...]

    def tensors(self) -> Iterator[TensorPlan]:
        for component in self.components:
            yield from component.tensors()

    @property
    def bytes_before(self) -> int:
        """Tensor bytes of the quantized components, as stored in the source."""
        return sum(tensor.source.spec.nbytes for tensor in self.tensors())

    @property
    def bytes_after(self) -> int:
        return sum(tensor.bytes_after for tensor in self.tensors())

    @property
    def bytes_copied(self) -> int:
        """Bytes of the files that arrive unchanged."""
        return sum(self.checkpoint.others.values())

    def disk_bytes(self, *, linked: bool) -> int:
        """Bytes that the output takes; ``linked``: unchanged files become hard links."""
        shards = sum(shard.size for part in self.components for shard in part.shards)
        return shards + (0 if linked else self.bytes_copied)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per source weight in the quantized components, scales and kept tensors included."""
        weights = sum(tensor.source.spec.numel for tensor in self.tensors())
        return 8 * self.bytes_after / weights if weights else 0.0


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Decide every tensor.

    Raises:
        UsageError: an ignore pattern matches nothing or splits a fused group.
        OmniConvertError: the source is quantized already, or nothing in it can be quantized.
    """
    for component in checkpoint.components:
        _refuse_quantized(component)
    engine_names = {name for c in checkpoint.components for name in _layer_names(c)}
    check_patterns(recipe.ignore, sorted(engine_names))
    _check_scale_names(checkpoint, recipe)
    plan = Plan(
        checkpoint=checkpoint,
        recipe=recipe,
        components=tuple(_plan_component(component, recipe) for component in checkpoint.components),
    )
    for part in plan.components:
        if not any(tensor.decision.format for tensor in part.tensors()):
            where = part.component.name or checkpoint.root.name
            found = f"{where}: none of its {sum(1 for _ in part.tensors())} tensors would be quantized"
            if recipe.ignore:
                raise UsageError(f"{found} with these --ignore patterns. Ignore less.")
            raise OmniConvertError(
                f"{found}, expected linear weights that {recipe.method} can hold ({_reasons(part)}). "
                "Leave this component as it is."
            )
    return plan


def _reasons(part: ComponentPlan) -> str:
    """The most frequent reasons why the matrices of a component are kept."""
    reasons = Counter(
        tensor.decision.reason for tensor in part.tensors() if len(tensor.source.spec.shape) > 1
    ).most_common(3)
    return ", ".join(f"{reason}: {count}" for reason, count in reasons) or "it holds no matrices"


def encode_json(data: Mapping[str, Any]) -> bytes:
    """UTF-8; a half of a surrogate pair, which JSON can hold and UTF-8 cannot, stays an escape."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _layer_names(component: Component) -> Iterator[str]:
    """Checkpoint names of the weights, and the names that engines give to fused matrices."""
    table = _find_table(component)
    for name, _, _ in component.tensors():
        if name.endswith(".weight"):
            yield name.removesuffix(".weight")
            group = table.group(name.removesuffix(".weight")) if table else None
            if group:
                yield group[0]


def _refuse_quantized(component: Component) -> None:
    config = component.config or {}
    remedy = "Convert the original BF16 checkpoint instead (the repository it was made from)."
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            entry = config[key]
            method = entry.get("quant_method", entry.get("method")) if isinstance(entry, dict) else entry
            raise OmniConvertError(
                f"{component.folder / 'config.json'}: the source is already quantized ({key} says {method!r}), "
                f"expected BF16, FP16 or FP32 weights. {remedy}"
            )
    for name, tensor, shard in component.tensors():
        is_codes = name.endswith(".weight") and _CODE_DTYPES.match(tensor.spec.dtype)
        if is_codes or _QUANTIZED_NAME.search(name):
            raise OmniConvertError(
                f"{shard.path}: the source is already quantized (tensor {printable(name)} holds {tensor.spec.dtype} "
                f"{tensor.spec.shape}), expected BF16, FP16 or FP32 weights. {remedy}"
            )


def _plan_component(component: Component, recipe: Recipe) -> ComponentPlan:
    table = _find_table(component)
    uneven = _uneven_groups(component, table, recipe.format)
    shards = []
    for header in component.shards.headers:
        tensors = tuple(
            TensorPlan(
                name=name,
                source=tensor,
                decision=_decide(name, tensor.spec, table, recipe, uneven),
                group=_group_name(name, table),
                input_scale=_input_scale(name, component, recipe),
            )
            for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].start)
        )
        layout = aligned_order({name: spec for tensor in tensors for name, spec in tensor.outputs.items()})
        encoded = encode_header(layout, header.metadata or {"format": "pt"})
        shards.append(ShardPlan(source=header, tensors=tensors, layout=layout, header=encoded))
    all_tensors = [tensor for shard in shards for tensor in shard.tensors]
    if table:
        _check_groups(table, all_tensors)
    if recipe.input_scales:
        _check_input_scales(component, recipe, all_tensors)
    return ComponentPlan(
        component=component,
        shards=tuple(shards),
        format=recipe.format,
        ignored_layers=_ignored_layers(all_tensors, recipe.format),
        architecture=table.name if table else None,
    )


def _find_table(component: Component) -> Architecture | None:
    return find_architecture(component.config, [name.removesuffix(".weight") for name, _, _ in component.tensors()])


def _group_name(name: str, table: Architecture | None) -> str | None:
    group = table.group(name.removesuffix(".weight")) if table else None
    return group[0] if group else None


def _uneven_groups(component: Component, table: Architecture | None, fmt: Format) -> frozenset[str]:
    """Fused matrices in which a block of rows would belong to two members: engines cannot cut a scale."""
    uneven = set()
    for name, tensor, _ in component.tensors():
        group = table.group(name.removesuffix(".weight")) if table else None
        is_last = group is not None and name == f"{group[1][-1]}.weight"
        if group and not is_last and tensor.spec.shape[0] % fmt.rows_per_scale:
            uneven.add(group[0])
    return frozenset(uneven)


def _decide(
    name: str, spec: TensorSpec, table: Architecture | None, recipe: Recipe, uneven: Collection[str]
) -> Decision:
    def keep(reason: str) -> Decision:
        return Decision(format=None, reason=reason)

    layer = name.removesuffix(".weight")
    if not name.endswith(".weight"):
        return keep("not a weight")
    if spec.dtype not in FLOAT_DTYPES:
        return keep(f"{spec.dtype} is not BF16, F16 or F32")
    if len(spec.shape) != 2:
        return keep(f"{len(spec.shape)}-D, a linear weight is 2-D")
    role = table.role(layer, recipe.method) if table else guess_role(layer)
    if not role.is_linear:
        return keep(role.reason)
    for pattern in recipe.ignore:
        if pattern.matches(_known_as(pattern, layer, table)):
            return keep(f"--ignore {pattern}")
    if _group_name(name, table) in uneven:
        return keep(f"engines fuse it with others, and blocks of {recipe.format.rows_per_scale} rows would not fit")
    refusal = recipe.format.refusal(spec.shape)
    return keep(refusal) if refusal else Decision(format=recipe.format, reason=role.reason)


def _input_scale(name: str, component: Component, recipe: Recipe) -> float | None:
    layer = name.removesuffix(".weight")
    return recipe.input_scales.get(f"{component.name}.{layer}", recipe.input_scales.get(layer))


def _check_scale_names(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Every recorded scale belongs to a layer."""
    layers = {name for component in checkpoint.components for name in _layer_names(component)}
    layers |= {f"{part.name}.{name}" for part in checkpoint.components for name in _layer_names(part)}
    for name in recipe.input_scales:
        if name not in layers:
            close = closest_names(name, layers)
            raise UsageError(
                f"--activation-scales: no layer is called {printable(name)}. The closest names are {', '.join(close)}."
            )


def _check_input_scales(component: Component, recipe: Recipe, tensors: Sequence[TensorPlan]) -> None:
    without = [tensor.layer for tensor in tensors if tensor.decision.format and tensor.input_scale is None]
    if without:
        close = closest_names(without[0], recipe.input_scales)
        raise UsageError(
            f"--activation-scales has no scale for {len(without)} layers of {component.name or 'the model'}, the "
            f"first is {without[0]} (the file has {', '.join(close)}, ...). Record them, or keep these layers with "
            "--ignore."
        )


def _known_as(pattern: Pattern, layer: str, table: Architecture | None) -> str:
    """The name by which a pattern sees a layer: an engine's fused name if it means no member by its own name.

    So ``to_qkv`` means the whole group, and ``to_q``, though a part of that name, only one member.
    """
    group = table.group(layer) if table else None
    if group is None or any(pattern.matches(member) for member in group[1]):
        return layer
    return group[0]


def _check_groups(table: Architecture, tensors: Sequence[TensorPlan]) -> None:
    """Engines run a fused group as one matrix: all of it is quantized, or none."""
    decided = {tensor.layer: tensor.decision for tensor in tensors if tensor.name.endswith(".weight")}
    for layer, decision in decided.items():
        group = table.group(layer)
        if group is None or decision.format is None:
            continue
        for member in group[1]:
            if member in decided and decided[member].format is None:
                raise UsageError(
                    f"{member} is kept ({decided[member].reason}) but {layer} is not. Engines fuse both into "
                    f"{group[0]}, which is quantized as a whole or not at all: "
                    f"--ignore {group[0].rsplit('.', 1)[-1]}, or none of its parts."
                )


def _ignored_layers(tensors: Sequence[TensorPlan], fmt: Format) -> tuple[str, ...]:
    """Every matrix that stays unquantized, by its checkpoint name and by the name of its fused group.

    The config alone then tells a loader which linears to build quantized; names that match nothing do no harm.
    """
    names: set[str] = set()
    for tensor in tensors:
        if not tensor.decision.format and tensor.is_matrix:
            names.add(tensor.layer)
            if tensor.group:
                names.add(tensor.group)
    if fmt.ignores_parts:
        quantized = [tensor.group or tensor.layer for tensor in tensors if tensor.decision.format]
        quantized += [tensor.layer for tensor in tensors if tensor.decision.format]
        names = {exact_pattern(name) if any(name in other for other in quantized) else name for name in names}
    return tuple(sorted(names, key=natural_key))


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
