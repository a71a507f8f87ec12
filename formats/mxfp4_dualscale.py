"""MXFP4 with two scales: e2m1 elements, e8m0 per 32 weights and float32 per 512 weights along K.

| suffix            | dtype   | shape                  | meaning                                              |
|-------------------|---------|------------------------|------------------------------------------------------|
| weight            | F8_E4M3 | (N, K)                 | element values 0, +-.5, 1, 1.5, 2, 3, 4, 6, unpacked |
| weight_scale      | U8      | (N, ceil(K / 32))      | e8m0, fine                                           |
| weight_dual_scale | F32     | (N, ceil(K / 512), 1)  | coarse: largest magnitude of the group / 6           |
| mul_scale         | F32     | (K,)                   | activations are multiplied by it; exact in BF16      |

w = weight * 2**(weight_scale - 127) * weight_dual_scale * mul_scale[k]. ``fast`` chooses the fine scale by rule
``even`` on w / coarse (true division); ``balanced`` searches both scales (``search``). A group of zeros has coarse 1.0
and fine 0. ``mul_scale`` is ones until calibrated; engines require it. K must be a multiple of 64, because engines pair
the fine scales.

    {"quant_method": "mxfp4_dualscale", "is_checkpoint_serialized": true, "ignored_layers": [...]}

vLLM-Omni loads it natively on Ascend NPUs only; a file has 8.3 bits per weight, the device 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from omni_convert.formats.base import (
    NO_FACTS,
    QUALITIES,
    Facts,
    NonFinite,
    checked_float32,
    refuse_shape,
    stack_experts,
    unstack_experts,
)
from omni_convert.formats.engine import Rows
from omni_convert.formats.header import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

GROUP = 512


@dataclass(frozen=True, kw_only=True)
class Mxfp4DualScale(Rows):
    """E2M1 elements, a power-of-two scale per 32 and a float32 scale per 512."""

    quality: str = "fast"
    name: ClassVar[str] = "mxfp4_dualscale"
    options: ClassVar[Mapping[str, Sequence[str]]] = {
        "activation_scheme": ("dynamic",),
        "scale_rule": ("even",),
        "quality": QUALITIES,
    }
    serialized_flag: ClassVar[str] = "is_checkpoint_serialized"
    suffixes: ClassVar[Sequence[str]] = ("weight", "weight_scale", "weight_dual_scale", "mul_scale")
    ignores_parts: ClassVar[bool] = False
    whole_suffixes: ClassVar[Sequence[str]] = ("mul_scale",)
    rows_per_scale: ClassVar[int] = 1
    needs: ClassVar[Sequence[str]] = ()

    @property
    def valid_codes(self) -> NDArray[np.bool_]:
        from omni_convert.formats import microscaling as mx

        return mx.E2M1.valid_codes

    @property
    def is_searched(self) -> bool:
        return self.quality != "fast"

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        return refuse_shape(self.name, shape, 64)

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        rows, columns = shape
        return {
            "weight": TensorSpec("F8_E4M3", shape),
            "weight_scale": TensorSpec("U8", (rows, -(-columns // 32))),
            "weight_dual_scale": TensorSpec("F32", (rows, -(-columns // GROUP), 1)),
            "mul_scale": TensorSpec("F32", (columns,)),
        }

    def quantize(self, weight: torch.Tensor, facts: Facts = NO_FACTS) -> dict[str, torch.Tensor]:
        import torch

        from omni_convert.formats import microscaling as mx

        w = checked_float32(weight)
        if w.dim() == 3:
            return stack_experts(self.quantize, w)
        rows, columns = w.shape
        groups = torch.nn.functional.pad(w, (0, -columns % GROUP)).view(rows, -1, GROUP)
        if self.quality == "fast":
            amax = groups.abs().amax(dim=-1)
            coarse = amax / torch.full_like(amax, mx.E2M1.largest)
            coarse = torch.where(coarse == 0, 1.0, coarse)
            fine = None
        else:
            from omni_convert.formats import search

            fine, coarse = search.dual_scales(w)
            fine = torch.nn.functional.pad(fine, (0, groups.numel() // rows // mx.BLOCK - fine.shape[1]))
        blocks = (groups / coarse.unsqueeze(-1)).view(rows, -1, mx.BLOCK)
        values, fine = mx.quantize_blocks(blocks, mx.E2M1, "even", fine)
        return {
            "weight": values.view(rows, -1)[:, :columns].to(torch.float8_e4m3fn),
            "weight_scale": fine[:, : -(-columns // mx.BLOCK)],
            "weight_dual_scale": coarse.unsqueeze(-1),
            "mul_scale": w.new_ones(columns),
        }

    def dequantize(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        from omni_convert.formats import microscaling as mx

        if tensors["weight"].dim() == 3:
            return unstack_experts(self.dequantize, tensors)
        weight = tensors["weight"].to(torch.float32)
        columns = weight.shape[1]
        coarse = tensors["weight_dual_scale"].squeeze(-1).repeat_interleave(GROUP, dim=1)[:, :columns]
        return weight * mx.scales_per_weight(tensors["weight_scale"], columns) * coarse * tensors["mul_scale"]

    def whole(self, shape: tuple[int, ...], facts: Facts = NO_FACTS) -> dict[str, NDArray[Any]]:
        import numpy as np

        return {"mul_scale": np.ones(shape[1], np.float32)}

    def compiled_rows(
        self,
        bits: NDArray[Any],
        dtype: str,
        out: Mapping[str, NDArray[Any]],
        power: NDArray[np.float64] | None,
        facts: Facts,
    ) -> NonFinite | None:
        from omni_convert.formats import dual_kernels
        from omni_convert.formats.bits import first_nonfinite, kernel_bits

        stored, codes, fine = kernel_bits(bits, dtype), out["weight"], out["weight_scale"]
        coarse = out["weight_dual_scale"].reshape(len(bits), -1)
        if self.quality == "fast":
            row = dual_kernels.dual_rows(stored, codes, fine, coarse, power)
        else:
            from omni_convert.formats import search_kernels

            row = search_kernels.dual_scales(stored, fine, coarse)
            if row < 0:
                row = dual_kernels.dual_codes(stored, codes, fine, coarse, power)
        return None if row < 0 else NonFinite(row, first_nonfinite(bits[row], dtype))

    def compiled_values(self, tensors: Mapping[str, NDArray[Any]], out: NDArray[Any] | None) -> NDArray[Any]:
        import numpy as np

        from omni_convert.formats import dequantize_kernels

        weight, fine = tensors["weight"], tensors["weight_scale"]
        coarse = tensors["weight_dual_scale"].reshape(len(weight), -1)
        values = np.empty(weight.shape, np.float32) if out is None else out
        dequantize_kernels.dual_values(weight, fine, coarse, tensors["mul_scale"], values)
        return values

    def tolerance(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        from omni_convert.formats import microscaling as mx
        from omni_convert.formats import search

        fine, coarse = self._scales(tensors)
        scale = fine * coarse * tensors["mul_scale"]
        overshoot = mx.E2M1.overshoot("even") if self.quality == "fast" else search.DUAL_OVERSHOOT
        return mx.tolerance(mx.E2M1, overshoot, tensors["weight"], scale)

    def config(self, ignored_layers: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": self.name,
            self.serialized_flag: True,
            "ignored_layers": list(ignored_layers),
        }

    def _scales(self, tensors: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Fine and coarse scale of every weight."""
        import numpy as np

        from omni_convert.formats import microscaling as mx

        rows, columns = tensors["weight"].shape
        fine = mx.expand(mx.e8m0_values(tensors["weight_scale"]), columns)
        coarse = np.repeat(tensors["weight_dual_scale"].reshape(rows, -1), GROUP, axis=1)[:, :columns]
        return fine, coarse
