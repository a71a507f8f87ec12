"""MXFP4: e2m1 elements, one e8m0 scale per 32 weights along K (W4A4 on engines that have it).

| suffix       | dtype   | shape            | meaning                                            |
|--------------|---------|------------------|----------------------------------------------------|
| weight       | F8_E4M3 | (N, K)           | element values 0, +-.5, 1, 1.5, 2, 3, 4, 6, unpacked |
| weight_scale | U8      | (N, ceil(K / 32))| e8m0: w = weight * 2**(scale - 127)                |

vLLM-Omni casts the values to packed FP4 on the device and does not read packed files, so a file has 8.25 bits per
weight, the device 4.25. Rule ``even`` by default. ``mxfp4_scale_alg: 2`` has the engine choose activation scales with
less error. A K that is not a multiple of 32 is refused (the layer stays as it is).

    {"quant_method": "mxfp4", "is_checkpoint_mxfp4_serialized": true, "ignored_layers": [...], "mxfp4_scale_alg": 2}

vLLM-Omni loads it natively on Ascend NPUs only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from omni_convert.formats.base import NonFinite
from omni_convert.formats.header import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Mxfp4:
    """E2M1 elements, one power-of-two scale per 32. ``scale_rule``: see ``microscaling``."""

    name: ClassVar[str] = "mxfp4"
    serialized_flag: ClassVar[str] = "is_checkpoint_mxfp4_serialized"
    suffixes: ClassVar[Sequence[str]] = ("weight", "weight_scale")
    scale_rule: str = "even"

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"mxfp4 needs a 2-D weight, this one has {len(shape)} dimensions"
        if 0 in shape:
            return "the weight is empty"
        return f"K is {shape[1]}, mxfp4 needs a multiple of 32" if shape[1] % 32 else None

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        blocks = -(-shape[1] // 32)
        return {"weight": TensorSpec("F8_E4M3", shape), "weight_scale": TensorSpec("U8", (shape[0], blocks))}

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        from omni_convert.formats import microscaling as mx

        rows, columns = weight.shape
        values, scale = mx.quantize_blocks(mx.to_blocks(weight), mx.E2M1, self.scale_rule)
        return {"weight": values.view(rows, -1)[:, :columns].to(torch.float8_e4m3fn), "weight_scale": scale}

    def dequantize(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        from omni_convert.formats import microscaling as mx

        weight = tensors["weight"].to(torch.float32)
        return weight * mx.scales_per_weight(tensors["weight_scale"], weight.shape[1])

    def constants(self, shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
        return {}

    def quantize_rows(
        self, bits: NDArray[Any], dtype: str, out: Mapping[str, NDArray[Any]], power: NDArray[np.float64]
    ) -> NonFinite | None:
        from omni_convert.formats import microscaling as mx
        from omni_convert.formats import mx_kernels
        from omni_convert.formats.bits import first_nonfinite, kernel_bits

        row = mx_kernels.mx_rows(
            kernel_bits(bits, dtype), out["weight"], out["weight_scale"], power, mx.E2M1, self.scale_rule
        )
        return None if row < 0 else NonFinite(row, first_nonfinite(bits[row], dtype))

    def dequantize_rows(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        from omni_convert.formats import microscaling as mx

        values: NDArray[np.float32] = mx.E4M3_VALUES[tensors["weight"]] * self._scales(tensors)
        return values

    def tolerance(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        from omni_convert.formats import microscaling as mx

        return mx.tolerance(mx.E2M1, self.scale_rule, tensors["weight"], self._scales(tensors))

    def config(self, ignored_layers: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": self.name,
            self.serialized_flag: True,
            "ignored_layers": list(ignored_layers),
            "mxfp4_scale_alg": 2,
        }

    def _scales(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        from omni_convert.formats import microscaling as mx

        return mx.expand(mx.e8m0_values(tensors["weight_scale"]), tensors["weight"].shape[1])
