"""Cut the work on a file into pieces: a few megabytes of the source, and where what becomes of them goes.

The pieces follow from the plan alone, so that threads, a resumed run and other machines all cut alike. A piece holds
rows of a large weight, or many small tensors: reading and writing them costs as little per byte.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from omni_convert.converter.plan import ShardPlan, TensorPlan
from omni_convert.formats.base import row_slice

PIECE_BYTES = 4 << 20
"""Large enough to hide the calls, small enough to stay in the last-level cache."""
_CACHE_LINE = 64


class Region(NamedTuple):
    """Consecutive bytes of the output file: ``offset`` there, ``size``, and ``at`` where they lie in a buffer."""

    offset: int
    size: int
    at: int


class Slice(NamedTuple):
    """Rows ``start`` to ``stop`` of a weight that is quantized, or those bytes of a tensor that is kept.

    ``size``: bytes of the source. ``is_whole``: all of the tensor. ``regions``: by suffix; "" for bytes that are kept.
    """

    tensor: TensorPlan
    start: int
    stop: int
    size: int
    is_whole: bool
    regions: Mapping[str, Region]


@dataclass(frozen=True, slots=True)
class Piece:
    """``size`` bytes of the source from ``start``, as slices that follow each other without a gap.

    ``spans``: what it writes, neighbouring regions joined. ``copies``: the bytes as they are, into one span.
    """

    start: int
    size: int
    slices: Sequence[Slice]
    spans: Sequence[Region]
    copies: bool

    @property
    def output_size(self) -> int:
        """Bytes of a buffer that holds the regions."""
        return self.spans[-1].at + self.spans[-1].size


class _Cut(NamedTuple):
    """A slice before it has its place."""

    tensor: TensorPlan
    start: int
    stop: int
    size: int
    is_whole: bool


def shard_pieces(shard: ShardPlan, piece_bytes: int, start: int = 0, stop: int = sys.maxsize) -> Iterator[Piece]:
    """All of a shard but its header, or what lies between two offsets in the source; in the order of the source."""
    offsets: dict[str, tuple[int, int]] = {}
    end = len(shard.header)
    for name, spec in shard.layout.items():
        offsets[name] = end, spec.nbytes
        end += spec.nbytes
    waiting: list[_Cut] = []
    size = 0
    for tensor in shard.tensors:
        for cut in _cuts(tensor, piece_bytes, start, stop):
            if waiting and size + cut.size > piece_bytes:
                yield _piece(waiting, offsets)
                waiting, size = [], 0
            waiting.append(cut)
            size += cut.size
    if waiting:
        yield _piece(waiting, offsets)


def copy_pieces(start: int, stop: int, piece_bytes: int) -> Iterator[Piece]:
    """Bytes of a file that arrives unchanged; an empty one is a piece of nothing."""
    for offset in range(start, max(stop, start + 1), piece_bytes):
        span = Region(offset, min(piece_bytes, stop - offset), 0)
        yield Piece(start=offset, size=span.size, slices=(), spans=(span,), copies=True)


def weight_pieces(tensor: TensorPlan, piece_bytes: int, start: int = 0, stop: int = sys.maxsize) -> Iterator[Piece]:
    """The rows of a weight (between two offsets in the source), to be read without writing anything."""
    for cut in _cuts(tensor, piece_bytes, start, stop):
        yield _piece([cut], None)


def unit_bytes(tensor: TensorPlan) -> int:
    """Bytes of what a slice counts: a row, or one byte of a tensor that is kept."""
    spec = tensor.source.spec
    return spec.nbytes // spec.shape[0] if tensor.decision.format else 1


def smallest_piece(tensor: TensorPlan) -> int:
    """Bytes of the source that cannot be cut any further: the rows that share scales."""
    if tensor.decision.format is None:
        return 1
    return unit_bytes(tensor) * min(tensor.decision.format.rows_per_scale, tensor.source.spec.shape[0])


def _cuts(tensor: TensorPlan, piece_bytes: int, start: int, stop: int) -> Iterator[_Cut]:
    unit, size = unit_bytes(tensor), tensor.source.spec.nbytes
    begin, whole = tensor.source.start, size // unit
    if size <= piece_bytes and start <= begin and begin + size <= stop:
        if size:
            yield _Cut(tensor, 0, whole, size, True)
        return
    first, last = max(start - begin, 0) // unit, min(stop - begin, size) // unit
    together = tensor.decision.format.rows_per_scale if tensor.decision.format else 1
    step = max(1, piece_bytes // (unit * together)) * together
    for row in range(first, last, step):
        end = min(row + step, last)
        yield _Cut(tensor, row, end, (end - row) * unit, end - row == whole)


def _piece(cuts: Sequence[_Cut], offsets: Mapping[str, tuple[int, int]] | None) -> Piece:
    """``offsets``: where the output's tensors begin, and their bytes; None if nothing is written."""
    places = [_places(cut, offsets) if offsets else {} for cut in cuts]
    spans: list[Region] = []
    regions: dict[int, Region] = {}
    begin = end = at = 0  # of the span that grows; end 0: there is none yet, for every file begins with its header
    for offset, size in sorted(place for part in places for place in part.values()):
        if offset != end:  # as far from a cache line's start as in the file: every element stays aligned
            if end:
                spans.append(Region(begin, end - begin, at))
            at = -(-(at + end - begin) // _CACHE_LINE) * _CACHE_LINE + offset % _CACHE_LINE
            begin = offset
        regions[offset] = Region(offset, size, at + offset - begin)
        end = offset + size
    if end:
        spans.append(Region(begin, end - begin, at))
    slices = [
        Slice(*cut, {suffix: regions[offset] for suffix, (offset, _) in part.items()})
        for cut, part in zip(cuts, places, strict=True)
    ]
    return Piece(
        start=cuts[0].tensor.source.start + cuts[0].start * unit_bytes(cuts[0].tensor),
        size=sum(cut.size for cut in cuts),
        slices=slices,
        spans=spans,
        copies=_copies(slices, spans),
    )


def _copies(slices: Sequence[Slice], spans: Sequence[Region]) -> bool:
    """Whether the bytes of the source follow each other in one span of the output too."""
    if len(spans) != 1 or any(item.tensor.decision.format for item in slices):
        return False
    kept = [item.regions[""].offset for item in slices]
    return kept == sorted(kept)


def _places(cut: _Cut, offsets: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Suffix -> offset and size in the output."""
    tensor, fmt = cut.tensor, cut.tensor.decision.format
    if fmt is None:
        return {"": (offsets[tensor.name][0] + cut.start, cut.stop - cut.start)}
    if cut.is_whole:
        return {suffix: offsets[f"{tensor.layer}.{suffix}"] for suffix in fmt.suffixes}
    places = {}
    for suffix in fmt.suffixes:
        name = f"{tensor.layer}.{suffix}"
        offset, size = offsets[name]
        if suffix in fmt.whole_suffixes:
            if cut.start == 0:
                places[suffix] = (offset, size)
            continue
        rows = slice(cut.start, cut.stop) if suffix == "weight" else row_slice(fmt, cut.start, cut.stop)
        row = size // tensor.outputs[name].shape[0]
        places[suffix] = (offset + rows.start * row, (rows.stop - rows.start) * row)
    return places
