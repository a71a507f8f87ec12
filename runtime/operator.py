"""The operator behind every quantized layer, with gradients.

It is opaque to ``torch.compile``: the compiler neither sees packed weights nor rewrites the integer product (with
``freezing=True`` Inductor turns it into an oneDNN call thousands of times slower).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omni_convert.formats.base import Format
from omni_convert.formats.config import parse_config
from omni_convert.formats.errors import OmniConvertError
from omni_convert.runtime import reference
from omni_convert.runtime.decode import decode
from omni_convert.runtime.kernels import choose, device_of
from omni_convert.runtime.prepared import reinterpreted

HELD = torch.int8
"""The dtype in which layers hold codes, whatever their format."""

_DTYPES = {"I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}


def stored_tensors(fmt: Format, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> dtype and shape of the tensors of a layer whose weight is ``shape`` (N, K)."""
    return {suffix: (_DTYPES[spec.dtype], spec.shape) for suffix, spec in fmt.tensors(shape).items()}


def as_codes(weight: Tensor, fmt: Format) -> Tensor:
    """``weight`` (N, K), as a layer holds it, in the dtype that its codes have on disk. Shares memory."""
    return weight.view(_code_dtype(fmt)) if weight.dtype == HELD else weight


@functools.cache
def _code_dtype(fmt: Format) -> torch.dtype:
    return _DTYPES[fmt.tensors((1, 1))["weight"].dtype]


@functools.cache
def format_text(fmt: Format) -> str:
    """``fmt`` as operators take it, which have no arguments of any class."""
    return json.dumps(fmt.config(()))


@functools.cache
def _format(text: str) -> Format:
    return parse_config(json.loads(text)).format


@torch.library.custom_op(
    "omni_convert::quantized_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor[] scales, Tensor? bias, Tensor handle, str format) -> Tensor",
)
def quantized_linear(
    x: Tensor, weight: Tensor, scales: Sequence[Tensor], bias: Tensor | None, handle: Tensor, format: str
) -> Tensor:
    """``x``: (..., K); ``weight``: (N, K) codes, as a layer holds them or as on disk; ``bias``: (N,).

    ``scales``: the other tensors of the format, in its order. ``handle``: of ``prepared``. ``format``: see
    ``format_text``. Returns (..., N) in the dtype of ``x``; under autocast ``x`` is cast first, as for ``F.linear``.
    Differentiable in ``x`` and ``bias``, as if the activations were not quantized (straight through).

    Raises:
        OmniConvertError: dtype, shape or device of ``x`` do not fit the layer, or those of its tensors the format.
    """
    fmt = _format(format)
    codes = reinterpreted(weight, _code_dtype(fmt)) if weight.dtype == HELD else weight
    tensors = dict(zip(fmt.suffixes, (codes, *scales), strict=True))
    _check_input(x, fmt, tensors)
    rows, columns = weight.shape
    kernel = choose(fmt, (rows, columns), device_of(x.device)).kernel
    y = kernel.run(fmt, x.reshape(-1, columns), tensors, bias, handle)
    return _own(y.reshape(*x.shape[:-1], rows))


def _own(y: Tensor) -> Tensor:
    """The same memory, but no view: what an operator with gradients returns as one cannot be changed in place."""
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


@quantized_linear.register_fake
def _fake(
    x: Tensor, weight: Tensor, scales: Sequence[Tensor], bias: Tensor | None, handle: Tensor, format: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _register_autocast(key: str, device: str) -> None:
    """``torch.library.register_autocast`` would cast to one dtype for ever, and the scales too."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_and_run(x: Tensor, *args: Any) -> Any:
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return quantized_linear._opoverload(x, *args)

    _LIBRARY.impl("quantized_linear", cast_and_run, key)  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("omni_convert", "FRAGMENT")  # type: ignore[no-untyped-call]
_register_autocast("AutocastCPU", "cpu")
_register_autocast("AutocastCUDA", "cuda")


@torch.library.custom_op(
    "omni_convert::decoded_weight",
    mutates_args=(),
    schema="(Tensor weight, Tensor[] scales, str format, ScalarType dtype) -> Tensor",
)
def decoded_weight(weight: Tensor, scales: Sequence[Tensor], format: str, dtype: torch.dtype) -> Tensor:
    """(N, K) in ``dtype``, for gradients. An operator, because the compiler cannot trace what looks codes up."""
    fmt = _format(format)
    tensors = dict(zip(fmt.suffixes, (as_codes(weight, fmt), *scales), strict=True))
    return decode(fmt, tensors, weight.new_empty(weight.shape, dtype=dtype))


@decoded_weight.register_fake
def _fake_weight(weight: Tensor, scales: Sequence[Tensor], format: str, dtype: torch.dtype) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scales, bias, _, ctx.format = inputs
    ctx.save_for_backward(weight, *scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, list[None], Tensor | None, None, None]:
    weight, *scales = ctx.saved_tensors
    needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    grad_x = grad @ decoded_weight(weight, scales, ctx.format, grad.dtype) if needs_x else None
    grad_bias = None
    if needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, [None] * len(scales), grad_bias, None, None


quantized_linear.register_autograd(_backward, setup_context=_setup_context)


@functools.cache
def _expected_tensors(fmt: Format, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    return stored_tensors(fmt, shape)


def _check_input(x: Tensor, fmt: Format, tensors: Mapping[str, Tensor]) -> None:
    weight = tensors["weight"]
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
    for suffix, (dtype, shape) in _expected_tensors(fmt, (weight.shape[0], weight.shape[1])).items():
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
