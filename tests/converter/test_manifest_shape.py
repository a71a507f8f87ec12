"""Every key of a manifest that is lost or turned into something else is named, or does no harm where it is read."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile.small import random, write_pipeline, write_weights

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.converter.manifest_shape import load_manifest
from omni_convert.formats.layout import read_json
from omni_convert.hub.card import base_of, make_card
from omni_convert.hub.picture import draw_picture

WRONG = [None, True, -1, 2.5, 1e999, 10**400, "", "x", "../x", [], [1], {}, {"x": 1}]
REQUIRED = [
    "omni_convert", "recipe", "files", "source", "components", "cautions", "source.name", "source.kind",
    "source.files", "components.transformer.class", "components.transformer.weights",
    "components.transformer.bytes_before", "components.transformer.bytes_after", "components.transformer.tensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    omni_convert.convert(write_pipeline(folder / "model"), folder / "out", method="int8", ignore=["img_mlp"])
    return folder / "out"


@pytest.fixture
def edited(out: Path, tmp_path: Path) -> Path:
    return shutil.copytree(out, tmp_path / "out")


def places(value: object, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The address of every member; of many files or tensors only some."""
    if isinstance(value, dict):
        alike = bool(at) and at[-1] in ("files", "tensors")
        for key in list(value)[:: max(1, len(value) // 3) if alike else 1]:
            yield (*at, key)
            yield from places(value[key], (*at, key))


def changed(manifest: dict[str, Any], at: tuple[str, ...], *value: object) -> dict[str, Any]:
    """A copy with another value there, or none."""
    made = copy.deepcopy(manifest)
    inner: Any = made
    for key in at[:-1]:
        inner = inner[key]
    if value:
        inner[at[-1]] = value[0]
    else:
        del inner[at[-1]]
    return made


@pytest.mark.parametrize("value", [(), *((value,) for value in WRONG)], ids=lambda value: repr(value)[:20])
def test_every_key_that_is_lost_or_something_else(edited: Path, value: tuple[object, ...]) -> None:
    path = edited / "omni_convert.json"
    manifest = read_json(path)
    refused, addresses = 0, list(places(manifest))
    assert {at[-1] for at in addresses} >= {"sha256", "size", "bytes_before", "weights", "sqnr_db", "why", "kind"}
    for at in addresses:
        path.write_text(json.dumps(changed(manifest, at, *value)))
        try:
            made = load_manifest(path)
        except OmniConvertError as error:
            refused += 1
            assert str(error).startswith(f"{path}: "), error
            assert at[0] in str(error), error
            assert "expected" in str(error) or "found no" in str(error) or "recipe" in str(error), error
            continue
        omni_convert.verify(edited)
        if at[-1] == "sqnr_db":
            draw_picture(made)
        make_card(edited, "me/x", base=base_of(made, None))
    assert refused >= (len(REQUIRED) if not value else len(addresses) // 2)


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("value", [(), (None,), (-7,)], ids=repr)
def test_the_error_names_file_key_and_what_is_expected(edited: Path, key: str, value: tuple[object, ...]) -> None:
    path = edited / "omni_convert.json"
    path.write_text(json.dumps(changed(read_json(path), tuple(key.split(".")), *value)))
    said = f"{key} is {value[0]}, expected " if value else f"found no {key}"
    with pytest.raises(OmniConvertError) as caught:
        omni_convert.verify(edited)
    assert str(caught.value).startswith(f"{path}: {said}")


def test_names_lead_nowhere_else(edited: Path) -> None:
    path = edited / "omni_convert.json"
    manifest = read_json(path)
    for at in (("files", "../secret"), ("source", "files", "a//b"), ("components", "..")):
        path.write_text(json.dumps(changed(manifest, at, {})))
        with pytest.raises(OmniConvertError, match=r"has the name '.*', expected "):
            load_manifest(path)


def test_components_are_those_of_the_recipe(edited: Path) -> None:
    path = edited / "omni_convert.json"
    manifest = read_json(path)
    manifest["recipe"] = {"components": {"vae": {"method": "int8"}}}
    path.write_text(json.dumps(manifest))
    with pytest.raises(OmniConvertError, match="components has 'transformer', which recipe does not quantize"):
        load_manifest(path)
    manifest["recipe"] = {"method": "int8", "default_ignore": 7}
    path.write_text(json.dumps(manifest))
    with pytest.raises(OmniConvertError, match="recipe cannot be read: default_ignore is 7, expected true or false"):
        load_manifest(path)


def test_a_single_file_has_its_own_name(tmp_path: Path) -> None:
    shard = write_weights(tmp_path / "alice" / "mine.safetensors", {"blocks.0.attn.weight": random(32, 32)})
    omni_convert.convert(shard, tmp_path / "out", method="int8")
    assert load_manifest(tmp_path / "out" / "omni_convert.json")["source"]["name"] == "mine.safetensors"
