"""Carry out a plan: read rows, quantize, write. Memory is a few buffers per thread, whatever the checkpoint.

The work on every file is cut into pieces of a few megabytes. A thread takes those of one file in order, and helps with
another's when none is left to begin; system calls, hashing and the compiled kernels release the interpreter lock. What
becomes of a piece goes straight to its place in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from omni_convert.converter import device
from omni_convert.converter.device import CPU
from omni_convert.converter.file_writer import FileRecord, FileWriter
from omni_convert.converter.groups import Group, Groups
from omni_convert.converter.jobs import Job, run_jobs
from omni_convert.converter.layer_error import BYTES_PER_ROW
from omni_convert.converter.outlet import Outlet
from omni_convert.converter.output import OutputFile
from omni_convert.converter.parts import Part, whole_file
from omni_convert.converter.pieces import copy_pieces, shard_pieces, smallest_piece
from omni_convert.converter.plan import Plan
from omni_convert.converter.statistics import sample_bytes
from omni_convert.formats.errors import OmniConvertError, UsageError, printable

Record: TypeAlias = Callable[[str, FileRecord], None]
"""Is told of every file that is whole, by its relative path, from any thread."""
DEFAULT_MEMORY = 400 << 20
_SMALLEST_PIECE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a plan is carried out; the bytes depend on none of it.

    ``piece_bytes``: of the source, that a thread holds at once. ``device``: what quantizes, as ``device.workers`` takes
    it. ``link``: hard-link files that arrive unchanged. ``durable``: wait for the disk. ``statistics``: gather those of
    every layer, for a report.
    """

    threads: int
    piece_bytes: int
    device: str = CPU
    link: bool = False
    durable: bool = False
    statistics: bool = False


def execute(
    plan: Plan,
    out: Path,
    names: Sequence[str],
    settings: Settings,
    *,
    known: Mapping[Group, float],
    record: Record,
    progress: Callable[[int], None],
    outlet: Outlet | None = None,
) -> None:
    """Write the files ``names`` (relative paths) of the plan below ``out``.

    Args:
        known: magnitudes that files which are done share with these.
        record: is told of every file that is whole.
        progress: receives source bytes as they are done; called by one thread at a time.
        outlet: makes room before each file.

    Raises:
        OmniConvertError: NaN or Inf in a weight, or a file that cannot be read or written.
    """
    groups = Groups(plan, settings.piece_bytes, known)
    hub = plan.checkpoint.hub
    files: list[OutputFile] = []

    def begin() -> Iterator[Iterator[Job]]:
        for name in names:
            if outlet:
                outlet.make_room()
            writer = file_writer(plan, whole_file(plan, name), groups, settings)
            files.append(output_file(plan, out, name, writer, settings, record))
            yield writer.jobs(files[-1])

    def wake() -> None:
        groups.give_up()
        if hub:
            hub.downloads.give_up()
        if outlet:
            outlet.give_up()

    try:
        at_once = 1 if hub or outlet else None  # files come or go one after the other, and few are kept at a time
        run_jobs(begin(), settings.threads, progress, device.workers(settings.device), wake, at_once)
    finally:
        for file in files:
            file.close()


def file_writer(plan: Plan, part: Part, groups: Groups, settings: Settings) -> FileWriter:
    """What writes a part of the output, of a shard or of a file that arrives unchanged."""
    if part.name not in plan.shards:
        return FileWriter(part.source, list(copy_pieces(part.start, part.stop, settings.piece_bytes)), groups)
    component, shard = plan.shards[part.name]
    return FileWriter(
        part.source,
        list(shard_pieces(shard, settings.piece_bytes, part.start, part.stop)),
        groups,
        component=component,
        header=shard.header if part.is_first else None,
        statistics=settings.statistics,
    )


def output_size(plan: Plan, part: Part) -> int:
    """Bytes of the output file to which a part belongs."""
    return plan.shards[part.name][1].size if part.name in plan.shards else part.source.size


def output_file(plan: Plan, out: Path, name: str, writer: FileWriter, settings: Settings, record: Record) -> OutputFile:
    """The whole file that ``writer`` writes; it is checked, named and recorded when its last byte is there."""
    shard = plan.shards.get(name)

    def whole(file: OutputFile) -> None:
        writer.source.check()
        file.publish()
        assert file.sha256 is not None
        largest = writer.groups.shared(shard[0], shard[1].tensors) if shard else {}
        record(name, FileRecord(sha256=file.sha256, size=file.size, errors=writer.errors.finished, largest=largest))
        writer.source.release()

    link_to = writer.source.path if settings.link and not shard else None
    return OutputFile(out / name, writer.spans, link_to=link_to, durable=settings.durable, whole=whole)


def fit(plan: Plan, settings: Settings, memory: int) -> Settings:
    """``settings`` with smaller pieces, then fewer threads, until the buffers take at most ``memory`` bytes.

    Raises:
        UsageError: one thread needs more.
    """
    settings = shrink(settings, memory, lambda tried: memory_bytes(plan, tried))
    if (need := memory_bytes(plan, settings)) > memory:
        widest = max(plan.tensors(), key=smallest_piece)
        raise UsageError(
            f"--memory {memory}: found a need of at least {need} bytes: three times the rows of "
            f"{printable(widest.name)} that share a scale ({smallest_piece(widest)} bytes), and error sums. Give more, "
            "or keep that layer with --ignore."
        )
    return settings


def shrink(settings: Settings, memory: int, need: Callable[[Settings], int]) -> Settings:
    """``settings`` with smaller pieces, then fewer threads, until they ``need`` at most ``memory`` bytes, or the least
    there is."""
    while need(settings) > memory:
        if settings.piece_bytes > _SMALLEST_PIECE:
            settings = replace(settings, piece_bytes=settings.piece_bytes // 2)
        elif settings.threads > 1:
            settings = replace(settings, threads=settings.threads - 1)
        else:
            break
    return settings


def memory_bytes(plan: Plan, settings: Settings) -> int:
    """Peak memory beyond the libraries: what each thread reads, writes and reads back for the hash, and error sums."""
    tensors = list(plan.tensors())
    piece = max([settings.piece_bytes, *map(smallest_piece, tensors)])
    rows = max((tensor.source.spec.shape[0] for tensor in tensors if tensor.decision.format), default=0)
    sums = BYTES_PER_ROW * rows
    if settings.statistics:
        sums += max((sample_bytes(tensor.source.spec.shape) for tensor in tensors if tensor.decision.format), default=0)
    return settings.threads * 3 * piece + (settings.threads + 1) * sums


def on_device(plan: Plan, settings: Settings) -> Settings:
    """``settings`` with as many threads as the device has memory for; as they are for the CPU.

    Raises:
        OmniConvertError: the device is not there, has too little memory, or would give other bytes.
    """
    if settings.device == CPU:
        return settings
    opened = device.open_device(settings.device)
    for fmt in dict.fromkeys(tensor.decision.format for tensor in plan.tensors()):
        if fmt:
            device.check_bytes(opened, fmt)
    free, one = device.free_bytes(opened), device_bytes(plan, replace(settings, threads=1))
    if one > free:
        raise OmniConvertError(
            f"--device {settings.device}: found {free} bytes of its memory free, one thread takes {one}. Free some, or "
            f"give less --memory. {device.INSTEAD}"
        )
    return replace(settings, threads=min(settings.threads, free // max(1, one)))


def device_bytes(plan: Plan, settings: Settings) -> int:
    """Peak memory of the device, beyond libraries; 0 for the CPU."""
    if settings.device == CPU:
        return 0
    work = 0
    for tensor in plan.tensors():
        if fmt := tensor.decision.format:
            spec = tensor.source.spec
            together = max(settings.piece_bytes, smallest_piece(tensor)) * spec.numel // spec.nbytes
            work = max(work, device.work_bytes(fmt, min(together, spec.numel)))
    return settings.threads * work
