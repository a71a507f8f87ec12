"""FP8 (e4m3): one float32 scale per weight, per output channel, or per block (W8A8).

| granularity | suffix           | dtype   | shape                        | meaning                              |
|-------------|------------------|---------|------------------------------|--------------------------------------|
| all         | weight           | F8_E4M3 | (N, K)                       | codes                                |
| tensor      | weight_scale     | F32     | (1,)                         | w = weight * weight_scale            |
| channel     | weight_scale     | F32     | (N,)                         | w = weight * weight_scale[n]         |
| block       | weight_scale_inv | F32     | (ceil(N / bn), ceil(K / bk)) | w = weight * scale[n // bn, k // bk] |
| tensor      | input_scale      | F32     | (1,)                         | static: activations are divided by it |

scale = amax / 448 in float32 over the weights that share it; code = e4m3(w / scale): true division, round half to even,
saturating, zeros positive. Zeros alone get scale 1.0. At the ends of float32 the scale moves by one unit in the last
place: up where it is so small that rounding it would clip, down where 448 * scale would overflow. ``weight_scale_inv``
multiplies too, despite its name. ``balanced`` searches the scales of channels and blocks (``search``); one scale
for a whole weight stays amax / 448.

    {"quant_method": "fp8", "is_checkpoint_fp8_serialized": true, "activation_scheme": "dynamic", "ignored_layers": []}
    ... "activation_scheme": "static" ...       with recorded input scales
    ... "weight_block_size": [128, 128] ...     blocks
    {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": []}       channels

No other key. vLLM and vLLM-Omni load all of them natively on CUDA; they know scales per channel only under ModelOpt's
name, which vLLM-Omni does not detect for Wan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from omni_convert.formats.errors import UsageError
from omni_convert.formats.header import TensorSpec
from omni_convert.formats.scales import absmax_scale, absmax_scales

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

LARGEST = 448.0
LARGEST_BLOCK = 1024
CLIPS = 464.0
"""A quotient from here on is nearer to the next value, which does not exist, than to the largest."""


@dataclass(frozen=True, kw_only=True)
class Fp8(Rows):
    """E4M3 with float32 scales. ``block_size``: (bn, bk), only with granularity ``block``, there 128 x 128."""

    granularity: str = "tensor"
    block_size: tuple[int, int] | None = None
    activation_scheme: str = "dynamic"
    quality: str = "fast"
    name: ClassVar[str] = "fp8"
    options: ClassVar[Mapping[str, Sequence[str]]] = {
        "granularity": ("tensor", "channel", "block"),
        "block_size": (),
        "activation_scheme": ("dynamic", "static"),
        "quality": QUALITIES,
    }

    def __post_init__(self) -> None:
        for option in ("granularity", "activation_scheme", "quality"):
            if getattr(self, option) not in self.options[option]:
                raise UsageError(
                    f"{option} is {getattr(self, option)!r}, fp8 knows only {', '.join(self.options[option])}."
                )
        if self.granularity == "block" and self.block_size is None:
            object.__setattr__(self, "block_size", (128, 128))
        if self.block_size is not None:
            if self.granularity != "block":
                raise UsageError(f"--block-size needs --granularity block, this one is {self.granularity}.")
            _check_block_size(self.block_size)
        if self.activation_scheme == "static" and self.granularity != "tensor":
            raise UsageError(
                f"--activation-scheme static: engines run fp8 scales per {self.granularity} with dynamic activations "
                "only. Use --granularity tensor, or --activation-scheme dynamic."
            )

    @property
    def serialized_flag(self) -> str | None:
        return None if self.granularity == "channel" else "is_checkpoint_fp8_serialized"

    @property
    def ignores_parts(self) -> bool:
        return self.granularity == "channel"

    @property
    def is_searched(self) -> bool:
        return self.quality != "fast" and self.granularity != "tensor"

    @property
    def suffixes(self) -> Sequence[str]:
        return ("weight", self._scale_suffix, *(("input_scale",) if self._is_static else ()))

    @property
    def whole_suffixes(self) -> Sequence[str]:
        return self.suffixes[1:] if self.granularity == "tensor" else ()

    @property
    def rows_per_scale(self) -> int:
        return self.block_size[0] if self.block_size else 1

    @property
    def needs(self) -> Sequence[str]:
        return (*(("amax",) if self.granularity == "tensor" else ()), *(("input_scale",) if self._is_static else ()))

    @property
    def valid_codes(self) -> NDArray[np.bool_]:
        from omni_convert.formats import microscaling as mx

        return mx.E4M3.valid_codes

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        return refuse_shape(self.name, shape)

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        rows, columns = shape
        scale: tuple[int, ...] = (1,)
        if self.granularity == "channel":
            scale = (rows,)
        if self.block_size:
            scale = (-(-rows // self.block_size[0]), -(-columns // self.block_size[1]))
        specs = {"weight": TensorSpec("F8_E4M3", shape), self._scale_suffix: TensorSpec("F32", scale)}
        return specs | ({"input_scale": TensorSpec("F32", (1,))} if self._is_static else {})

    def quantize(self, weight: torch.Tensor, facts: Facts = NO_FACTS) -> dict[str, torch.Tensor]:
        import torch

        from omni_convert.formats import microscaling as mx

        w = checked_float32(weight)
        if w.dim() == 3:
            return stack_experts(lambda expert: self.quantize(expert, facts._replace(amax=None)), w)
        block = self._block(w)
        if self.is_searched:
            from omni_convert.formats import search

            scale = search.fp8_block_scales(w, block)
        elif facts.amax is not None and self.granularity == "tensor":
            scale = absmax_scales(w.new_full((1, 1), facts.amax), LARGEST, CLIPS, torch)
        else:
            scale = absmax_scales(_block_amax(w, block), LARGEST, CLIPS, torch)
        codes = mx.round_elements(w / _expand(scale, block, w.shape), mx.E4M3).to(torch.float8_e4m3fn)
        result = {"weight": codes, self._scale_suffix: scale if self.block_size else scale.flatten()}
        if self._is_static:
            result["input_scale"] = w.new_full((1,), known(facts.input_scale, "input_scale"))
        return result

    def dequantize(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        if tensors["weight"].dim() == 3:
            return unstack_experts(self.dequantize, tensors)
        weight = tensors["weight"].to(torch.float32)
        scale = tensors[self._scale_suffix]
        if not self.block_size:
            return weight * scale.unsqueeze(1)
        return weight * _expand(scale, self.block_size, weight.shape)

    def whole(self, shape: tuple[int, ...], facts: Facts = NO_FACTS) -> dict[str, NDArray[Any]]:
        import numpy as np

        if self.granularity != "tensor":
            return {}
        scale = absmax_scale(known(facts.amax, "amax"), LARGEST, CLIPS)
        result: dict[str, NDArray[Any]] = {"weight_scale": np.full(1, scale, np.float32)}
        if self._is_static:
            result["input_scale"] = np.array([known(facts.input_scale, "input_scale")], np.float32)
        return result

    def compiled_rows(
        self,
        bits: NDArray[Any],
        dtype: str,
        out: Mapping[str, NDArray[Any]],
        power: NDArray[np.float64] | None,
        facts: Facts,
    ) -> NonFinite | None:
        from omni_convert.formats.bits import first_nonfinite, kernel_bits, nonfinite_place

        stored, codes = kernel_bits(bits, dtype), out["weight"]
        if self.granularity == "tensor":
            if not math.isfinite(known(facts.amax, "amax")):
                place = nonfinite_place(bits, dtype)
                return NonFinite(*place) if place else None
            self._shared_rows(stored, codes, power, facts)
            return None
        row = self._scaled_rows(stored, codes, out[self._scale_suffix], power)
        return None if row < 0 else NonFinite(row, first_nonfinite(bits[row], dtype))

    def compiled_values(self, tensors: Mapping[str, NDArray[Any]], out: NDArray[Any] | None) -> NDArray[Any]:
        import numpy as np

        from omni_convert.formats import dequantize_kernels

        codes, scale = tensors["weight"], tensors[self._scale_suffix]
        values = np.empty(codes.shape, np.float32) if out is None else out
        if self.block_size:
            dequantize_kernels.fp8_block_values(codes, scale, values, self.block_size)
        else:
            dequantize_kernels.fp8_values(
                codes, scale if len(scale) == len(codes) else np.full(len(codes), scale[0]), values
            )
        return values

    def tolerance(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        from omni_convert.formats import microscaling as mx

        bound: NDArray[np.float32] = mx.E4M3.half_steps[tensors["weight"]] * self._row_scales(tensors)
        return bound

    def config(self, ignored_layers: Sequence[str]) -> dict[str, Any]:
        if self.granularity == "channel":
            return {
                "quant_method": "modelopt",
                "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
                "ignore": list(ignored_layers),
            }
        return {
            "quant_method": self.name,
            "is_checkpoint_fp8_serialized": True,
            "activation_scheme": self.activation_scheme,
            **({"weight_block_size": list(self.block_size)} if self.block_size else {}),
            "ignored_layers": list(ignored_layers),
        }

    def _shared_rows(
        self, bits: NDArray[Any], codes: NDArray[Any], power: NDArray[np.float64] | None, facts: Facts
    ) -> None:
        import numpy as np

        from omni_convert.formats import fp8_kernels

        scale = self.whole(bits.shape, facts)["weight_scale"][0]
        fp8_kernels.fp8_shared(bits, codes, scale, power, np.float32(known(facts.amax, "amax")))

    def _scaled_rows(
        self, bits: NDArray[Any], codes: NDArray[Any], scale: NDArray[Any], power: NDArray[np.float64] | None
    ) -> int:
        """The first row that holds NaN or Inf, or -1."""
        from omni_convert.formats import fp8_kernels

        if self.is_searched:
            from omni_convert.formats import search_kernels

            row = (
                search_kernels.fp8_block_scales(bits, scale, self.block_size)
                if self.block_size
                else search_kernels.fp8_row_scales(bits, scale)
            )
            if row >= 0:
                return row
        if self.block_size:
            return fp8_kernels.fp8_block_rows(bits, codes, scale, power, self.block_size, given=self.is_searched)
        return fp8_kernels.fp8_rows(bits, codes, scale, power, given=self.is_searched)

    @property
    def _scale_suffix(self) -> str:
        return "weight_scale_inv" if self.granularity == "block" else "weight_scale"

    @property
    def _is_static(self) -> bool:
        return self.activation_scheme == "static"

    def _block(self, weight: torch.Tensor) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        rows, columns = weight.shape
        return self.block_size or (rows if self.granularity == "tensor" else 1, columns)

    def _row_scales(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The scale of some rows' weights, broadcastable to (n, K)."""
        import numpy as np

        scale = tensors[self._scale_suffix]
        if not self.block_size:
            return scale.reshape(-1, 1)
        rows, columns = tensors["weight"].shape
        return np.repeat(np.repeat(scale, self.block_size[0], 0)[:rows], self.block_size[1], 1)[:, :columns]


def _check_block_size(block: Sequence[object]) -> None:
    """Rows: engines need no more, and all rows of a block are in memory at once. Columns: whole vectors of 16."""
    numbers = [side for side in block if type(side) is int]
    if len(block) != 2 or len(numbers) != 2 or not 1 <= numbers[0] <= LARGEST_BLOCK:
        raise UsageError(f"--block-size is {block!r}, expected two numbers from 1 to {LARGEST_BLOCK}, as in 128x128.")
    if numbers[1] % 16 or not 16 <= numbers[1] <= LARGEST_BLOCK:
        raise UsageError(
            f"--block-size has {numbers[1]} columns, expected a multiple of 16 up to {LARGEST_BLOCK}, as in 128x128."
        )


def _block_amax(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Largest magnitude of every block: (N, K) -> (ceil(N / bn), ceil(K / bk))."""
    import torch

    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.abs(), (0, -columns % block[1], 0, -rows % block[0]))
    down, across = -(-rows // block[0]), -(-columns // block[1])
    return padded.reshape(down, block[0], across, block[1]).amax(dim=(1, 3))


def _expand(scale: torch.Tensor, block: tuple[int, int], shape: Sequence[int]) -> torch.Tensor:
    """Per block -> per weight."""
    return scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]
