"""The plan: what happens to every tensor, computed from headers alone. Everything later reads this one value."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from omni_convert.converter.cautions import kept_experts, target_cautions, unheard
from omni_convert.converter.checkpoint import Checkpoint, Component
from omni_convert.converter.decide import Decision, View, holds_experts, natural_key
from omni_convert.converter.pipeline import check_component, encoder_layers
from omni_convert.converter.recipe import Recipe, check_patterns, closest_names
from omni_convert.formats.config import LayerRule, QuantizationConfig, exact_pattern, stored_config, without_asking
from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.formats.header import Header, StoredTensor, TensorSpec, aligned_order, encode_header
from omni_convert.formats.patterns import parts_of_names

_QUANTIZED_SUFFIXES = {
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_dual_scale", "weight_packed", "qweight", "qzeros",
    "scales", "wscales", "weight_zero_point", "input_scale", "mul_scale", "pre_quant_scale", "quant_state", "SCB",
    "absmax",
}  # fmt: skip
_CODE_DTYPES = re.compile(r"F8_|F4|F6_")
_CODES_OF_A_WEIGHT = ("I8", "U8")


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    name: str
    source: StoredTensor
    decision: Decision
    group: str | None = None
    """The target's name of several layers, this one among them, that are quantized together."""
    scale_group: str | None = None
    """What the target fuses this layer into: all of its parts have one scale, where the format has one per weight."""
    input_scale: float | None = None
    """Of the layer's activations, recorded beforehand."""

    @cached_property
    def layer(self) -> str:
        return self.name.removesuffix(".weight")

    @cached_property
    def amax_of(self) -> str | None:
        """The name of the weights (the layer alone, or what it is fused into) whose largest magnitude must be known
        before this one can be quantized; None if its format does without."""
        needs = self.decision.format.needs if self.decision.format else ()
        return (self.scale_group or self.layer) if "amax" in needs else None

    @property
    def is_matrix(self) -> bool:
        """A weight matrix, or those of experts, whose parameters some classes do not call weight."""
        spec = self.source.spec
        return (len(spec.shape) == 2 and self.name.endswith(".weight")) or holds_experts(self.name, spec)

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
    quantization: QuantizationConfig
    """As it is written: exact names."""
    architecture: str | None
    config_at: Sequence[str] = ()
    """The object in ``config.json`` that takes ``quantization_config`` too."""

    @property
    def ignored_layers(self) -> tuple[str, ...]:
        """The names of everything that stays unquantized."""
        return self.quantization.ignored_layers

    def tensors(self) -> Iterator[TensorPlan]:
        for shard in self.shards:
            yield from shard.tensors

    @property
    def config_bytes(self) -> bytes:
        """``config.json`` of the output: the source's keys in their order, then ``quantization_config``."""
        config = part = dict(self.component.config or {})
        for key in self.config_at:
            part[key] = part = dict(part[key])
        part["quantization_config"] = config["quantization_config"] = self.quantization.to_dict()
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
    warnings: tuple[str, ...] = ()
    """What to know before it is carried out, ``cautions`` and what to do about them among it."""
    cautions: tuple[str, ...] = ()
    """Why the target may not load the result, or on what condition it does."""

    def tensors(self) -> Iterator[TensorPlan]:
        for component in self.components:
            yield from component.tensors()

    @cached_property
    def shards(self) -> dict[str, tuple[str, ShardPlan]]:
        """Relative path -> component and shard, of every shard that is written."""
        return {
            part.component.relative(shard.source.path.name): (part.component.name, shard)
            for part in self.components
            for shard in part.shards
        }

    @cached_property
    def bytes_before(self) -> int:
        """Tensor bytes of the quantized components, as stored in the source."""
        return sum(tensor.source.spec.nbytes for tensor in self.tensors())

    @cached_property
    def bytes_after(self) -> int:
        return sum(tensor.bytes_after for tensor in self.tensors())

    @property
    def bytes_copied(self) -> int:
        """Bytes of the files that arrive unchanged."""
        return sum(file.size for file in self.checkpoint.others.values())

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
        UsageError: the target cannot load the format, an ignore pattern matches nothing or splits a fused group.
        OmniConvertError: the source is quantized already, or nothing in it can be quantized.
    """
    plain = tuple(replace(part, config=without_asking(part.config)) for part in checkpoint.components)
    asking = [old for old, new in zip(checkpoint.components, plain, strict=True) if old.config != new.config]
    checkpoint = replace(checkpoint, components=plain)
    for component in checkpoint.components:
        _refuse_quantized(component)
    views = [View(component, recipe, checkpoint.pipeline_class) for component in checkpoint.components]
    for view in views:
        check_component(view, checkpoint, views)
        view.check_target()
    _check_patterns(views, recipe)
    _check_scale_names(views, recipe)
    parts = [_plan_component(view) for view in views]
    for part in parts:
        _check_quantizes(part, checkpoint, recipe)
    quantized = {tensor.layer for part in parts for tensor in part.tensors() if tensor.decision.format}
    for place, view in enumerate(views):
        encoder = encoder_layers(view, checkpoint) or set()
        parts[place] = _with_ignored(parts[place], view, encoder - quantized)
    cautions = target_cautions(views, checkpoint)
    warnings = list(checkpoint.hub.warnings if checkpoint.hub else ())
    warnings += [f"{caution} {advice}".rstrip() for caution, advice in cautions]
    warnings += kept_experts([tensor for part in parts for tensor in part.tensors()], recipe)
    warnings += map(unheard, asking)
    return Plan(
        checkpoint=checkpoint, recipe=recipe, components=tuple(parts), warnings=tuple(warnings),
        cautions=tuple(caution for caution, _ in cautions),
    )  # fmt: skip


def _with_ignored(part: ComponentPlan, view: View, encoder: Iterable[str]) -> ComponentPlan:
    """``part`` with the names of all that stays unquantized, of which the engine takes none for a quantized layer's."""
    kept = [tensor.layer for tensor in part.tensors() if tensor.is_matrix and not tensor.decision.format]
    names = {*view.engine_names(kept), *encoder}
    if part.quantization.format.ignores_parts:
        quantized = view.engine_names(tensor.layer for tensor in part.tensors() if tensor.decision.format)
        parts = parts_of_names(names, quantized)
        names = {exact_pattern(name) if name in parts else name for name in names}
        names.update(view.table.other_stages if view.table else ())
    ignored = tuple(sorted(names, key=natural_key))
    return replace(part, quantization=replace(part.quantization, ignored_layers=ignored))


def _check_patterns(views: Sequence[View], recipe: Recipe) -> None:
    """Every pattern must mean a layer of some component that it was given for."""
    for name, config in recipe.parts.items():
        if not config.ignored_layers and not config.layers:
            continue
        own = [view for view in views if recipe.part(view.component.name) is config]
        names = sorted({known for view in own for known in view.names})

        def means(text: str, own: Sequence[View] = own) -> bool:
            return any(view.means(text) for view in own)

        where = f" ({name})" if name else ""
        check_patterns(f"--ignore{where}", config.ignored_layers, names, means)
        check_patterns(f"--layer{where}", (rule.name for rule in config.layers), names, means)


def _check_quantizes(part: ComponentPlan, checkpoint: Checkpoint, recipe: Recipe) -> None:
    if any(tensor.decision.format for tensor in part.tensors()):
        return
    where = part.component.name or checkpoint.name
    found = f"{where}: none of its {sum(1 for _ in part.tensors())} tensors would be quantized"
    config = recipe.part(part.component.name)
    if config.ignored_layers or config.layers:
        raise UsageError(f"{found} with these --ignore and --layer patterns. Keep less.")
    by_default = any(tensor.decision.reason.startswith("kept by default") for tensor in part.tensors())
    remedy = "Use --no-default-ignore" if by_default else "Leave this component as it is"
    raise OmniConvertError(
        f"{found}, expected linear weights that {config.format.name} can hold ({_reasons(part)}). {remedy}."
    )


def _reasons(part: ComponentPlan) -> str:
    """The most frequent reasons why the matrices of a component are kept."""
    reasons = Counter(
        tensor.decision.reason for tensor in part.tensors() if len(tensor.source.spec.shape) > 1
    ).most_common(3)
    return ", ".join(f"{reason}: {count}" for reason, count in reasons) or "it holds no matrices"


def encode_json(data: Mapping[str, Any]) -> bytes:
    """UTF-8; a half of a surrogate pair, which JSON can hold and UTF-8 cannot, stays an escape."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _refuse_quantized(component: Component) -> None:
    config = component.config or {}
    remedy = "Convert the original BF16 checkpoint instead (the repository it was made from)."
    for key in ("quantization_config", "compression_config"):
        entry = stored_config(config, key)
        if entry:
            method = entry.get("quant_method", entry.get("method")) if isinstance(entry, dict) else entry
            raise OmniConvertError(
                f"{component.folder / 'config.json'}: the source is already quantized ({key} says {method!r}), "
                f"expected BF16, FP16 or FP32 weights. {remedy}"
            )
    for name, tensor, shard in component.tensors():
        dtype = tensor.spec.dtype
        is_codes = _CODE_DTYPES.match(dtype) or (dtype in _CODES_OF_A_WEIGHT and name.endswith(".weight"))
        if is_codes or name.rpartition(".")[2] in _QUANTIZED_SUFFIXES:
            raise OmniConvertError(
                f"{shard.path}: the source is already quantized (tensor {printable(name)} holds {tensor.spec.dtype} "
                f"{tensor.spec.shape}), expected BF16, FP16 or FP32 weights. {remedy}"
            )


def _plan_component(view: View) -> ComponentPlan:
    component, recipe = view.component, view.recipe
    decisions = view.decide_all()
    shards = []
    for header in component.shards.headers:
        tensors = tuple(
            TensorPlan(
                name=name,
                source=tensor,
                decision=decisions[name],
                group=view.group(name),
                scale_group=view.scale_group(name),
                input_scale=recipe.input_scale(component.name, name.removesuffix(".weight")),
            )
            for name, tensor in sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].spec.nbytes))
        )
        layout = aligned_order({name: spec for tensor in tensors for name, spec in tensor.outputs.items()})
        encoded = encode_header(layout, header.metadata or {"format": "pt"})
        shards.append(ShardPlan(source=header, tensors=tensors, layout=layout, header=encoded))
    all_tensors = [tensor for shard in shards for tensor in shard.tensors]
    if recipe.input_scales:
        _check_input_scales(component, recipe, all_tensors)
    return ComponentPlan(
        component=component,
        shards=tuple(shards),
        quantization=_written_config(view.config, all_tensors),
        architecture=view.architecture,
        config_at=view.table.config_at if view.table else (),
    )


def _written_config(wanted: QuantizationConfig, tensors: Iterable[TensorPlan]) -> QuantizationConfig:
    """What config.json says of ``tensors``: the format of most, by rule, and who has another."""
    found = {tensor.layer: tensor.decision.format for tensor in tensors if tensor.decision.format}
    usual = wanted.format if wanted.format.config(()) in (fmt.config(()) for fmt in found.values()) else None
    fmt = usual or next(iter(found.values()), wanted.format)
    rules = tuple(LayerRule(layer, other) for layer, other in found.items() if other.config(()) != fmt.config(()))
    return QuantizationConfig(format=fmt, layers=rules, is_serialized=True)


def _check_scale_names(views: Sequence[View], recipe: Recipe) -> None:
    """Every recorded scale belongs to a layer."""
    if not recipe.input_scales:
        return
    layers = {name for view in views for name in view.names}
    layers |= {f"{view.component.name}.{name}" for view in views for name in view.names}
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
