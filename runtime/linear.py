"""The module that stands in for ``nn.Linear`` in a quantized model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from omni_convert.formats import format_label
from omni_convert.formats.base import Format
from omni_convert.runtime.kernels import choose, device_of
from omni_convert.runtime.operator import HELD, as_codes, format_text, quantized_linear, stored_tensors
from omni_convert.runtime.prepared import new_handle, release

_OF_ANY_MODULE = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"}


def take_over(old: nn.Linear, new: nn.Linear) -> None:
    """Give ``new``, which takes the place of ``old``, what ``old`` carries: its mode, its hooks, which can still be
    removed by their handles, and what a library notes on it."""
    carried = {name: value for name, value in vars(old).items() if name in _OF_ANY_MODULE or name not in vars(new)}
    vars(new).update(carried)


class QuantizedLinear(nn.Linear):
    """A linear that holds the tensors of a checkpoint, under their names and in their shapes.

    State: ``weight`` (N, K) int8, the codes of ``format``, a parameter without gradient; the other tensors of
    ``format``, buffers in the dtypes of the checkpoint; ``bias`` (N,), a parameter, or None. Takes (..., K) in bf16,
    fp16 or fp32 and returns (..., N) in the same dtype.

    What happens to the activations is the kernel's business. With ``decode`` they stay as they are (weight-only), and
    the output is that of ``F.linear`` with the dequantized weight in their dtype, up to the order of float32 sums. INT8
    on CPUs quantizes them per token (W8A8); a row that holds a NaN or an Inf gives a row of NaN there. The scale of
    static activations (``input_scale``) is kept for other engines.

    Codes of e4m3 are held as the int8 of the same bytes; ``tensors`` has them in the dtype of the checkpoint, in which
    the libraries' ``save_pretrained`` writes them. For libraries take a floating-point weight for one to compute with:
    T5 casts activations to its dtype, PEFT adapters, and Transformers wants a gradient; pickle cannot even read back
    what it wrote. int8 is what they know as quantized.

    It is an ``nn.Linear`` because adapters look for one. Casting the model casts the bias only. Scales are buffers, so
    that ``model.dtype`` and optimizers, which look at parameters, do not see them.
    """

    format: Format
    stored_name: str | None = None
    """What the checkpoint calls it, where a library may have renamed it; None: as the model does."""

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
                self.weight = nn.Parameter(torch.zeros(shape, dtype=HELD, device=device), requires_grad=False)
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

    def await_stored(self) -> None:
        """Until it is filled, have ``weight`` in the dtype that it has on disk: libraries cast what they load to that
        of the model. The layer takes it as bytes when they set it."""
        codes = as_codes(self.weight.detach(), self.format)
        self.register_parameter("weight", nn.Parameter(codes, requires_grad=False))

    def tensors(self) -> dict[str, Tensor]:
        """Suffix -> what the checkpoint holds, in its dtype: what ``Format.dequantize`` takes. Shares memory."""
        held = {suffix: getattr(self, suffix).detach() for suffix in self.format.suffixes}
        return held | {"weight": as_codes(held["weight"], self.format)}

    def reset_parameters(self) -> None:
        """Nothing: random codes are never wanted."""

    def extra_repr(self) -> str:
        device = self.weight.device
        shape = (self.out_features, self.in_features)
        kernel = "undecided" if device.type == "meta" else choose(self.format, shape, device_of(device)).kernel.name
        return f"{super().extra_repr()}, format={format_label(self.format)}, kernel={kernel}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, nn.Parameter) and value.dtype == torch.float8_e4m3fn:
            held = nn.Parameter(value.detach().view(HELD), requires_grad=False)
            held.__dict__.update(value.__dict__)  # libraries note there that it is loaded
            value = held
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        held = [getattr(self, suffix) for suffix in self.format.suffixes]

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is other for other in held):
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        release(self._handle)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
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
        stored = self.stored_tensors()
        for name in found:
            given, (dtype, shape) = state_dict[prefix + name], stored[name]
            if given.dtype != dtype and (name != "weight" or given.dtype != HELD):
                error_msgs.append(f"{prefix}{name} is {given.dtype}, expected {dtype}: quantize the checkpoint first.")
            elif given.shape != shape:
                error_msgs.append(f"{prefix}{name} has shape {tuple(given.shape)}, expected {shape}.")
        if error_msgs:
            return
        if found:
            key = f"{prefix}weight"
            state_dict = {**state_dict, key: state_dict[key].detach().view(HELD)}
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)
        release(self._handle)  # in inference mode nothing shows that the weight was overwritten
