"""Malformed safetensors files: always our own error, at once, whatever the bytes."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile.malformed import DATA, ENTRIES, GOOD, LENGTHS, METADATA, PAIRS, TENSOR_NAMES, TEXTS
from hostile.small import entry, file_bytes
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import read_header
from omni_convert.formats.layout import read_index, read_json


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    return path


def refused(folder: Path, data: bytes) -> str:
    """The one paragraph, made of few printable characters, that reading ``data`` must end in, soon."""
    path = write(folder, data)
    started = time.perf_counter()
    with pytest.raises(OmniConvertError) as caught:
        read_header(path)
    assert time.perf_counter() - started < 5
    message = str(caught.value).removeprefix(str(path))
    assert message != str(caught.value)
    assert message.isprintable()
    assert len(message) < 700
    return message


@pytest.mark.parametrize("data", LENGTHS.values(), ids=LENGTHS)
def test_lengths(tmp_path: Path, data: bytes) -> None:
    refused(tmp_path, data)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_header_that_is_no_header(tmp_path: Path, text: bytes) -> None:
    refused(tmp_path, file_bytes(text, DATA))


@pytest.mark.parametrize("tensor", ENTRIES.values(), ids=ENTRIES)
def test_tensor_that_is_no_tensor(tmp_path: Path, tensor: Any) -> None:
    empty = isinstance(tensor, dict) and tensor.get("data_offsets") == [0, 0]
    assert "a" in refused(tmp_path, file_bytes({"a": tensor}, b"" if empty else DATA))


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_tensors_that_do_not_fit_together(tmp_path: Path, pair: tuple[Any, Any]) -> None:
    for first, second in (pair, pair[::-1]):
        message = refused(tmp_path, file_bytes({"one": first, "two": second}, DATA))
        assert "one" in message or "two" in message


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_metadata_that_is_no_metadata(tmp_path: Path, metadata: Any) -> None:
    assert "__metadata__" in refused(tmp_path, file_bytes({"__metadata__": metadata, "a": GOOD}, DATA))


@pytest.mark.parametrize("name", ["a" * 100_000, "\n\n\n", "\x1b[31m", "\0", "../../x", "\u202e", "\ud800", "😀"])
def test_names_cannot_garble_the_message(tmp_path: Path, name: str) -> None:
    refused(tmp_path, file_bytes({name: entry("U8", [9], 0, 9)}, DATA))
    refused(tmp_path, file_bytes({name: name}, DATA))
    escaped = json.dumps(name)
    refused(tmp_path, file_bytes(f"{{{escaped}:1,{escaped}:1}}", DATA))


def test_message_says_what_to_do(tmp_path: Path) -> None:
    message = refused(tmp_path, file_bytes({"a.weight": entry("BF16", [2, 2], 0, 8)}, DATA))
    for part in ("a.weight", "8", "4 bytes", "truncated", "download"):
        assert part in message


def test_many_tensors_are_read_in_time(tmp_path: Path) -> None:
    header = {f"t{number}": entry("U8", [0], 0, 0) for number in range(50_000)}
    started = time.perf_counter()
    assert len(read_header(write(tmp_path, file_bytes(header))).tensors) == 50_000
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("name", TENSOR_NAMES.values(), ids=TENSOR_NAMES)
def test_any_text_is_a_name(tmp_path: Path, name: str) -> None:
    """Also beside one that looks the same: names are compared code point by code point."""
    data = file_bytes({name: GOOD, "blocks.0.ff.weight": entry("U8", [0], 4, 4)}, DATA)
    header = read_header(write(tmp_path, data))
    assert {*header.tensors} == {name, "blocks.0.ff.weight"} == {*dict(deserialize(data))}
    refused(tmp_path, file_bytes({name: entry("U8", [5], 0, 5)}, DATA))


MANY = 4_000_000
DENSE = {
    "lists": b'{"a":[' + b"[]," * (MANY // 3) + b"[]]}",
    "objects": b'{"a":[' + b'{"":0},' * (MANY // 7) + b"0]}",
    "text": b'{"a":[' + '"\u044f",'.encode() * (MANY // 5) + b"0]}",
    "numbers": b'{"a":[' + b"1.5," * (MANY // 4) + b"0]}",
    "names": b"{" + b",".join(b'"%x":1' % number for number in range(MANY // 9)) + b"}",
    "metadata": b'{"__metadata__":{' + b",".join(b'"%x":""' % number for number in range(MANY // 10)) + b"}}",
    "metadata of lists": b'{"__metadata__":{"a":[' + b"[]," * (MANY // 3) + b"[]]}}",
    "tensors": b"{"
    + b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number for number in range(MANY // 53))
    + b"}",
    "dimensions": b'{"a":{"dtype":"U8","shape":[' + b"0," * (MANY // 2) + b'0],"data_offsets":[0,0]}}',
    "brackets in a name": b'{"' + b"[" * MANY + b'":1}',
}


@pytest.mark.parametrize("read", [read_header, read_json, read_index])
@pytest.mark.parametrize("text", DENSE.values(), ids=DENSE)
def test_a_few_megabytes_take_little_memory(tmp_path: Path, text: bytes, read: Callable[[Path], object]) -> None:
    path = write(tmp_path, file_bytes(text) if read is read_header else text)
    tracemalloc.start()
    with contextlib.suppress(OmniConvertError):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000


def test_folder_and_absent_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(OmniConvertError, match="cannot be read"):
            read_header(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
odd = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**63, 2**64, 1.0, True, None]), json_values)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F32", "F4", "I64", "??"]) | json_values,
        "shape": st.lists(odd, max_size=3) | json_values,
        "data_offsets": st.lists(odd, min_size=1, max_size=3) | json_values,
    }
)
near_headers = st.dictionaries(st.text(max_size=4), near_entries | json_values, max_size=3)
valid = file_bytes(
    {"__metadata__": {"format": "pt"}, "a.weight": entry("BF16", [2, 3], 0, 12), "b": entry("U8", [4], 12, 16)},
    bytes(16),
)
edits = st.lists(st.tuples(st.integers(0, len(valid) - 1), st.integers(0, 255)), min_size=1, max_size=4)
fuzz = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_any(folder: Path, data: bytes) -> None:
    """Either our error, or a header that the safetensors library reads to the same end."""
    try:
        header = read_header(write(folder, data))
    except OmniConvertError:
        return
    found = dict(deserialize(data))
    assert {name: (item["dtype"], tuple(item["shape"])) for name, item in found.items()} == {
        name: tuple(item.spec) for name, item in header.tensors.items()
    }


@fuzz
@given(st.binary(max_size=60), st.binary(max_size=20))
def test_random_bytes(tmp_path: Path, header: bytes, data: bytes) -> None:
    check_any(tmp_path, header + data)
    check_any(tmp_path, file_bytes(header, data))


@fuzz
@given(near_headers | json_values, st.binary(max_size=20))
def test_random_json(tmp_path: Path, header: Any, data: bytes) -> None:
    check_any(tmp_path, file_bytes(json.dumps(header).encode(), data))


@fuzz
@given(edits, st.integers(-20, 20))
@example([(8, 0x20)], 0)
def test_valid_file_with_some_bytes_changed(tmp_path: Path, changes: list[tuple[int, int]], growth: int) -> None:
    data = bytearray(valid)
    for place, value in changes:
        data[place] = value
    check_any(tmp_path, bytes(data[: len(data) + min(growth, 0)]) + bytes(max(growth, 0)))


@pytest.mark.parametrize(
    "header",
    [
        {"\ud800": GOOD},
        *(pytest.param({"__metadata__": extra, "a": GOOD}) for extra in ({"\udfff": "a"}, {"a": "\ud800"})),
    ],
    ids=["name", "key", "value"],
)
def test_half_a_surrogate_pair_is_no_text(tmp_path: Path, header: Any) -> None:
    data = file_bytes(header, DATA)
    with pytest.raises(SafetensorError):
        deserialize(data)
    refused(tmp_path, data)
