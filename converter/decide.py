"""What happens to every layer of one component, and what the target calls the layers: from headers alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from omni_convert.converter.checkpoint import Component
from omni_convert.converter.recipe import Recipe
from omni_convert.formats import format_label
from omni_convert.formats.architectures import Architecture, Layer, guess_role
from omni_convert.formats.base import Format
from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.formats.header import FLOAT_DTYPES, TensorSpec
from omni_convert.formats.patterns import Names, Pattern
from omni_convert.formats.quant_config import NONE
from omni_convert.formats.target import TARGETS, Rule, Target, find_target, format_kind, kind_flags


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What happens to one tensor: quantized to ``format``, or kept (None), and why."""

    format: Format | None
    reason: str


@dataclass(frozen=True)
class View:
    """A component as the recipe's target sees it. ``pipeline``: class of the pipeline that it is part of."""

    component: Component
    recipe: Recipe
    pipeline: str | None

    @cached_property
    def target(self) -> Target:
        return find_target(self.recipe.target)

    @cached_property
    def config(self) -> QuantizationConfig:
        """How this component is to be quantized."""
        return self.recipe.part(self.component.name)

    @cached_property
    def kind(self) -> str:
        return format_kind(self.config.format)

    @cached_property
    def kinds(self) -> Sequence[str]:
        """What is asked for: the kind of most layers, then that of each rule, if others."""
        return tuple(dict.fromkeys(map(format_kind, self.config.formats)))

    @cached_property
    def layers(self) -> Sequence[str]:
        """Checkpoint names of the weights."""
        return [name.removesuffix(".weight") for name, _, _ in self.component.tensors() if name.endswith(".weight")]

    @cached_property
    def names(self) -> frozenset[str]:
        """Every name of every layer: the checkpoint's and the engine's."""
        experts = [name for name, tensor, _ in self.component.tensors() if holds_experts(name, tensor.spec)]
        return frozenset((*self.layers, *self.peers, *experts))

    @cached_property
    def table(self) -> Architecture | None:
        return self.target.find(self.component.config, self.layers, self.pipeline)

    @property
    def architecture(self) -> str | None:
        return self.table.name if self.table else None

    @property
    def where(self) -> str:
        return self.component.name or "the model"

    def group(self, tensor: str) -> str | None:
        """The engine's name of several layers that are quantized together, one of them this tensor's; else None."""
        runtime = self.runtime_names[tensor.removesuffix(".weight")]
        return runtime if len(self.peers.get(runtime, ())) > 1 else None

    def fuses(self, layer: str) -> bool:
        """Whether the engine runs the layer as a part of a larger matrix, or as several matrices in one."""
        return layer in self.described and self.described[layer].is_fused()

    def scale_group(self, tensor: str) -> str | None:
        """What the engine fuses this tensor's layer into; None if it stands alone."""
        group = self.fused_groups.get(tensor.removesuffix(".weight"))
        return group[0] if group else None

    @cached_property
    def described(self) -> Mapping[str, Layer]:
        """Every tensor's layer as the table describes it; empty if there is no table."""
        layers = (name.removesuffix(".weight") for name, _, _ in self.component.tensors())
        return {layer: self.table.layer(layer) for layer in layers} if self.table else {}

    @cached_property
    def runtime_names(self) -> Mapping[str, str]:
        """Every tensor's layer -> the name by which the engine decides whether it is quantized."""
        if not self.table:
            return {layer: layer for layer in (name.removesuffix(".weight") for name, _, _ in self.component.tensors())}
        return {layer: description.runtime_name() for layer, description in self.described.items()}

    @cached_property
    def fused_groups(self) -> Mapping[str, tuple[str, Sequence[str]]]:
        """Every tensor's layer that is part of a fused matrix -> that matrix, and all of its parts."""
        groups = {layer: description.group() for layer, description in self.described.items()}
        return {layer: group for layer, group in groups.items() if group}

    @cached_property
    def peers(self) -> Mapping[str, Sequence[str]]:
        """The engine's name -> the layers that it stands for."""
        peers: dict[str, list[str]] = defaultdict(list)
        for layer in self.layers:
            peers[self.runtime_names[layer]].append(layer)
        return peers

    def check_target(self) -> None:
        """Whether the target loads these formats for this class, from a config that has room for them.

        Raises:
            UsageError: it does not; names the methods that work.
            OmniConvertError: the config lacks the part that takes ``quantization_config``.
        """
        for kind in self.kinds:
            if reason := self.target.refusal(self.architecture, kind):
                raise UsageError(
                    f"{kind_flags(kind)}: {self.target.title} cannot load it for {self.architecture or self.where}: "
                    f"{reason}. {self._remedy(kind)}"
                )
        if self.config.is_mixed and not self.target.mixes:
            self._refuse_mix()
        part: object = self.component.config
        for key in self.table.config_at if self.table else ():
            part = part.get(key) if isinstance(part, Mapping) else None
            if not isinstance(part, Mapping):
                raise OmniConvertError(
                    f"{self.component.folder / 'config.json'}: has no object {key}, expected one in the config of "
                    f"{self.architecture}. The download is damaged: fetch it again."
                )

    def _refuse_mix(self) -> None:
        """One method for a component is all that the target knows."""
        default = format_label(self.config.format)
        plain = self.config.format.config(())
        rule = next(rule for rule in self.config.layers if rule.format and rule.format.config(()) != plain)
        other = _method(rule.format)
        mixing = [name for name, target in TARGETS.items() if target.mixes]
        raise UsageError(
            f"--layer {rule.name}={other}: {self.target.title} runs all layers of {self.where} with one method, here "
            f"{default}. Keep these layers unquantized with --layer {rule.name}=none, convert everything to {other}, "
            f"or mix for another engine: --target {' or '.join(mixing)}."
        )

    def _remedy(self, kind: str) -> str:
        working = self.target.working(self.architecture)
        others = [
            name
            for name, target in TARGETS.items()
            if target.refusal(self._architecture_for(target), kind) is None and name != self.target.name
        ]
        remedies = [f"Use {' or '.join(map(kind_flags, working))}."] if working else ["No method works there."]
        remedies += [f"To load it with {TARGETS[name].title} instead: --target {name}." for name in others]
        return " ".join(remedies)

    def _architecture_for(self, target: Target) -> str | None:
        table = target.find(self.component.config, self.layers, self.pipeline)
        return table.name if table else None

    def decide(self, name: str, spec: TensorSpec) -> Decision:
        def keep(reason: str) -> Decision:
            return Decision(format=None, reason=reason)

        layer = name.removesuffix(".weight")
        named = name.endswith(".weight")
        if holds_experts(name, spec) and not (named and len(spec.shape) == 2):
            return keep(f"experts merged into one {len(spec.shape)}-D tensor, {self._merged_experts}")
        if not named:
            return keep("not a weight")
        if spec.dtype not in FLOAT_DTYPES:
            return keep(f"{spec.dtype} is not BF16, F16 or F32")
        if len(spec.shape) != 2:
            return keep(f"{len(spec.shape)}-D, a linear weight is 2-D")
        wanted = self._wanted(layer)
        fmt = wanted.format or self.config.format
        role = self.described[layer].role(fmt.name) if self.table else guess_role(layer)
        if not role.is_linear:
            return keep(role.reason)
        if not self.table and layer in self._read_by_attention:
            return keep("torch's own attention reads this weight past the layer")
        if wanted.format is None:
            return wanted
        if layer in self._uneven_layers:
            return keep(f"engines fuse or cut it, and blocks of {fmt.rows_per_scale} rows would not fit")
        refusal = fmt.refusal(spec.shape)
        if refusal:
            return keep(refusal)
        return Decision(format=fmt.fused() if self.fuses(layer) else fmt, reason=wanted.reason or role.reason)

    def _wanted(self, layer: str) -> Decision:
        """What the rules say of a linear: the first that matches. The reason is empty if none does."""
        if layer in self._rules:
            return self._rules[layer]
        for kept in self._kept_rules:
            if re.search(kept.layers, layer):
                reason = f"kept by default with {self.config.format.name}: {kept.reason}"
                return Decision(format=None, reason=reason)
        return Decision(format=self.config.format, reason="")

    @cached_property
    def _kept_rules(self) -> Sequence[Rule]:
        """What the target keeps by default, unless it was asked not to."""
        return self.target.kept_rules(self.architecture, self.kind) if self.recipe.default_ignore else ()

    @property
    def _merged_experts(self) -> str:
        """Why tensors that hold several experts stay unquantized."""
        if self.table and any(".experts." in name for block in self.table.blocks for name in block.members):
            return "quantized only where each has its own tensors, as save_pretrained writes them"
        return "which no linear layer has"

    @cached_property
    def _read_by_attention(self) -> frozenset[str]:
        """Output projections of ``torch.nn.MultiheadAttention``."""
        names = (name for name, _, _ in self.component.tensors() if name.endswith(".in_proj_weight"))
        return frozenset(f"{name.removesuffix('in_proj_weight')}out_proj" for name in names)

    @cached_property
    def _uneven_layers(self) -> frozenset[str]:
        """Members of fused matrices in which a block of rows would belong to two: engines cannot cut a scale."""
        uneven: set[str] = set()
        together = self.config.format.rows_per_scale
        if self.table is None or together == 1:
            return frozenset()
        for name, tensor, _ in self.component.tensors():
            layer = name.removesuffix(".weight")
            group = self.fused_groups.get(layer)
            if group and layer != group[1][-1] and tensor.spec.shape[0] % together:
                uneven.update(group[1])
            count = self.described[layer].merged()
            if count > 1 and tensor.spec.shape[0] // count % together:
                uneven.add(layer)
        return frozenset(uneven)

    @cached_property
    def _rules(self) -> Mapping[str, Decision]:
        """What the first rule that means it says of a layer, if any does."""
        found: dict[str, Decision] = {}
        for rule in self.config.layers:
            decision = Decision(format=rule.format, reason=f"--layer {rule.name}={_method(rule.format)}")
            for layer in self._meant(rule.name):
                found.setdefault(layer, decision)
        for pattern in self.config.ignored_layers:
            decision = Decision(format=None, reason=f"--ignore {pattern}")
            for layer in self._meant(pattern):
                found.setdefault(layer, decision)
        return found

    def _meant(self, text: str) -> set[str]:
        """The layers that a pattern means, by their own names, or else by the engine's if it means no layer there.

        So ``to_qkv`` means the whole group, and ``to_q``, though a part of that name, only one member.
        """
        matched = self._all_names.matching(self._pattern(text))
        layers = set(self._own_names.intersection(matched))
        named = {self.runtime_names[layer] for layer in layers}
        return layers.union(*(self.peers[name] for name in matched if name in self.peers and name not in named))

    @cached_property
    def _own_names(self) -> frozenset[str]:
        return frozenset(self.layers)

    @cached_property
    def _all_names(self) -> Names:
        return Names(self.names)

    def _pattern(self, text: str) -> Pattern:
        """``text`` as it is, or, if that means nothing here, without the name of this component in front."""
        pattern = Pattern(text)
        own = text.removeprefix(f"{self.component.name}.")
        return pattern if own in ("", text) or self._all_names.matching(pattern) else Pattern(own)

    def means(self, text: str) -> bool:
        """Whether a pattern means any layer here."""
        return bool(self._all_names.matching(self._pattern(text)))

    def decide_all(self) -> dict[str, Decision]:
        """The decision for every tensor. Engines run the layers under one name as one matrix: all of them are
        quantized, or none.

        Raises:
            UsageError: some are kept and some are not.
        """
        decided = {name: self.decide(name, tensor.spec) for name, tensor, _ in self.component.tensors()}
        self._check_complete()
        for runtime, layers in self.peers.items():
            names = [f"{layer}.weight" for layer in layers]
            kept = [name for name in names if not decided[name].format]
            quantized = [name for name in names if decided[name].format]
            if kept and quantized:
                self._check_widened(runtime, kept[0], quantized[0], decided[kept[0]].reason)
                reason = f"fused with {kept[0].removesuffix('.weight')}, which is kept"
                decided |= dict.fromkeys(quantized, Decision(format=None, reason=reason))
        return decided

    def _check_complete(self) -> None:
        known = set(self.layers)
        for layer in self.layers:
            group = self.fused_groups.get(layer)
            if group and (missing := [member for member in group[1] if member not in known]):
                raise OmniConvertError(
                    f"{self.component.folder}: holds {layer} but not {missing[0]}, expected both: they are parts of "
                    f"{group[0]}. The checkpoint is incomplete: fetch it again."
                )

    def _check_widened(self, runtime: str, kept: str, quantized: str, reason: str) -> None:
        if self.recipe.ignore_whole_group:
            return
        raise UsageError(
            f"{kept.removesuffix('.weight')} is kept ({reason}) but {quantized.removesuffix('.weight')} is not. "
            f"Engines fuse both into {runtime}, which is quantized as a whole or not at all. Keep all of it with "
            f"--ignore {runtime.rsplit('.', 1)[-1]} or --ignore-whole-group, or keep none of it."
        )

    def engine_names(self, layers: Iterable[str]) -> set[str]:
        """Every name of some layers: the checkpoint's and the engine's.

        Of all kept layers, they alone tell a loader which linears to build quantized; names that match nothing do no
        harm.
        """
        return {name for layer in layers for name in (layer, self.runtime_names[layer])}


def _method(fmt: Format | None) -> str:
    return format_label(fmt) if fmt else NONE


def holds_experts(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor is the matrix of a routed expert, or those of several, whatever its class calls it."""
    shape = spec.shape
    if len(shape) < 2 or spec.dtype not in FLOAT_DTYPES or name.endswith("bias"):
        return False
    if len(shape) == 3 and shape[0] > 1 and min(shape[1:]) >= _NO_KERNEL:
        return True
    return "experts" in name and "experts" in name.split(".")


_NO_KERNEL = 32
"""Convolution kernels, the other 3-D weights, are shorter."""


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block 2 before block 10: fewer digits first, for Python turns only so many into a number."""
    parts = [part.lstrip("0") if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    return [(len(part) if place % 2 else -1, part) for place, part in enumerate(parts)]
