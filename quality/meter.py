"""Wall-clock time and peak memory of a generation."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): the peak resident set becomes the present one


class Meter:
    """Measures what happens on ``device``. ``seconds`` and ``peaks``, in bytes, have an entry for every ``run``.

    Memory is what PyTorch allocated on a device; on the CPU the resident memory of this process, libraries included,
    which only Linux tells. ``peaks`` has None where nobody knows.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self.peaks: list[int | None] = []
        self._device = device
        self._module = _module(device)

    @property
    def memory(self) -> str:
        """What ``peaks`` counts."""
        return "resident memory of the process" if self._module is None else f"allocated on {self._device} by PyTorch"

    @contextmanager
    def run(self) -> Iterator[None]:
        self._reset()
        started = time.perf_counter()
        yield
        self._synchronize()
        self.seconds.append(time.perf_counter() - started)
        self.peaks.append(self._peak())

    def _synchronize(self) -> None:
        if self._module is not None:
            self._module.synchronize(self._device)

    def _reset(self) -> None:
        self._synchronize()
        if self._module is not None:
            self._module.reset_peak_memory_stats(self._device)
        elif _RESET.exists():
            _RESET.write_text(_RESET_PEAK)

    def _peak(self) -> int | None:
        if self._module is not None:
            return int(self._module.max_memory_allocated(self._device))
        if not _RESET.exists():
            return None
        rows = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(rows["VmHWM"].split()[0]) * 1024


@contextmanager
def freed_after(device: torch.device) -> Iterator[None]:
    """Afterwards the memory is free of whatever is no longer referred to."""
    try:
        yield
    finally:
        gc.collect()
        if (module := _module(device)) is not None:
            module.empty_cache()


def _module(device: torch.device) -> Any:
    """``torch.cuda`` or ``torch.npu``; None for the CPU."""
    return None if device.type == "cpu" else getattr(torch, device.type)
