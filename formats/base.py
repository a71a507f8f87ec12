"""What every format offers. A format is a value; two of its functions are inverse up to rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from omni_convert.formats.header import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class NonFinite(NamedTuple):
    """Where the first NaN or Inf of a block of rows sits, relative to the block."""

    row: int
    column: int


class Format(Protocol):
    """One numeric representation of a linear weight ``(N, K)`` = (out_features, in_features).

    Tensors are named ``<layer>.<suffix>``; the suffix ``weight`` holds the codes.
    """

    @property
    def name(self) -> str:
        """The ``quant_method`` of ``quantization_config``."""

    @property
    def serialized_flag(self) -> str:
        """The config key that says "weights on disk are already quantized"."""

    @property
    def suffixes(self) -> Sequence[str]:
        """The suffixes of a quantized layer, in the order in which they are stored."""

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be held in this format; None if it can."""

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Suffix -> dtype and shape on disk of a quantized weight of ``shape``."""

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The readable reference. ``weight``: (N, K), bf16, fp16 or fp32, finite, any device."""

    def dequantize(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32 (N, K) from the tensors of ``quantize``."""

    def constants(self, shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
        """Suffixes whose tensor belongs to the weight as a whole and does not depend on its values."""

    def quantize_rows(
        self, bits: NDArray[Any], dtype: str, out: Mapping[str, NDArray[Any]], power: NDArray[np.float64]
    ) -> NonFinite | None:
        """Quantize some rows of a weight with the compiled CPU kernel: the same bits as ``quantize``.

        ``bits``: (n, K) stored bits, uint16 for BF16 and F16, uint32 for F32. ``out``: suffix -> array that
        receives the rows; ``constants`` are not among them.
        ``power``: (n, 2) float64, receives per row the sum of squares of the weight and of
        the quantization error. Returns the first NaN or Inf, if any; ``out`` is then undefined.
        """

    def dequantize_rows(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """float32 (n, K) from some rows of the stored tensors: the same values as ``dequantize``."""

    def tolerance(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The largest error that this format may leave in every weight, broadcastable to (n, K): half the distance
        between neighbouring codes, and what saturation cuts off where the format allows it."""

    def config(self, ignored_layers: Sequence[str]) -> dict[str, Any]:
        """``quantization_config`` of a serialized checkpoint: exactly the keys that engines accept."""
