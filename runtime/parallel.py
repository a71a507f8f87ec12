"""Tensor parallelism: which slice of a layer's tensors a rank holds, and how the ranks' results become one.

Plans of the libraries say which linears are split by rows (``colwise``: each rank computes some of the outputs) and
which by columns (``rowwise``: each rank sees some of the inputs, and the results are added up). Scales are split with
what they scale, so a cut must fall between blocks that share one. Plans of Transformers: ``transformers_parallel``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omni_convert.formats.base import Format
from omni_convert.formats.errors import OmniConvertError, UsageError, printable
from omni_convert.formats.microscaling import BLOCK
from omni_convert.formats.mxfp4_dualscale import GROUP
from omni_convert.runtime.linear import QuantizedLinear, take_over

ASCEND_BLOCK = 64
"""Columns of MX formats that Ascend's kernels take together."""


_IS_PART = "_omni_convert_is_part"


@dataclass(frozen=True)
class Rank:
    """One of ``size`` processes that run a model together. ``device``: the type of all their devices. ``in_pipeline``:
    the model is one of several, and each rank may hold all of it."""

    index: int
    size: int
    device: str = "cpu"
    in_pipeline: bool = False


def parse_rank(index: int | None, size: int | None) -> Rank | None:
    """``tp_rank`` and ``tp_size``; None for one process.

    Raises:
        UsageError: one without the other, or a rank that there is not.
    """
    if index is None and size is None:
        return None
    if type(index) is not int or type(size) is not int or not 0 <= index < size:
        raise UsageError(f"tp_rank is {index!r}, tp_size {size!r}, expected two integers, 0 <= tp_rank < tp_size.")
    return Rank(index, size) if size > 1 else None


class Split(NamedTuple):
    """How a weight is split: along ``dim``, each of ``blocks`` (which fill it) among all ranks. ``is_closed``: every
    rank takes all inputs and gives all outputs, so that what is around it does not know."""

    dim: int
    blocks: Sequence[int]
    is_closed: bool = False

    def ranges(self, rank: Rank) -> list[tuple[int, int]]:
        """Start and stop of what a rank holds of every block."""
        found, start = [], 0
        for block in self.blocks:
            part = block // rank.size
            found.append((start + rank.index * part, start + (rank.index + 1) * part))
            start += block
        return found


LOADING: ContextVar[Rank | None] = ContextVar("LOADING", default=None)
"""The rank for which a model is being loaded: libraries have no way to hand it through."""


def split_linears(model: nn.Module, splits: Mapping[str, Split], rank: Rank) -> None:
    """Replace linears of ``model``, which has no weights yet, by a rank's part of them. ``splits``: by module.

    Raises:
        OmniConvertError: a cut falls between weights that share a scale.
    """
    for name, split in splits.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        check_split(name, format_of(linear), split, rank)
        part = _part_of(linear, split, rank)
        if split.dim == 0 and split.is_closed:
            part.register_forward_hook(functools.partial(join, rank))
        if split.dim == 1 and split.is_closed:
            part.register_forward_pre_hook(functools.partial(_take_columns, split, rank))
        if split.dim == 1:
            part.register_forward_hook(functools.partial(add_up, rank))
        model.set_submodule(name, part)


def format_of(module: object) -> Format | None:
    """Of a quantized linear; None of any other module."""
    return module.format if isinstance(module, QuantizedLinear) else None


def _part_of(linear: nn.Linear, split: Split, rank: Rank) -> nn.Linear:
    """An empty linear like this one, of the shape that a rank holds."""
    sides = [linear.out_features, linear.in_features]
    sides[split.dim] //= rank.size
    rows, columns = sides
    has_bias, device = linear.bias is not None, linear.weight.device
    part: nn.Linear
    if isinstance(linear, QuantizedLinear):
        dtype = linear.bias.dtype if has_bias else None
        part = QuantizedLinear(columns, rows, has_bias, device, dtype, fmt=linear.format)
        part.await_stored()
    else:
        part = nn.Linear(columns, rows, has_bias, device, linear.weight.dtype)
    take_over(linear, part)
    mark_part(part)
    return part


def mark_part(module: nn.Module) -> None:
    """Note that it is one rank's part of a module."""
    vars(module)[_IS_PART] = True


def is_part(module: object) -> bool:
    """Whether it is one rank's part of a module."""
    return _IS_PART in getattr(module, "__dict__", ())


def diffusers_splits(model: Any, rank: Rank) -> dict[str, Split]:
    """Module -> how its weight is split, by the plan of a class of Diffusers.

    Raises:
        OmniConvertError: the class has no plan for it, or something cannot be divided by the number of ranks.
    """
    where = type(model).__name__
    plan = getattr(model, "_tp_plan", None)
    if not plan:
        raise OmniConvertError(
            f"{where}: has no plan for tensor parallelism, expected a class of Diffusers with one (Qwen-Image, FLUX). "
            "Load it on one device, without tp_size."
        )
    heads = model.config.get("num_attention_heads")
    if isinstance(heads, int) and heads % rank.size:
        raise OmniConvertError(
            f"{where}: has {heads} attention heads, expected a multiple of tp_size, which is {rank.size}."
        )
    from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs

    try:
        specs = resolve_tp_shard_specs(model, plan, rank.size)
    except ValueError as error:
        raise OmniConvertError(f"{where}: cannot be split among {rank.size} ranks ({error}). Use fewer.") from error
    return {
        name.removesuffix(".weight"): Split(spec.dim, spec.block_sizes)
        for name, spec in specs.items()
        if name.endswith(".weight")
    }


def check_split(layer: str, fmt: Format | None, split: Split, rank: Rank) -> None:
    """``fmt``: None for plain weights.

    Raises:
        OmniConvertError: ranks would hold parts of several sizes, or a cut falls between weights that share a scale.
    """
    what = "row" if split.dim in (0, -2) else "column"
    if uneven := next((block for block in split.blocks if block % rank.size), None):
        raise OmniConvertError(
            f"{printable(layer)}: has {uneven} {what}s, expected a multiple of tp_size, which is {rank.size}."
        )
    if fmt is None:
        return
    unit = fmt.rows_per_scale if split.dim == 0 else _columns_per_scale(fmt, rank.device)
    for start, stop in split.ranges(rank):
        if start % unit or stop % unit:
            raise OmniConvertError(
                f"{printable(layer)}: rank {rank.index} of {rank.size} would hold the {what}s from {start} to {stop}, "
                f"expected multiples of {unit}, which {fmt.name} keeps together on {rank.device}. Use fewer ranks, "
                "or convert again and keep this layer (--ignore)."
            )


def _columns_per_scale(fmt: Format, device: str) -> int:
    """How many columns share a scale, or are taken together on a device, and so stay together; 1 if whole rows do."""
    block = getattr(fmt, "block_size", None)
    if block:
        return int(block[1])
    mx_block = ASCEND_BLOCK if device == "npu" else BLOCK
    return {"mxfp8": mx_block, "mxfp4": mx_block, "mxfp4_dualscale": GROUP}.get(fmt.name, 1)


def local_tensors(fmt: Format | None, tensors: Mapping[str, Tensor], split: Split, rank: Rank) -> dict[str, Tensor]:
    """A rank's part of a layer's tensors, by suffix. ``fmt``: None for a plain layer.

    Of a layer that is split by columns the bias is added once: on all ranks but the first it is zero.
    """
    found = {}
    for suffix, tensor in tensors.items():
        if suffix == "weight" or (suffix == "bias" and split.dim == 0):
            found[suffix] = cut(tensor, split.dim, split, rank)
        elif suffix == "bias":
            found[suffix] = tensor.clone() if rank.index == 0 else torch.zeros_like(tensor)
        else:
            assert fmt is not None
            dim, unit = _scale_dim(fmt, suffix, split.dim)
            found[suffix] = tensor.clone() if dim is None else cut(tensor, dim, split, rank, unit)
    return found


@functools.cache
def _scale_dim(fmt: Format, suffix: str, dim: int) -> tuple[int | None, int]:
    """The dimension of a scale that grows with dimension ``dim`` of the weight (None: none), and how many weights one
    element of it stands for."""
    block = getattr(fmt, "block_size", None)
    side = 512 * (block[dim] if block else 1)  # whole blocks of any format
    shapes = [(side, side), (2 * side, side) if dim == 0 else (side, 2 * side)]
    small, large = (fmt.tensors(shape)[suffix].shape for shape in shapes)
    grown = [place for place, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    return (grown[0], side // small[grown[0]]) if grown else (None, 1)


def cut(tensor: Tensor, dim: int, split: Split, rank: Rank, unit: int = 1) -> Tensor:
    """A copy of a rank's part, which alone is read from the file. ``unit``: how many weights one element stands for."""
    parts = [tensor.narrow(dim, start // unit, -(-stop // unit) - start // unit) for start, stop in split.ranges(rank)]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def add_up(rank: Rank, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook: the sum of all ranks' results."""
    import torch.distributed as dist

    _check_group(rank)
    total = output.detach().contiguous()
    dist.all_reduce(total)
    return _end_of_graph(output, total)


def join(rank: Rank, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook: all ranks' results side by side."""
    import torch.distributed as dist

    _check_group(rank)
    parts = [torch.empty_like(output, memory_format=torch.contiguous_format) for _ in range(rank.size)]
    dist.all_gather(parts, output.detach().contiguous())
    return _end_of_graph(output, torch.cat(parts, -1))


def _end_of_graph(output: Tensor, found: Tensor) -> Tensor:
    """``found``, which all ranks made of ``output``; it refuses to be differentiated where that would be."""
    is_recorded = torch.is_grad_enabled() and output.requires_grad
    return _RefuseBackward.apply(output, found) if is_recorded else found  # type: ignore[no-untyped-call]


class _RefuseBackward(torch.autograd.Function):
    """Parameters require gradients by default, so a forward pass alone is fine."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, found: Tensor) -> Tensor:
        return found.clone()  # of itself autograd would make a view, which nobody may change in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise OmniConvertError(
            "this model holds one rank's part of every layer, and gradients would be those of a part: it only runs "
            "forward, expected no backward(). Use torch.inference_mode(), or train on one device, without tp_size."
        )


def _take_columns(split: Split, rank: Rank, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook: of all inputs, those that a rank has columns for."""
    return (cut(args[0], -1, split, rank), *args[1:])


def _check_group(rank: Rank) -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        raise OmniConvertError(
            "this model holds one rank's part of every layer, expected a process group to add up the parts: start all "
            "ranks with torchrun and call torch.distributed.init_process_group first."
        )
    found = dist.get_rank(), dist.get_world_size()
    if found != (rank.index, rank.size):
        raise OmniConvertError(
            f"this process is rank {found[0]} of {found[1]} of the process group, expected {rank.index} of "
            f"{rank.size}, which the model was loaded for (tp_rank, tp_size)."
        )
