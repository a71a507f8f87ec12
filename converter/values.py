"""What the stored tensors of quantized layers may hold: codes that exist, scales that are finite and positive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.checkpoint import Component
from omni_convert.converter.files import processors
from omni_convert.converter.recipe import Recipe
from omni_convert.formats.base import Facts, Format
from omni_convert.formats.bits import OUTPUT_DTYPE
from omni_convert.formats.header import Header, StoredTensor

PIECE_BYTES = 4 << 20
_E8M0_NAN = 255


def value_problems(component: Component, recipe: Recipe, layers: Mapping[str, Format]) -> list[str]:
    """Every tensor of the quantized ``layers`` that holds what no conversion writes, with the first such place."""
    stored = {name: (tensor, shard) for name, tensor, shard in component.tensors()}
    names = [(f"{layer}.{suffix}", fmt) for layer, fmt in sorted(layers.items()) for suffix in fmt.suffixes]
    with ThreadPoolExecutor(processors()) as pool:
        tasks = [pool.submit(_problem, name, *stored[name], fmt) for name, fmt in names]
        problems = [problem for task in tasks if (problem := task.result())]
    for layer, fmt in sorted(layers.items()):
        facts = Facts(input_scale=recipe.input_scale(component.name, layer))
        problems += _known_problems(layer, stored, fmt, facts)
    return problems


def _known_problems(
    layer: str, stored: Mapping[str, tuple[StoredTensor, Header]], fmt: Format, facts: Facts
) -> Iterator[str]:
    """Tensors that do not depend on the weight."""
    weight = stored[f"{layer}.weight"][0].spec
    expected = fmt.whole(weight.shape, facts._replace(amax=1.0))
    for suffix in expected.keys() & {"mul_scale", "input_scale"}:
        tensor, shard = stored[f"{layer}.{suffix}"]
        found = np.fromfile(shard.path, OUTPUT_DTYPE[tensor.spec.dtype], tensor.spec.numel, offset=tensor.start)
        wrong = np.flatnonzero(found != expected[suffix].ravel())
        if wrong.size:
            first = int(wrong[0])
            yield f"{layer}.{suffix}: holds {found[first]} at [{first}], expected {expected[suffix].ravel()[first]}."


def _problem(name: str, tensor: StoredTensor, shard: Header, fmt: Format) -> str | None:
    is_weight = name.endswith(".weight")
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
    good: NDArray[np.bool_] = fmt.valid_codes[codes.view(np.uint8)]
    return good


def _good_scales(scale: NDArray[np.float32] | NDArray[np.uint8]) -> NDArray[np.bool_]:
    """A float32, or an e8m0 byte."""
    if scale.dtype == np.uint8:
        good: NDArray[np.bool_] = scale != _E8M0_NAN
    else:
        good = np.isfinite(scale) & (scale > 0)
    return good
