"""The float32 scale that puts the largest of some weights on the largest code."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

_NO_EDGE = (2.0**-100, 2.0**100)
"""Between these, a scale is a division: neither subnormal nor near the end of float32."""


@lru_cache(maxsize=1024)
def absmax_scale(amax: float, largest: float, clips: float) -> Any:
    """``absmax_scales`` of one number, as numpy has it: asked again for every piece of what shares a scale."""
    import numpy as np

    if _NO_EDGE[0] < amax < _NO_EDGE[1]:
        return np.float32(amax) / np.float32(largest)
    return absmax_scales(np.array(amax, np.float32), largest, clips, np)


def absmax_scales(amax: Any, largest: float, clips: float, library: Any) -> Any:
    """amax / ``largest`` in float32, 1.0 for zeros; ``amax``: an array or tensor of ``library`` (numpy or torch).

    At the ends of float32 the scale moves by one unit in the last place: up where it is so small that rounding it would
    clip (a quotient from ``clips`` on is nearer to the code that does not exist), down where ``largest`` * scale would
    overflow.
    """
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        scale = amax / library.full_like(amax, largest)
        up, down = (library.nextafter(scale, library.full_like(scale, end)) for end in (np.inf, 0.0))
        scale = library.where(amax / scale > clips, up, scale)
        scale = library.where(library.isinf(scale * library.full_like(scale, largest)), down, scale)
        return library.where(amax == 0, library.ones_like(scale), scale)
