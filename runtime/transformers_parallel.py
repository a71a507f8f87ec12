"""Tensor parallelism of models of Transformers: what their plans mean, and how a rank reads its part of a checkpoint.

A plan (``base_model_tp_plan`` of configs, ``_tp_plan`` of classes) names modules, and parameters of experts, with a
style each. Transformers' own loader makes distributed tensors of them, which quantized layers cannot be; here every
rank holds ordinary tensors, and needs no process group before it runs.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

from omni_convert.formats.errors import OmniConvertError
from omni_convert.runtime.parallel import (
    Rank,
    Split,
    add_up,
    check_split,
    cut,
    format_of,
    join,
    local_tensors,
    mark_part,
    split_linears,
)

_log = logging.getLogger(__name__)

_LINEARS = {  # dim, is_closed, how many blocks fill it
    "colwise": (0, False, 1),
    "packed_colwise": (0, False, 2),
    "colwise_gather_output": (0, True, 1),
    "rowwise": (1, False, 1),
    "packed_rowwise": (1, False, 2),
    "rowwise_split_input": (1, True, 1),
}
_EMBEDDINGS = {"embedding_rowwise": 0, "embedding_colwise": 1}
_EXPERTS = "moe_tp_experts"
_WHOLE = ("replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj")
"""Every rank holds all of it; what sets these apart concerns gradients alone."""


def split_model(model: Any, rank: Rank, rules: Mapping[str, Any]) -> dict[str, Split]:
    """Replace what the plan of ``model``, which has no weights yet, names by a rank's part of it. ``rules``: by tensor,
    what Transformers makes it with, of those that are not loaded as they are.

    Returns tensor name -> how it is split, of every tensor of which a rank holds a part; of an expert's weights with
    dimensions counted from the end. Empty: it cannot be split, and is one of several models in a pipeline.

    Raises:
        OmniConvertError: it has no plan, or one with a style that is not known here; heads cannot be divided by the
            number of ranks; a cut falls between weights that share a scale; or parts of what is stored do not make
            parts of what is split. The model is then as it was.
    """
    try:
        modules, experts = _splits(model, rank)
        _check(model, modules, experts, rank)
        tensors = experts | {
            f"{name}.{suffix}": split
            for name, split in modules.items()
            for suffix in model.get_submodule(name).state_dict(keep_vars=True)
        }
        for name, rule in rules.items():
            check_merged(model, name, rule, tensors)
    except OmniConvertError as error:
        if not rank.in_pipeline:
            raise
        _log.warning("every rank holds all of a %s (%s)", type(model).__name__, error)
        return {}
    linears = {name: split for name, split in modules.items() if isinstance(model.get_submodule(name), nn.Linear)}
    split_linears(model, linears, rank)
    for name in modules.keys() - linears.keys():
        _split_embedding(model.get_submodule(name), modules[name], rank)
    _split_experts(model, experts, rank)
    return tensors


def _splits(model: Any, rank: Rank) -> tuple[dict[str, Split], dict[str, Split]]:
    """Module -> how it is split, and the same of single parameters of experts."""
    plan, modules, experts = getattr(model, "tp_plan", None) or {}, {}, {}
    for name, module in model.named_modules():
        style = plan.get(_pattern(name))
        if style is not None and style not in (*_WHOLE, _EXPERTS):
            modules[name] = _split(model, name, module, style)
        if style == _EXPERTS:
            named = {parameter: plan.get(_pattern(f"{name}.{parameter}")) for parameter in module._parameters}
            for parameter, found in named.items():
                experts[f"{name}.{parameter}"] = _expert_split(model, f"{name}.{parameter}", found)
    closed = [name for name, split in modules.items() if split.is_closed]
    for name in [name for name in closed if not _can_split(model.get_submodule(name), modules[name], rank)]:
        del modules[name]  # whole on every rank is right too
    for tied in model.all_tied_weights_keys.items():
        pair = [name.removesuffix(".weight") for name in tied]
        if modules.get(pair[0]) != modules.get(pair[1]):
            for name in pair:
                modules.pop(name, None)
    return modules, experts


def _pattern(name: str) -> str:
    """How a plan spells a name."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _split(model: nn.Module, name: str, module: nn.Module, style: str) -> Split:
    if style in _LINEARS and isinstance(module, nn.Linear):
        dim, is_closed, count = _LINEARS[style]
        side = (module.out_features, module.in_features)[dim]
        return Split(dim, (side // count,) * count, is_closed)
    if style in _EMBEDDINGS and isinstance(module, nn.Embedding):
        dim = _EMBEDDINGS[style]
        return Split(dim, (module.weight.shape[dim],), is_closed=True)
    raise _unknown(model, name, type(module).__name__, style)


def _expert_split(model: nn.Module, name: str, style: str | None) -> Split:
    weight = model.get_parameter(name)
    if style not in ("colwise", "packed_colwise", "rowwise", "packed_rowwise") or weight.ndim != 3:
        raise _unknown(model, name, f"a parameter with {weight.ndim} dimensions", style)
    dim, _, count = _LINEARS[style]
    return Split(dim - 2, (weight.shape[dim - 2] // count,) * count)


def _unknown(model: nn.Module, name: str, what: str, style: str | None) -> OmniConvertError:
    return OmniConvertError(
        f"{type(model).__name__}: its plan for tensor parallelism has {style!r} for {name}, {what}, expected one of "
        f"{', '.join((*_LINEARS, *_EMBEDDINGS, _EXPERTS))}, of a linear, an embedding or experts. Load it on one "
        "device, without tp_size."
    )


def _can_split(module: nn.Module, split: Split, rank: Rank) -> bool:
    try:
        check_split("", format_of(module), split, rank)
    except OmniConvertError:
        return False
    return True


def _check(model: nn.Module, modules: Mapping[str, Split], experts: Mapping[str, Split], rank: Rank) -> None:
    """Raises:
    OmniConvertError: nothing is split, or something cannot be.
    """
    if not modules and not experts:
        raise OmniConvertError(
            f"{type(model).__name__}: has no plan for tensor parallelism, expected one in its class or config (as of "
            "Llama, Qwen and Mistral). Load it on one device, without tp_size."
        )
    for name, split in experts.items():
        check_split(name, None, split, rank)
    for name, split in modules.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) and not split.is_closed:
            _check_heads(name, module, split.dim, model.get_submodule(name.rpartition(".")[0]), rank)
        check_split(name, format_of(module), split, rank)


def _check_heads(name: str, linear: nn.Linear, dim: int, attention: nn.Module, rank: Rank) -> None:
    """Raises:
    OmniConvertError: an attention's heads cannot be divided by the number of ranks.
    """
    size = getattr(attention, "head_dim", None)
    if not isinstance(size, int):
        return
    heads = (linear.out_features, linear.in_features)[dim] // size
    queries = getattr(getattr(attention, "config", None), "num_attention_heads", heads)
    for count in (heads, queries):
        if count % rank.size:
            raise OmniConvertError(
                f"{name}: has {count} heads, expected a multiple of tp_size, which is {rank.size}. Use fewer ranks."
            )


def check_merged(model: nn.Module, name: str, rule: Any, splits: Mapping[str, Split]) -> None:
    """``name``: of the tensor that Transformers makes of others by ``rule``.

    Raises:
        OmniConvertError: parts of those others do not make a part of it.
    """
    targets = [name.replace(rule.target_patterns[0], target) for target in rule.target_patterns]
    is_simple = len(targets) == 1 and all(isinstance(op, (MergeModulelist, Concatenate)) for op in rule.operations)
    if not is_simple and not splits.keys().isdisjoint(targets):
        steps = ", ".join(type(op).__name__ for op in rule.operations)
        raise OmniConvertError(
            f"{type(model).__name__}: Transformers rearranges {name} when it loads ({steps}), expected a tensor that "
            "is loaded as it is, or merged from others, to be split among ranks. Load it on one device, without "
            "tp_size."
        )


class _VocabularyPart:
    """Some of an embedding's rows; mixed into its class, which may scale what it looks up."""

    rank: Rank
    num_embeddings: int

    def forward(self, input: Tensor) -> Tensor:
        """(...) token ids -> (..., K), the sum of all ranks' results, of which one is not zero."""
        local = input - self.rank.index * self.num_embeddings
        is_elsewhere = (local < 0) | (local >= self.num_embeddings)
        found = super().forward(local.masked_fill(is_elsewhere, 0))  # type: ignore[misc]
        return add_up(self.rank, self, (), found.masked_fill(is_elsewhere.unsqueeze(-1), 0))  # type: ignore[arg-type]


def _split_embedding(module: nn.Module, split: Split, rank: Rank) -> None:
    """Make an embedding a rank's part of it, in place: other classes may know it."""
    assert isinstance(module, nn.Embedding)
    weight = module.weight
    shape = [side // rank.size if dim == split.dim else side for dim, side in enumerate(weight.shape)]
    module.weight = nn.Parameter(weight.new_empty(shape), requires_grad=weight.requires_grad)
    module.num_embeddings, module.embedding_dim = shape
    if split.dim == 0:
        module.padding_idx = None  # of gradients, by the number of the whole
        vars(module)["rank"] = rank
        module.__class__ = type(f"Part{type(module).__name__}", (_VocabularyPart, type(module)), {})
    else:
        module.register_forward_hook(functools.partial(join, rank))
    mark_part(module)


def _split_experts(model: nn.Module, splits: Mapping[str, Split], rank: Rank) -> None:
    """Make modules with the weights of all experts (experts, N, K) a rank's part of them. ``splits``: by weight."""
    for name, split in splits.items():
        parent, _, own = name.rpartition(".")
        weight, shape = model.get_parameter(name), list(model.get_parameter(name).shape)
        shape[split.dim] //= rank.size
        part = nn.Parameter(weight.new_empty(shape), requires_grad=weight.requires_grad)
        model.get_submodule(parent).register_parameter(own, part)
    for parent in {name.rpartition(".")[0] for name in splits}:
        model.get_submodule(parent).register_forward_hook(functools.partial(add_up, rank))
        mark_part(model.get_submodule(parent))


class TakePart(ConversionOps):  # type: ignore[misc]
    """Cuts a rank's part of a tensor, which has been mapped and not read. ``dtype``: what it is cast to after that."""

    dtype: torch.dtype | None = None

    def __init__(self, splits: Mapping[str, Split], rank: Rank) -> None:
        """``splits``: by tensor; the others are taken whole."""
        self._splits = splits
        self._rank = rank

    def __deepcopy__(self, memo: object) -> TakePart:
        """Transformers copies operations for every tensor."""
        return TakePart(self._splits, self._rank)

    def convert(
        self, input_dict: Mapping[str, Any], *args: Any, full_layer_name: str, model: nn.Module, **kwargs: Any
    ) -> dict[str, Any]:
        split, found = self._splits.get(full_layer_name), {}
        for pattern, value in input_dict.items():
            tensors = value if isinstance(value, list) else [value]
            if split is not None:
                tensors = [self._part(full_layer_name, tensor, split, model, len(input_dict)) for tensor in tensors]
            found[pattern] = [tensor.to(dtype=self.dtype) for tensor in tensors]
        return found

    def _part(self, name: str, tensor: Tensor, split: Split, model: nn.Module, merged: int) -> Tensor:
        """``merged``: how many tensors are put side by side to fill the blocks of one."""
        layer, _, suffix = name.rpartition(".")
        if split.dim < 0:
            blocks = split.blocks if merged == 1 else (tensor.shape[split.dim],)
            return cut(tensor, split.dim, Split(split.dim, blocks), self._rank)
        fmt = format_of(model.get_submodule(layer))
        return local_tensors(fmt, {suffix: tensor}, split, self._rank)[suffix]


def part_conversions(rules: Sequence[Any], splits: Mapping[str, Split], rank: Rank) -> list[Any]:
    """Transformers' rules for loading, with those that take a rank's part: first thing of what is merged, and a rule of
    its own for all else."""
    for rule in rules:
        if isinstance(rule, WeightConverter):
            rule.operations.insert(0, TakePart(splits, rank))
    suffixes = sorted({name.rpartition(".")[2] for name in splits})
    return [*rules, *(WeightConverter(suffix, suffix, [TakePart(splits, rank)]) for suffix in suffixes)]
