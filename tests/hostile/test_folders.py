"""Malformed folders: indexes, configs and pipeline indexes that are damaged, or mean harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile.malformed import BROKEN_JSON, FILE_NAMES, INDEX, SHARD
from hostile.small import (
    QWEN_CONFIG,
    Tensor,
    file_bytes,
    qwen_shards,
    random,
    read_json,
    snapshot,
    write_json,
    write_model,
    write_pipeline,
    write_sharded,
    write_weights,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_convert.converter.convert import convert
from omni_convert.converter.inspect import inspect
from omni_convert.formats.errors import OmniConvertError


def refused(source: Path, *expected: object, components: tuple[str, ...] = ()) -> str:
    """The one paragraph that converting ``source`` must end in, soon; nothing is written, nothing changed."""
    before, out = snapshot(source), source.parent / "out"
    started = time.perf_counter()
    with pytest.raises(OmniConvertError) as caught:
        convert(source, out, method="int8", components=components)
    assert time.perf_counter() - started < 10
    message = str(caught.value)
    for part in expected:
        assert str(part) in message
    assert snapshot(source) == before
    assert not out.exists()
    return message


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "model", qwen_shards(), QWEN_CONFIG)


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = read_json(folder / INDEX)
    change(index)
    write_json(folder / INDEX, index)


@pytest.mark.parametrize("file_name", FILE_NAMES.values(), ids=FILE_NAMES)
def test_index_that_points_elsewhere(sharded: Path, file_name: Any) -> None:
    write_weights(sharded.parent / SHARD, {"img_in.weight": random(4, 4)})
    change_index(sharded, lambda index: index["weight_map"].update({"img_in.weight": file_name}))
    message = refused(sharded, sharded / INDEX, "img_in.weight", "expected the plain name", "do not use it")
    assert message.isprintable()


def test_index_with_a_name_that_no_file_can_have(sharded: Path) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({"img_in.weight": "é" * 200 + ".safetensors"}))
    refused(sharded, sharded)


def test_file_names_of_an_index_cannot_garble_the_message(sharded: Path) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({"img_in.weight": "a\n\x1b[2J.safetensors"}))
    assert refused(sharded, sharded).isprintable()


def test_index_with_a_name_that_is_no_unicode(sharded: Path) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({"img_in.weight": "\ud800.safetensors"}))
    refused(sharded, sharded)


@pytest.mark.parametrize("content", BROKEN_JSON.values(), ids=BROKEN_JSON)
@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_broken_json(sharded: Path, name: str, content: bytes) -> None:
    (sharded / name).write_bytes(content)
    assert refused(sharded, sharded / name).isprintable()


@pytest.mark.parametrize("content", BROKEN_JSON.values(), ids=BROKEN_JSON)
def test_broken_pipeline_index(tmp_path: Path, content: bytes) -> None:
    source = write_pipeline(tmp_path / "model")
    (source / "model_index.json").write_bytes(content)
    refused(source, source / "model_index.json")


@pytest.mark.parametrize("value", [None, [], "x", {}, {"img_in.weight": 5}], ids=str)
def test_weight_map_of_another_kind(sharded: Path, value: Any) -> None:
    change_index(sharded, lambda index: index.update(weight_map=value))
    refused(sharded, sharded / INDEX)


@pytest.mark.parametrize(
    "name", ["a" * 5_000, "a\n\nError: all is well", "\x1b[2J\x1b[31m", "\u202egnp.exe"], ids=ascii
)
def test_tensor_names_cannot_garble_the_message(sharded: Path, name: str) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({name: SHARD}))
    message = refused(sharded)
    assert message.isprintable()
    assert len(message) < 1_000


def bad_weight(name: str) -> dict[str, Tensor]:
    weight = random(4, 4)
    weight.bits[1, 1] = 0x7F80
    return {name: weight}


@pytest.mark.parametrize(
    "tensors",
    [bad_weight("a\n\x1b[31m.weight"), {"a\n.weight": Tensor("I8", random(2, 4).bits.view("u1"))}],
    ids=["Inf", "quantized"],
)
def test_names_of_bad_tensors_cannot_garble_the_message(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    assert refused(write_model(tmp_path / "model", {}, {"b.weight": random(4, 4), **tensors})).isprintable()


@pytest.mark.parametrize("value", [5, {"a": 1}, True, "x", [5], [None], [["x"]]], ids=str)
def test_config_with_odd_architectures(tmp_path: Path, value: Any) -> None:
    source = write_model(tmp_path / "model", {"architectures": value, "_class_name": None})
    convert(source, tmp_path / "out", method="int8")
    assert len(inspect(tmp_path / "out").components) == 1


def test_texts_that_utf8_cannot_hold(sharded: Path, tmp_path: Path) -> None:
    (sharded / "config.json").write_text('{"note":"\\ud800","_class_name":"X"}')
    change_index(sharded, lambda index: index["metadata"].update(note="\udfff"))
    convert(sharded, tmp_path / "out", method="int8")
    assert read_json(tmp_path / "out" / "config.json")["note"] == "\ud800"
    assert read_json(tmp_path / "out" / INDEX)["metadata"]["note"] == "\udfff"


@pytest.mark.parametrize("name", ["..", "../other", "transformer/..", "/"])
def test_pipeline_component_that_leads_out(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "other")
    source = write_pipeline(tmp_path / "model")
    write_json(source / "model_index.json", read_json(source / "model_index.json") | {name: ["diffusers", "X"]})
    before = snapshot(tmp_path)
    with pytest.raises(OmniConvertError):
        convert(source, tmp_path / "out", method="int8", components=[name])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("value", [None, 5, "x", {}, [], ["diffusers"], [1, 2, 3], [None, None]], ids=str)
def test_pipeline_index_with_odd_values(tmp_path: Path, value: Any) -> None:
    source = write_pipeline(tmp_path / "model")
    write_json(source / "model_index.json", read_json(source / "model_index.json") | {"x": value, "scheduler": value})
    convert(source, tmp_path / "out", method="int8")
    assert (tmp_path / "out" / "model_index.json").read_bytes() == (source / "model_index.json").read_bytes()


@pytest.mark.parametrize("name", ["x" * 300, "é" * 200])
def test_pipeline_index_with_a_name_that_no_folder_can_have(tmp_path: Path, name: str) -> None:
    source = write_pipeline(tmp_path / "model")
    write_json(source / "model_index.json", read_json(source / "model_index.json") | {name: ["diffusers", "X"]})
    refused(source, source / "model_index.json")


def test_shard_that_is_a_folder(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    (sharded / SHARD).mkdir()
    refused(sharded, sharded / SHARD)


def test_shard_that_is_a_circle_of_links(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    (sharded / SHARD).symlink_to(SHARD)
    refused(sharded, sharded / SHARD)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, file_bytes({}), file_bytes({}, b"x"), file_bytes("[")], ids=ascii)
def test_single_damaged_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(OmniConvertError, match=r"x\.safetensors|would be quantized"):
        convert(path, tmp_path / "out", method="int8")
    assert os.listdir(tmp_path) == ["x.safetensors"]  # noqa: PTH208


@pytest.mark.parametrize(
    "manifest",
    [*({"files": files} for files in (5, [1], None, {"a\0b": 1}, {"x" * 300: 1}, {"transformer": {}})), []],
    ids=lambda value: ascii(value)[:30],
)
def test_overwriting_under_a_damaged_manifest(tmp_path: Path, manifest: Any) -> None:
    source, out = write_pipeline(tmp_path / "model"), tmp_path / "out"
    write_json(out / "transformer" / "note.txt", "mine")
    write_json(out / "omni_convert.json", manifest)
    if isinstance(manifest, dict):
        convert(source, out, method="int8", overwrite=True)
    else:
        refused_before = snapshot(out)
        with pytest.raises(OmniConvertError, match=r"omni_convert\.json"):
            convert(source, out, method="int8", overwrite=True)
        assert snapshot(out) == refused_before
    assert (out / "transformer" / "note.txt").exists()


def test_overwriting_where_a_folder_stands_in_the_way(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "model"), tmp_path / "out"
    (out / "config.json").mkdir(parents=True)
    with pytest.raises(OmniConvertError, match=r"config\.json"):
        convert(source, out, method="int8", overwrite=True)
    assert [path.name for path in out.iterdir()] == ["config.json"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(
    [
        "_class_name",
        "architectures",
        "model_type",
        "quantization_config",
        "compression_config",
        "weight_map",
        "metadata",
    ]
)
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", ["config.json", INDEX])
@fuzz
@given(st.dictionaries(keys | st.text(max_size=4), json_values, max_size=4))
def test_random_json(tmp_path_factory: pytest.TempPathFactory, name: str, content: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    source = write_sharded(folder / "model", qwen_shards(), QWEN_CONFIG)
    (source / name).write_text(json.dumps(content))
    if not isinstance(content.get("architectures", []), list):
        return  # has its own test
    try:
        convert(source, folder / "out", method="int8")
        inspect(folder / "out")
    except OmniConvertError:
        assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_small_file_linked_from_outside(sharded: Path, name: str) -> None:
    (sharded / name).rename(sharded.parent / "elsewhere.json")
    (sharded / name).symlink_to("../elsewhere.json")
    refused(sharded, sharded / name, sharded.parent / "elsewhere.json", "outside")


def test_shard_that_is_a_pipe(sharded: Path) -> None:
    """Opening it would wait for a writer for ever, so another process does."""
    (sharded / SHARD).unlink()
    os.mkfifo(sharded / SHARD)
    command = [sys.executable, "-m", "omni_convert", "inspect", str(sharded)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=4)
    assert result.returncode == 1
    assert str(sharded / SHARD) in result.stderr
