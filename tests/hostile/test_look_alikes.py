"""Names and numbers that are legal but strange must come through a conversion as they are, or be refused clearly."""

from __future__ import annotations

import json
import ntpath
import os
import posixpath
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile.malformed import BROKEN_JSON, FILE_NAMES, GOOD, INDEX, INDEXES, TENSOR_NAMES
from hostile.small import (
    QWEN_CONFIG,
    as_stored,
    entry,
    file_bytes,
    qwen_shards,
    random,
    read_folder,
    read_json,
    snapshot,
    write_json,
    write_model,
    write_pipeline,
    write_sharded,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_convert.converter.convert import convert
from omni_convert.converter.inspect import inspect
from omni_convert.converter.verify import verify
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.layout import read_index

LAYER = "blocks.0.ff.weight"
CLI = [sys.executable, "-m", "omni_convert"]


@pytest.mark.parametrize("name", TENSOR_NAMES.values(), ids=TENSOR_NAMES)
def test_tensor_is_copied_under_its_name(tmp_path: Path, name: str) -> None:
    strange = random(7, dtype="F32")
    source = write_model(tmp_path / "model", None, {LAYER: random(16, 24), name: strange})
    convert(source, tmp_path / "out", method="int8")
    found = read_folder(tmp_path / "out")
    assert found.keys() == {LAYER, LAYER + "_scale", name}
    assert found[name] == as_stored(strange)
    assert found[LAYER].dtype == "I8"
    assert verify(tmp_path / "out", source=source).ok


@pytest.mark.parametrize("name", ["blocks.0.ff.w\u0435ight", "blocks.0.ff.weight\u200b", "blocks.0.ff\uff0eweight"])
def test_what_only_looks_like_a_weight_is_kept(tmp_path: Path, name: str) -> None:
    pair = {LAYER: random(16, 24), name: random(16, 24, seed=1)}
    convert(write_model(tmp_path / "model", None, pair), tmp_path / "out", method="int8")
    found = read_folder(tmp_path / "out")
    assert found.keys() == {*pair, LAYER + "_scale"}
    assert found[name] == as_stored(pair[name])


def test_names_that_are_equal_once_normalized_stay_apart(tmp_path: Path) -> None:
    """Both are quantized, each with its own scale."""
    pair = {"caf\u00e9.weight": random(16, 24), "cafe\u0301.weight": random(16, 24, seed=1)}
    convert(write_model(tmp_path / "model", None, pair), tmp_path / "out", method="int8")
    found = read_folder(tmp_path / "out")
    assert found.keys() == {*pair, *(name + "_scale" for name in pair)}
    assert len({item.data for item in found.values()}) == 4


@pytest.mark.parametrize("name", TENSOR_NAMES.values(), ids=TENSOR_NAMES)
def test_names_cannot_garble_what_is_shown(tmp_path: Path, name: str) -> None:
    weight = f"{name}.weight"
    source = write_model(tmp_path / "model", None, {LAYER: random(16, 24), weight: random(16, 24), name: random(3)})
    convert(source, tmp_path / "out", method="int8")
    verified = verify(tmp_path / "out", source=source)
    edited = file_bytes(
        {weight + "_scale": GOOD, weight: entry("I8", [0, 8], 4, 4), LAYER: entry("F32", [1], 4, 8)}, bytes(8)
    )
    next((tmp_path / "out").glob("*.safetensors")).write_bytes(edited)
    broken = verify(tmp_path / "out", source=source)
    assert not broken.ok
    for shown in (verified, broken, inspect(tmp_path / "out")):
        for line in shown.to_text().splitlines():
            assert line.isprintable()
            assert len(line) < 3_000


@pytest.mark.parametrize("content", INDEXES.values(), ids=INDEXES)
def test_ambiguous_index(tmp_path: Path, content: bytes) -> None:
    source = write_sharded(tmp_path / "model", qwen_shards(), QWEN_CONFIG)
    (source / INDEX).write_bytes(content)
    assert str(source / INDEX) in refused(source)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
file_names = st.sampled_from([name for name in FILE_NAMES.values() if len(str(name)) < 400]) | st.text(max_size=6)
near_indexes = st.fixed_dictionaries(
    {
        "weight_map": st.dictionaries(st.text(max_size=4), file_names | st.just("a.safetensors"), max_size=3)
        | json_values
    },
    optional={"metadata": json_values, "a": json_values},
)


@settings(max_examples=400, deadline=None)
@given(near_indexes, st.booleans())
def test_random_index(tmp_path_factory: pytest.TempPathFactory, content: Any, ascii_only: bool) -> None:
    """Refused, or what it says, with the names of files that lie right beside it."""
    path = tmp_path_factory.getbasetemp() / "x.index.json"
    path.write_bytes(json.dumps(content, ensure_ascii=ascii_only).encode(errors="surrogatepass"))
    try:
        weight_map, _ = read_index(path)
    except OmniConvertError as error:
        assert str(error).isprintable()
        return
    assert weight_map == content["weight_map"]
    for name in weight_map.values():
        assert name.endswith(".safetensors")
        assert name.isprintable()
        assert name == posixpath.basename(name) == ntpath.basename(name)


@pytest.mark.parametrize("value", ["1e999999", "-1e999999", "NaN", "Infinity", "1e-999999", "-0.0", "9" * 4300])
def test_numbers_of_a_config_come_through(tmp_path: Path, value: str) -> None:
    """Mamba's configs hold ``Infinity``; what JSON cannot say, Python's ``json`` can."""
    source = write_model(tmp_path / "model")
    write_json(source / "config.json", f'{{"_class_name":"X","limit":{value}}}')
    convert(source, tmp_path / "out", method="int8")
    found, expected = read_json(tmp_path / "out" / "config.json"), read_json(source / "config.json")
    assert repr(found["limit"]) == repr(expected["limit"])


def test_of_a_name_twice_in_a_config_the_last_counts(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    write_json(source / "config.json", '{"_class_name":"X","eps":1,"eps":2}')
    convert(source, tmp_path / "out", method="int8")
    assert read_json(tmp_path / "out" / "config.json")["eps"] == 2


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("value", ["9" * 4301, "[" + "[]," * 1_000_000 + "[]]"], ids=["digits", "brackets"])
def test_values_that_nobody_means(tmp_path: Path, name: str, value: str) -> None:
    source = write_sharded(tmp_path / "model", qwen_shards(), QWEN_CONFIG)
    content = read_json(source / name)
    write_json(source / name, content | {"metadata": {"x": "HERE"}})
    path = source / name
    path.write_text(path.read_text().replace('"HERE"', value))
    assert str(path) in refused(source)


LINKS = {
    "file to itself": ("assets/loop", "loop"),
    "folder to itself": ("transformer", "transformer"),
    "folder to its parent": ("transformer", "."),
    "other folder to its parent": ("assets/up", ".."),
    "two folders to one another": ("assets/one", "two"),
    "component to another": ("text_encoder", "transformer"),
    "index to itself": (f"text_encoder/{INDEX}", INDEX),
    "config to itself": ("transformer/config.json", "config.json"),
    "pipeline index to itself": ("model_index.json", "model_index.json"),
    "index to a device": (f"text_encoder/{INDEX}", "/dev/zero"),
    "config to a device": ("transformer/config.json", "/dev/zero"),
    "pipeline index to a device": ("model_index.json", "/dev/zero"),
    "index out of the source": (f"text_encoder/{INDEX}", "../../elsewhere.json"),
}


@pytest.mark.parametrize(("place", "target"), LINKS.values(), ids=LINKS)
def test_links_that_lead_nowhere_good(tmp_path: Path, place: str, target: str) -> None:
    """In another process: a device or a circle could be followed for ever."""
    source = write_pipeline(tmp_path / "model")
    write_json(tmp_path / "elsewhere.json", "{")
    path = source / place
    if path.is_dir():
        path.rename(tmp_path / "away")
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    if target == "two":
        path.with_name("two").symlink_to("one")
    message = refused_by_command([str(source), str(tmp_path / "out")])
    assert str(source) in message
    assert not (tmp_path / "out").exists()


def test_source_that_is_a_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert str(tmp_path / "loop") in refused_by_command([str(tmp_path / "loop"), str(tmp_path / "out")])


def test_index_that_is_a_pipe(tmp_path: Path) -> None:
    source = write_pipeline(tmp_path / "model")
    os.mkfifo(source / "text_encoder" / INDEX)
    message = refused_by_command([str(source), str(tmp_path / "out")])
    assert str(source / "text_encoder" / INDEX) in message


@pytest.mark.parametrize("content", BROKEN_JSON.values(), ids=BROKEN_JSON)
def test_inspecting_under_a_broken_manifest(tmp_path: Path, content: bytes) -> None:
    source = write_model(tmp_path / "model")
    (source / "omni_convert.json").write_bytes(content)
    with pytest.raises(OmniConvertError, match=r"omni_convert\.json"):
        inspect(source)


def refused(source: Path) -> str:
    """The one printable paragraph that converting ``source`` must end in; nothing is written, nothing changed."""
    before, out = snapshot(source), source.parent / "out"
    with pytest.raises(OmniConvertError) as caught:
        convert(source, out, method="int8")
    assert str(caught.value).isprintable()
    assert snapshot(source) == before
    assert not out.exists()
    return str(caught.value)


def refused_by_command(arguments: list[Any]) -> str:
    """The same from the command line, within seconds."""
    result = subprocess.run([*CLI, "--method", "int8", *arguments], capture_output=True, text=True, timeout=20)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr
