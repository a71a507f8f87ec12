"""Pieces of work on files, and the threads that run them in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.source import Reader, SourceFile
from omni_convert.formats.base import Facts, Format, NonFinite


class Worker:
    """What a thread keeps from job to job: open files, and buffers, since fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._reader = Reader()
        self._input = self.empty(0)
        self._output = self.empty(0)

    def empty(self, size: int) -> NDArray[np.uint8]:
        """A buffer."""
        return np.empty(size, np.uint8)

    def read(self, source: SourceFile, start: int, size: int) -> memoryview:
        """Bytes of a source file, valid until the next call."""
        if len(self._input) < size:
            self._input = self.empty(size)
        buffer = self._input[:size].data
        self._reader.read(source, buffer, start)
        return buffer

    def output(self, size: int) -> NDArray[np.uint8]:
        """Room for results, valid until the next call."""
        if len(self._output) < size:
            self._output = self.empty(size)
        return self._output[:size]

    def quantize_rows(
        self,
        fmt: Format,
        bits: NDArray[Any],
        dtype: str,
        out: Mapping[str, NDArray[Any]],
        power: NDArray[np.float64] | None,
        facts: Facts,
    ) -> NonFinite | None:
        """``fmt.quantize_rows``, wherever this worker computes."""
        return fmt.quantize_rows(bits, dtype, out, power, facts)

    def close(self) -> None:
        self._reader.close()


@dataclass(frozen=True)
class Job:
    """A piece of work: ``run(worker)``; ``size`` bytes of source.

    ``counts``: whether these bytes are done afterwards (not if they will be read again).
    """

    size: int
    run: Callable[[Worker], None]
    counts: bool = True


class _Files:
    """Hands out the jobs of files, those of each in order.

    A thread keeps to one file: file systems let one thread at a time write into a file, and its hash finds the bytes
    in the processor's cache. A thread for which no file is left to begin helps with another's. ``at_once``: how many
    files are begun before one ends.
    """

    def __init__(self, files: Iterator[Iterator[Job]], at_once: int) -> None:
        self._files = files
        self._at_once = at_once
        self._begun: list[Iterator[Job]] = []

    def next(self, mine: Iterator[Job] | None) -> tuple[Job, Iterator[Job]] | None:
        """A job, and the file that the thread keeps to from now on; None if all are handed out."""
        while True:
            if mine is not None:
                if (job := next(mine, None)) is not None:
                    return job, mine
                if mine in self._begun:
                    self._begun.remove(mine)
            more = len(self._begun) < self._at_once
            if more and (mine := next(self._files, None)) is not None:
                self._begun.append(mine)
            elif self._begun:
                mine = self._begun[0]
            else:
                return None


def run_jobs(
    files: Iterator[Iterator[Job]],
    threads: int,
    progress: Callable[[int], None],
    make_worker: Callable[[], Worker] = Worker,
    wake: Callable[[], None] = lambda: None,
    at_once: int | None = None,
) -> None:
    """Run the jobs of every file on ``threads`` threads; the first error stops all of them and is raised.

    The calling thread waits without a lock that others need: a signal may raise there at any moment. ``wake``: called
    when the run ends early, to end jobs that wait for others. ``at_once``: files that are begun before one
    ends; None for one for every thread.
    """
    lock, stop = Lock(), Event()
    queue = _Files(files, at_once or threads)
    ends: SimpleQueue[BaseException | None] = SimpleQueue()

    def work(worker: Worker) -> None:
        mine: Iterator[Job] | None = None
        while not stop.is_set():
            with lock:
                found = queue.next(mine)
            if found is None:
                return
            job, mine = found
            job.run(worker)
            if job.counts:
                with lock:
                    progress(job.size)

    def thread() -> None:
        try:
            with closing(make_worker()) as worker:
                work(worker)
        except BaseException as error:  # whatever it is, the caller raises it
            ends.put(error)
        else:
            ends.put(None)

    threads_ = [Thread(target=thread, name=f"omni-convert-{number}") for number in range(threads)]
    try:
        for item in threads_:
            item.start()
        for _ in threads_:
            if (error := ends.get()) is not None:
                raise error
    except BaseException:
        stop.set()
        wake()
        raise
    finally:
        for item in threads_:
            if item.ident is not None:
                item.join()
