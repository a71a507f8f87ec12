"""Carry out a plan: read rows, quantize, write. Memory is a few buffers per thread, whatever the checkpoint.

The work is a list of jobs, each a few megabytes of one file: rows of a weight, or bytes that are copied. Threads
take them in order; system calls, hashing and the compiled kernels release the interpreter lock. A weight's rows go
straight to their place in the output; its scales are small, gather in memory, and are written after the last row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from omni_convert.converter import jobs
from omni_convert.converter.jobs import Job, Source, run_jobs
from omni_convert.converter.output import OutputFile
from omni_convert.converter.plan import Plan, ShardPlan, TensorPlan
from omni_convert.converter.weight_writer import Largest, LayerError, WeightWriter, piece_bytes


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run produced: sha256 and size by relative path, and the error of every quantized layer by component."""

    files: Mapping[str, tuple[str, int]]
    errors: Mapping[tuple[str, str], LayerError]


@dataclass
class _Work:
    """Everything a run holds."""

    steps: list[list[Job] | WeightWriter] = field(default_factory=list)
    largest: defaultdict[tuple[str, str], Largest] = field(default_factory=lambda: defaultdict(Largest))
    outputs: dict[str, OutputFile] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    errors: dict[tuple[str, str], LayerError] = field(default_factory=dict)

    def add_source(self, path: Path, size: int) -> Source:
        self.sources.append(Source(path, size))
        return self.sources[-1]

    def jobs(self) -> Iterator[Job]:
        """In order; before a weight is written, all with which it shares a scale are read."""
        for step in self.steps:
            if isinstance(step, WeightWriter):
                yield from step.largest.jobs() if step.largest else ()
                yield from step.jobs()
            else:
                yield from step


def execute(
    plan: Plan, out: Path, copies: Iterable[str], *, threads: int, link: bool, progress: Callable[[int], None]
) -> Outcome:
    """Write every shard of the plan and every file of ``copies`` (relative paths) below ``out``.

    Args:
        threads: worker threads; the bytes do not depend on it.
        link: hard-link the copies instead of copying them.
        progress: receives source bytes as they are done; called by one thread at a time.

    Raises:
        OmniConvertError: NaN or Inf in a weight, or a file that cannot be read or written.
    """
    work = _Work()
    for component in plan.components:
        for shard in component.shards:
            relative = component.component.relative(shard.source.path.name)
            _add_shard(work, component.component.name, shard, relative, out)
    for relative in copies:
        _add_copy(work, plan.checkpoint.root / relative, relative, out, link)
    try:
        run_jobs(list(work.jobs()), threads, progress)
    finally:
        for file in work.outputs.values():
            file.close()
        for source in work.sources:
            source.close()
    files = {}
    for relative, file in work.outputs.items():
        assert file.sha256 is not None
        files[relative] = (file.sha256, file.size)
    return Outcome(files=files, errors=work.errors)


def buffer_bytes(plan: Plan) -> int:
    """Working memory of one thread: its read buffer, the rows it writes, and a piece read back for hashing."""
    rows = (
        min(tensor.decision.format.rows_per_scale, tensor.source.spec.shape[0])
        * (tensor.source.spec.nbytes // tensor.source.spec.shape[0])
        for tensor in plan.tensors()
        if tensor.decision.format
    )
    return 3 * max(jobs.JOB_BYTES, *rows, 0)


def scale_bytes(plan: Plan) -> int:
    """Memory for scales and error sums of the largest weight."""
    sizes = (
        tensor.bytes_after - tensor.outputs[tensor.name].nbytes + 20 * tensor.source.spec.shape[0]
        for tensor in plan.tensors()
        if tensor.decision.format
    )
    return max(sizes, default=0)


def _add_shard(work: _Work, component: str, shard: ShardPlan, relative: str, out: Path) -> None:
    source = work.add_source(
        shard.source.path, sum(tensor.source.spec.nbytes * (1 + _needs_amax(tensor)) for tensor in shard.tensors)
    )
    spans: list[tuple[int, int]] = [(0, len(shard.header))]
    first_span: dict[str, int] = {}
    offset = len(shard.header)
    pieces = {tensor.name: piece_bytes(tensor) for tensor in shard.tensors}
    for name, spec in shard.layout.items():
        first_span[name] = len(spans)
        step = pieces.get(name) or max(spec.nbytes, 1)
        spans += [(offset + at, min(step, spec.nbytes - at)) for at in range(0, spec.nbytes, step)]
        offset += spec.nbytes
    file = OutputFile(out / relative, spans)
    work.outputs[relative] = file
    work.steps.append([Job(0, lambda _buffer: file.write(0, shard.header))])
    order = {name: position for position, name in enumerate(shard.layout)}
    for tensor in sorted(shard.tensors, key=lambda tensor: order[tensor.name]):
        if tensor.decision.format is None:
            start, nbytes = tensor.source.start, tensor.source.spec.nbytes
            work.steps.append(_copy_jobs(source, start, nbytes, file, first_span[tensor.name]))
        else:
            key = component, tensor.layer
            largest = work.largest[component, tensor.scale_group or tensor.layer] if _needs_amax(tensor) else None
            done = partial(work.errors.__setitem__, key)
            work.steps.append(WeightWriter(tensor, tensor.decision.format, source, file, first_span, largest, done))


def _needs_amax(tensor: TensorPlan) -> bool:
    """Whether the whole weight is read once before it is quantized."""
    return tensor.decision.format is not None and "amax" in tensor.decision.format.needs


def _add_copy(work: _Work, path: Path, relative: str, out: Path, link: bool) -> None:
    size = path.stat().st_size
    spans = [(at, min(jobs.JOB_BYTES, size - at)) for at in range(0, size, jobs.JOB_BYTES)] or [(0, 0)]
    file = OutputFile(out / relative, spans, link_to=path if link else None)
    work.outputs[relative] = file
    copied = _copy_jobs(work.add_source(path, size), 0, size, file, 0)
    work.steps.append(copied or [Job(0, lambda _buffer: file.write(0, b""))])


def _copy_jobs(source: Source, start: int, nbytes: int, file: OutputFile, span: int) -> list[Job]:
    def job(at: int, index: int) -> Job:
        size = min(jobs.JOB_BYTES, nbytes - at)

        def run(buffer: memoryview) -> None:
            source.read(buffer[:size], start + at)
            file.write(index, buffer[:size])

        return Job(size, run)

    return [job(at, span + index) for index, at in enumerate(range(0, nbytes, jobs.JOB_BYTES))]
