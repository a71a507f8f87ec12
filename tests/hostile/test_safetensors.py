"""Malformed safetensors files: always our own error, at once, whatever the bytes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hostile.small import entry, file_bytes
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.header import read_header

GOOD = entry("U8", [4], 0, 4)
DATA = b"\0" * 4

LENGTHS = {
    "empty": b"",
    "7 bytes": b"\0" * 7,
    "length 0": bytes(8),
    "length 1": b"\1" + bytes(7) + b"{",
    "length 2**63": bytes(7) + b"\x80" + b"{}",
    "length 2**64 - 1": b"\xff" * 8 + b"{}",
    "length over the limit": (100_000_001).to_bytes(8, "little") + b"{}",
    "one byte short": file_bytes({"a": GOOD})[:-1],
    "header without data": file_bytes({"a": GOOD}),
    "data cut off": file_bytes({"a": GOOD}, DATA[:3]),
    "data too long": file_bytes({"a": GOOD}, DATA + b"\0"),
    "data but no tensor": file_bytes({}, b"\0"),
}

TEXTS = {
    "no JSON": b"not json",
    "no UTF-8": b'{"\xff\xfe":1}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "cut off": b'{"a":{"dtype":"U8"',
    "two values": b"{}{}",
    "trailing comma": b'{"a":1,}',
    "trailing zeros": b"{}\0\0\0\0\0\0",
    "comment": b"{} // x",
    "control character": b'{"a\nb":1}',
    "deep list": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nearly too deep": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    "list": b"[]",
    "string": b'"{}"',
    "number": b"12",
    "null": b"null",
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,Infinity]}}',
    "-Infinity": b'{"a":-Infinity}',
    "number of 10,000 digits": b'{"a":' + b"9" * 10_000 + b"}",
    "duplicate tensor": f'{{"a":{json.dumps(GOOD)},"a":{json.dumps(GOOD)}}}'.encode(),
    "duplicate field": b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
    "duplicate metadata": b'{"__metadata__":{},"__metadata__":{}}',
}

ENTRIES = {
    "null": None,
    "number": 1,
    "list": ["U8", [4], [0, 4]],
    "empty": {},
    "no dtype": {"shape": [4], "data_offsets": [0, 4]},
    "no shape": {"dtype": "U8", "data_offsets": [0, 4]},
    "no offsets": {"dtype": "U8", "shape": [4]},
    "more fields": GOOD | {"extra": 1},
    "dtype of no kind": entry("Q4_K", [4], 0, 4),
    "dtype in lower case": entry("u8", [4], 0, 4),
    "dtype null": entry(None, [4], 0, 4),
    "dtype list": entry(["U8"], [4], 0, 4),
    "dtype object": entry({"U8": 1}, [4], 0, 4),
    "shape null": entry("U8", None, 0, 4),
    "shape number": entry("U8", 4, 0, 4),
    "shape text": entry("U8", "4", 0, 4),
    "shape of text": entry("U8", ["4"], 0, 4),
    "shape negative": entry("U8", [-4], 0, 4),
    "shape negative twice": entry("U8", [-2, -2], 0, 4),
    "shape bool": entry("U8", [True, 4], 0, 4),
    "shape float": entry("U8", [4.0], 0, 4),
    "shape null inside": entry("U8", [None], 0, 4),
    "shape nested": entry("U8", [[4]], 0, 4),
    "shape wrong": entry("U8", [5], 0, 4),
    "shape of a wider dtype": entry("F32", [4], 0, 4),
    "shape overflows to the right size": entry("U8", [2**62, 4, 2**62, 4], 0, 0),
    "shape 2**63": entry("U8", [2**63], 0, 4),
    "shape 2**64 + 4": entry("U8", [2**64 + 4], 0, 4),
    "shape overflows beside a zero": entry("U8", [2**62, 2**62, 2**62, 0], 0, 0),
    "shape with 100,000 dimensions": entry("U8", [1] * 100_000, 0, 4),
    "half a byte": entry("F4", [7], 0, 4),
    "offsets null": {"dtype": "U8", "shape": [4], "data_offsets": None},
    "offsets of one": {"dtype": "U8", "shape": [4], "data_offsets": [4]},
    "offsets of three": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]},
    "offsets object": {"dtype": "U8", "shape": [4], "data_offsets": {"0": 0, "1": 4}},
    "offsets reversed": entry("U8", [4], 4, 0),
    "offsets negative": entry("U8", [4], -4, 0),
    "offsets bool": entry("U8", [1], False, True),
    "offsets float": entry("U8", [4], 0.0, 4.0),
    "offsets out of range": entry("U8", [8], 0, 8),
    "offsets huge": entry("U8", [4], 2**63, 2**63 + 4),
    "offsets far out": entry("U8", [4], 2**62, 2**62 + 4),
    "gap at the start": entry("U8", [3], 1, 4),
    "gap at the end": entry("U8", [3], 0, 3),
}

PAIRS = {
    "overlap": (entry("U8", [3], 0, 3), entry("U8", [3], 2, 4 + 1)),
    "same bytes": (GOOD, GOOD),
    "one inside the other": (GOOD, entry("U8", [2], 1, 3)),
    "gap": (entry("U8", [1], 0, 1), entry("U8", [2], 2, 4)),
    "empty tensor in the middle": (GOOD, entry("U8", [0], 2, 2)),
    "empty tensor beyond the end": (GOOD, entry("U8", [0], 5, 5)),
}

METADATA = {
    "null": None,
    "list": ["a"],
    "text": "pt",
    "number inside": {"a": 1},
    "null inside": {"a": None},
    "object inside": {"a": {}},
    "looks like a tensor": GOOD,
}


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
