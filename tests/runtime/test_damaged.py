"""What is wrong with the files or the flag of a converted model is said whoever loads it: ``load`` or the libraries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kinds import KINDS
from loaded import LAYERS, loaders, refused, stored
from safetensors.torch import save_file

import omni_convert
from omni_convert import OmniConvertError

library = pytest.mark.parametrize("name", LAYERS)
Edit = Callable[[dict[str, str]], object]

FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda raw: raw[:-1], r"tensor .* ends at byte \d+ of the data, but the data has \d+ bytes"),
    "longer": (lambda raw: raw + b"\0", r"the tensors end at byte \d+ of the data, but the data has \d+ bytes"),
    "half a header": (lambda raw: raw[:100], r"claims \d+ bytes but only 92 follow"),
    "empty": (lambda raw: b"", "found 0 bytes, expected at least 8"),
    "not JSON": (lambda raw: raw[:8] + b"x" + raw[9:], "the header is not valid JSON"),
    "a web page": (lambda raw: b"<!DOCTYPE html>" * 9, r"claim a header of \d+ bytes, expected 2 to"),
    "a pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", r"claim a header of \d+ bytes"),
}


def copied(source: Path, tmp_path: Path, *, is_single: bool = False) -> Path:
    folder = tmp_path / "copied"
    if not is_single:
        return Path(shutil.copytree(source, folder))
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    index = next(source.glob("*.index.json")).name
    save_file(stored(source), folder / index.removesuffix(".index.json"), {"format": "pt"})
    return folder


@library
@pytest.mark.parametrize("is_single", [True, False], ids=["single", "sharded"])
@pytest.mark.parametrize("damage", FILES)
def test_files(name: str, is_single: bool, damage: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = copied(request.getfixturevalue(name), tmp_path, is_single=is_single)
    file = max(folder.glob("*.safetensors"))
    change, message = FILES[damage]
    file.write_bytes(change(file.read_bytes()))
    refused(name, folder, f"{file}: .*{message}")


@library
def test_a_missing_shard(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = copied(request.getfixturevalue(name), tmp_path)
    file = max(folder.glob("*.safetensors"))
    file.unlink()
    for load in loaders(name):  # Diffusers looks, and names it, before it reads anything
        with pytest.raises((OmniConvertError, FileNotFoundError), match=file.name):
            load(folder)


@library
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda places, layer: places.update({"x.weight": places[layer]}), "places tensor x.weight in"),
        (lambda places, layer: places.update({layer: min({*places.values()} - {places[layer]})}), "does not hold it"),
    ],
)
def test_an_index(
    name: str, edit: Callable[..., object], message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = copied(request.getfixturevalue(name), tmp_path)
    path = next(folder.glob("*.index.json"))
    index = json.loads(path.read_text())
    edit(index["weight_map"], f"{LAYERS[name]}.weight")
    path.write_text(json.dumps(index))
    refused(name, folder, f"{path}: .*{message}")
    for text, problem in (
        (path.read_text()[:-1], "is not valid JSON"),
        ("{}", "found no weight_map"),
        ("[]", ""),
        (json.dumps(index | {"weight_map": {"a": 3}}), ""),
    ):
        path.write_text(text)
        refused(name, folder, f"{path}: .*{problem}")


@library
def test_files_of_others_are_left_to_the_library(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = copied(request.getfixturevalue(f"{name}_plain"), tmp_path, is_single=name == "qwen")
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    _, load = loaders(name)
    with pytest.raises(Exception, match=r"Unable to load weights|incomplete metadata") as caught:
        load(folder)
    assert not isinstance(caught.value, OmniConvertError)


@library
@pytest.mark.parametrize("kind", [kind for kind, fmt in KINDS.items() if fmt.config(()).keys() & {fmt.serialized_flag}])
def test_a_missing_flag(
    name: str, kind: str, request: pytest.FixtureRequest, quantize: Callable[..., Path], tmp_path: Path
) -> None:
    """Transformers has methods of its own called fp8, mxfp8 and mxfp4, of configs without it; it would load noise."""
    source = request.getfixturevalue(f"{name}_plain")
    folder = quantize(source, tmp_path / "converted", fmt=KINDS[kind])
    flag = str(KINDS[kind].serialized_flag)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][flag] = False
    path.write_text(json.dumps(config))
    refused(name, folder, f"{flag} is False")
    del config["quantization_config"][flag]
    path.write_text(json.dumps(config))
    ours, theirs = loaders(name)
    with pytest.raises(
        OmniConvertError, match=rf"{path}: .*has no {flag}, but the tensors are quantized .*so the config"
    ):
        ours(folder)
    if (name, kind) == ("bert", "fp8 block"):  # the one that is theirs too
        assert theirs(folder).encoder.layer[0].output.dense.weight.isfinite().all()
        return
    with pytest.raises(OmniConvertError, match=f"{flag}.*expected true"):
        theirs(folder)


@pytest.mark.parametrize("found", [["NewModel"], "BertModel", ["pipeline"], [3]], ids=str)
def test_a_class_that_the_library_lacks(
    bert_plain: Path, quantize: Callable[..., Path], found: object, tmp_path: Path
) -> None:
    """A model without its head would load in its place."""
    folder = quantize(bert_plain, tmp_path / "converted", fmt=KINDS["int8"])
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": found}))
    with pytest.raises(OmniConvertError, match=rf"{path}: architectures is .*expected a list with a model class of"):
        omni_convert.load(folder)
