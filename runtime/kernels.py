"""Which kernel runs a quantized layer, decided once per device and shape, and the operator that calls it.

The operator is opaque to ``torch.compile``: the compiler neither sees packed weights nor rewrites the integer
product (with ``freezing=True`` Inductor turns it into an oneDNN call thousands of times slower).
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_convert.formats.base import Format
from omni_convert.formats.config import parse_config
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.int8 import Int8
from omni_convert.runtime import cpu, cuda, reference
from omni_convert.runtime.decode import decode, decoded_linear

_log = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Tensor], Tensor]
"""(x (M, K), weight, weight_scale, bias, handle) -> (M, N) in the dtype of x."""


class Candidate(NamedTuple):
    """A kernel, and why it cannot run a weight of a given (N, K); None if it can."""

    name: str
    run: Kernel
    refuse: Callable[[tuple[int, int]], str | None]


class Choice(NamedTuple):
    """The kernel that runs, the ones that were preferred but refused, with the reason, and what to know about it."""

    kernel: str
    rejected: Mapping[str, str]
    note: str = ""


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

_DECODE = Choice(
    kernel="decode",
    rejected={},
    note="weight-only: some rows of the weight at a time are decoded to the dtype of the activations, because "
    "multiplying the codes themselves has no faster kernel here yet",
)
"""Of every format with e4m3 codes, on every device."""


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
    if format_name != Int8.name:
        _log.info("%s %s on %s runs on kernel %r (%s)", format_name, shape, device_type, _DECODE.kernel, _DECODE.note)
        return _DECODE
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
def _int8_kernel(device_type: str, shape: tuple[int, int]) -> Kernel:
    name = select_kernel(Int8.name, device_type, shape).kernel
    candidates = _CANDIDATES.get((Int8.name, device_type), (_DEQUANTIZE,))
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
    _check_input(x, _INT8, {"weight": weight, "weight_scale": weight_scale})
    rows, columns = weight.shape
    run = _int8_kernel(x.device.type, (rows, columns))
    y = run(x.reshape(-1, columns), weight, weight_scale, bias, handle)
    return y.reshape(*x.shape[:-1], rows)


_DTYPES = {"I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}


def stored_tensors(fmt: Format, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> dtype and shape of the tensors of a layer whose weight is ``shape`` (N, K)."""
    return {suffix: (_DTYPES[spec.dtype], spec.shape) for suffix, spec in fmt.tensors(shape).items()}


def format_text(fmt: Format) -> str:
    """``fmt`` as operators take it, which have no arguments of any class."""
    return json.dumps(fmt.config(()))


@functools.cache
def _format(text: str) -> Format:
    return parse_config(json.loads(text)).format


_INT8 = format_text(Int8())


@functools.cache
def _expected_tensors(text: str, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    return stored_tensors(_format(text), shape)


def _check_input(x: Tensor, text: str, tensors: Mapping[str, Tensor]) -> None:
    weight, fmt = tensors["weight"], _format(text)
    if x.dtype not in reference.ACTIVATION_DTYPES:
        expected = ", ".join(str(dtype) for dtype in reference.ACTIVATION_DTYPES)
        raise OmniConvertError(
            f"an {fmt.name} layer was given activations of {x.dtype}, expected {expected}. Cast them before the layer; "
            "code that casts to `layer.weight.dtype` must not do so for a quantized layer."
        )
    if not x.shape or x.shape[-1] != weight.shape[1]:
        raise OmniConvertError(
            f"an {fmt.name} layer of shape {tuple(weight.shape)} was given activations of shape {tuple(x.shape)}, "
            f"expected the last dimension to be {weight.shape[1]}."
        )
    for suffix, (dtype, shape) in _expected_tensors(text, (weight.shape[0], weight.shape[1])).items():
        tensor = tensors[suffix]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise OmniConvertError(
                f"an {fmt.name} layer of shape {tuple(weight.shape)} holds {suffix} {tensor.dtype} "
                f"{tuple(tensor.shape)}, expected {dtype} and {shape}. Sharding a loaded layer is not supported: load "
                "the model on one device."
            )
        if tensor.device != x.device:
            raise OmniConvertError(
                f"an {fmt.name} layer with {suffix} on {tensor.device} was given activations on {x.device}, expected "
                "one device. Move the model or the input with .to(device)."
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
    grad_x = None
    if needs_x:
        # INT8 codes are exact in every activation dtype, so the scale goes to the smaller operand.
        grad_x = (grad * weight_scale.view(-1).to(torch.float32)).to(grad.dtype) @ weight.to(grad.dtype)
    grad_bias = _bias_gradient(grad, ctx.bias_dtype) if needs_bias else None
    return grad_x, None, None, grad_bias, None


def _bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=torch.float32).to(dtype)


int8_linear.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "omni_convert::decoded_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor[] scales, Tensor? bias, str format) -> Tensor",
)
def weight_only_linear(x: Tensor, weight: Tensor, scales: Sequence[Tensor], bias: Tensor | None, format: str) -> Tensor:
    """``x``: (..., K); ``weight``: (N, K) e4m3; ``scales``: the other tensors of the format; ``bias``: (N,).

    ``format``: see ``format_text``. Returns (..., N). Differentiable in ``x`` and ``bias``.

    Raises:
        OmniConvertError: dtype, shape or device of ``x`` do not fit the layer, or those of its tensors the format.
    """
    fmt = _format(format)
    tensors = dict(zip(fmt.suffixes, (weight, *scales), strict=True))
    _check_input(x, format, tensors)
    rows, columns = weight.shape
    select_kernel(fmt.name, x.device.type, (rows, columns))
    y = decoded_linear(fmt, x.reshape(-1, columns), tensors, bias)
    return y.reshape(*x.shape[:-1], rows)


@weight_only_linear.register_fake
def _fake_decoded(x: Tensor, weight: Tensor, scales: Sequence[Tensor], bias: Tensor | None, format: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op(
    "omni_convert::decoded_weight",
    mutates_args=(),
    schema="(Tensor weight, Tensor[] scales, str format, ScalarType dtype) -> Tensor",
)
def decoded_weight(weight: Tensor, scales: Sequence[Tensor], format: str, dtype: torch.dtype) -> Tensor:
    """(N, K) in ``dtype``, for gradients. An operator, because the compiler cannot trace what looks codes up."""
    fmt = _format(format)
    tensors = dict(zip(fmt.suffixes, (weight, *scales), strict=True))
    return decode(fmt, tensors, weight.new_empty(weight.shape, dtype=dtype))


@decoded_weight.register_fake
def _fake_weight(weight: Tensor, scales: Sequence[Tensor], format: str, dtype: torch.dtype) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


def _setup_decoded_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scales, bias, ctx.format = inputs
    ctx.save_for_backward(weight, *scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _decoded_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, list[None], Tensor | None, None]:
    weight, *scales = ctx.saved_tensors
    needs_x, _, _, needs_bias, _ = ctx.needs_input_grad
    grad_x = grad @ decoded_weight(weight, scales, ctx.format, grad.dtype) if needs_x else None
    grad_bias = _bias_gradient(grad, ctx.bias_dtype) if needs_bias else None
    return grad_x, None, [None] * len(scales), grad_bias, None


weight_only_linear.register_autograd(_decoded_backward, setup_context=_setup_decoded_context)
