"""Cut the files of a plan into parts of even size, each of which a machine can convert without the others.

A part is a run of bytes of one source file. It begins and ends between rows (those that share scales stay together), so
what becomes of it does not depend on how the rest is cut, nor on who does the work.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace

from omni_convert.converter.groups import Group, group_of
from omni_convert.converter.pieces import smallest_piece
from omni_convert.converter.plan import Plan, TensorPlan
from omni_convert.converter.source import SourceFile

PARTS_PER_WORKER = 8
"""Workers that are all busy until the last part is begun end within an eighth of their time of each other."""
SMALLEST_PART = 64 << 20
"""Some hundredths of a second of work: much more than it costs to hand it out."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes ``start`` to ``stop`` of a source file, without its header.

    ``name``: of the output file, relative. ``is_first``, ``is_last``: whether the file begins, ends with them.
    """

    name: str
    source: SourceFile
    start: int
    stop: int
    is_first: bool = True
    is_last: bool = True

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the file."""
        return self.is_first and self.is_last


def whole_file(plan: Plan, name: str) -> Part:
    """All of one file of the output."""
    if name not in plan.shards:
        source = plan.checkpoint.others[name]
        return Part(name=name, source=source, start=0, stop=source.size)
    _, shard = plan.shards[name]
    start = shard.tensors[0].source.start if shard.tensors else shard.source.file_size
    return Part(name=name, source=plan.checkpoint.shard_file(shard.source), start=start, stop=shard.source.file_size)


def part_bytes(total: int, workers: int) -> int:
    """The size of a part, so that ``workers`` are done with ``total`` bytes at about the same time."""
    return max(SMALLEST_PART, total // (workers * PARTS_PER_WORKER))


def split(plan: Plan, file: Part, size: int) -> list[Part]:
    """A whole file in parts of about the same number of bytes, at most ``size`` where rows are not longer."""
    count = -(-file.size // size) or 1
    wanted = [file.start + file.size * place // count for place in range(1, count)]
    if file.name in plan.shards:
        wanted = [_between_rows(plan.shards[file.name][1].tensors, offset) for offset in wanted]
    ends = sorted({*wanted, file.stop} - {file.start}) or [file.stop]
    return [
        replace(file, start=start, stop=stop, is_first=start == file.start, is_last=stop == file.stop)
        for start, stop in zip([file.start, *ends], ends, strict=False)
    ]


def _between_rows(tensors: Sequence[TensorPlan], offset: int) -> int:
    """The place nearest to ``offset`` where the tensor that lies there can be cut."""
    tensor = tensors[bisect_right(tensors, offset, key=lambda tensor: tensor.source.start) - 1]
    begin, step = tensor.source.start, smallest_piece(tensor)
    return begin + min(round((offset - begin) / step) * step, tensor.source.spec.nbytes)


def part_tensors(plan: Plan, part: Part) -> Iterator[TensorPlan]:
    """The tensors of which a part holds something."""
    if part.name not in plan.shards:
        return
    tensors = plan.shards[part.name][1].tensors
    place = max(0, bisect_right(tensors, part.start, key=lambda tensor: tensor.source.start) - 1)
    while place < len(tensors) and tensors[place].source.start < part.stop:
        yield tensors[place]
        place += 1


def shared_groups(plan: Plan, parts: Sequence[Part], known: Set[Group]) -> dict[Part, frozenset[Group]]:
    """The groups of weights with a common scale that lie in several parts, of every part that holds any.

    None of these parts can be converted before all were seen; ``known`` were seen before.
    """
    holders: defaultdict[Group, list[Part]] = defaultdict(list)
    for part in parts:
        own = (group_of(plan.shards[part.name][0], tensor) for tensor in part_tensors(plan, part))
        for group in dict.fromkeys(filter(None, own)):
            holders[group].append(part)
    shared: defaultdict[Part, set[Group]] = defaultdict(set)
    for group, found in holders.items():
        if len(found) > 1 and group not in known:
            for part in found:
                shared[part].add(group)
    return {part: frozenset(groups) for part, groups in shared.items()}
