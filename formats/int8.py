"""INT8, one scale per output channel, dynamic activations (W8A8).

| suffix       | dtype   | shape  | meaning                                        |
|--------------|---------|--------|------------------------------------------------|
| weight       | int8    | (N, K) | codes, symmetric, in [-127, 127]; see below    |
| weight_scale | float32 | (N, 1) | w = weight * weight_scale                      |

``fast``: scale = amax(row) / 127 in float32; code = round_half_even(w / scale), true division. ``balanced`` searches
the scale (``search``), clips to [-128, 127], and so loses less over all. A row of zeros gets scale 1.0 and codes 0. At
the ends of float32 the scale moves by one unit in the last place: up where it is so small that rounding it would clip
the row, down where 127 * scale would overflow. A layer that the engine fuses with others has the group's amax / 127 in
every row (``fused``), by either quality: vLLM-Omni on CUDA reads one scale only. Activations are quantized at run time,
symmetric, one scale per token; no tensor is stored for them. The bias stays as it is.

    {"quant_method": "int8", "is_checkpoint_int8_serialized": true, "activation_scheme": "dynamic",
     "ignored_layers": [...]}

No other key: vLLM-Omni passes them to a constructor. It loads this natively (CUDA sm_80+, Ascend NPU); Diffusers
and Transformers load it after ``import omni_convert``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from omni_convert.formats.base import (
    NO_FACTS,
    QUALITIES,
    Facts,
    NonFinite,
    checked_float32,
    known,
    refuse_shape,
    stack_experts,
    unstack_experts,
)
from omni_convert.formats.engine import Rows
from omni_convert.formats.header import TensorSpec
from omni_convert.formats.scales import absmax_scale, absmax_scales

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

QMAX = 127.0
FUSED_SCALES = ("shared", "per-channel")
NPU_ROWS = 65535
"""vLLM-Omni runs a layer with more rows unquantized on NPUs."""


@dataclass(frozen=True, kw_only=True)
class Int8(Rows):
    """INT8 with one float32 scale per output channel.

    ``fused_scale``: whether layers that the engine fuses get one scale (``shared``) or theirs (``per-channel``).
    ``is_fused``: this is such a layer, with one scale.
    """

    quality: str = "fast"
    fused_scale: str = "shared"
    is_fused: bool = False
    name: ClassVar[str] = "int8"
    options: ClassVar[Mapping[str, Sequence[str]]] = {
        "granularity": ("channel",),
        "activation_scheme": ("dynamic",),
        "quality": QUALITIES,
        "fused_scale": FUSED_SCALES,
    }
    serialized_flag: ClassVar[str] = "is_checkpoint_int8_serialized"
    suffixes: ClassVar[Sequence[str]] = ("weight", "weight_scale")
    ignores_parts: ClassVar[bool] = False
    rows_per_scale: ClassVar[int] = 1

    @property
    def whole_suffixes(self) -> Sequence[str]:
        return ("weight_scale",) if self.is_fused else ()

    @property
    def needs(self) -> Sequence[str]:
        return ("amax",) if self.is_fused else ()

    @property
    def valid_codes(self) -> NDArray[np.bool_]:
        import numpy as np

        return np.arange(256, dtype=np.uint8).view(np.int8) >= self._qmin

    @property
    def is_searched(self) -> bool:
        return self.quality != "fast" and not self.is_fused

    def fused(self) -> Int8:
        return replace(self, is_fused=self.fused_scale == "shared")

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        refusal = refuse_shape(self.name, shape)
        if refusal is None and shape[0] > NPU_ROWS:
            return f"N is {shape[0]}, and int8 on Ascend NPUs takes at most {NPU_ROWS}"
        return refusal

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec("I8", shape), "weight_scale": TensorSpec("F32", (shape[0], 1))}

    def quantize(self, weight: torch.Tensor, facts: Facts = NO_FACTS) -> dict[str, torch.Tensor]:
        import torch

        w = checked_float32(weight)
        if w.dim() == 3:
            return stack_experts(self.quantize, w)
        if self.is_fused:
            amax = w.abs().amax() if facts.amax is None else w.new_full((), facts.amax)
            scale = absmax_scales(amax, QMAX, QMAX + 0.5, torch).expand(len(w), 1).clone()
        elif self.quality == "fast":
            scale = absmax_scales(w.abs().amax(dim=1, keepdim=True), QMAX, QMAX + 0.5, torch)
        else:
            from omni_convert.formats import search

            scale = search.int8_scales(w).unsqueeze(1)
        codes = (w / scale).clamp_(self._qmin, QMAX).round_().to(torch.int8)
        return {"weight": codes, "weight_scale": scale}

    def dequantize(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        if tensors["weight"].dim() == 3:
            return unstack_experts(self.dequantize, tensors)
        return tensors["weight"].to(torch.float32) * tensors["weight_scale"]

    def whole(self, shape: tuple[int, ...], facts: Facts = NO_FACTS) -> dict[str, NDArray[Any]]:
        import numpy as np

        if not self.is_fused:
            return {}
        scale = absmax_scale(known(facts.amax, "amax"), QMAX, QMAX + 0.5)
        return {"weight_scale": np.full((shape[0], 1), scale, np.float32)}

    def compiled_rows(
        self,
        bits: NDArray[Any],
        dtype: str,
        out: Mapping[str, NDArray[Any]],
        power: NDArray[np.float64] | None,
        facts: Facts,
    ) -> NonFinite | None:
        from omni_convert.formats import kernels
        from omni_convert.formats.bits import first_nonfinite, kernel_bits

        stored, codes = kernel_bits(bits, dtype), out["weight"]
        scale = self.whole(bits.shape, facts)["weight_scale"] if self.is_fused else out["weight_scale"]
        if self.is_fused:
            row = kernels.int8_codes(stored, codes, scale, power, int(self._qmin))
        elif self.quality == "fast":
            row = kernels.int8_rows(stored, codes, scale, power)
        else:
            from omni_convert.formats import search_kernels

            row = search_kernels.int8_scales(stored, scale[:, 0])
            if row < 0:
                row = kernels.int8_codes(stored, codes, scale, power, int(self._qmin))
        return None if row < 0 else NonFinite(row, first_nonfinite(bits[row], dtype))

    def compiled_values(self, tensors: Mapping[str, NDArray[Any]], out: NDArray[Any] | None) -> NDArray[Any]:
        import numpy as np

        from omni_convert.formats import dequantize_kernels

        values = np.empty(tensors["weight"].shape, np.float32) if out is None else out
        dequantize_kernels.int8_values(tensors["weight"], tensors["weight_scale"], values)
        return values

    def tolerance(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        import numpy as np

        from omni_convert.formats import search

        steps = np.float32(0.5)
        if self.is_searched:
            at_end = (tensors["weight"] == QMAX) | (tensors["weight"] == self._qmin)
            steps = np.where(at_end, np.float32(search.INT8_OVERSHOOT), steps)
        bound: NDArray[np.float32] = tensors["weight_scale"] * steps
        return bound

    def own_noise(self, maxima: NDArray[np.float32], columns: int) -> float | None:
        import numpy as np

        if not self.is_fused:
            return None
        steps = np.square(maxima.astype(np.float64) / QMAX)  # an error is anywhere within half a step
        return float(columns * steps.sum() / 12)

    @property
    def _qmin(self) -> float:
        return -QMAX - 1 if self.is_searched else -QMAX

    def config(self, ignored_layers: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": self.name,
            self.serialized_flag: True,
            "activation_scheme": "dynamic",
            "ignored_layers": list(ignored_layers),
        }
