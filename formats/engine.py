"""Which engine quantizes rows on a CPU: the compiled kernels, or the torch reference where numba does not work."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from omni_convert.formats.base import NO_FACTS, Facts, Format, NonFinite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@cache
def compiled() -> bool:
    """Whether the compiled kernels work here; if not, says so once, in one line on stderr.

    numba is missing, or was built for another NumPy, or finds no folder for its cache, or cannot compile: the first
    three show when it is imported, the last when a kernel first runs.
    """
    try:
        import numpy as np

        from omni_convert.formats import kernels

        codes, scale, power = np.empty((1, 1), np.int8), np.empty((1, 1), np.float32), np.empty((1, 2))
        kernels.int8_rows(np.full((1, 1), 0xC000, np.uint16), codes, scale, power)
        if codes[0, 0] == -127:
            return True
        problem = f"-2 became code {codes[0, 0]}, expected -127"
    except Exception as error:  # whatever it is, the reference does not need numba
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    sys.stderr.write(
        f"omni-convert: numba does not work here ({problem}); torch takes over, with the same bytes at a tenth of the "
        "speed or less.\n"
    )
    return False


def reference_values(
    fmt: Format, tensors: Mapping[str, NDArray[Any]], out: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """``Format.dequantize_rows`` by ``Format.dequantize``."""
    import numpy as np
    import torch

    views = {suffix: torch.from_numpy(np.ascontiguousarray(array)) for suffix, array in tensors.items()}
    if views["weight"].dtype == torch.uint8:
        views["weight"] = views["weight"].view(torch.float8_e4m3fn)
    values: NDArray[np.float32] = fmt.dequantize(views).numpy()
    if out is None:
        return values
    out[...] = values
    return out


def reference_rows(
    fmt: Format,
    bits: NDArray[Any],
    dtype: str,
    out: Mapping[str, NDArray[Any]],
    power: NDArray[np.float64] | None,
    facts: Facts = NO_FACTS,
) -> NonFinite | None:
    """``Format.quantize_rows`` by ``Format.quantize``."""
    import numpy as np
    import torch

    from omni_convert.formats.bits import nonfinite_place, to_float32

    weight = to_float32(bits, dtype)
    place = nonfinite_place(bits, dtype)
    if place is not None:
        return NonFinite(*place)
    tensors = fmt.quantize(torch.from_numpy(np.array(weight)), facts)
    for suffix, array in out.items():
        tensor = tensors[suffix]
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = tensor.view(torch.uint8)
        array[...] = tensor.numpy().reshape(array.shape)
    if power is not None:
        values = fmt.dequantize(tensors).numpy()
        power[:, 0] = np.square(weight, dtype=np.float64).sum(axis=1)
        power[:, 1] = np.square(weight.astype(np.float64) - values).sum(axis=1)
    return None


def amax(bits: NDArray[Any], dtype: str) -> np.float32:
    """Largest magnitude of stored bits (n, K), not empty; NaN or Inf if one of them is."""
    from omni_convert.formats import bits as stored

    if not compiled():
        return stored.amax(bits, dtype)
    from omni_convert.formats import fp8_kernels

    return fp8_kernels.largest_magnitude(stored.kernel_bits(bits, dtype))
