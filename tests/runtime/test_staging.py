"""Copies through two buffers, on a stand-in for a stream: it runs them in order, but late, as a device may."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from omni_convert.formats import make_format
from omni_convert.runtime.linear import QuantizedLinear
from omni_convert.runtime.staging import Stage, move

SIZE = 1000


class LateLink:
    """Copies in a thread of its own, whatever ``source`` then holds; ``target`` is on the host too."""

    device = torch.device("cpu")

    def __init__(self, delay: float) -> None:
        self.buffers: list[Tensor] = []
        self.sent = 0
        self._delay = delay
        self._asked: queue.Queue[tuple[Tensor, Tensor, threading.Event] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def pinned(self, size: int) -> Tensor:
        self.buffers.append(torch.zeros(size, dtype=torch.uint8))
        return self.buffers[-1]

    def send(self, source: Tensor, target: Tensor) -> Callable[[], bool]:
        places = [buffer.untyped_storage().data_ptr() for buffer in self.buffers]
        assert source.untyped_storage().data_ptr() in places, "a device fetches from pinned memory only"
        done = threading.Event()
        self._asked.put((source, target, done))
        self.sent += 1
        return done.wait

    def close(self) -> None:
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._asked.get()) is not None:
            source, target, done = job
            time.sleep(self._delay)
            target.copy_(source)
            done.set()


@pytest.fixture
def link() -> Iterator[LateLink]:
    late = LateLink(0.005)
    yield late
    late.close()


def test_every_byte_arrives(link: LateLink) -> None:
    stage = Stage(link, SIZE)
    sizes = (1, SIZE - 1, SIZE, SIZE + 1, 7 * SIZE + 3)
    tensors = [torch.randint(-128, 128, (size,), dtype=torch.int8) for size in sizes]
    tensors += [torch.randn(33, 70).bfloat16(), torch.tensor(3.5), torch.randn(9, 11).to(torch.float8_e4m3fn)]
    moved = [stage.move(tensor) for tensor in tensors]
    stage.finish()
    assert link.sent > 2 * len(link.buffers) == 4
    for found, tensor in zip(moved, tensors, strict=True):
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        assert found.data_ptr() != tensor.data_ptr()
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_the_host_reads_on_while_a_copy_is_under_way(link: LateLink) -> None:
    tensor = torch.ones(2 * SIZE, dtype=torch.uint8)
    stage = Stage(link, SIZE)
    moved = stage.move(tensor)
    tensor.zero_()  # both pieces have been read, and lie in the buffers
    assert link.sent == 2
    stage.finish()
    assert bool(moved.all())


def test_a_tensor_that_is_not_contiguous_keeps_its_strides(link: LateLink) -> None:
    tensor = torch.randn(4, 6).t()
    moved = Stage(link, SIZE).move(tensor)
    assert moved.stride() == tensor.stride()
    assert torch.equal(moved, tensor)
    assert link.sent == 0


def test_a_model(link: LateLink) -> None:
    fmt = make_format("mxfp8")
    layer = QuantizedLinear(96, 64, dtype=torch.bfloat16, fmt=fmt)
    assert layer.bias is not None
    layer.load_state_dict({**fmt.quantize(torch.randn(64, 96)), "bias": torch.randn(64).bfloat16()})
    expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    before = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    stage = Stage(link, SIZE)
    layer._apply(stage.move)
    stage.finish()
    assert link.sent > 6
    for name, tensor in layer.state_dict().items():
        assert tensor.data_ptr() != before[name]
        assert torch.equal(tensor, expected[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3000, 4000), torch.nn.Linear(4000, 3000))
    model[1].weight = torch.nn.Parameter(model[0].weight.detach().t())  # not contiguous
    model.append(model[0])
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    move(model, torch.device("cuda"))
    assert model[2].weight is model[0].weight
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), expected[name])
