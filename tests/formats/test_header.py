"""Headers: reader and writer against the safetensors library, in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hostile.small import entry, file_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save

from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import (
    ALIGNMENT,
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    TensorSpec,
    aligned_order,
    encode_header,
    read_header,
)

NUMPY_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "F16": np.float16,
    "U32": np.uint32, "I32": np.int32, "F32": np.float32, "U64": np.uint64, "I64": np.int64, "F64": np.float64,
    "C64": np.complex64,
}  # fmt: skip
WHOLE_BYTES = sorted(dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0)

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
metadata = st.dictionaries(names, names, max_size=3)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
specs = st.builds(TensorSpec, st.sampled_from(WHOLE_BYTES), shapes)
tensors = st.dictionaries(names, specs, max_size=8)
fast = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, data: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    return path


@fast
@given(tensors, metadata)
def test_written_header_is_read_by_the_library(layout: dict[str, TensorSpec], extra: dict[str, str]) -> None:
    header = encode_header(layout, extra)
    data = bytes(place % 251 for place in range(sum(spec.nbytes for spec in layout.values())))
    assert len(header) % ALIGNMENT == 0
    found = dict(deserialize(header + data))
    assert {name: (item["dtype"], tuple(item["shape"])) for name, item in found.items()} == layout
    begin = 0
    for name, spec in layout.items():
        assert bytes(found[name]["data"]) == data[begin : begin + spec.nbytes]
        begin += spec.nbytes


@fast
@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(NUMPY_DTYPES)), shapes), max_size=8), metadata)
def test_header_of_the_library_is_read(
    tmp_path: Path, layout: dict[str, tuple[str, tuple[int, ...]]], extra: dict[str, str]
) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 2, shape).astype(NUMPY_DTYPES[dtype]) for name, (dtype, shape) in layout.items()}
    blob = save(arrays, metadata=extra or None)
    header = read_header(write(tmp_path, blob))
    assert {name: tuple(item.spec) for name, item in header.tensors.items()} == layout
    assert header.metadata == extra
    assert header.file_size == len(blob)
    for name, array in arrays.items():
        stored = header.tensors[name]
        assert blob[stored.start : stored.start + stored.spec.nbytes] == array.tobytes()


@fast
@given(tensors, metadata)
def test_reader_is_the_inverse_of_the_writer(
    tmp_path: Path, layout: dict[str, TensorSpec], extra: dict[str, str]
) -> None:
    encoded = encode_header(layout, extra)
    header = read_header(write(tmp_path, encoded + bytes(sum(spec.nbytes for spec in layout.values()))))
    assert {name: item.spec for name, item in header.tensors.items()} == layout
    assert header.metadata == extra


def test_bytes_of_a_small_header() -> None:
    encoded = encode_header({"a": TensorSpec("I8", (2, 3)), "é": TensorSpec("F32", (2, 1))}, {"format": "pt"})
    text = (
        '{"__metadata__":{"format":"pt"},"a":{"dtype":"I8","shape":[2,3],"data_offsets":[0,6]},'
        '"é":{"dtype":"F32","shape":[2,1],"data_offsets":[6,14]}}'
    ).encode()
    padded = text + b" " * (-len(text) % 8)
    assert encoded == len(padded).to_bytes(8, "little") + padded


def test_hash_covers_length_and_json(tmp_path: Path) -> None:
    import hashlib

    raw = file_bytes({"a": entry("U8", [1], 0, 1)})
    first, second = read_header(write(tmp_path, raw + b"\0")), read_header(write(tmp_path, raw + b"\1"))
    assert first.sha256 == second.sha256 == hashlib.sha256(raw).hexdigest()
    padded = file_bytes(json.dumps({"a": entry("U8", [1], 0, 1)}) + " ", b"\0")
    assert read_header(write(tmp_path, padded)).sha256 != first.sha256


def test_header_larger_than_the_library_allows_is_refused() -> None:
    with pytest.raises(OmniConvertError, match=f"safetensors allows {MAX_HEADER_BYTES}"):
        encode_header({"a": TensorSpec("U8", ())}, {"note": "x" * MAX_HEADER_BYTES})


@fast
@given(tensors)
def test_aligned_order_is_a_permutation_that_aligns(layout: dict[str, TensorSpec]) -> None:
    ordered = aligned_order(layout)
    assert ordered == layout
    begin = 0
    for spec in ordered.values():
        assert begin % max(DTYPE_BITS[spec.dtype] // 8, 1) == 0
        begin += spec.nbytes


@fast
@given(tensors)
def test_aligned_order_keeps_neighbours(layout: dict[str, TensorSpec]) -> None:
    whole = [name for name, spec in layout.items() if spec.nbytes % ALIGNMENT == 0]
    assert list(aligned_order(layout))[: len(whole)] == whole
    if len(whole) == len(layout):
        assert list(aligned_order(layout)) == list(layout)


@pytest.mark.parametrize(("dtype", "bits"), DTYPE_BITS.items())
def test_sizes(dtype: str, bits: int) -> None:
    assert TensorSpec(dtype, (8, 3)).nbytes == 3 * bits
    assert TensorSpec(dtype, ()).numel == 1
    assert TensorSpec(dtype, (0, 9)).nbytes == 0
