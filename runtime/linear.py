"""The module that stands in for ``nn.Linear`` in a quantized model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from omni_convert.formats import format_label
from omni_convert.formats.base import Format
from omni_convert.runtime.kernels import choose, device_of
from omni_convert.runtime.operator import format_text, quantized_linear, stored_tensors
from omni_convert.runtime.prepared import new_handle, release


class QuantizedLinear(nn.Linear):
    """A linear that holds the tensors of a checkpoint, under their names and in their dtypes and shapes.

    State: ``weight`` (N, K), the codes, a parameter without gradient; the other tensors of ``format``, buffers;
    ``bias`` (N,), a parameter, or None. Takes (..., K) in bf16, fp16 or fp32 and returns (..., N) in the same dtype.

    What happens to the activations is the kernel's business. With ``decode`` they stay as they are (weight-only), and
    the output is that of ``F.linear`` with the dequantized weight in their dtype, up to the order of float32 sums. INT8
    on CPUs quantizes them per token (W8A8); a row that holds a NaN or an Inf gives a row of NaN there. The scale of
    static activations (``input_scale``) is kept for other engines.

    It is an ``nn.Linear`` because adapters look for one. Casting the model casts the bias only. Scales are buffers, so
    that ``model.dtype`` and optimizers, which look at parameters, do not see them; the bias comes first, so that
    ``model.dtype`` sees it before codes, which e4m3 makes floating-point numbers.
    """

    format: Format

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        fmt: Format,
    ) -> None:
        """An all-zero layer, to be filled from a checkpoint. ``dtype`` is that of the bias."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate and fill a float weight
        self.in_features = in_features
        self.out_features = out_features
        self.format = fmt
        values = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        for suffix, (stored, shape) in self.stored_tensors().items():
            if suffix == "weight":
                codes = torch.zeros(shape, dtype=stored, device=device)
                self.weight = nn.Parameter(codes, requires_grad=False)
            else:
                self.register_buffer(suffix, torch.ones(shape, dtype=stored, device=device))
        self._format_text = format_text(fmt)
        self._handle = new_handle(self)

    def forward(self, input: Tensor) -> Tensor:
        scales = [getattr(self, suffix) for suffix in self.format.suffixes[1:]]
        output: Tensor = quantized_linear(input, self.weight, scales, self.bias, self._handle, self._format_text)
        return output

    def stored_tensors(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> dtype and shape of what the layer holds beside its bias."""
        return stored_tensors(self.format, (self.out_features, self.in_features))

    def reset_parameters(self) -> None:
        """Nothing: random codes are never wanted."""

    def extra_repr(self) -> str:
        device = self.weight.device
        shape = (self.out_features, self.in_features)
        kernel = "undecided" if device.type == "meta" else choose(self.format, shape, device_of(device)).kernel.name
        return f"{super().extra_repr()}, format={format_label(self.format)}, kernel={kernel}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        held = [getattr(self, suffix) for suffix in self.format.suffixes]

        def keep_dtype(tensor: Tensor) -> Tensor:
            if not any(tensor is other for other in held):
                return fn(tensor)
            # As bytes, codes that are floating-point numbers do not look so to `fn`.
            given = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
            moved = fn(given)
            if moved.dtype != given.dtype:
                moved = given.to(moved.device)
            return moved.view(tensor.dtype)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        release(self._handle)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # pickle cannot read e4m3 tensors that it wrote, so codes go through it, and deepcopy, as bytes.
        if self.weight.dtype != torch.float8_e4m3fn:
            return self.__dict__
        codes = nn.Parameter(self.weight.detach().view(torch.uint8), requires_grad=False)
        return self.__dict__ | {"_parameters": self._parameters | {"weight": codes}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        stored, _ = self.stored_tensors()["weight"]
        if self.weight.dtype != stored:
            self.weight = nn.Parameter(self.weight.detach().view(stored), requires_grad=False)
        self._handle = new_handle(self)  # what is prepared for the original is not for the copy

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any
    ) -> None:
        """Refuse what ``copy_`` would silently cast: float weights into codes, or codes without their scale."""
        error_msgs: list[str] = args[-1]
        found = [name for name in self.format.suffixes if prefix + name in state_dict]
        if found and len(found) < len(self.format.suffixes):
            error_msgs.append(
                f"{prefix}{found[0]} comes without its companion, expected all of {', '.join(self.format.suffixes)}."
            )
        for name in found:
            given, held = state_dict[prefix + name], getattr(self, name)
            if given.dtype != held.dtype:
                error_msgs.append(
                    f"{prefix}{name} is {given.dtype}, expected {held.dtype}: quantize the checkpoint first."
                )
            elif given.shape != held.shape:
                error_msgs.append(f"{prefix}{name} has shape {tuple(given.shape)}, expected {tuple(held.shape)}.")
        if not error_msgs:
            super()._load_from_state_dict(state_dict, prefix, metadata, *args)
