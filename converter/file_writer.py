"""Write one output file, piece by piece: read, quantize or copy, write, and account for it when it is whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.groups import Group, Groups, bad_weight, group_of, needs_amax, row_maxima, rows_of
from omni_convert.converter.jobs import Job, Worker
from omni_convert.converter.layer_error import SUMS, LayerError, LayerErrors, Rows
from omni_convert.converter.pieces import Piece, Slice
from omni_convert.converter.source import SourceFile
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
    ) -> None:
        """``component``: whose weights these are. ``header``: the first bytes of the output."""
        self.source = source
        self.pieces = pieces
        self.groups = groups
        self.component = component
        self.header = header
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
        maxima = self._local_maxima(piece, data)
        at = 0
        for item in piece.slices:
            part = data[at : at + item.size]
            at += item.size
            if item.tensor.decision.format is None:
                kept = item.regions[""]
                out[kept.at : kept.at + kept.size] = part
            elif not self._quantize(item, item.tensor.decision.format, part, out, maxima, worker):
                return  # another job failed, and says why
        for span in piece.spans:
            file.write(span.offset, out[span.at : span.at + span.size].data)

    def _local_maxima(self, piece: Piece, data: memoryview) -> dict[Group, list[NDArray[np.float32]]]:
        """The largest magnitude of every row of the groups that lie in this piece as a whole."""
        local = self.groups.local(self.component, piece)
        found: dict[Group, list[NDArray[np.float32]]] = {group: [] for group in local}
        at = 0
        for item in piece.slices if found else ():
            if needs_amax(item.tensor) and (group := group_of(self.component, item.tensor)) in found:
                found[group].append(row_maxima(self.source, item, data[at:]))
            at += item.size
        return found

    def _quantize(
        self,
        item: Slice,
        fmt: Format,
        data: memoryview,
        out: NDArray[np.uint8],
        maxima: Mapping[Group, Sequence[NDArray[np.float32]]],
        worker: Worker,
    ) -> bool:
        """Put the slice into ``out``; False if the largest magnitude that it needs could not be found."""
        tensor, rows, largest = item.tensor, rows_of(item, data), None
        if needs_amax(tensor):
            group = group_of(self.component, tensor)
            local = maxima.get(group)
            largest = float(max(part.max() for part in local)) if local else self.groups.wait(group)
            if largest is None:
                return False
        facts = Facts(amax=largest, input_scale=tensor.input_scale)
        views = {}
        for suffix, region in item.regions.items():
            spec = tensor.outputs[f"{tensor.layer}.{suffix}"]
            array = out[region.at : region.at + region.size].view(OUTPUT_DTYPE[spec.dtype])
            views[suffix] = array.reshape(-1, *spec.shape[1:])
        for suffix, values in fmt.whole(tensor.source.spec.shape, facts).items():
            if (whole := views.pop(suffix, None)) is not None:
                whole[...] = values.reshape(whole.shape)
        power = np.empty((len(rows), 2))
        bad = worker.quantize_rows(fmt, rows, tensor.source.spec.dtype, views, power, facts)
        if bad is not None:
            raise bad_weight(self.source, item, bad.row, bad.column)
        sums = np.zeros((len(rows), SUMS))
        sums[:, :2] = power
        if fmt.is_fused:
            sums[:, 2] = row_maxima(self.source, item, data)
        self.errors.add(Rows(tensor, item.start, sums))
        return True
