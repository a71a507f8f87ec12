"""Safetensors headers: a strict reader that trusts no byte of the file, and the writer's layout.

File: 8 bytes little-endian length ``n`` | ``n`` bytes of JSON | tensor data. Every JSON entry is
``name: {"dtype", "shape", "data_offsets": [begin, end]}`` with offsets relative to the data; the data has
neither gaps nor overlaps. Source: the format section of the safetensors README.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.formats.strict_json import parse_object, read_object, read_text, read_value

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
ALIGNMENT = 8
_ENTRY = re.compile(r"\{[^{}]{0,4000}\}")  # 64 dimensions take 1,300 characters; more would only cost memory

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})


class TensorSpec(NamedTuple):
    """What a tensor is on disk: a safetensors dtype name and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor inside a file; ``start`` is its absolute byte offset."""

    spec: TensorSpec
    start: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """The parsed header of one safetensors file. ``sha256`` covers the length field and the JSON; ``mtime_ns`` is the
    file's time of last change when it was read."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    file_size: int
    mtime_ns: int
    sha256: str


def read_header(path: Path) -> Header:
    """Read and check the header of ``path``; the tensor data is not touched.

    Raises:
        OmniConvertError: the file is not a well-formed safetensors file; names the file and the tensor.
    """
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            size = stat.st_size
            prefix = file.read(8)
            raw = _read_json_bytes(path, file, prefix, size)
    except OSError as error:
        raise OmniConvertError(
            f"{path}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error
    data_start = 8 + len(raw)
    tensors, metadata = _parse_json(path, raw, data_start, size)
    _check_layout(path, tensors, data_start, size)
    return Header(
        path=path,
        tensors=tensors,
        metadata=metadata,
        file_size=size,
        mtime_ns=stat.st_mtime_ns,
        sha256=hashlib.sha256(prefix + raw).hexdigest(),
    )


def hash_header(path: Path) -> str | None:
    """sha256 of a safetensors file's length field and JSON, as in ``Header``; None if it has no whole header."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        raw = file.read(length) if len(prefix) == 8 and length <= MAX_HEADER_BYTES else b""
    return hashlib.sha256(prefix + raw).hexdigest() if raw and len(raw) == length else None


def encode_header(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length field and JSON for ``tensors`` laid out in the given order, padded with spaces to 8 bytes."""
    encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    entries = [f'"__metadata__":{encode(dict(metadata))}'] if metadata else []
    begin = 0
    for name, spec in tensors.items():
        end = begin + spec.nbytes
        shape = ",".join(map(str, spec.shape))
        entries.append(f'{encode(name)}:{{"dtype":"{spec.dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}')
        begin = end
    raw = f"{{{','.join(entries)}}}".encode(errors="backslashreplace")
    raw += b" " * (-len(raw) % ALIGNMENT)
    if len(raw) > MAX_HEADER_BYTES:
        raise OmniConvertError(
            f"the header of a shard with {len(tensors)} tensors takes {len(raw)} bytes; safetensors allows "
            f"{MAX_HEADER_BYTES}. Split the source into more shards."
        )
    return len(raw).to_bytes(8, "little") + raw


def aligned_order(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """``tensors`` in an order that keeps every tensor aligned to its own element size.

    Sizes that are a multiple of 8 bytes keep their order (so a weight and its scale stay neighbours and a file
    can be written and hashed front to back); the rest follow, widest element first.
    """
    odd = {name: spec for name, spec in tensors.items() if spec.nbytes % ALIGNMENT}
    tail = sorted(odd.items(), key=lambda item: -DTYPE_BITS[item[1].dtype])
    return {name: spec for name, spec in tensors.items() if name not in odd} | dict(tail)


def _read_json_bytes(path: Path, file: BinaryIO, prefix: bytes, size: int) -> bytes:
    if len(prefix) < 8:
        raise OmniConvertError(
            f"{path}: found {size} bytes, expected at least 8 (the header length). "
            "The file is truncated: download it again."
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or length < 2:
        raise OmniConvertError(
            f"{path}: its first 8 bytes claim a header of {length} bytes, expected 2 to {MAX_HEADER_BYTES}. "
            "This is not a safetensors file, or it is damaged: download it again."
        )
    if length > size - 8:
        raise OmniConvertError(
            f"{path}: the header claims {length} bytes but only {size - 8} follow. "
            "The file is truncated: download it again."
        )
    raw = file.read(length)
    if len(raw) != length:
        raise OmniConvertError(f"{path}: changed while it was read. Wait until it is written, then run again.")
    return raw


def _parse_json(path: Path, raw: bytes, data_start: int, size: int) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Every entry is checked as soon as it is read, so that a damaged header cannot take much memory."""

    def read(name: str, text: str, place: int) -> tuple[Any, int]:
        if name == "__metadata__":
            return _read_metadata(path, text, place)
        match = _ENTRY.match(text, place)
        if not match:
            raise _bad_tensor(path, name, text[place : place + 200], "an object with dtype, shape and data_offsets")
        entry = match.group()
        spec, begin = _check_entry(path, name, read_value(name, entry, 0)[0], size - data_start)
        if "-" in entry:  # -0, which is an integer for Python alone
            raise _bad_tensor(path, name, entry, "integers without a sign")
        return StoredTensor(spec=spec, start=data_start + begin), match.end()

    try:
        tensors = parse_object(raw.decode("utf-8"), read)
        metadata = tensors.pop("__metadata__", {})
        if _SURROGATE.search(raw):  # legal JSON, but half of a pair is no text
            for text in (*tensors, *metadata, *metadata.values()):
                text.encode()
    except (ValueError, RecursionError) as error:
        raise OmniConvertError(
            f"{path}: the header is not valid JSON ({str(error)[:200]}). The file is damaged: download it again."
        ) from error
    return tensors, metadata


def _read_metadata(path: Path, text: str, place: int) -> tuple[dict[str, str], int]:
    try:
        return read_object(text, place, read_text)
    except ValueError as error:
        raise OmniConvertError(
            f"{path}: __metadata__ does not map names to strings ({str(error)[:200]}). "
            "Write the file again with safetensors."
        ) from error


def _check_layout(path: Path, tensors: Mapping[str, StoredTensor], data_start: int, size: int) -> None:
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].spec.nbytes)):
        if tensor.start != end:
            kind = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise OmniConvertError(
                f"{path}: tensor {printable(name)} starts at byte {tensor.start - data_start} of the data, expected "
                f"{end - data_start}: it {kind}. The file is damaged: download it again."
            )
        end += tensor.spec.nbytes
    if end != size:
        raise OmniConvertError(
            f"{path}: the tensors end at byte {end - data_start} of the data, but the data has {size - data_start} "
            "bytes. The file is damaged: download it again."
        )


def _check_entry(path: Path, name: str, entry: Any, data_size: int) -> tuple[TensorSpec, int]:
    bad = partial(_bad_tensor, path, name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad(entry, "an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise bad(f"dtype {dtype!r}", f"one of {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or len(shape) > 64 or not _natural(shape):
        raise bad(f"shape {shape!r}", "a list of at most 64 non-negative integers")
    if math.prod(size for size in shape if size) >= 2**63:  # also beside a zero, which would hide it
        raise bad(f"shape {shape!r}", "fewer than 2**63 elements")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _natural(offsets):
        raise bad(f"data_offsets {offsets!r}", "two non-negative integers")
    begin, end = offsets
    if end > data_size:
        raise OmniConvertError(
            f"{path}: tensor {printable(name)} ends at byte {end} of the data, but the data has {data_size} bytes. "
            "The file is truncated or damaged: download it again."
        )
    spec = TensorSpec(dtype, tuple(shape))
    bits = spec.numel * DTYPE_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise bad(f"data_offsets {offsets!r}", f"{bits / 8:g} bytes for {dtype} {tuple(shape)}")
    return spec, begin


def _bad_tensor(path: Path, name: str, found: object, expected: str) -> OmniConvertError:
    return OmniConvertError(
        f"{path}: tensor {printable(name)} has {printable(found)}, expected {expected}. "
        "The file is damaged: download it again."
    )


def _natural(values: Iterable[object]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)
