"""Pieces of work on files, and the threads that run them in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread, local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.output import read_into
from omni_convert.formats.errors import OmniConvertError

JOB_BYTES = 4 << 20
"""Source bytes of one job: large enough to hide the calls, small enough to stay in the last-level cache."""


@dataclass(frozen=True)
class Job:
    """A piece of work: ``run(buffer)`` with a buffer of at least ``size`` bytes; ``size`` bytes of source.

    ``counts``: whether these bytes are done afterwards (not if they will be read again).
    """

    size: int
    run: Callable[[memoryview], None]
    counts: bool = True


class Source:
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


_thread = local()


def scratch(dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """This thread's reused output array: fresh pages would cost more than the arithmetic."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if getattr(_thread, "scratch", np.empty(0)).nbytes < nbytes:
        _thread.scratch = np.empty(nbytes, np.uint8)
    pages: NDArray[np.uint8] = _thread.scratch
    return pages[:nbytes].view(dtype).reshape(shape)


def run_jobs(jobs: Sequence[Job], threads: int, progress: Callable[[int], None]) -> None:
    """Run the jobs in order on ``threads`` threads; the first error stops all of them and is raised.

    The calling thread waits without a lock that others need: a signal may raise there at any moment.
    """
    largest = max((job.size for job in jobs), default=0)
    queue = iter(jobs)
    lock, stop = Lock(), Event()
    ends: SimpleQueue[BaseException | None] = SimpleQueue()

    def work() -> None:
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

    def worker() -> None:
        try:
            work()
        except BaseException as error:  # whatever it is, the caller raises it
            ends.put(error)
        else:
            ends.put(None)

    workers = [Thread(target=worker, name=f"omni-convert-{number}") for number in range(threads)]
    try:
        for thread in workers:
            thread.start()
        for _ in workers:
            if (error := ends.get()) is not None:
                raise error
    finally:
        stop.set()
        for thread in workers:
            if thread.ident is not None:
                thread.join()
