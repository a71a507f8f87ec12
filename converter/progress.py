"""Progress on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` bytes that is told of every few more; shown on a terminal only, if at all."""
    from tqdm import tqdm

    disable = None if show else True  # None: shown on a terminal only
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=disable, dynamic_ncols=True) as bar:
        yield lambda count: (bar.update(count), None)[1]
