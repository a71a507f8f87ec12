"""The module that stands in for ``nn.Linear`` in a quantized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from omni_convert.formats import FORMATS
from omni_convert.runtime import cpu
from omni_convert.runtime.kernels import int8_linear, select_kernel


class Int8Linear(nn.Linear):
    """INT8 weight, one scale per output channel, activations quantized per token at run time (W8A8).

    State: ``weight`` (N, K) int8 parameter without gradient, ``weight_scale`` (N, 1) float32 buffer, ``bias`` (N,)
    parameter or None; the names and dtypes of the checkpoint. Takes (..., K) in bf16, fp16 or fp32 and returns
    (..., N) in the same dtype. A row of activations that holds a NaN or an Inf gives a row of NaN (where only the
    kernel ``dequantize`` can run, what ``F.linear`` gives).

    It is an ``nn.Linear`` because adapters look for one. Casting the model casts the bias only. The scale is a
    buffer, so that ``model.dtype`` and optimizers, which look at parameters, do not see it.
    """

    format = FORMATS["int8"]
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An all-zero layer, to be filled from a checkpoint. ``dtype`` is that of the bias."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate and fill a float weight
        self.in_features = in_features
        self.out_features = out_features
        codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(out_features, 1, dtype=torch.float32, device=device))
        values = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        self._handle = cpu.new_handle(self)

    def reset_parameters(self) -> None:
        """Nothing: random codes are never wanted."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = int8_linear(input, self.weight, self.weight_scale, self.bias, self._handle)
        return output

    def extra_repr(self) -> str:
        device = self.weight.device.type
        shape = (self.out_features, self.in_features)
        kernel = "undecided" if device in ("meta", "npu") else select_kernel(self.format.name, device, shape).kernel
        return f"{super().extra_repr()}, format={self.format.name}, kernel={kernel}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if (tensor is self.weight or tensor is self.weight_scale) and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        cpu.release(self._handle)
        return self

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
            given, held = state_dict[prefix + name].dtype, getattr(self, name).dtype
            if given != held:
                error_msgs.append(f"{prefix}{name} is {given}, expected {held}: quantize the checkpoint first.")
        if not error_msgs:
            super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # deepcopy and unpickling come through here: a copy gets a packed weight of its own.
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = cpu.new_handle(self)
