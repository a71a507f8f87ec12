"""What every format offers. A format is a value; two of its functions are inverse up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

QUALITIES = ("fast", "balanced")
SCALE_RULES = ("floor", "even", "rceil")
"""How MX formats choose the exponent of a block; see ``microscaling``."""


class Facts(NamedTuple):
    """What some formats must know of a weight before its rows are quantized; each names what it ``needs``.

    ``amax``: the largest magnitude of all weights that share its scale, finite. ``input_scale``: of the layer's
    activations, recorded beforehand (static activations).
    """

    amax: float | None = None
    input_scale: float | None = None


NO_FACTS = Facts()


class NonFinite(NamedTuple):
    """Where the first NaN or Inf of a block of rows sits, relative to the block."""

    row: int
    column: int


class Format(Protocol):
    """One numeric representation of a linear weight ``(N, K)`` = (out_features, in_features).

    Tensors are named ``<layer>.<suffix>``; the suffix ``weight`` holds the codes.
    """

    def __hash__(self) -> int:
        """A format is a value."""

    @property
    def name(self) -> str:
        """The ``quant_method`` of ``quantization_config``."""

    @property
    def quality(self) -> str:
        """How scales are chosen: one of ``QUALITIES``."""

    @property
    def options(self) -> Mapping[str, Sequence[str]]:
        """What a conversion may choose: option -> its values (empty: any)."""

    @property
    def serialized_flag(self) -> str | None:
        """The config key that says "weights on disk are already quantized"; None where the method says it."""

    @property
    def ignores_parts(self) -> bool:
        """Whether engines take an ignored layer for a part of a name (or a pattern), not for a whole one."""

    @property
    def is_searched(self) -> bool:
        """Whether its quality is one that searches scales, and there are better ones to find."""

    @property
    def suffixes(self) -> Sequence[str]:
        """The suffixes of a quantized layer, in the order in which they are stored."""

    @property
    def whole_suffixes(self) -> Sequence[str]:
        """Those whose tensor belongs to the weight as a whole; the first dimension of all others follows the rows."""

    @property
    def rows_per_scale(self) -> int:
        """How many rows share their scales: work on a weight is split at multiples of it."""

    @property
    def needs(self) -> Sequence[str]:
        """The ``Facts`` without which this format cannot quantize some rows."""

    @property
    def valid_codes(self) -> NDArray[np.bool_]:
        """(256,): which bytes conversions write into ``weight``."""

    @property
    def is_fused(self) -> bool:
        """Whether one scale replaces those of rows, because engines fuse the layer; see ``fused``."""

    def fused(self) -> Format:
        """The format of a layer that engines fuse with others, or cut: what it writes for one of those."""

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be held in this format; None if it can."""

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Suffix -> dtype and shape on disk of a quantized weight of ``shape`` (N, K)."""

    def quantize(self, weight: torch.Tensor, facts: Facts = NO_FACTS) -> dict[str, torch.Tensor]:
        """The readable reference: the same bits on every device that computes as IEEE 754 says.

        So it divides by tensors, never by numbers (CUDA would multiply by the reciprocal), adds integers, or floats one
        by one, and takes exponents from bits. It waits for the device once.

        ``weight``: (N, K), bf16, fp16 or fp32, any device and strides.
        (experts, N, K) is quantized expert by expert; every result then has one dimension more. ``facts``: those that
        the weight does not show.

        Raises:
            OmniConvertError: NaN or Inf, an empty weight, or another number of dimensions.
        """

    def dequantize(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32 (N, K), or (experts, N, K), from the tensors of ``quantize``."""

    def whole(self, shape: tuple[int, ...], facts: Facts = NO_FACTS) -> dict[str, NDArray[Any]]:
        """The tensors of ``whole_suffixes``: known before any row is quantized."""

    def quantize_rows(
        self,
        bits: NDArray[Any],
        dtype: str,
        out: Mapping[str, NDArray[Any]],
        power: NDArray[np.float64] | None,
        facts: Facts = NO_FACTS,
    ) -> NonFinite | None:
        """Quantize some rows of a weight with the compiled CPU kernel: the same bits as ``quantize``.

        ``bits``: (n, K) stored bits, uint16 for BF16 and F16, uint32 for F32, from a row that is a multiple of
        ``rows_per_scale``. ``out``: suffix -> array that receives the rows; ``whole_suffixes`` are not among them.
        ``power``: (n, 2) float64, receives per row the sum of squares of the weight and of the quantization error;
        None leaves them out, which is quicker. Returns the first NaN or Inf, if any; ``out`` is then undefined.
        """

    def dequantize_rows(
        self, tensors: Mapping[str, NDArray[Any]], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """float32 (n, K) from some rows of the stored tensors, in ``out`` if given: the same values as
        ``dequantize``."""

    def compiled_values(self, tensors: Mapping[str, NDArray[Any]], out: NDArray[Any] | None) -> NDArray[Any]:
        """``dequantize_rows`` by the compiled kernel, or an error where numba does not work. In ``out`` of uint16 the
        values are BF16 patterns, rounded once."""

    def tolerance(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The largest error that this format may leave in every weight, broadcastable to (n, K): half the distance
        between neighbouring codes, and what saturation cuts off where the format allows it."""

    def own_noise(self, maxima: NDArray[np.float32], columns: int) -> float | None:
        """About the sum of squared errors of a weight with scales of its own, if it shares one; else None.

        ``maxima``: (N,) largest magnitude of every row. ``columns``: K.
        """

    def config(self, ignored_layers: Sequence[str]) -> dict[str, Any]:
        """``quantization_config`` of a serialized checkpoint: exactly the keys that engines accept."""


def known(fact: float | None, name: str) -> float:
    """One of the ``Facts``.

    Raises:
        OmniConvertError: it was not measured.
    """
    if fact is None:
        raise OmniConvertError(f"facts.{name} of this weight is unknown, expected a number. Measure it first.")
    return fact


def row_slice(fmt: Format, start: int, stop: int) -> slice:
    """Where the scales of rows ``start`` to ``stop`` of a weight lie in the tensors that follow the rows."""
    return slice(start // fmt.rows_per_scale, -(-stop // fmt.rows_per_scale))


def refuse_shape(name: str, shape: tuple[int, ...], multiple: int = 1) -> str | None:
    """Why ``shape`` is not (N, K) with K a ``multiple``; None if it is."""
    if len(shape) != 2:
        return f"{name} needs a 2-D weight, this one has {len(shape)} dimensions"
    if 0 in shape:
        return "the weight is empty"
    return f"K is {shape[1]}, {name} needs a multiple of {multiple}" if shape[1] % multiple else None


def checked_float32(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` in float32.

    Raises:
        OmniConvertError: it is empty, not 2-D or 3-D, or holds NaN or Inf.
    """
    import torch

    if weight.dim() not in (2, 3) or not weight.numel():
        raise OmniConvertError(
            f"the weight has shape {tuple(weight.shape)}, expected (N, K) or (experts, N, K), not empty. "
            "Leave this layer as it is."
        )
    finite = weight.isfinite()
    if not bool(finite.all()):
        place = tuple(torch.nonzero(~finite)[0].tolist())
        raise OmniConvertError(
            f"the weight holds {float(weight[place])} at {place}, expected finite values. Leave this layer as it is."
        )
    return weight.to(torch.float32)


def stack_experts(
    quantize: Callable[[torch.Tensor], dict[str, torch.Tensor]], weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    """``quantize`` of every (N, K) of ``weight`` (experts, N, K), stacked."""
    import torch

    parts = [quantize(expert) for expert in weight.unbind()]
    return {suffix: torch.stack([part[suffix] for part in parts]) for suffix in parts[0]}


def unstack_experts(
    dequantize: Callable[[Mapping[str, torch.Tensor]], torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """``dequantize`` of what ``stack_experts`` returned."""
    import torch

    experts = range(len(tensors["weight"]))
    return torch.stack([dequantize({suffix: part[index] for suffix, part in tensors.items()}) for index in experts])
