"""Rows of a weight, shared among threads: compiled kernels run outside Python's lock."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

SMALL = 1 << 18
"""Weights that one thread is done with sooner than several begin."""


def in_threads(work: Callable[[int, int], None], shape: tuple[int, int], together: int) -> None:
    """``work(start, stop)`` for all rows of (n, K), in as many threads as PyTorch uses, this one among them.

    ``together``: so many rows stay in one call. What ``work`` raises for the first rows is raised here.
    """
    rows, columns = shape
    count = 1 if rows * columns <= SMALL else torch.get_num_threads()
    step = -(-rows // (count * together)) * together
    others = [_pool().submit(work, start, min(start + step, rows)) for start in range(step, rows, step)]
    try:
        work(0, min(step, rows))
    finally:
        found = [other.exception() for other in others]
    for error in found:
        if error is not None:
            raise error


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Kept, for to start threads takes longer than they work. ``work`` must not come here again."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="omni_convert")


if hasattr(os, "register_at_fork"):  # a process that is forked has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
