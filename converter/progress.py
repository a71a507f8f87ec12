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


@contextmanager
def without_bars(*, unless: bool = False) -> Iterator[None]:
    """Without huggingface_hub's own progress bars: one for every file, also where stderr is no terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if unless or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
