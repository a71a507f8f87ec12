"""What several plans of one checkpoint would do to every layer, measured in one pass; nothing is written.

Rows are read once, and every plan's kernel is applied to them while they are in the processor's cache. Weights that
share a scale, and are not in hand as a whole, are read once before, for all plans together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.execute import Settings
from omni_convert.converter.groups import Groups, bad_weight, group_of, row_maxima, rows_of
from omni_convert.converter.jobs import Job, Worker, run_jobs
from omni_convert.converter.layer_error import BYTES_PER_ROW, LayerError, LayerErrors, Rows
from omni_convert.converter.pieces import Piece, unit_bytes, weight_pieces
from omni_convert.converter.plan import ComponentPlan, Plan, ShardPlan, TensorPlan
from omni_convert.converter.source import SourceFile
from omni_convert.formats.base import Facts, Format
from omni_convert.formats.bits import OUTPUT_DTYPE

Errors = Mapping[tuple[str, str], LayerError]
"""Of every quantized layer, by component and layer."""
_CACHE_LINE = 64


class _Layer(NamedTuple):
    """A weight that some plans quantize. ``tensor``: of a plan that needs to know most of it. ``wanted``: by number of
    the plan. ``rows``: how many are quantized together, so that no scale is cut by any plan."""

    component: str
    source: SourceFile
    tensor: TensorPlan
    wanted: Sequence[tuple[int, TensorPlan]]
    rows: int


def measure(plans: Sequence[Plan], settings: Settings, progress: Callable[[int], None]) -> list[Errors]:
    """The errors that each of ``plans``, which share a checkpoint, would report.

    Args:
        progress: receives source bytes as they are done; called by one thread at a time.

    Raises:
        OmniConvertError: NaN or Inf in a weight, or a file that cannot be read or changed meanwhile.
    """
    groups = Groups(_together(plans), settings.piece_bytes, {})
    errors = [{part.component.name: LayerErrors() for part in plan.components} for plan in plans]
    files = [layers for layers in _files(plans) if layers]

    def jobs(layers: Sequence[_Layer]) -> Iterator[Job]:
        pieces = [(layer, piece) for layer in layers for piece in _pieces(layer, settings.piece_bytes)]
        left = list(pieces)
        for layer, piece in pieces:
            yield from groups.before(layer.component, piece)
            yield Job(piece.size, partial(run, layer, piece, left))

    def run(layer: _Layer, piece: Piece, left: list[tuple[_Layer, Piece]], worker: Worker) -> None:
        _measure_piece(layer, piece, groups, errors, worker)
        left.pop()
        if not left:
            layer.source.release()

    hub = plans[0].checkpoint.hub

    def wake() -> None:
        groups.give_up()
        if hub:
            hub.downloads.give_up()

    run_jobs(map(jobs, files), settings.threads, progress, wake=wake, at_once=1 if hub else None)
    for layers in files:
        layers[0].source.check()
    return [
        {
            (part.component.name, tensor.layer): found[part.component.name].finished[tensor.layer]
            for part in plan.components
            for tensor in part.tensors()
            if tensor.decision.format
        }
        for plan, found in zip(plans, errors, strict=True)
    ]


def _pieces(layer: _Layer, piece_bytes: int) -> Iterator[Piece]:
    unit = unit_bytes(layer.tensor)
    step = max(1, piece_bytes // (unit * layer.rows)) * layer.rows
    return weight_pieces(layer.tensor, step * unit)


def weight_bytes(plans: Sequence[Plan]) -> int:
    """Source bytes of the layers that any of ``plans`` quantizes."""
    return sum(layer.tensor.source.spec.nbytes for layers in _files(plans) for layer in layers)


def memory_bytes(plans: Sequence[Plan], settings: Settings) -> int:
    """Peak memory beyond the libraries: what each thread reads and one plan makes of it, and error sums of all."""
    layers = [layer for file in _files(plans) for layer in file]
    piece = max([settings.piece_bytes, *(layer.rows * unit_bytes(layer.tensor) for layer in layers)])
    sums = max((len(layer.wanted) * layer.tensor.source.spec.shape[0] for layer in layers), default=0)
    return settings.threads * 2 * piece + (settings.threads + 1) * BYTES_PER_ROW * sums


def _measure_piece(
    layer: _Layer, piece: Piece, groups: Groups, errors: Sequence[Mapping[str, LayerErrors]], worker: Worker
) -> None:
    (item,) = piece.slices
    data = worker.read(layer.source, piece.start, piece.size)
    group, maxima, amax = group_of(layer.component, layer.tensor), None, None
    is_local = group in groups.local(layer.component, piece)
    if is_local or any(_format(tensor).is_fused for _, tensor in layer.wanted):
        maxima = row_maxima(layer.source, item, data)
    if group:
        amax = float(maxima.max()) if is_local and maxima is not None else groups.wait(group)
        if amax is None:
            return  # another job failed, and says why
    rows = rows_of(item, data)
    for number, tensor in layer.wanted:
        fmt, power = _format(tensor), np.empty((len(rows), 2))
        facts = Facts(amax=amax if tensor.amax_of else None, input_scale=tensor.input_scale)
        bad = worker.quantize_rows(fmt, rows, tensor.source.spec.dtype, _room(fmt, rows.shape, worker), power, facts)
        if bad is not None:
            raise bad_weight(layer.source, item, bad.row, bad.column)
        errors[number][layer.component].add(Rows(tensor, item.start, power, maxima if fmt.is_fused else None))


def _room(fmt: Format, shape: tuple[int, ...], worker: Worker) -> dict[str, NDArray[np.generic]]:
    """Where a format puts the tensors of some rows, to be forgotten."""
    specs = {suffix: spec for suffix, spec in fmt.tensors(shape).items() if suffix not in fmt.whole_suffixes}
    sizes = [-(-spec.nbytes // _CACHE_LINE) * _CACHE_LINE for spec in specs.values()]
    out, at = worker.output(sum(sizes)), 0
    room: dict[str, NDArray[np.generic]] = {}
    for (suffix, spec), size in zip(specs.items(), sizes, strict=True):
        room[suffix] = out[at : at + spec.nbytes].view(OUTPUT_DTYPE[spec.dtype]).reshape(spec.shape)
        at += size
    return room


def _files(plans: Sequence[Plan]) -> Iterator[list[_Layer]]:
    """The layers of every file of the source, in its order."""
    for component, shards in _aligned(plans):
        source, layers = plans[0].checkpoint.shard_file(shards[0].source), []
        for tensors in zip(*(shard.tensors for shard in shards), strict=True):
            wanted = [(number, tensor) for number, tensor in enumerate(tensors) if tensor.decision.format]
            if wanted:
                rows = math.lcm(*(_format(tensor).rows_per_scale for _, tensor in wanted))
                layers.append(_Layer(component, source, _neediest(tensors), wanted, rows))
        yield layers


def _aligned(plans: Sequence[Plan]) -> Iterator[tuple[str, tuple[ShardPlan, ...]]]:
    """Every component and shard, as each of the plans has it."""
    for parts in zip(*(plan.components for plan in plans), strict=True):
        for shards in zip(*(part.shards for part in parts), strict=True):
            yield parts[0].component.name, shards


def _together(plans: Sequence[Plan]) -> Plan:
    """A plan whose every tensor is quantized, and waits for others, if it is and does in any of ``plans``."""

    def part(parts: Sequence[ComponentPlan]) -> ComponentPlan:
        return replace(parts[0], shards=tuple(map(shard, zip(*(part.shards for part in parts), strict=True))))

    def shard(shards: Sequence[ShardPlan]) -> ShardPlan:
        tensors = zip(*(shard.tensors for shard in shards), strict=True)
        return replace(shards[0], tensors=tuple(map(_neediest, tensors)))

    components = zip(*(plan.components for plan in plans), strict=True)
    return replace(plans[0], components=tuple(map(part, components)))


def _neediest(tensors: Sequence[TensorPlan]) -> TensorPlan:
    """One tensor, as that plan has it that must know most before: its group's largest magnitude, or at least rows."""
    return max(tensors, key=lambda tensor: (tensor.amax_of is not None, tensor.decision.format is not None))


def _format(tensor: TensorPlan) -> Format:
    assert tensor.decision.format is not None
    return tensor.decision.format
