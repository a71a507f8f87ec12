"""What the stored tensors of quantized layers may hold: codes that exist, scales that are finite and positive."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.checkpoint import Component
from omni_convert.converter.files import processors
from omni_convert.formats.base import Format
from omni_convert.formats.bits import OUTPUT_DTYPE
from omni_convert.formats.header import Header, StoredTensor

PIECE_BYTES = 4 << 20
_E8M0_NAN = 255


def value_problems(component: Component, fmt: Format, layers: Iterable[str]) -> list[str]:
    """Every tensor of the quantized ``layers`` that holds what no conversion writes, with the first such place."""
    stored = {name: (tensor, shard) for name, tensor, shard in component.tensors()}
    names = [f"{layer}.{suffix}" for layer in sorted(layers) for suffix in fmt.suffixes]
    with ThreadPoolExecutor(processors()) as pool:
        tasks = [pool.submit(_problem, name, *stored[name], fmt) for name in names]
        return [problem for task in tasks if (problem := task.result())]


def _problem(name: str, tensor: StoredTensor, shard: Header, fmt: Format) -> str | None:
    is_weight = name.endswith(".weight")
    if is_weight and fmt.valid_codes is None:
        return None
    dtype = OUTPUT_DTYPE[tensor.spec.dtype]
    for start in range(0, tensor.spec.nbytes, PIECE_BYTES):
        count = min(PIECE_BYTES, tensor.spec.nbytes - start) // dtype.itemsize
        values = np.fromfile(shard.path, dtype, count, offset=tensor.start + start)
        good = _good_codes(values, fmt) if is_weight else _good_scales(values)
        if not good.all():
            first = int(np.argmin(good))
            place = np.unravel_index(start // dtype.itemsize + first, tensor.spec.shape)
            what = f"a code of {fmt.name}" if is_weight else "a finite positive scale"
            return f"{name}: holds {values[first]} at {[int(index) for index in place]}, expected {what}."
    return None


def _good_codes(codes: NDArray[np.uint8], fmt: Format) -> NDArray[np.bool_]:
    assert fmt.valid_codes is not None
    good: NDArray[np.bool_] = fmt.valid_codes[codes]
    return good


def _good_scales(scale: NDArray[np.float32] | NDArray[np.uint8]) -> NDArray[np.bool_]:
    """A float32, or an e8m0 byte."""
    if scale.dtype == np.uint8:
        good: NDArray[np.bool_] = scale != _E8M0_NAN
    else:
        good = np.isfinite(scale) & (scale > 0)
    return good
