"""Quantize while loading: layer by layer, to the bits that a conversion writes.

A weight on the CPU is quantized there, by the compiled kernels and all processors, so that a device receives codes,
half the bytes or a quarter; a weight on a device is quantized where it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omni_convert.formats.base import Facts, Format, row_slice
from omni_convert.formats.bits import NUMPY_DTYPE, OUTPUT_DTYPE, nonfinite_place
from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.engine import row_maxima
from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.runtime.threads import in_threads

_STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_NOT_FINITE = (
    "the weight holds NaN or Inf {place}, expected finite values. The checkpoint is damaged: download it again, or "
    "leave this layer as it is (ignore)."
)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What becomes of one layer. ``amax_with``: the layers that share its scale, itself among them; empty: none.
    ``input_scale``: of its activations, recorded beforehand."""

    format: Format
    amax_with: Sequence[str] = ()
    input_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class Online:
    """What becomes of the plain weights of one model.

    ``config``: what a converted checkpoint says of itself. ``layers``: by checkpoint name, those that are quantized.
    ``weight``: the plain weight (N, K) of a layer, as it is stored.
    """

    config: QuantizationConfig
    layers: Mapping[str, LayerPlan]
    weight: Callable[[str], Tensor]

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Suffix -> tensor of a quantized layer, where its weight is.

        Raises:
            OmniConvertError: NaN or Inf, or the weight cannot be read.
        """
        plan = self.layers[layer]
        facts = Facts(amax=self.amax(layer), input_scale=plan.input_scale)
        try:
            return quantize_weight(self.weight(layer), plan.format, facts)
        except OmniConvertError as error:
            raise OmniConvertError(f"{printable(layer)}: {error}") from error

    def amax(self, layer: str) -> float | None:
        """The largest magnitude of the layers that share this one's scale; None if it shares none."""
        together = tuple(self.layers[layer].amax_with)
        return self._amax(together) if len(together) > 1 else None

    def check(self, layer: str) -> None:
        """See what is shared with other layers, and whether the weight is finite, while all weights are plain.

        Raises:
            OmniConvertError: NaN or Inf.
        """
        if self.amax(layer) is None:
            _amax_of(layer, self.weight(layer))

    @functools.cached_property
    def _amax(self) -> Callable[[tuple[str, ...]], float]:
        """The largest magnitude of several layers; kept, for each of them will ask."""

        @functools.cache
        def largest(layers: tuple[str, ...]) -> float:
            return max(_amax_of(layer, self.weight(layer)) for layer in layers)

        return largest


QUANTIZING: ContextVar[Online | None] = ContextVar("QUANTIZING", default=None)
"""How the model that is being loaded is quantized: libraries have no way to hand it through."""


def stored_weights(files: Mapping[str, Path]) -> Callable[[str], Tensor]:
    """Layer -> its weight, mapped from the file that holds it. ``files``: by tensor name."""
    from safetensors import safe_open

    @functools.cache
    def opened(path: Path) -> Any:
        return safe_open(path, framework="pt", device="cpu")

    def weight(layer: str) -> Tensor:
        name = f"{layer}.weight"
        tensor: Tensor = opened(files[name]).get_tensor(name)
        return tensor

    return weight


def quantize_weight(weight: Tensor, fmt: Format, facts: Facts) -> dict[str, Tensor]:
    """Suffix -> tensor, the bits of ``fmt.quantize``. ``weight``: (N, K), bf16, fp16 or fp32, on any device.

    Raises:
        OmniConvertError: NaN or Inf.
    """
    if weight.device.type != "cpu":
        return fmt.quantize(weight.detach(), facts)
    bits, dtype = _bits(weight), _STORED[weight.dtype]
    if "amax" in fmt.needs and facts.amax is None:
        facts = facts._replace(amax=_finite(bits, dtype))
    shape = (int(bits.shape[0]), int(bits.shape[1]))
    specs = fmt.tensors(shape)
    arrays = {suffix: np.empty(spec.shape, OUTPUT_DTYPE[spec.dtype]) for suffix, spec in specs.items()}
    for suffix, values in fmt.whole(shape, facts).items():
        arrays[suffix][...] = values.reshape(arrays[suffix].shape)
    by_row = {suffix: array for suffix, array in arrays.items() if suffix not in fmt.whole_suffixes}

    def some_rows(start: int, stop: int) -> None:
        views = {suffix: array[row_slice(fmt, start, stop)] for suffix, array in by_row.items()}
        views["weight"] = arrays["weight"][start:stop]
        bad = fmt.quantize_rows(bits[start:stop], dtype, views, None, facts)
        if bad is not None:
            raise OmniConvertError(_NOT_FINITE.format(place=f"at row {start + bad.row}, column {bad.column}"))

    in_threads(some_rows, shape, fmt.rows_per_scale)
    tensors = {suffix: torch.from_numpy(array) for suffix, array in arrays.items()}
    if specs["weight"].dtype == "F8_E4M3":
        tensors["weight"] = tensors["weight"].view(torch.float8_e4m3fn)
    return tensors


def _bits(weight: Tensor) -> NDArray[Any]:
    """The stored bits, without a copy where the weight is contiguous."""
    stored = weight.detach().contiguous()
    bits = stored.view(torch.int16 if stored.element_size() == 2 else torch.int32).numpy()
    return bits.view(NUMPY_DTYPE[_STORED[stored.dtype]])


def _amax_of(layer: str, weight: Tensor) -> float:
    try:
        if weight.device.type == "cpu":
            return _finite(_bits(weight), _STORED[weight.dtype])
        amax = max(abs(float(value)) for value in weight.detach().aminmax())
        if not math.isfinite(amax):
            raise OmniConvertError(_NOT_FINITE.format(place="somewhere"))
        return amax
    except OmniConvertError as error:
        raise OmniConvertError(f"{printable(layer)}: {error}") from error


def _finite(bits: NDArray[Any], dtype: str) -> float:
    """The largest magnitude."""
    amax = float(row_maxima(bits, dtype).max())
    if (place := None if math.isfinite(amax) else nonfinite_place(bits, dtype)) is not None:
        raise OmniConvertError(_NOT_FINITE.format(place=f"at row {place[0]}, column {place[1]}"))
    return amax
