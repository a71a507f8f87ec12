"""Model folders: which files hold the weights, and whether index and shards fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hostile.small import QWEN_CONFIG, qwen_shards, random, read_json, write_json, write_sharded, write_weights

from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.layout import INDEX_NAMES, WEIGHT_NAMES, is_pickle, read_shards
from omni_convert.formats.layout import read_json as read_product_json

INDEX = "diffusion_pytorch_model.safetensors.index.json"
FIRST, SECOND = (f"diffusion_pytorch_model-0000{place}-of-00002.safetensors" for place in (1, 2))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path, qwen_shards(), QWEN_CONFIG)


def refused(folder: Path, *expected: object) -> None:
    with pytest.raises(OmniConvertError) as caught:
        read_shards(folder)
    assert "\n" not in str(caught.value)
    for part in ["expected", *expected]:
        assert str(part) in str(caught.value)


def test_names_of_both_libraries() -> None:
    assert WEIGHT_NAMES == ("diffusion_pytorch_model.safetensors", "model.safetensors")
    assert INDEX_NAMES == (INDEX, "model.safetensors.index.json")


def test_shards_of_an_index(sharded: Path) -> None:
    shards = read_shards(sharded)
    assert [header.path.name for header in shards.headers] == [FIRST, SECOND]
    assert shards.index_name == INDEX
    assert shards.index_metadata["made_by"] == "hand"
    assert {name for name, _, _ in shards.tensors()} == {name for shard in qwen_shards() for name in shard}


@pytest.mark.parametrize("name", [*WEIGHT_NAMES, "of any name.safetensors"])
def test_single_file(tmp_path: Path, name: str) -> None:
    write_weights(tmp_path / name, {"a": random(2)})
    shards = read_shards(tmp_path)
    assert [header.path.name for header in shards.headers] == [name]
    assert shards.index_name is None


def test_standard_name_wins_over_a_variant(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.fp16.safetensors"):
        write_weights(tmp_path / name, {"a": random(2)})
    assert [header.path.name for header in read_shards(tmp_path).headers] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors.index.json", *WEIGHT_NAMES])
def test_two_sets_of_weights(sharded: Path, name: str) -> None:
    (sharded / name).write_bytes((sharded / INDEX).read_bytes())
    refused(sharded, sharded, "both", INDEX, name)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, sharded, "2 safetensors files", "no index", INDEX)


def test_no_weights(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path, "no weights", "model.safetensors")


def test_only_pickles(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, tmp_path / "pytorch_model.bin", "pickle", "save_pretrained")


@pytest.mark.parametrize(("name", "pickle"), [("a.bin", True), ("A.PT", True), ("a.ckpt", True), ("a.bin.txt", False)])
def test_is_pickle(name: str, pickle: bool) -> None:
    assert is_pickle(name) is pickle


def test_missing_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    refused(sharded, sharded / SECOND, "index names", "missing", "fetch")


def test_tensor_absent_from_the_shard_that_the_index_names(sharded: Path) -> None:
    index = read_json(sharded / INDEX)
    index["weight_map"]["img_in.weight"] = SECOND
    write_json(sharded / INDEX, index)
    with pytest.raises(OmniConvertError) as caught:
        read_shards(sharded)
    for part in (sharded / INDEX, "img_in.weight", SECOND, "download"):
        assert str(part) in str(caught.value)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    first, second = qwen_shards()
    write_sharded(tmp_path, [first, {**second, "img_in.weight": random(4, 4)}], QWEN_CONFIG)
    refused(tmp_path, "img_in.weight", FIRST, SECOND)


@pytest.mark.parametrize("value", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": None}], ids=str)
def test_index_without_weight_map(sharded: Path, value: Any) -> None:
    write_json(sharded / INDEX, value)
    refused(sharded, sharded / INDEX, "weight_map")


@pytest.mark.parametrize("metadata", [None, [], "x", 5])
def test_index_with_other_metadata(sharded: Path, metadata: Any) -> None:
    write_json(sharded / INDEX, read_json(sharded / INDEX) | {"metadata": metadata})
    refused(sharded, sharded / INDEX, "metadata")


def test_check_sees_every_file_before_it_is_opened(sharded: Path) -> None:
    (sharded / FIRST).write_bytes(b"no weights")
    seen = []

    def refuse(path: Path) -> None:
        seen.append(path.name)
        if path.name == FIRST:
            raise OmniConvertError("refused")

    with pytest.raises(OmniConvertError, match="refused"):
        read_shards(sharded, refuse)
    assert seen == [INDEX, FIRST]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"[" * 9_000, "not valid JSON"),
        (b"[" * 100_000, "100000 lists and objects"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not valid JSON"),
        (b"[]", "a JSON list"),
        (b"null", "a JSON NoneType"),
    ],
    ids=["empty", "no UTF-8", "quotes", "cut off", "deep", "very deep", "digits", "list", "null"],
)
def test_damaged_json(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(OmniConvertError) as caught:
        read_product_json(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OmniConvertError, match="No such file"):
        read_product_json(tmp_path / "absent.json")
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(OmniConvertError, match="100000001 bytes, expected at most 100000000"):
        read_product_json(huge)
