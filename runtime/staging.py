"""From files to a CUDA device through pinned memory: while the device fetches one piece, the host reads the next.

Weights that were loaded lie in mapped files, where CUDA cannot fetch them: ``Tensor.to`` has them read and sent in
turns. Here a piece is copied into one of two pinned buffers while the other is under way. Copies run on the current
stream of the device, so that whatever is asked of it later finds them done; the host waits only before it fills a
buffer again, and at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

BUFFER_BYTES = 32 << 20
"""Of each buffer: long beside the time that it takes to ask for a copy."""


class Link(Protocol):
    """A device, as far as copies to it are concerned."""

    device: torch.device

    def pinned(self, size: int) -> Tensor:
        """(size,) uint8 on the host, which the device can fetch by itself."""

    def send(self, source: Tensor, target: Tensor) -> Callable[[], Any]:
        """Ask for a copy of pinned ``source`` into ``target``, after all copies asked for before, and do not wait.

        What is returned waits until ``source`` has been read.
        """


class CudaLink:
    """The current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def send(self, source: Tensor, target: Tensor) -> Callable[[], Any]:
        target.copy_(source, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(target.device))
        return done.synchronize


class Stage:
    """Copies tensors to a device, through two buffers in turns."""

    def __init__(self, link: Link, size: int = BUFFER_BYTES) -> None:
        self._link = link
        self._buffers = [link.pinned(size) for _ in range(2)]
        self._waits: list[Callable[[], Any]] = [lambda: None] * 2

    def move(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the device; of a contiguous one on the host, the copies may still be under way."""
        if tensor.device.type != "cpu" or not tensor.numel() or not tensor.is_contiguous():
            return tensor.to(self._link.device)
        moved = torch.empty_like(tensor, device=self._link.device)
        self._copy(_bytes(tensor), _bytes(moved))
        return moved

    def finish(self) -> None:
        """Wait for all copies."""
        for wait in self._waits:
            wait()

    def _copy(self, source: Tensor, target: Tensor) -> None:
        size = len(self._buffers[0])
        for start in range(0, len(source), size):
            wait, buffer = self._waits.pop(0), self._buffers.pop(0)
            wait()
            piece = buffer[: len(source) - start]
            piece.copy_(source[start : start + size])
            self._waits.append(self._link.send(piece, target[start : start + size]))
            self._buffers.append(buffer)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def move(model: nn.Module, device: torch.device) -> None:
    """``model.to(device)``, of the CPU's weights to a CUDA device through pinned memory."""
    if device.type != "cuda":
        model.to(device)
        return
    stage = Stage(CudaLink(device))
    model._apply(stage.move)  # type: ignore[no-untyped-call]
    stage.finish()
