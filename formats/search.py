"""Search for better scales without any data: the same bytes on disk, less error. The readable arithmetic.

Each search tries a fixed list of candidates and keeps the one whose error costs least; the first of equals wins, and
the plain scale (from the largest magnitude) comes first, so no search does worse than that in its own norm.
``search_kernels`` does the same, bit for bit, on a CPU. That is possible because costs are integers: a weight's cost
comes from individually rounded operations and ends as an integer, so the order of summation does not matter. Totals
stay below 2**53 for a million weights, so float64 holds them exactly; one product with a constant brings them to the
same unit. Constants that are fractional powers are cut to 40 binary places, where C libraries agree.

A search looks at weights through a lens, in units of a largest magnitude; codes are always computed from the weights
themselves, by true division. Where the largest magnitude is not ``SEARCHABLE``, the scale stays plain.

**int8**: scale = amax / 127 * 512 / m. First m = 512, 488, 490 ... 550, then the two odd neighbours of the best.
Lens: q = round(|w| * (128 / plain scale)), at most 16256. So q * m is |w| / scale in units of 2**-16, and its low half,
read as int16, is the rounding error e: nothing is divided, nothing rounded. |e|**2.4 is approximated by
e**2 * (0.532 + 0.956 * e**2), 1 % above on average; for weights beyond 127.5 (-128.5), which clip, by interpolation in
a table. The error of a clipped weight is exact however large it is, so clipping is never underrated.

**fp8**: scale = amax / 448 * 2**(i / 24), i = 0 ... 23; squared error. A whole octave, upwards: nothing saturates, and
a power of two would change nothing but subnormals. Lens: x = |w| * (512 / scale) in float32, rounded to four
significant bits; the square of the error is an integer in units of (scale / 512)**2, rounded down. Subnormals of e4m3
lie one unit apart: none of their errors counts, and they need no rounding of their own.

**mxfp4_dualscale**: coarse = amax / 6 * 2**(i / 16), i = 0 ... 15. For each of them every block of 32 takes its
exponent by rule ``even``, or one less if its largest weight then stays below 8 and the error costs less; 2.4-norm of
the group. Lens: q = round(|w| * (65535 / largest of the block)); x = q * m >> 16 is |w| / scale in units of 2**-13, and
d its distance to the nearest e2m1 value. |e|**2.4 is approximated by e**2 * (0.4 + 0.62 * |e|).

**mxfp4**: rule ``floor``, or one more if the squared error is less: no power of two does better. Nothing is looked at
through a lens; the square of an error is an integer in units of (scale / 1024)**2, rounded down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from omni_convert.formats import microscaling as mx
from omni_convert.formats.microscaling import BLOCK, E2M1, E4M3
from omni_convert.formats.scales import absmax_scales

if TYPE_CHECKING:
    import torch

SEARCHABLE = (2.0**-60, 2.0**100)
"""Largest magnitudes with which no step of the search leaves the normal range of float32."""

INT8_LARGEST = 127.0
INT8_CLIPS = 127.5
INT8_BASE = 512
INT8_LENS = 128.0
INT8_COARSE = (512, *(m for m in range(488, 551, 2) if m != 512))
INT8_FINE = (-1, 1)
INT8_OFFSET = 285
INT8_SHIFT = 7
"""A cost is square * (offset + (square >> shift)); square: e**2 in units of 2**-16."""
INT8_UNIT = 546 * 2**16
"""The cost of a clipped error of one scale: so that clipping costs no less than any rounding."""
INT8_CELL = 13
"""The table of clipped errors has cells of 2**13 units of 2**-16: an eighth of a scale."""
INT8_OVERSHOOT = 9.7
"""How far beyond 127 a scaled weight may lie (beyond -128: one less): 127 * 551 / 512 - 127, rounded up."""

FP8_CLIPS = 464.0
FP8_CANDIDATES = 24
FP8_LENS = 512.0

MXFP4_UNIT = 1024.0
"""An error of one scale."""

GROUP = 512
DUAL_CANDIDATES = 16
DUAL_LENS = 65535.0
DUAL_NEGLIGIBLE = 2.0**-40
"""Blocks whose largest magnitude is below this share of the group's have no say."""
DUAL_OFFSET, DUAL_SLOPE = 1951, 24195
"""A cost is d * (d * (offset + (d * slope >> 16)) >> 16); d in units of 2**-13."""
DUAL_OVERSHOOT = 2.0
"""How far beyond 6 a scaled weight may lie: a block takes the smaller exponent only below 8."""


def _cut(value: float) -> float:
    return round(value * 2**40) / 2**40


def _octave(candidates: int, power: float) -> list[float]:
    """2**(power * i / candidates)."""
    return [_cut(2 ** (power * i / candidates)) for i in range(candidates)]


_MULTIPLIERS = range(1, max(INT8_COARSE) + 2)
INT8_RATIOS = np.array([0, *(INT8_BASE / m for m in _MULTIPLIERS)], np.float32)
"""Scale in units of the plain one, by m."""
INT8_WEIGHTS = np.array([0, *(_cut((INT8_BASE / m) ** 2.4) for m in _MULTIPLIERS)])
"""|scale|**2.4 in units of the plain one, by m."""
INT8_TABLE = np.array([round((i / 8) ** 2.4 * INT8_UNIT) for i in range(80)], np.int64)
"""Costs of clipped errors of i / 8 scales."""

FP8_RATIOS = np.array(_octave(FP8_CANDIDATES, 1), np.float32)
FP8_INVERSES = np.array(_octave(FP8_CANDIDATES, -1), np.float32)
FP8_WEIGHTS = np.array(_octave(FP8_CANDIDATES, 2))

DUAL_RATIOS = np.array(_octave(DUAL_CANDIDATES, 1), np.float32)
DUAL_WEIGHTS = np.array(_octave(DUAL_CANDIDATES, 2.4))
DUAL_FINE_WEIGHTS = np.array([np.ldexp(_octave(5, 1)[12 * n % 5], 12 * n // 5) for n in range(-127, 128)])
"""2**(2.4 * (byte - 127)) by fine byte, a fifth of an octave times a power of two."""


def searchable(amax: torch.Tensor) -> torch.Tensor:
    return (amax >= SEARCHABLE[0]) & (amax <= SEARCHABLE[1])


def int8_scales(weight: torch.Tensor) -> torch.Tensor:
    """Scales (N,) float32 of rows (N, K) float32."""
    import torch

    amax = weight.abs().amax(dim=1)
    plain: torch.Tensor = absmax_scales(amax, INT8_LARGEST, INT8_CLIPS, torch)
    unit = torch.where(searchable(amax), INT8_LENS / plain, 0.0)  # all costs 0: the first candidate wins
    lens = (weight.abs() * unit[:, None]).round().to(torch.int64)
    end = torch.where(weight < 0, 128, 127) << 16

    best = torch.full_like(amax, torch.inf, dtype=torch.float64)
    chosen = torch.full_like(amax, INT8_BASE, dtype=torch.int64)
    weights = torch.from_numpy(INT8_WEIGHTS).to(weight.device)
    for candidates in (INT8_COARSE, INT8_FINE):
        center = torch.zeros_like(chosen) if candidates is INT8_COARSE else chosen
        for offset in candidates:
            m = center + offset
            cost = int8_costs(lens * m[:, None], end).sum(dim=1).to(torch.float64) * weights[m]
            chosen = torch.where(cost < best, m, chosen)
            best = torch.minimum(cost, best)
    return plain * torch.from_numpy(INT8_RATIOS).to(weight.device)[chosen]


def int8_costs(value: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Costs (int64) of weights ``value``, not negative, if the last code is ``end``; both in units of 2**-16 scale."""
    import torch

    error = ((value + 0x8000) & 0xFFFF) - 0x8000
    square = (error * error) >> 16
    rounding = square * (INT8_OFFSET + (square >> INT8_SHIFT))

    excess = (value - end).clamp(min=0)
    table = torch.from_numpy(INT8_TABLE).to(value.device)
    cell, place = excess >> INT8_CELL, excess & ((1 << INT8_CELL) - 1)
    clipping = table[cell] + (((table[cell + 1] - table[cell]) * place) >> INT8_CELL)
    return torch.where(excess > 0x8000, clipping, rounding)


def fp8_scales(tiles: torch.Tensor) -> torch.Tensor:
    """Scales (...) float32 of tiles (..., n) float32 that share one."""
    import torch

    amax = tiles.abs().amax(dim=-1)
    plain: torch.Tensor = absmax_scales(amax, E4M3.largest, FP8_CLIPS, torch)
    unit = torch.where(searchable(amax), FP8_LENS / plain, 0.0)
    best = torch.full_like(amax, torch.inf, dtype=torch.float64)
    ratio = torch.ones_like(amax)
    for inverse, weight, candidate in zip(FP8_INVERSES, FP8_WEIGHTS, FP8_RATIOS, strict=True):
        cost = fp8_costs(tiles.abs() * (unit * float(inverse)).unsqueeze(-1)).sum(dim=-1)
        total = cost.to(torch.float64) * float(weight)
        ratio = torch.where(total < best, float(candidate), ratio)
        best = torch.minimum(total, best)
    return plain * ratio


def fp8_costs(values: torch.Tensor) -> torch.Tensor:
    """Costs (int64) of weights, not negative, in units of scale / 512."""
    import torch

    exponent = ((values.view(torch.int32) >> 23) - 127).clamp(min=-1)  # below 1 no error counts
    step = mx.power_of_two(exponent - E4M3.mantissa_bits)
    error = values - (values / step).round() * step
    return (error * error).to(torch.int64)


def mxfp4_scales(blocks: torch.Tensor) -> torch.Tensor:
    """e8m0 bytes (...) uint8 of blocks (..., 32) float32."""
    import torch

    amax = blocks.abs().amax(dim=-1)
    byte = mx.block_scales(amax, E2M1, "floor")
    searched = searchable(amax)
    looked_at = torch.where(searched.unsqueeze(-1), blocks, 0.0)
    below, above = (mxfp4_costs(looked_at, byte + more) for more in (0, 1))
    return torch.where(searched, byte + (4 * above < below), mx.block_scales(amax, E2M1, "even"))


def mxfp4_costs(blocks: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
    """Costs (int64) of blocks in units of their own scale: 32 times at most 2**22."""
    import torch

    sizes = blocks.abs() * mx.power_of_two(127 - byte.to(torch.int32)).unsqueeze(-1)
    error = (sizes - mx.round_elements(sizes, E2M1)) * MXFP4_UNIT
    return (error * error).to(torch.int64).sum(dim=-1)


def fp8_row_scales(weight: torch.Tensor) -> torch.Tensor:
    """Scales (N,) float32 of rows (N, K) float32."""
    return fp8_scales(weight)


def fp8_block_scales(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Scales (ceil(N / bn), ceil(K / bk)) float32 of blocks (bn, bk) of (N, K) float32, smaller at the edges."""
    import torch

    (rows, columns), (tall, wide) = weight.shape, block
    padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % tall))  # zeros cost nothing
    tiles = padded.view(-(-rows // tall), tall, -(-columns // wide), wide).transpose(1, 2)
    return fp8_scales(tiles.flatten(2))


def dual_scales(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fine bytes (N, K / 32) uint8 and coarse scales (N, ceil(K / 512)) float32 of (N, K) float32, K % 32 = 0."""
    import torch

    rows, columns = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -columns % GROUP)).view(rows, -1, GROUP // BLOCK, BLOCK).abs()
    blocks = groups.amax(dim=-1)
    amax = blocks.amax(dim=-1)
    plain = amax / torch.full_like(amax, E2M1.largest)
    plain = torch.where(plain == 0, 1.0, plain)
    counts = searchable(amax)[..., None] & (blocks >= amax[..., None] * DUAL_NEGLIGIBLE)
    unit = torch.where(counts, DUAL_LENS / blocks, 0.0)
    lens = (groups * unit[..., None]).round().to(torch.int64)

    best = torch.full_like(amax, torch.inf, dtype=torch.float64)
    coarse, fine = plain, torch.zeros_like(blocks, dtype=torch.uint8)
    for ratio, weight_of_candidate in zip(DUAL_RATIOS, DUAL_WEIGHTS, strict=True):
        candidate = plain * float(ratio)
        cost, byte = _dual_blocks(lens, blocks / candidate[..., None], counts)
        total = torch.zeros_like(best)
        for block in range(GROUP // BLOCK):  # float64, so in order
            total = total + cost[..., block]
        total = total * float(weight_of_candidate)
        better = total < best
        coarse = torch.where(better, candidate, coarse)
        fine = torch.where(better[..., None], byte, fine)
        best = torch.minimum(total, best)
    return fine.view(rows, -1)[:, : columns // BLOCK].contiguous(), coarse


def _dual_blocks(lens: torch.Tensor, amax: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cost (float64) in units of the coarse scale, and fine byte, of blocks.

    ``lens``: (..., 32); ``amax``: in units of the coarse scale; ``counts``: whether the block has a say.
    """
    import torch

    byte = mx.block_scales(amax, E2M1, "even")
    scaled = amax * mx.power_of_two(127 - byte.to(torch.int32))  # 3.5 to 7
    m = torch.where(counts, (scaled * 2.0**13).round(), 0.0).to(torch.int64)
    weights = torch.from_numpy(DUAL_FINE_WEIGHTS).to(lens.device)
    cost, other = (
        dual_costs((lens * factor[..., None]) >> 16).sum(dim=-1).to(torch.float64) * weights[place.to(torch.int64)]
        for factor, place in ((m, byte), (2 * m, byte.clamp(min=1) - 1))
    )
    smaller = counts & (m < 1 << 15) & (other < cost)
    return torch.where(smaller, other, cost), torch.where(smaller, byte - 1, byte)


def dual_costs(value: torch.Tensor) -> torch.Tensor:
    """Costs (int64) of weights, not negative, in units of 2**-13 of a block's scale: as far as e2m1 is from them.

    The remainder within a cell between two e2m1 values; to the upper one it is one unit too small, which is as good.
    Beyond 6 there is no upper one.
    """
    import torch

    cell = torch.where(value < 2 << 13, (1 << 12) - 1, torch.where(value < 4 << 13, (1 << 13) - 1, (1 << 14) - 1))
    inside = value & cell
    error = torch.maximum(torch.minimum(inside, cell - inside), value - (6 << 13))
    factor = DUAL_OFFSET + ((error * DUAL_SLOPE) >> 16)
    return error * ((error * factor) >> 16)
