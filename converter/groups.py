"""The largest magnitudes of weights that share a scale, wherever in the checkpoint they lie."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Event, Lock
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.jobs import Job, Worker
from omni_convert.converter.pieces import Piece, Slice, weight_pieces
from omni_convert.converter.plan import Plan, TensorPlan
from omni_convert.converter.source import SourceFile
from omni_convert.formats import engine
from omni_convert.formats.bits import NUMPY_DTYPE, first_nonfinite
from omni_convert.formats.errors import SourceError, printable

Group: TypeAlias = tuple[str, str]
"""A component, and the target's name of what it fuses, or of the layer alone."""


class _Largest:
    """One group. Its jobs come before any of the same file that waits for it, and never wait themselves: whoever waits,
    waits for threads that work."""

    def __init__(self) -> None:
        self.members: list[tuple[SourceFile, TensorPlan]] = []
        self.value: float | None = None
        self.begun = False
        self._left = 0
        self._largest = np.float32(0)
        self._known = Event()
        self._lock = Lock()

    def jobs(self, piece_bytes: int) -> Iterator[Job]:
        """The jobs that read all of the weights."""
        self.begun = True
        pieces = [(file, piece) for file, tensor in self.members for piece in weight_pieces(tensor, piece_bytes)]
        self._left = len(pieces)
        for file, piece in pieces:
            yield Job(piece.size, self._measure(file, piece), counts=False)

    def _measure(self, file: SourceFile, piece: Piece) -> Callable[[Worker], None]:
        def run(worker: Worker) -> None:
            largest = np.float32(np.nan)
            try:
                bits = worker.read(file, piece.start, piece.size)
                largest = row_maxima(file, piece.slices[0], bits).max()
            finally:
                self._report(largest)

        return run

    def _report(self, largest: np.float32) -> None:
        """One job is done; NaN where it failed, so that nobody waits for it."""
        with self._lock:
            self._largest = np.maximum(self._largest, largest)  # NaN wins
            self._left -= 1
            if not self._left:
                self.value = None if np.isnan(self._largest) else float(self._largest)
                self._known.set()

    def wait(self) -> float | None:
        """The largest magnitude; None if some weight could not be read: the run is failing."""
        if self.value is None:
            self._known.wait()
        return self.value

    def give_up(self) -> None:
        """Let nobody wait any more: jobs that would end it are not handed out."""
        self._known.set()


class Groups:
    """Of every weight whose format needs it: the largest magnitude among those with which it shares a scale.

    A group that lies in one piece costs nothing; others are read once before the first of them is written.
    """

    def __init__(self, plan: Plan, piece_bytes: int, known: Mapping[Group, float]) -> None:
        """``known``: magnitudes that were measured before."""
        self._piece_bytes = piece_bytes
        self._groups: defaultdict[Group, _Largest] = defaultdict(_Largest)
        for part in plan.components:
            for shard in part.shards:
                file = plan.checkpoint.shard_file(shard.source)
                for tensor in shard.tensors:
                    if group := group_of(part.component.name, tensor):
                        self._groups[group].members.append((file, tensor))
        for group, value in known.items():
            self._groups[group].value, self._groups[group].begun = value, True

    def before(self, component: str, piece: Piece) -> Iterator[Job]:
        """What must be read before a piece can be quantized; nothing when asked again."""
        local = self.local(component, piece)
        for item in piece.slices:
            if (group := group_of(component, item.tensor)) and group not in local:
                found = self._groups[group]
                if not found.begun:
                    yield from found.jobs(self._piece_bytes)

    def local(self, component: str, piece: Piece) -> frozenset[Group]:
        """The groups that lie in this piece as a whole."""
        found: defaultdict[Group, int] = defaultdict(int)
        for item in piece.slices:
            if item.is_whole and (group := group_of(component, item.tensor)):
                found[group] += 1
        return frozenset(group for group, count in found.items() if count == len(self._groups[group].members))

    def wait(self, group: Group) -> float | None:
        """The largest magnitude; None if some weight could not be read: the run is failing."""
        return self._groups[group].wait()

    def give_up(self) -> None:
        """Let nobody wait any more, since the run stops."""
        for group in self._groups.values():
            group.give_up()

    def shared(self, component: str, tensors: Sequence[TensorPlan]) -> dict[str, float]:
        """The magnitudes that these tensors of one file share with other files', by the group's name."""
        own: defaultdict[Group, int] = defaultdict(int)
        for tensor in tensors:
            if group := group_of(component, tensor):
                own[group] += 1
        shared = {group: self._groups[group] for group, count in own.items()}
        return {
            group[1]: found.value
            for group, found in shared.items()
            if found.value is not None and own[group] < len(found.members)
        }


def group_of(component: str, tensor: TensorPlan) -> Group | None:
    """The weights that must all be seen before this one can be quantized; None if it needs none."""
    return (component, tensor.amax_of) if tensor.amax_of else None


def rows_of(item: Slice, data: memoryview) -> NDArray[np.uint16] | NDArray[np.uint32]:
    """The rows of a weight in ``data``, bytes of the source that begin with them."""
    spec = item.tensor.source.spec
    rows = np.frombuffer(data[: item.size], NUMPY_DTYPE[spec.dtype]).reshape(item.stop - item.start, *spec.shape[1:])
    return rows if rows.flags.aligned else rows.copy()


def row_maxima(file: SourceFile, item: Slice, data: memoryview) -> NDArray[np.float32]:
    """The largest magnitude of every row.

    Raises:
        SourceError: one is NaN or Inf.
    """
    rows, dtype = rows_of(item, data), item.tensor.source.spec.dtype
    found = engine.row_maxima(rows, dtype)
    if not math.isfinite(found.max()):
        row = int(np.argmin(np.isfinite(found)))
        raise bad_weight(file, item, row, first_nonfinite(rows[row], dtype))
    return found


def bad_weight(file: SourceFile, item: Slice, row: int, column: int) -> SourceError:
    """The error of a weight that holds NaN or Inf; ``row``: within the slice."""
    tensor = item.tensor
    return SourceError(
        f"{file.path}: tensor {printable(tensor.name)} holds NaN or Inf at row {item.start + row}, column {column}, "
        "expected finite weights. The checkpoint is damaged: download it again, or leave this layer as it is with "
        f"--ignore {printable(tensor.group or tensor.layer)}."
    )
