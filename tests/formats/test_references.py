"""What lets the torch references give the same bits on any device: no operation that devices may compute otherwise, no
tensor left on the host, hardly a wait. Checked without any device, by listening to every operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from choices import FACTS, every
from hostile.small import random
from quantized import as_bytes, run_kernel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omni_convert.converter.device import work_bytes
from omni_convert.formats import base, engine, make_format
from omni_convert.formats.base import Facts, Format
from omni_convert.formats.bits import row_maxima
from omni_convert.formats.engine import _error_sums

EXACT = {
    "__lshift__", "__rshift__", "_to_copy", "_unsafe_view", "abs", "add", "alias", "all", "amax", "bitwise_and",
    "clamp", "clamp_", "clone", "constant_pad_nd", "copysign", "detach", "div", "eq", "expand", "full", "full_like",
    "ge", "gt", "index", "isinf", "le", "lift_fresh", "lt", "maximum", "minimum", "mul", "ne", "new_full", "new_ones",
    "nextafter", "ones_like", "reciprocal", "round", "round_", "rsub", "scalar_tensor", "select", "slice", "sub",
    "transpose", "unsqueeze", "view", "where", "zeros_like",
}  # fmt: skip
"""Moves, comparisons, and arithmetic that IEEE 754 rounds in one way only."""
WAITS = "_local_scalar_dense"


class Listener(TorchDispatchMode):
    """Counts operations, and the bytes that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.peak = self._bytes = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        if name in ("div", "sum", "mul", "add"):
            kinds = (item.dtype if isinstance(item, torch.Tensor) else type(item) for item in args)
            self.calls.append((name, tuple(kinds)))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self._bytes += size
            self.peak = max(self.peak, self._bytes)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self._bytes -= size


def facts_of(fmt: Format) -> Facts:
    return FACTS._replace(amax=5.0) if "amax" in fmt.needs else FACTS


@every
def test_only_operations_that_every_device_rounds_alike(fmt: Format) -> None:
    weight = torch.randn(4, 640).bfloat16()
    with Listener() as heard:
        fmt.quantize(weight, facts_of(fmt))
    assert heard.counts.keys() - EXACT - {WAITS, "sum"} == set()
    assert heard.counts[WAITS] == 1  # are they finite?
    for name, kinds in heard.calls:
        if name == "div":  # by a number CUDA would multiply with its reciprocal
            assert kinds[1] is torch.float32, kinds
        if name == "sum":  # of floats it would depend on the order
            assert kinds[0] is torch.int64, kinds


@every
def test_memory_of_a_device_is_estimated_from_above(fmt: Format) -> None:
    weight = torch.randn(256, 1024).bfloat16()
    with Listener() as heard:
        tensors = fmt.quantize(weight, facts_of(fmt))
        _error_sums(fmt, weight, tensors)
    assert heard.peak + weight.nbytes <= work_bytes(fmt, weight.numel())


@pytest.mark.parametrize("without_float64", [(), ("cpu",)], ids=str)
@every
def test_error_sums_here_and_there(fmt: Format, without_float64: tuple[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_WITHOUT_FLOAT64", without_float64)
    weight = random(6, 192, dtype="F32")
    expected = run_kernel(fmt, weight)
    power = np.zeros((6, 2))
    facts = Facts(amax=float(row_maxima(weight.bits, weight.dtype).max()), input_scale=0.25)
    engine.reference_rows(fmt, weight.bits, weight.dtype, {}, power, facts)
    assert power == pytest.approx(expected.power, rel=1e-4)


@contextmanager
def elsewhere() -> Iterator[None]:
    """Tensors without values, on a device that is not the host, which refuse to meet any that are."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        for method in ("int8", "fp8", "mxfp8", "mxfp4_dualscale"):  # values that decide are values that are waited for
            module = __import__(type(make_format(method)).__module__, fromlist=["checked_float32"])
            patch.setattr(module, "checked_float32", lambda weight: weight.to(torch.float32))
        yield


@every
def test_nothing_stays_on_the_host(fmt: Format) -> None:
    with elsewhere():
        weight = torch.empty(4, 640, dtype=torch.bfloat16, device="meta")
        tensors = fmt.quantize(weight, facts_of(fmt))
        sums = _error_sums(fmt, weight, tensors)
    assert {tensor.device.type for tensor in [*tensors.values(), sums]} == {"meta"}
    specs = fmt.tensors((4, 640))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: spec.shape for name, spec in specs.items()
    }


def test_the_fakes_notice_what_stays_on_the_host() -> None:
    with elsewhere(), pytest.raises(RuntimeError, match="device"):
        torch.empty(4, device="meta") * torch.ones(4)
    assert base.checked_float32(torch.ones(1, 1)) == 1


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@every
def test_the_default_dtype_of_the_process_does_not_matter(fmt: Format, default: torch.dtype) -> None:
    weight = torch.randn(4, 640).bfloat16()
    expected = fmt.quantize(weight, facts_of(fmt))
    torch.set_default_dtype(default)
    try:
        found = fmt.quantize(weight, facts_of(fmt))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in expected.items():
        assert torch.equal(as_bytes(found[name]), as_bytes(tensor)), name
        assert found[name].dtype == tensor.dtype
