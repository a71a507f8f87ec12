"""Quantize one weight, some rows at a time; its scales gather in memory and are written after the last rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter import jobs
from omni_convert.converter.jobs import Job, Source, scratch
from omni_convert.converter.output import OutputFile
from omni_convert.converter.plan import TensorPlan
from omni_convert.formats.base import Facts, Format, row_slice
from omni_convert.formats.bits import NUMPY_DTYPE, OUTPUT_DTYPE
from omni_convert.formats.engine import row_maxima
from omni_convert.formats.errors import OmniConvertError, printable


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Sums of squares of a weight and of its quantization error.

    ``own_noise``: about the error that it would have with scales of its own; None if it has them.
    """

    signal: float
    noise: float
    own_noise: float | None = None

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB; infinite for an exact layer."""
        return float(10 * np.log10(self.signal / self.noise)) if self.noise and self.signal else float("inf")

    @property
    def shared_scale_db(self) -> float | None:
        """About how many dB a shared scale costs this layer; None if it has its own."""
        if self.own_noise is None:
            return None
        return max(0.0, float(10 * np.log10(self.noise / self.own_noise))) if self.noise and self.own_noise else 0.0


class Largest:
    """The largest magnitude of the weights that share a scale, wherever in the checkpoint they lie.

    Its jobs come before any that waits for it; jobs are handed out in order, so whoever waits, waits for jobs that
    other threads have already begun.
    """

    def __init__(self) -> None:
        self._writers: list[WeightWriter] = []
        self._left = 0
        self._value = np.float32(0)
        self._known = Event()
        self._lock = Lock()

    def add(self, writer: WeightWriter) -> None:
        self._writers.append(writer)

    def jobs(self) -> Iterator[Job]:
        """The jobs that read all of the weights; nothing when asked again."""
        writers, self._writers = self._writers, []
        for writer in writers:
            for job in writer.measuring_jobs():
                self._left += 1
                yield job

    def report(self, largest: np.float32) -> None:
        """One job is done; NaN where it failed, so that nobody waits for it."""
        with self._lock:
            self._value = np.maximum(self._value, largest)  # NaN wins
            self._left -= 1
            if not self._left:
                self._known.set()

    def wait(self) -> float:
        """The largest magnitude; not finite if one weight is not, or could not be read."""
        self._known.wait()
        return float(self._value)


class WeightWriter:
    """Quantizes one weight and writes it into ``file``, whose tensors begin at the spans ``first_span``."""

    def __init__(
        self,
        tensor: TensorPlan,
        fmt: Format,
        source: Source,
        file: OutputFile,
        first_span: Mapping[str, int],
        largest: Largest | None,
        done: Callable[[LayerError], None],
    ) -> None:
        """``largest``: for a format that needs it. ``done``: called when the weight is written."""
        self.tensor = tensor
        self.format = fmt
        self.source = source
        self.file = file
        self.first_span = first_span
        self.largest = largest
        self.done = done
        self.side: dict[str, NDArray[Any]] = {}
        self.maxima: NDArray[np.float32] = np.empty(0, np.float32)
        self.power: NDArray[np.float64] = np.empty((0, 2))
        self.lock = Lock()
        self.left = len(self._pieces())
        if largest:
            largest.add(self)

    def measuring_jobs(self) -> Iterator[Job]:
        """Read the weight once to find its largest magnitude."""
        for start, stop in self._pieces():
            yield Job((stop - start) * self._row_bytes, self._measure(start, stop), counts=False)

    def jobs(self) -> Iterator[Job]:
        """Read the weight, quantize it and write it."""
        for index, (start, stop) in enumerate(self._pieces()):
            span = self.first_span[self.tensor.name] + index
            yield Job((stop - start) * self._row_bytes, self._quantize(start, stop, span))

    @property
    def _rows(self) -> int:
        return self.tensor.source.spec.shape[0]

    @property
    def _row_bytes(self) -> int:
        return self.tensor.source.spec.nbytes // self._rows

    def _pieces(self) -> list[tuple[int, int]]:
        step = rows_per_job(self.tensor)
        return [(start, min(start + step, self._rows)) for start in range(0, self._rows, step)]

    def _read(self, buffer: memoryview, start: int, stop: int) -> NDArray[Any]:
        spec = self.tensor.source.spec
        size = (stop - start) * self._row_bytes
        self.source.read(buffer[:size], self.tensor.source.start + start * self._row_bytes)
        return np.frombuffer(buffer[:size], NUMPY_DTYPE[spec.dtype]).reshape(stop - start, *spec.shape[1:])

    def _measure(self, start: int, stop: int) -> Callable[[memoryview], None]:
        def run(buffer: memoryview) -> None:
            assert self.largest is not None
            largest = np.float32(np.nan)
            try:
                maxima = row_maxima(self._read(buffer, start, stop), self.tensor.source.spec.dtype)
                with self.lock:
                    if not len(self.maxima):
                        self.maxima = np.empty(self._rows, np.float32)
                self.maxima[start:stop] = maxima
                largest = maxima.max()
            finally:
                self.largest.report(largest)

        return run

    def _quantize(self, start: int, stop: int, span: int) -> Callable[[memoryview], None]:
        def run(buffer: memoryview) -> None:
            bits = self._read(buffer, start, stop)
            facts = self._facts()
            self._allocate()
            weight = self.tensor.outputs[self.tensor.name]
            codes = scratch(OUTPUT_DTYPE[weight.dtype], (stop - start, *weight.shape[1:]))
            scales = row_slice(self.format, start, stop)
            out = {"weight": codes} | {suffix: array[scales] for suffix, array in self.side.items()}
            bad = self.format.quantize_rows(bits, self.tensor.source.spec.dtype, out, self.power[start:stop], facts)
            if bad is not None:
                raise OmniConvertError(
                    f"{self.source.path}: tensor {printable(self.tensor.name)} holds NaN or Inf at row "
                    f"{start + bad.row}, column {bad.column}, expected finite weights. The checkpoint is damaged: "
                    "download it again, or leave this layer as it is with --ignore "
                    f"{printable(self.tensor.group or self.tensor.layer)}."
                )
            self.file.write(span, codes.data.cast("B"))
            self._finish_rows(facts)

        return run

    def _facts(self) -> Facts:
        return Facts(amax=self.largest.wait() if self.largest else None, input_scale=self.tensor.input_scale)

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
            self.power = np.empty((self._rows, 2))

    def _finish_rows(self, facts: Facts) -> None:
        with self.lock:
            self.left -= 1
            if self.left:
                return
        shape = self.tensor.source.spec.shape
        for suffix, array in (self.side | self.format.whole(shape, facts)).items():
            span = self.first_span[f"{self.tensor.layer}.{suffix}"]
            self.file.write(span, array.data.cast("B"))
        signal, noise = self.power.sum(axis=0)
        own = self.format.own_noise(self.maxima, shape[1]) if self.largest else None
        self.done(LayerError(signal=float(signal), noise=float(noise), own_noise=own))
        self.side, self.power, self.maxima = {}, np.empty((0, 2)), np.empty(0, np.float32)


def piece_bytes(tensor: TensorPlan) -> int:
    """Bytes of the output tensor of the same name that one job writes."""
    if tensor.decision.format is None:
        return jobs.JOB_BYTES
    return rows_per_job(tensor) * (tensor.outputs[tensor.name].nbytes // tensor.source.spec.shape[0])


def rows_per_job(tensor: TensorPlan) -> int:
    """As many rows as ``jobs.JOB_BYTES`` hold, in whole groups of rows that share scales."""
    assert tensor.decision.format is not None
    spec, together = tensor.source.spec, tensor.decision.format.rows_per_scale
    return max(1, jobs.JOB_BYTES * spec.shape[0] // spec.nbytes // together) * together
