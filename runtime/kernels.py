"""Which kernel runs a quantized layer: decided once per format, device and shape, with the reasons for it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from omni_convert.formats import format_label
from omni_convert.formats.base import Format
from omni_convert.formats.errors import OmniConvertError
from omni_convert.runtime import cpu, cuda, cuda_fp8, cuda_mx, npu, npu_device
from omni_convert.runtime.cuda_device import Capability, capability_of
from omni_convert.runtime.decode import decoded_linear

_log = logging.getLogger(__name__)

Run = Callable[[Format, Tensor, Mapping[str, Tensor], "Tensor | None", Tensor], Tensor]
"""(format, x (M, K), the layer's tensors by suffix, bias (N,), handle of ``prepared``) -> (M, N) in the dtype of x."""


class Device(NamedTuple):
    """What decides about kernels. ``capability``: of a CUDA device, such as (9, 0). ``soc``: of an NPU, see there."""

    type: str
    capability: Capability | None = None
    soc: int | None = None


class Kernel(NamedTuple):
    """``refuse``: why it cannot run a weight (N, K) in a format on a device; None if it can. ``note``: what to know."""

    name: str
    run: Run
    refuse: Callable[[Format, tuple[int, int], Device], str | None]
    note: str = ""


class Choice(NamedTuple):
    """The kernel that runs, and those that were preferred but refused, with the reason."""

    kernel: Kernel
    rejected: Mapping[str, str]


def _accept(fmt: Format, shape: tuple[int, int], device: Device) -> str | None:
    return None


def _cuda(name: str, run: Run, refuse: Callable[[Format, tuple[int, int], Capability], str | None]) -> Kernel:
    def refuse_device(fmt: Format, shape: tuple[int, int], device: Device) -> str | None:
        assert device.capability is not None, "a CUDA device has one"
        return refuse(fmt, shape, device.capability)

    return Kernel(name, run, refuse_device, "not measured on a device yet")


DECODE = Kernel(
    "decode",
    decoded_linear,
    _accept,
    note="weight-only: some rows of the weight at a time are decoded to the dtype of the activations",
)
"""Of every format, wherever PyTorch runs."""

_INT8_CPU = (
    Kernel("onednn", cpu.onednn_linear, lambda fmt, shape, device: cpu.refuse_onednn(shape)),
    Kernel("int_mm", cpu.int_mm_linear, lambda fmt, shape, device: cpu.refuse_int_mm(shape)),
    DECODE,
)
_INT8_CUDA = (
    _cuda("triton", cuda.triton_linear, cuda.refuse_triton),
    _cuda("cuda_int_mm", cuda.int_mm_linear, cuda.refuse_int_mm),
    DECODE,
)
_FP8_CUDA = (
    _cuda("scaled_mm", cuda_fp8.scaled_mm_linear, cuda_fp8.refuse_scaled_mm),
    _cuda("unscaled_mm", cuda_fp8.unscaled_linear, cuda_fp8.refuse_unscaled),
    DECODE,
)
_MX_CUDA = (_cuda("mx_scaled_mm", cuda_mx.scaled_mm_linear, cuda_mx.refuse_scaled_mm), DECODE)
_NPU = {
    name: (
        Kernel(f"npu_{name}", run, lambda fmt, shape, device: npu.refuse(fmt, shape), note="not measured, no hardware"),
        DECODE,
    )
    for name, run in npu.LINEARS.items()
}

_KERNELS: Mapping[tuple[str, str], Sequence[Kernel]] = {
    ("int8", "cpu"): _INT8_CPU,
    ("int8", "cuda"): _INT8_CUDA,
    ("fp8", "cuda"): _FP8_CUDA,
    ("mxfp8", "cuda"): _MX_CUDA,
    ("mxfp4", "cuda"): _MX_CUDA,
    **{(name, "npu"): kernels for name, kernels in _NPU.items()},
}
"""By format and device type, best first; of all others ``DECODE`` is the only one."""


@functools.cache
def device_of(device: torch.device) -> Device:
    """What a PyTorch device is to kernels. ROCm calls itself CUDA, but no kernel here was written for it."""
    if device.type == "cuda":
        return Device("cuda", capability=capability_of(device)) if torch.version.hip is None else Device("rocm")
    return Device(device.type, soc=npu_device.soc_version() if device.type == "npu" else None)


def check_format(fmt: Format, device: Device) -> None:
    """Whether the device runs layers of this format, whatever their shape.

    Raises:
        OmniConvertError: it does not.
    """
    reason = npu_device.refuse_format(fmt, device.soc)
    if reason is not None:
        raise OmniConvertError(reason)


@functools.cache
def choose(fmt: Format, shape: tuple[int, int], device: Device) -> Choice:
    """The kernel for a weight of ``shape`` (N, K).

    Raises:
        OmniConvertError: the device has no kernels for this format.
    """
    check_format(fmt, device)
    rejected: dict[str, str] = {}
    for kernel in _KERNELS.get((fmt.name, device.type), (DECODE,)):
        reason = kernel.refuse(fmt, shape, device)
        if reason is None:
            break
        rejected[kernel.name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
    level, why = logging.WARNING if rejected else logging.INFO, reasons or kernel.note or "the best one there is"
    where = f"{format_label(fmt)} {shape} on {device.type}"
    _log.log(level, "%s runs on kernel %r (%s)", where, kernel.name, why)
    return Choice(kernel, rejected)
