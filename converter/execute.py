"""Carry out a plan: read rows, quantize, write. Memory is a few buffers per thread, whatever the checkpoint.

The work is a list of jobs, each a few megabytes of one file: rows of a weight, or bytes that are copied. Threads
take them in order; system calls, hashing and the compiled kernels release the interpreter lock. A weight's rows go
straight to their place in the output; its scales are small, gather in memory, and are written after the last row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.output import OutputFile, read_into
from omni_convert.converter.plan import Plan, ShardPlan, TensorPlan
from omni_convert.formats.base import Facts, Format, row_slice
from omni_convert.formats.bits import NUMPY_DTYPE, OUTPUT_DTYPE
from omni_convert.formats.engine import amax
from omni_convert.formats.errors import OmniConvertError, printable

JOB_BYTES = 4 << 20
"""Source bytes of one job: large enough to hide the calls, small enough to stay in the last-level cache."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Sums of squares of a weight and of its quantization error."""

    signal: float
    noise: float

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB; infinite for an exact layer."""
        return float(10 * np.log10(self.signal / self.noise)) if self.noise and self.signal else float("inf")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run produced: sha256 and size by relative path, and the error of every quantized layer by component."""

    files: Mapping[str, tuple[str, int]]
    errors: Mapping[tuple[str, str], LayerError]


@dataclass(frozen=True)
class _Job:
    """A piece of work: ``run(buffer)`` with a buffer of at least ``size`` bytes; ``size`` bytes of source.

    ``counts``: whether these bytes are done afterwards (not if they will be read again).
    """

    size: int
    run: Callable[[memoryview], None]
    counts: bool = True


class _Source:
    """A source file of which ``size`` bytes will be read: open from the first of them to the last."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._left = size
        self._fd: int | None = None
        self._lock = Lock()

    def read(self, buffer: memoryview, offset: int) -> None:
        with self._lock:
            if self._fd is None:
                try:
                    self._fd = os.open(self.path, os.O_RDONLY)
                except OSError as error:
                    raise OmniConvertError(
                        f"{self.path}: cannot be opened ({error.strerror}). Check its rights, then run again."
                    ) from error
        read_into(self._fd, buffer, offset, self.path)
        with self._lock:
            self._left -= len(buffer)
            if not self._left:
                self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@dataclass
class _Work:
    """Everything a run holds."""

    jobs: list[_Job] = field(default_factory=list)
    outputs: dict[str, OutputFile] = field(default_factory=dict)
    sources: list[_Source] = field(default_factory=list)
    errors: dict[tuple[str, str], LayerError] = field(default_factory=dict)

    def add_source(self, path: Path, size: int) -> _Source:
        self.sources.append(_Source(path, size))
        return self.sources[-1]


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
        _run_jobs(work.jobs, threads, progress)
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
    return 3 * max(JOB_BYTES, *rows, 0)


def scale_bytes(plan: Plan) -> int:
    """Memory for scales and error sums of the largest weight."""
    sizes = (
        tensor.bytes_after - tensor.outputs[tensor.name].nbytes + 16 * tensor.source.spec.shape[0]
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
    pieces = {tensor.name: _piece_bytes(tensor) for tensor in shard.tensors}
    for name, spec in shard.layout.items():
        first_span[name] = len(spans)
        step = pieces.get(name) or max(spec.nbytes, 1)
        spans += [(offset + at, min(step, spec.nbytes - at)) for at in range(0, spec.nbytes, step)]
        offset += spec.nbytes
    file = OutputFile(out / relative, spans)
    work.outputs[relative] = file
    work.jobs.append(_Job(0, lambda _buffer: file.write(0, shard.header)))
    order = {name: position for position, name in enumerate(shard.layout)}
    for tensor in sorted(shard.tensors, key=lambda tensor: order[tensor.name]):
        if tensor.decision.format is None:
            start, nbytes = tensor.source.start, tensor.source.spec.nbytes
            work.jobs += _copy_jobs(source, start, nbytes, file, first_span[tensor.name])
        else:
            writer = _WeightWriter(work, component, tensor, tensor.decision.format, source, file, first_span)
            work.jobs += writer.jobs()


def _piece_bytes(tensor: TensorPlan) -> int:
    """Bytes of the output tensor of the same name that one job writes."""
    if tensor.decision.format is None:
        return JOB_BYTES
    return _rows_per_job(tensor) * (tensor.outputs[tensor.name].nbytes // tensor.source.spec.shape[0])


def _rows_per_job(tensor: TensorPlan) -> int:
    """As many rows as ``JOB_BYTES`` hold, in whole groups of rows that share scales."""
    assert tensor.decision.format is not None
    spec, together = tensor.source.spec, tensor.decision.format.rows_per_scale
    return max(1, JOB_BYTES * spec.shape[0] // spec.nbytes // together) * together


def _needs_amax(tensor: TensorPlan) -> bool:
    """Whether the whole weight is read once before it is quantized."""
    return tensor.decision.format is not None and "amax" in tensor.decision.format.needs


def _add_copy(work: _Work, path: Path, relative: str, out: Path, link: bool) -> None:
    size = path.stat().st_size
    spans = [(at, min(JOB_BYTES, size - at)) for at in range(0, size, JOB_BYTES)] or [(0, 0)]
    file = OutputFile(out / relative, spans, link_to=path if link else None)
    work.outputs[relative] = file
    work.jobs += _copy_jobs(work.add_source(path, size), 0, size, file, 0) or [
        _Job(0, lambda _buffer: file.write(0, b""))
    ]


def _copy_jobs(source: _Source, start: int, nbytes: int, file: OutputFile, span: int) -> list[_Job]:
    def job(at: int, index: int) -> _Job:
        size = min(JOB_BYTES, nbytes - at)

        def run(buffer: memoryview) -> None:
            source.read(buffer[:size], start + at)
            file.write(index, buffer[:size])

        return _Job(size, run)

    return [job(at, span + index) for index, at in enumerate(range(0, nbytes, JOB_BYTES))]


class _WeightWriter:
    """Quantizes one weight, some rows at a time, and writes its scales when the last rows are done.

    A format that needs the weight's largest magnitude has it read first; jobs are handed out in order, so whoever
    waits for it waits for jobs that other threads have already begun.
    """

    def __init__(
        self,
        work: _Work,
        component: str,
        tensor: TensorPlan,
        fmt: Format,
        source: _Source,
        file: OutputFile,
        first_span: Mapping[str, int],
    ) -> None:
        self.work = work
        self.key = (component, tensor.layer)
        self.tensor = tensor
        self.format = fmt
        self.source = source
        self.file = file
        self.first_span = first_span
        self.side: dict[str, NDArray[Any]] = {}
        self.facts = Facts(input_scale=tensor.input_scale)
        self.measured = Event()
        self.amax = np.float32(0)
        self.power: NDArray[np.float64] = np.empty((0, 2))
        self.lock = Lock()
        self.left = 0

    def jobs(self) -> Iterator[_Job]:
        rows = self.tensor.source.spec.shape[0]
        row_bytes = self.tensor.source.spec.nbytes // rows
        step = _rows_per_job(self.tensor)
        pieces = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        if _needs_amax(self.tensor):
            self.left = len(pieces)
            for start, stop in pieces:
                yield _Job((stop - start) * row_bytes, self._amax_job(start, stop), counts=False)
        else:
            self.measured.set()
        for index, (start, stop) in enumerate(pieces):
            span = self.first_span[self.tensor.name] + index
            yield _Job((stop - start) * row_bytes, self._rows_job(start, stop, span))

    def _read(self, buffer: memoryview, start: int, stop: int) -> NDArray[Any]:
        spec = self.tensor.source.spec
        row_bytes = spec.nbytes // spec.shape[0]
        size = (stop - start) * row_bytes
        self.source.read(buffer[:size], self.tensor.source.start + start * row_bytes)
        return np.frombuffer(buffer[:size], NUMPY_DTYPE[spec.dtype]).reshape(stop - start, *spec.shape[1:])

    def _amax_job(self, start: int, stop: int) -> Callable[[memoryview], None]:
        def run(buffer: memoryview) -> None:
            largest = np.float32(np.nan)
            try:
                largest = amax(self._read(buffer, start, stop), self.tensor.source.spec.dtype)
            finally:  # also after an error, which others must not wait for
                with self.lock:
                    self.amax = np.maximum(self.amax, largest)  # NaN wins
                    self.left -= 1
                    if not self.left:
                        self.facts = self.facts._replace(amax=float(self.amax))
                        self.measured.set()

        return run

    def _rows_job(self, start: int, stop: int, span: int) -> Callable[[memoryview], None]:
        def run(buffer: memoryview) -> None:
            bits = self._read(buffer, start, stop)
            self.measured.wait()
            self._allocate()
            weight = self.tensor.outputs[self.tensor.name]
            codes = _scratch(OUTPUT_DTYPE[weight.dtype], (stop - start, *weight.shape[1:]))
            scales = row_slice(self.format, start, stop)
            out = {"weight": codes} | {suffix: array[scales] for suffix, array in self.side.items()}
            bad = self.format.quantize_rows(
                bits, self.tensor.source.spec.dtype, out, self.power[start:stop], self.facts
            )
            if bad is not None:
                raise OmniConvertError(
                    f"{self.source.path}: tensor {printable(self.tensor.name)} holds NaN or Inf at row "
                    f"{start + bad.row}, column {bad.column}, expected finite weights. The checkpoint is damaged: "
                    "download it again, or leave this layer as it is with --ignore "
                    f"{printable(self.tensor.group or self.tensor.layer)}."
                )
            self.file.write(span, codes.data.cast("B"))
            self._finish_rows()

        return run

    def _allocate(self) -> None:
        with self.lock:
            if len(self.power):
                return
            specs = self.format.tensors(self.tensor.source.spec.shape)
            self.side = {
                suffix: np.empty(spec.shape, OUTPUT_DTYPE[spec.dtype])
                for suffix, spec in specs.items()
                if suffix != "weight" and suffix not in self.format.whole_suffixes
            }
            self.power = np.empty((self.tensor.source.spec.shape[0], 2))
            self.left = -(-self.tensor.source.spec.shape[0] // _rows_per_job(self.tensor))

    def _finish_rows(self) -> None:
        with self.lock:
            self.left -= 1
            if self.left:
                return
        whole = self.format.whole(self.tensor.source.spec.shape, self.facts)
        for suffix, array in (self.side | whole).items():
            span = self.first_span[f"{self.tensor.layer}.{suffix}"]
            self.file.write(span, array.data.cast("B"))
        signal, noise = self.power.sum(axis=0)
        self.work.errors[self.key] = LayerError(signal=float(signal), noise=float(noise))
        self.side, self.power = {}, np.empty((0, 2))


_thread = local()


def _scratch(dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """This thread's reused output array: fresh pages would cost more than the arithmetic."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if getattr(_thread, "scratch", np.empty(0)).nbytes < nbytes:
        _thread.scratch = np.empty(nbytes, np.uint8)
    scratch: NDArray[np.uint8] = _thread.scratch
    return scratch[:nbytes].view(dtype).reshape(shape)


def _run_jobs(jobs: list[_Job], threads: int, progress: Callable[[int], None]) -> None:
    """Run the jobs in order on ``threads`` threads; the first error stops all of them and is raised."""
    largest = max((job.size for job in jobs), default=0)
    queue = iter(jobs)
    lock, stop = Lock(), Event()

    def worker() -> None:
        buffer = memoryview(bytearray(largest))
        while not stop.is_set():
            with lock:
                job = next(queue, None)
            if job is None:
                return
            job.run(buffer)
            if job.counts:
                with lock:
                    progress(job.size)

    with ThreadPoolExecutor(threads, thread_name_prefix="omni-convert") as pool:
        futures = [pool.submit(worker) for _ in range(threads)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
        for future in done:
            future.result()
