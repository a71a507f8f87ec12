"""Threads that take the jobs of several files."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hostile.small import QWEN_CONFIG, qwen_shards, write_sharded

from omni_convert.converter.convert import convert
from omni_convert.converter.groups import Groups
from omni_convert.converter.jobs import Job, Worker, run_jobs
from omni_convert.converter.source import SourceFile
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import read_header


def jobs(name: str, count: int, run: Callable[[str, int], None]) -> Iterator[Job]:
    for place in range(count):
        yield Job(1, partial(_ignoring_worker, run, name, place))


def _ignoring_worker(run: Callable[[str, int], None], name: str, place: int, _: Worker) -> None:
    run(name, place)


def test_a_thread_keeps_to_a_file_and_helps_in_the_end() -> None:
    done: dict[str, list[tuple[int, str]]] = defaultdict(list)
    begun = threading.Barrier(2)

    def run(name: str, place: int) -> None:
        if place == 0:
            begun.wait(5)
        done[name].append((place, threading.current_thread().name))
        time.sleep(0.002)

    run_jobs(iter([jobs("short", 5, run), jobs("long", 60, run)]), 2, lambda count: None)
    assert [place for place, _ in done["short"]] == list(range(5))
    assert len({thread for _, thread in done["short"]}) == 1
    assert sorted(place for place, _ in done["long"]) == list(range(60))
    assert len({thread for _, thread in done["long"]}) == 2


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_job_runs_once(threads: int) -> None:
    found: list[tuple[str, int]] = []
    sizes: list[int] = []
    files = (jobs(name, count, lambda *job: found.append(job)) for name, count in (("a", 0), ("b", 7), ("c", 1)))
    run_jobs(files, threads, sizes.append)
    assert sorted(found) == [("b", place) for place in range(7)] + [("c", 0)]
    assert sum(sizes) == 8


def test_nobody_waits_for_a_file_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread fails before it has measured all that another waits for."""
    first, second = (dict(shard) for shard in qwen_shards())
    name = "transformer_blocks.0.attn.to_k.weight"
    second[name] = first.pop(name)  # measured with the first shard, needed by both
    source = write_sharded(tmp_path / "model", [first, second], QWEN_CONFIG)
    path = source / "diffusion_pytorch_model-00002-of-00002.safetensors"
    place = read_header(path).tensors[name].start
    waiting = threading.Event()
    wait, read = Groups.wait, Worker.read

    def note(self: Groups, group: tuple[str, str]) -> float | None:
        if self._groups[group].value is None:
            waiting.set()
        return wait(self, group)

    def fail(self: Worker, file: SourceFile, start: int, size: int) -> memoryview:
        if file.path == path and start >= place and waiting.wait(5):  # measured before it is converted
            raise OmniConvertError("a disk failed")
        return read(self, file, start, size)

    monkeypatch.setattr(Groups, "wait", note)
    monkeypatch.setattr(Worker, "read", fail)
    monkeypatch.setattr("omni_convert.converter.convert.PIECE_BYTES", 64)
    with pytest.raises(OmniConvertError, match="a disk failed"):
        convert(source, tmp_path / "out", method="int8", threads=2)
