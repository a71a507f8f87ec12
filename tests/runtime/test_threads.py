"""Rows are shared among threads: each is worked on once, errors arrive, and a forked process has threads of its own."""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing import get_context

import pytest
import torch

from omni_convert.runtime import threads


@pytest.fixture(autouse=True)
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(threads, "SMALL", 1)


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
@pytest.mark.parametrize("together", [1, 3, 64])
def test_every_row_once(rows: int, together: int) -> None:
    done, lock = [], threading.Lock()

    def work(start: int, stop: int) -> None:
        with lock:
            done.append((start, stop))

    threads.in_threads(work, (rows, 7), together)
    done.sort()
    assert [start for start, _ in done] == [0, *(stop for _, stop in done[:-1])]
    assert done[-1][1] == rows
    assert len(done) <= 4
    assert all(start % together == 0 for start, _ in done)


def test_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    meeting = threading.Barrier(2)

    def work(start: int, stop: int) -> None:
        meeting.wait(timeout=60)

    threads.in_threads(work, (8, 7), 1)


@pytest.mark.parametrize("row", [0, 99])
def test_an_error_arrives_when_all_are_done(row: int) -> None:
    ended = []

    def work(start: int, stop: int) -> None:
        if start <= row < stop:
            raise ValueError(f"row {row}")
        ended.append(start)

    with pytest.raises(ValueError, match=f"row {row}"):
        threads.in_threads(work, (100, 7), 1)
    assert len(ended) == 3


def _sum_rows() -> int:
    sums: list[int] = []
    threads.in_threads(lambda start, stop: sums.append(stop - start), (100, 7), 1)
    return sum(sums)


def _child() -> None:
    os._exit(0 if _sum_rows() == 100 else 1)


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_after_a_fork() -> None:
    assert _sum_rows() == 100
    child = get_context("fork").Process(target=_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0
