"""Rules about what tensors hold: codes that are numbers, scales that are usable, and scales that the engine merges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.converter.contract_folder import Folder, Layer, Part, Place
from omni_convert.converter.contract_methods import COMPANIONS, METHODS
from omni_convert.converter.files import processors

PIECE_BYTES = 4 << 20
Count = Callable[[Folder, Part], int]
Problems = Callable[[Folder, Part], Iterator[str]]
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
}
_NAN, _E8M0_NAN = 0x7F, 255
_E2M1 = frozenset({0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C})
"""0, 0.5, 1, 1.5, 2, 3, 4 and 6 as e4m3 bytes; the sign bit is free."""
_AGAIN = "Convert again"


def _values(place: Place) -> NDArray[np.float64]:
    """A whole tensor of scales."""
    spec = place.tensor.spec
    stored = np.fromfile(place.path, _DTYPES[spec.dtype], spec.numel, offset=place.tensor.start)
    if spec.dtype == "BF16":
        stored = (stored.astype("<u4") << 16).view("<f4")
    values: NDArray[np.float64] = stored.astype(np.float64)
    return values


def _bad_codes(kind: str) -> bytes:
    """For every byte 1 if it is no weight of this kind, else 0."""
    if kind.startswith("mxfp4"):
        return bytes(code & 0x7F not in _E2M1 for code in range(256))
    return bytes(code & 0x7F == _NAN and kind != "int8" for code in range(256))


def _codes(folder: Folder, part: Part) -> Iterator[str]:
    bad = _bad_codes(part.kind)
    layers = [layer for layer in part.quantized if layer.dtype == METHODS[part.kind].weight]
    if not any(bad):
        return
    with ThreadPoolExecutor(processors()) as pool:
        for found in pool.map(lambda layer: _code_problem(layer, bad, part.kind), layers):
            if found:
                yield found


def _code_problem(layer: Layer, bad: bytes, kind: str) -> str | None:
    """The first code that is none; the weight is read piece by piece."""
    path, start = layer.tensors["weight"].path, layer.tensors["weight"].tensor.start
    left = layer.tensors["weight"].tensor.spec.nbytes
    with path.open("rb") as file:
        file.seek(start)
        while piece := file.read(min(PIECE_BYTES, left)):
            left -= len(piece)
            first = piece.translate(bad).find(1)
            if first >= 0:
                offset = file.tell() - len(piece) + first - start
                place = [int(index) for index in np.unravel_index(offset, layer.shape)]
                said = "is NaN" if piece[first] & 0x7F == _NAN else f"is no weight of {kind} (e2m1 values alone)"
                return f"{layer.name}.weight: the byte {piece[first]:#04x} at {place} {said}. {_AGAIN}"
    return None


def _scale_values(folder: Folder, part: Part) -> Iterator[str]:
    """Finite and positive, whatever the method; factors of activations survive BF16."""
    for layer in part.quantized:
        for suffix in layer.tensors.keys() & COMPANIONS:
            place = layer.tensors[suffix]
            dtype = place.tensor.spec.dtype
            if dtype not in _DTYPES:
                continue
            values = _values(place)
            good = values != _E8M0_NAN if dtype == "U8" else np.isfinite(values) & (values > 0)
            expected = "an e8m0 byte" if dtype == "U8" else "a finite positive number"
            if good.all() and suffix == "mul_scale":
                good = values.astype("<f4").view("<u4") % (1 << 16) == 0
                expected = "a number that BF16 holds, to which the engine casts it"
            if not good.all():
                first = int(np.argmin(good))
                yield f"{layer.name}.{suffix}: holds {values[first]:g} at [{first}], expected {expected}. {_AGAIN}"


def _stacked(part: Part) -> Mapping[str, list[Layer]]:
    """Parameters of several logical matrices, all of which hold codes."""
    return {
        param: layers
        for param, layers in part.grouped("param").items()
        if layers[0].built and layers[0].built.is_stacked and all(layer.is_quantized for layer in layers)
    }


def _several(part: Part) -> Mapping[str, list[Layer]]:
    """Those that are several tensors on disk."""
    return {param: layers for param, layers in _stacked(part).items() if len(layers) > 1}


def _merged(part: Part) -> Mapping[str, list[Layer]]:
    """Those whose scales the engine merges: all with int8, with fp8 per tensor those of several tensors."""
    if part.kind == "int8":
        return _stacked(part)
    per_tensor = part.kind in ("fp8", "fp8 static", "modelopt")
    return _several(part) if per_tensor else {}


def _fused_scales(folder: Folder, part: Part) -> Iterator[str]:
    for param, layers in _merged(part).items():
        found = _distinct(layers, "weight_scale")
        if len(found) < 2:
            continue
        names = ", ".join(layer.name for layer in layers)
        if part.kind == "int8":
            yield (
                f"{param}: the rows of {names} have {len(found)} scales, expected one: on CUDA the engine gives whole "
                "matrices of a fused layer the scales of its first rows, 11 to 30 % off, without a word. "
                f"{_AGAIN}, or --ignore it"
            )
        else:
            yield (
                f"{param}: {names} have the scales {', '.join(f'{value:g}' for value in found)}, expected one: the "
                f"engine rounds all codes again to the largest. {_AGAIN}"
            )


def _mul_scales(folder: Folder, part: Part) -> Iterator[str]:
    """One vector for all matrices of a fused layer."""
    for param, layers in _several(part).items():
        places = [layer.tensors["mul_scale"] for layer in layers if "mul_scale" in layer.tensors]
        vectors = [_values(place) for place in places if place.tensor.spec.dtype == "F32"]
        alike = all(np.array_equal(vectors[0], other) for other in vectors)
        if vectors and (not alike or len(vectors) < len(layers)):
            yield (
                f"{param}: {', '.join(layer.name for layer in layers)} differ in mul_scale, and the engine has one "
                f"input for all: the last wins silently, and Wan stops. {_AGAIN}"
            )


def _distinct(layers: Sequence[Layer], suffix: str) -> list[float]:
    places = [layer.tensors[suffix] for layer in layers if suffix in layer.tensors]
    values = [_values(place) for place in places if place.tensor.spec.dtype in ("F32", "BF16")]
    return [float(value) for value in np.unique(np.concatenate(values))] if values else []


def _count_mul_scales(folder: Folder, part: Part) -> int:
    return sum(any("mul_scale" in layer.tensors for layer in layers) for layers in _several(part).values())


def _count(folder: Folder, part: Part) -> int:
    return len(part.quantized)


CODES = "codes"
RULES: Mapping[str, tuple[str, Count, Problems]] = {
    "fused scales": (
        "layers by the scales that the engine merges", lambda folder, part: len(_merged(part)), _fused_scales,
    ),
    "fused factors": ("layers by mul_scale", _count_mul_scales, _mul_scales),
    CODES: (
        "layers code by code",
        lambda folder, part: 0 if part.kind == "int8" else len(part.quantized),  # all its bytes are weights
        _codes,
    ),
    "scale values": ("layers by what their scales hold", _count, _scale_values),
}  # fmt: skip
