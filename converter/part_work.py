"""What one worker does with one part of a file: measure it, convert it, hash the whole. No worker waits for another.

A worker may be lost and its part begun again, while the lost one still writes: it may only be out of touch. So nobody
here gives a file its name, and no two attempts can spoil each other's work. A whole file has another partial name in
every attempt. Parts of one file are written into the same one, where every attempt puts the same bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from omni_convert.converter.execute import Settings, file_writer, output_size
from omni_convert.converter.file_writer import FileWriter
from omni_convert.converter.groups import Group, Groups, group_of, row_maxima
from omni_convert.converter.hashes import file_sha256
from omni_convert.converter.jobs import Job, Worker, run_jobs
from omni_convert.converter.layer_error import LayerError, Rows
from omni_convert.converter.output import OutputFile, PartFile, partial_path
from omni_convert.converter.parts import Part, part_tensors
from omni_convert.converter.pieces import Piece, weight_pieces
from omni_convert.converter.plan import Plan
from omni_convert.converter.source import SourceFile


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """A file that waits for its name: its sha256, and the attempt that is in its partial name."""

    sha256: str
    attempt: str


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What came of a part: the errors of its layers, the sums of those that it shares with other parts, and the file if
    it is all of one."""

    errors: Mapping[str, LayerError]
    rows: tuple[Rows, ...]
    file: Hashed | None


def new_attempt() -> str:
    """What tells the partial file of one attempt from those of others."""
    return secrets.token_hex(4)


def measure_part(plan: Plan, part: Part, groups: Set[Group], settings: Settings) -> dict[Group, float]:
    """The largest magnitude that a part holds of each of ``groups``.

    Raises:
        SourceError: NaN or Inf.
    """
    found: dict[Group, float] = {}
    lock = Lock()

    def job(group: Group, piece: Piece) -> Callable[[Worker], None]:
        def run(worker: Worker) -> None:
            data = worker.read(part.source, piece.start, piece.size)
            largest = float(row_maxima(part.source, piece.slices[0], data).max())
            with lock:
                found[group] = max(found.get(group, 0.0), largest)

        return run

    def jobs() -> Iterator[Job]:
        for tensor in part_tensors(plan, part):
            group = group_of(plan.shards[part.name][0], tensor)
            if group and group in groups:
                for piece in weight_pieces(tensor, settings.piece_bytes, part.start, part.stop):
                    yield Job(piece.size, job(group, piece))

    run_jobs(iter([jobs()]), settings.threads, lambda count: None)
    return found


def convert_part(
    plan: Plan, part: Part, out: Path, settings: Settings, *, known: Mapping[Group, float], attempt: str
) -> Converted:
    """Convert a part into a partial file.

    Args:
        known: the magnitudes of all groups that lie in other parts too.
        attempt: in the partial name of a file that has several parts, the same for all of them.
    """
    groups = Groups(plan, settings.piece_bytes, known)
    writer = file_writer(plan, part, groups, settings)
    file: OutputFile | PartFile
    if part.is_whole:
        attempt = new_attempt()
        file = _whole_file(plan, part, out, settings, writer, attempt)
    else:
        file = PartFile(out / part.name, attempt, output_size(plan, part), durable=settings.durable)
    try:
        run_jobs(iter([writer.jobs(file)]), settings.threads, lambda count: None, wake=groups.give_up)
        file.finish()
    finally:
        file.close()
    sha256 = file.sha256 if isinstance(file, OutputFile) else None
    return Converted(
        errors=writer.errors.finished,
        rows=tuple(writer.errors.unfinished()),
        file=Hashed(sha256=sha256, attempt=attempt) if sha256 else None,
    )


def _whole_file(plan: Plan, part: Part, out: Path, settings: Settings, writer: FileWriter, attempt: str) -> OutputFile:
    link_to = part.source.path if settings.link and part.name not in plan.shards else None
    return OutputFile(
        out / part.name,
        writer.spans,
        link_to=link_to,
        durable=settings.durable,
        attempt=attempt,
        whole=lambda file: part.source.check(),
    )


def hash_file(path: Path, source: SourceFile, attempt: str) -> Hashed:
    """Hash a file all of whose parts are written."""
    sha256 = file_sha256(partial_path(path, attempt))
    source.check()
    return Hashed(sha256=sha256, attempt=attempt)
