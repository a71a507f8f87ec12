"""Write one output file, piece by piece: read, quantize or copy, write, and account for it when it is whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.groups import Group, Groups, bad_weight, group_of, row_maxima, rows_of
from omni_convert.converter.jobs import Job, Worker
from omni_convert.converter.layer_error import LayerError, LayerErrors, Rows
from omni_convert.converter.pieces import Piece, Slice
from omni_convert.converter.source import SourceFile
from omni_convert.converter.statistics import take_sample
from omni_convert.formats.base import Facts, Format
from omni_convert.formats.bits import OUTPUT_DTYPE


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file that is whole: what it is, and of a shard the error of every quantized layer.

    ``largest``: the magnitudes that its layers share with those of other files, by group.
    """

    sha256: str
    size: int
    errors: dict[str, LayerError] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)


class Sink(Protocol):
    """Where a writer puts bytes: a whole file or a part of one."""

    def write(self, offset: int, data: memoryview | bytes) -> None: ...


class FileWriter:
    """Some or all pieces of one output file, made of one source file."""

    def __init__(
        self,
        source: SourceFile,
        pieces: Sequence[Piece],
        groups: Groups,
        *,
        component: str = "",
        header: bytes | None = None,
        statistics: bool = False,
    ) -> None:
        """``component``: whose weights these are. ``header``: the first bytes of the output. ``statistics``: whether to
        gather those of every layer."""
        self.source = source
        self.pieces = pieces
        self.groups = groups
        self.component = component
        self.header = header
        self.statistics = statistics
        self.errors = LayerErrors()

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """Offset and size of everything that is written."""
        if self.header is not None:
            yield 0, len(self.header)
        for piece in self.pieces:
            yield from ((span.offset, span.size) for span in piece.spans)

    def jobs(self, file: Sink) -> Iterator[Job]:
        """Write everything to ``file``; before a weight is written, all with which it shares a scale are read."""
        if (header := self.header) is not None:
            yield Job(0, lambda _: file.write(0, header))
        for piece in self.pieces:
            yield from self.groups.before(self.component, piece)
            yield Job(piece.size, partial(self._convert, piece, file))

    def _convert(self, piece: Piece, file: Sink, worker: Worker) -> None:
        data = worker.read(self.source, piece.start, piece.size)
        if piece.copies:
            file.write(piece.spans[0].offset, data)
            return
        out = worker.output(piece.output_size)
        slices = list(_with_data(piece, data))
        maxima, largest = self._maxima(piece, slices)
        for (item, part), found in zip(slices, maxima, strict=True):
            if item.tensor.decision.format is None:
                kept = item.regions[""]
                out[kept.at : kept.at + kept.size] = part
                continue
            amax = None
            if group := group_of(self.component, item.tensor):
                amax = largest[group] if group in largest else self.groups.wait(group)
                if amax is None:
                    return  # another job failed, and says why
            facts = Facts(amax=amax, input_scale=item.tensor.input_scale)
            power = self._quantize(item, item.tensor.decision.format, part, out, facts, worker)
            self.errors.add(Rows(item.tensor, item.start, power, found, self._sample(item, part)))
        for span in piece.spans:
            file.write(span.offset, out[span.at : span.at + span.size].data)

    def _maxima(
        self, piece: Piece, slices: Sequence[tuple[Slice, memoryview]]
    ) -> tuple[list[NDArray[np.float32] | None], dict[Group, float]]:
        """Of every slice the largest magnitude of every row, if its format asks for them; and that of every group that
        lies in this piece as a whole."""
        local = self.groups.local(self.component, piece)
        found: list[NDArray[np.float32] | None] = []
        largest: dict[Group, float] = {}
        for item, data in slices:
            fmt, group = item.tensor.decision.format, group_of(self.component, item.tensor)
            if group not in local and not (fmt and fmt.is_fused):
                found.append(None)
                continue
            maxima = row_maxima(self.source, item, data)
            found.append(maxima)
            if group and group in local:
                largest[group] = max(largest.get(group, 0.0), float(maxima.max()))
        return found, largest

    def _sample(self, item: Slice, data: memoryview) -> NDArray[np.float32] | None:
        """The values of those rows that are in the sample of their layer."""
        if not self.statistics:
            return None
        spec = item.tensor.source.spec
        return take_sample(rows_of(item, data), spec.dtype, item.start, spec.shape)

    def _quantize(
        self, item: Slice, fmt: Format, data: memoryview, out: NDArray[np.uint8], facts: Facts, worker: Worker
    ) -> NDArray[np.float64]:
        """Put the slice into ``out``; returns the ``power`` of its rows."""
        tensor, rows = item.tensor, rows_of(item, data)
        spec = tensor.source.spec
        views = {}
        for suffix, region in item.regions.items():
            stored = tensor.outputs[f"{tensor.layer}.{suffix}"]
            array = out[region.at : region.at + region.size].view(OUTPUT_DTYPE[stored.dtype])
            views[suffix] = array.reshape(-1, *stored.shape[1:])
        for suffix, values in fmt.whole(spec.shape, facts).items():
            if (whole := views.pop(suffix, None)) is not None:
                whole[...] = values.reshape(whole.shape)
        power = np.empty((len(rows), 2))
        bad = worker.quantize_rows(fmt, rows, spec.dtype, views, power, facts)
        if bad is not None:
            raise bad_weight(self.source, item, bad.row, bad.column)
        return power


def _with_data(piece: Piece, data: memoryview) -> Iterator[tuple[Slice, memoryview]]:
    """Every slice with its bytes of the source."""
    at = 0
    for item in piece.slices:
        yield item, data[at : at + item.size]
        at += item.size
