"""Which kernel runs a quantized layer, decided once per device and shape, and the operator that calls it.

The operator is opaque to ``torch.compile``: the compiler neither sees packed weights nor rewrites the integer
product (with ``freezing=True`` Inductor turns it into an oneDNN call thousands of times slower).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_convert.formats.errors import OmniConvertError
from omni_convert.runtime import cpu, cuda, reference

_log = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Tensor], Tensor]
"""(x (M, K), weight, weight_scale, bias, handle) -> (M, N) in the dtype of x."""


class Candidate(NamedTuple):
    """A kernel, and why it cannot run a weight of a given (N, K); None if it can."""

    name: str
    run: Kernel
    refuse: Callable[[tuple[int, int]], str | None]


class Choice(NamedTuple):
    """The kernel that runs, and the ones that were preferred but refused, with the reason."""

    kernel: str
    rejected: Mapping[str, str]


def _accept(shape: tuple[int, int]) -> str | None:
    return None


_DEQUANTIZE = Candidate("dequantize", reference.dequantized_linear, _accept)

_CANDIDATES: Mapping[tuple[str, str], Sequence[Candidate]] = {
    ("int8", "cpu"): (
        Candidate("onednn", cpu.onednn_linear, cpu.refuse_onednn),
        Candidate("int_mm", cpu.int_mm_linear, cpu.refuse_int_mm),
        _DEQUANTIZE,
    ),
    ("int8", "cuda"): (Candidate("cuda_int_mm", cuda.int_mm_linear, cuda.refuse_int_mm), _DEQUANTIZE),
}
"""By format and device type, best first."""


@functools.cache
def select_kernel(format_name: str, device_type: str, shape: tuple[int, int]) -> Choice:
    """The kernel for a weight of ``shape`` (N, K) on a device.

    Raises:
        OmniConvertError: the device has no kernels yet (Ascend).
    """
    if device_type == "npu":
        raise OmniConvertError(
            f"found an {format_name} layer on an Ascend NPU, expected the CPU or a GPU: Ascend kernels are not there "
            "yet. Serve the checkpoint with vLLM-Omni, which has them, or load it with device='cpu'."
        )
    rejected: dict[str, str] = {}
    for candidate in _CANDIDATES.get((format_name, device_type), (_DEQUANTIZE,)):
        reason = candidate.refuse(shape)
        if reason is None:
            break
        rejected[candidate.name] = reason
    if rejected or candidate is _DEQUANTIZE:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        _log.warning(
            "%s %s on %s runs on kernel %r (%s)",
            format_name, shape, device_type, candidate.name, reasons or "no faster one is known for this device",
        )  # fmt: skip
    return Choice(candidate.name, rejected)


@functools.cache
def _kernel(format_name: str, device_type: str, shape: tuple[int, int]) -> Kernel:
    name = select_kernel(format_name, device_type, shape).kernel
    candidates = _CANDIDATES.get((format_name, device_type), (_DEQUANTIZE,))
    return next(candidate.run for candidate in candidates if candidate.name == name)


@torch.library.custom_op(
    "omni_convert::int8_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor handle) -> Tensor",
)
def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, handle: Tensor) -> Tensor:
    """``x``: (..., K); ``weight``: (N, K) int8; ``weight_scale``: (N, 1) float32; ``bias``: (N,). Returns (..., N).

    Differentiable in ``x`` and ``bias``, as if the activations were not quantized (straight through).

    Raises:
        OmniConvertError: dtype, shape or device of ``x`` do not fit the layer.
    """
    _check_input(x, weight, weight_scale)
    rows, columns = weight.shape
    run = _kernel("int8", x.device.type, (rows, columns))
    y = run(x.reshape(-1, columns), weight, weight_scale, bias, handle)
    return y.reshape(*x.shape[:-1], rows)


def _check_input(x: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
    if x.dtype not in reference.ACTIVATION_DTYPES:
        expected = ", ".join(str(dtype) for dtype in reference.ACTIVATION_DTYPES)
        raise OmniConvertError(
            f"an int8 layer was given activations of {x.dtype}, expected {expected}. Cast them before the layer; "
            "code that casts to `layer.weight.dtype` must not do so for a quantized layer."
        )
    if not x.shape or x.shape[-1] != weight.shape[1]:
        raise OmniConvertError(
            f"an int8 layer of shape {tuple(weight.shape)} was given activations of shape {tuple(x.shape)}, "
            f"expected the last dimension to be {weight.shape[1]}."
        )
    if weight.dtype != torch.int8 or weight_scale.shape != (weight.shape[0], 1):
        raise OmniConvertError(
            f"an int8 layer holds weight {weight.dtype} {tuple(weight.shape)} and weight_scale "
            f"{tuple(weight_scale.shape)}, expected torch.int8 and ({weight.shape[0]}, 1). "
            "Sharding a loaded layer is not supported: load the model on one device."
        )
    if not x.device == weight.device == weight_scale.device:
        raise OmniConvertError(
            f"an int8 layer on {weight.device} (scale on {weight_scale.device}) was given activations on {x.device}, "
            "expected one device. Move the model or the input with .to(device)."
        )


@int8_linear.register_fake
def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, handle: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, weight_scale, bias, _ = inputs
    ctx.save_for_backward(weight, weight_scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    weight, weight_scale = ctx.saved_tensors
    needs_x, _, _, needs_bias, _ = ctx.needs_input_grad
    grad_x = grad_bias = None
    if needs_x:
        # INT8 codes are exact in every activation dtype, so the scale goes to the smaller operand.
        grad_x = (grad * weight_scale.view(-1).to(torch.float32)).to(grad.dtype) @ weight.to(grad.dtype)
    if needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None


int8_linear.register_autograd(_backward, setup_context=_setup_context)
