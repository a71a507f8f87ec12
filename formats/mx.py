"""The MX formats with one scale: a value of ``Mx`` is MXFP8 or MXFP4; their contracts stand in files of those names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from omni_convert.formats.base import (
    NO_FACTS,
    QUALITIES,
    SCALE_RULES,
    Facts,
    NonFinite,
    checked_float32,
    refuse_shape,
    stack_experts,
    unstack_experts,
)
from omni_convert.formats.engine import Rows
from omni_convert.formats.errors import UsageError
from omni_convert.formats.header import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from omni_convert.formats.microscaling import Element


@dataclass(frozen=True, kw_only=True)
class Mx(Rows):
    """Small floats with one power-of-two scale per 32 weights along K.

    ``element`` and ``scale_rule``: see ``microscaling``. ``settings``: further keys of ``quantization_config``.
    ``balanced`` searches the scales of e2m1 (``search``); for e4m3 none is better than that of ``rceil``.
    """

    name: str
    element: str
    scale_rule: str
    settings: tuple[tuple[str, Any], ...] = ()
    quality: str = "fast"
    suffixes: ClassVar[Sequence[str]] = ("weight", "weight_scale")
    ignores_parts: ClassVar[bool] = False
    whole_suffixes: ClassVar[Sequence[str]] = ()
    rows_per_scale: ClassVar[int] = 1
    needs: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        if self.is_searched and self.scale_rule != "even":
            raise UsageError(
                f"--scale-rule {self.scale_rule} with --quality {self.quality}: the search of {self.name} chooses the "
                "scales itself. Leave one of them out."
            )

    @property
    def options(self) -> Mapping[str, Sequence[str]]:
        return {"activation_scheme": ("dynamic",), "scale_rule": SCALE_RULES, "quality": QUALITIES}

    @property
    def serialized_flag(self) -> str:
        return f"is_checkpoint_{self.name}_serialized"

    @property
    def valid_codes(self) -> NDArray[np.bool_]:
        return self._element.valid_codes

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        return refuse_shape(self.name, shape, 32)

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        blocks = -(-shape[1] // 32)
        return {"weight": TensorSpec("F8_E4M3", shape), "weight_scale": TensorSpec("U8", (shape[0], blocks))}

    def quantize(self, weight: torch.Tensor, facts: Facts = NO_FACTS) -> dict[str, torch.Tensor]:
        import torch

        from omni_convert.formats import microscaling as mx

        w = checked_float32(weight)
        if w.dim() == 3:
            return stack_experts(self.quantize, w)
        rows, columns = w.shape
        blocks, scale = mx.to_blocks(w), None
        if self.is_searched:
            from omni_convert.formats import search

            scale = search.mxfp4_scales(blocks)
        values, scale = mx.quantize_blocks(blocks, self._element, self.scale_rule, scale)
        return {"weight": values.view(rows, -1)[:, :columns].to(torch.float8_e4m3fn), "weight_scale": scale}

    def dequantize(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        from omni_convert.formats import microscaling as mx

        if tensors["weight"].dim() == 3:
            return unstack_experts(self.dequantize, tensors)
        weight = tensors["weight"].to(torch.float32)
        return weight * mx.scales_per_weight(tensors["weight_scale"], weight.shape[1])

    def whole(self, shape: tuple[int, ...], facts: Facts = NO_FACTS) -> dict[str, NDArray[Any]]:
        return {}

    def compiled_rows(
        self,
        bits: NDArray[Any],
        dtype: str,
        out: Mapping[str, NDArray[Any]],
        power: NDArray[np.float64] | None,
        facts: Facts,
    ) -> NonFinite | None:
        from omni_convert.formats import mx_kernels
        from omni_convert.formats.bits import first_nonfinite, kernel_bits

        stored, scale = kernel_bits(bits, dtype), out["weight_scale"]
        row = -1
        if self.is_searched:
            from omni_convert.formats import mxfp4_search

            row = mxfp4_search.mxfp4_scales(stored, scale)
        if row < 0:
            rule = None if self.is_searched else self.scale_rule
            row = mx_kernels.mx_rows(stored, out["weight"], scale, power, self._element, rule)
        return None if row < 0 else NonFinite(row, first_nonfinite(bits[row], dtype))

    def compiled_values(self, tensors: Mapping[str, NDArray[Any]], out: NDArray[Any] | None) -> NDArray[Any]:
        import numpy as np

        from omni_convert.formats import dequantize_kernels

        values = np.empty(tensors["weight"].shape, np.float32) if out is None else out
        dequantize_kernels.mx_values(tensors["weight"], tensors["weight_scale"], values)
        return values

    def tolerance(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        from omni_convert.formats import microscaling as mx

        overshoot = self._element.overshoot("floor" if self.is_searched else self.scale_rule)
        return mx.tolerance(self._element, overshoot, tensors["weight"], self._scales(tensors))

    def config(self, ignored_layers: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": self.name,
            self.serialized_flag: True,
            "ignored_layers": list(ignored_layers),
            **dict(self.settings),
        }

    def _scales(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        from omni_convert.formats import microscaling as mx

        return mx.expand(mx.e8m0_values(tensors["weight_scale"]), tensors["weight"].shape[1])

    @property
    def is_searched(self) -> bool:
        return self.element == "e2m1" and self.quality != "fast"

    @property
    def _element(self) -> Element:
        from omni_convert.formats import microscaling as mx

        return mx.ELEMENTS[self.element]
