"""What the MX formats share: element types, the choice of a block's power-of-two scale, the readable arithmetic.

A block of 32 weights along K shares one scale 2**(byte - 127), stored as the e8m0 byte. With E the exponent of the
block's largest magnitude and m in [1, 2) its mantissa, byte - 127 is E - emax, plus one where the rule says so:

| rule  | one more if                | e4m3      | e2m1     |                                                      |
|-------|----------------------------|-----------|----------|------------------------------------------------------|
| floor | never                      |           |          | OCP; the largest values of a block may saturate      |
| even  | m rounds up to 2 in the element | m >= 1.9375 | m >= 1.75 | saturates less than floor                    |
| rceil | m is above the element's largest | m > 1.75 | m > 1.5  | never saturates                                  |

Exponents come from the bits of a float32, never from a logarithm. A block of zeros has byte 0. Multiplying by a power
of two is exact; elements are rounded half to even and saturate; a zero is +0. Where a rule adds one in the top binade
of float32, elements saturate below 2**emax, so that every stored value is finite.
Source: OCP Microscaling Formats 1.0; the rules as torchao names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

BLOCK = 32
_MANTISSA = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Element:
    """A small float: largest value, exponent of its largest binade and of its smallest normal, stored mantissa bits."""

    name: str
    largest: float
    emax: int
    emin: int
    mantissa_bits: int

    def threshold(self, rule: str) -> int:
        """The 23 mantissa bits of a block's largest magnitude from which on the rule adds one to the exponent."""
        return {
            "floor": _MANTISSA,
            "even": _MANTISSA - (_MANTISSA >> (self.mantissa_bits + 1)),
            "rceil": int((self.largest / 2**self.emax - 1) * _MANTISSA) + 1,
        }[rule]

    def overshoot(self, rule: str) -> float:
        """How far beyond ``largest`` a scaled weight may lie."""
        return 2.0**self.emax * (1 + self.threshold(rule) / _MANTISSA) - self.largest

    @property
    def largest_at_top(self) -> float:
        """The largest value that a block with a scale above 2**(127 - emax) may hold: the next would be 2**128."""
        return 2.0 ** (self.emax - 1) * (2 - 2.0**-self.mantissa_bits)

    @cached_property
    def valid_codes(self) -> NDArray[np.bool_]:
        """Which e4m3 bytes hold a value of this element; zero has no sign."""
        magnitude = np.abs(E4M3_VALUES)
        steps = magnitude / (2 * self.half_steps)
        valid: NDArray[np.bool_] = (magnitude <= self.largest) & (steps == np.floor(steps))
        valid[0x80] = False
        return valid

    @cached_property
    def half_steps(self) -> NDArray[np.float32]:
        """Half the distance between neighbours, by e4m3 byte of the value."""
        exponent = np.where(E4M3_VALUES == 0, self.emin, np.maximum(np.frexp(E4M3_VALUES)[1] - 1, self.emin))
        steps: NDArray[np.float32] = np.ldexp(np.float32(0.5), exponent - self.mantissa_bits).astype(np.float32)
        return steps


E4M3 = Element(name="e4m3", largest=448.0, emax=8, emin=-6, mantissa_bits=3)
E2M1 = Element(name="e2m1", largest=6.0, emax=2, emin=0, mantissa_bits=1)
ELEMENTS = {element.name: element for element in (E4M3, E2M1)}


def _e4m3_values() -> NDArray[np.float32]:
    """The value of every e4m3 byte; NaN for the two that are."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    magnitude = np.where(exponent, np.ldexp(1 + mantissa / 8, exponent - 7), mantissa * 2.0**-9)
    magnitude[(byte & 127) == 127] = np.nan
    values: NDArray[np.float32] = np.where(byte & 128, -magnitude, magnitude).astype(np.float32)
    return values


E4M3_VALUES = _e4m3_values()


def e8m0_values(scale: NDArray[np.uint8]) -> NDArray[np.float32]:
    """2**(byte - 127), exact; byte 0 is a subnormal float32."""
    bits: NDArray[np.uint32] = np.where(scale == 0, np.uint32(1 << 22), scale.astype(np.uint32) << np.uint32(23))
    return bits.view(np.float32)


def expand(scale: NDArray[Any], columns: int) -> NDArray[Any]:
    """Per-block values (n, blocks) -> per weight (n, columns)."""
    return np.repeat(scale, BLOCK, axis=1)[:, :columns]


def tolerance(
    element: Element, overshoot: float, codes: NDArray[np.uint8], scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Largest error that rounding may leave: half a step, or at the largest value what saturation cuts off.

    ``overshoot``: how far beyond the largest a scaled weight may lie. ``codes``: (n, K) e4m3 bytes. ``scale``: per
    weight, (n, K).
    """
    half = element.half_steps[codes]
    magnitude = np.abs(E4M3_VALUES[codes])
    top = scale > 2.0 ** (127 - element.emax)
    cut = np.where(top, 2.0**element.emax - element.largest_at_top, overshoot)
    at_end = magnitude == np.where(top, element.largest_at_top, element.largest)
    bound: NDArray[np.float32] = (np.where(at_end, np.maximum(half, cut), half) * scale).astype(np.float32)
    return bound


def block_scales(amax: torch.Tensor, element: Element, rule: str) -> torch.Tensor:
    """e8m0 bytes (uint8) for the largest magnitudes of blocks (float32, any shape)."""
    import torch

    bits = amax.view(torch.int32)
    one_more = (bits & (_MANTISSA - 1)) >= element.threshold(rule)
    return ((bits >> 23) - element.emax + one_more).clamp(0, 254).to(torch.uint8)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2.0**exponent in float32, exact for -149 to 127. ``exponent``: int32.

    By its bits: devices differ in what they make of float64 and of ``ldexp``.
    """
    import torch

    subnormal = torch.ones_like(exponent) << (exponent + 149).clamp(0, 22)
    return torch.where(exponent < -126, subnormal, (exponent + 127) << 23).view(torch.float32)


def scales_per_weight(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """e8m0 bytes (N, blocks) -> float32 (N, columns)."""
    import torch

    return power_of_two(scale.to(torch.int32) - 127).repeat_interleave(BLOCK, dim=1)[:, :columns]


def round_elements(values: torch.Tensor, element: Element, largest: torch.Tensor | None = None) -> torch.Tensor:
    """Nearest element values (float32), half to even, zeros positive, saturating at ``largest`` (default: the
    element's)."""
    import torch

    magnitude = values.abs().clamp(max=element.largest)
    if largest is not None:
        magnitude = magnitude.minimum(largest)
    exponent = ((magnitude.view(torch.int32) >> 23) - 127).clamp(min=element.emin)
    step = power_of_two(exponent - element.mantissa_bits)
    rounded = (magnitude / step).round() * step
    return torch.where(rounded == 0, 0.0, torch.copysign(rounded, values))


def to_blocks(weight: torch.Tensor) -> torch.Tensor:
    """(N, K) -> float32 (N, ceil(K / 32), 32), the tail padded with zeros."""
    import torch

    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.to(torch.float32), (0, -columns % BLOCK))
    return padded.view(rows, -1, BLOCK)


def quantize_blocks(
    blocks: torch.Tensor, element: Element, rule: str, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Element values (float32, the shape of ``blocks``) and scale bytes (one dimension less), by ``rule`` if not
    given."""
    import torch

    if scale is None:
        scale = block_scales(blocks.abs().amax(dim=-1), element, rule)
    inverse = power_of_two(127 - scale.to(torch.int32)).unsqueeze(-1)
    at_top = (scale > 254 - element.emax).unsqueeze(-1)
    largest = torch.where(at_top, element.largest_at_top, blocks.new_full((), element.largest))
    return round_elements(blocks * inverse, element, largest), scale
