"""Sources: the four layouts, the file names of both libraries, and everything that is no valid source."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hostile.small import (
    QWEN_CONFIG,
    qwen_shards,
    write_json,
    write_model,
    write_pipeline,
    write_sharded,
    write_weights,
)

from omni_convert.converter.checkpoint import find_components, open_checkpoint
from omni_convert.converter.hub_source import open_source
from omni_convert.formats.errors import OmniConvertError, UsageError


def write_cache(folder: Path, source: Path) -> Path:
    """``source`` as the Hub cache holds it: a snapshot of links into blobs."""
    blobs, snapshot = folder / "models--a--b" / "blobs", folder / "models--a--b" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    for place, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        relative = path.relative_to(source)
        shutil.copyfile(path, blobs / str(place))
        link = snapshot / relative
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(relative.parts) + 1), "blobs", str(place)))
    return snapshot


def refused(source: Path, *expected: object, components: tuple[str, ...] = ()) -> str:
    """The message of the one error that opening ``source`` must end in."""
    with pytest.raises(OmniConvertError) as caught:
        open_checkpoint(source, components)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert str(part) in message
    return message


def test_pipeline(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_pipeline(tmp_path / "model", second=True))
    assert checkpoint.kind == "pipeline"
    assert [component.name for component in checkpoint.components] == ["transformer", "transformer_2"]
    assert checkpoint.components[0].class_name == "QwenImageTransformer2DModel"
    everything = {path.relative_to(checkpoint.root).as_posix() for path in checkpoint.root.rglob("*") if path.is_file()}
    assert {name for name in everything if not name.startswith("transformer")} == checkpoint.others.keys()
    assert checkpoint.others["README.md"].size == (tmp_path / "model" / "README.md").stat().st_size


@pytest.mark.parametrize(
    ("wanted", "opened"),
    [(("text_encoder",), ["text_encoder"]), (("transformer", "text_encoder"), ["transformer", "text_encoder"])],
)
def test_component_option_replaces_the_default(tmp_path: Path, wanted: tuple[str, ...], opened: list[str]) -> None:
    checkpoint = open_checkpoint(write_pipeline(tmp_path / "model"), wanted)
    assert [component.name for component in checkpoint.components] == opened
    assert ("transformer/config.json" in checkpoint.others) == ("transformer" not in wanted)


def test_unknown_component_is_a_usage_error(tmp_path: Path) -> None:
    model = write_pipeline(tmp_path / "model")
    message = refused(model, "transfomer", "transformer", "text_encoder", components=("transfomer",))
    assert "image_encoder" not in message  # listed, but absent
    with pytest.raises(UsageError):
        open_checkpoint(model, ("transfomer",))
    with pytest.raises(UsageError, match="not a pipeline"):
        open_checkpoint(model / "transformer", ("transformer",))


def test_pipeline_without_diffusion_transformer_asks_for_a_component(tmp_path: Path) -> None:
    model = write_pipeline(tmp_path / "model")
    (model / "transformer").rename(model / "unet")
    write_json(model / "model_index.json", {"unet": ["diffusers", "X"], "text_encoder": ["transformers", "Y"]})
    refused(model, "--component", "unet", "text_encoder")
    assert open_checkpoint(model, ("unet",)).components[0].name == "unet"


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("sharded", [True, False])
def test_one_model_with_the_names_of_either_library(tmp_path: Path, stem: str, sharded: bool) -> None:
    if sharded:
        write_sharded(tmp_path, qwen_shards(), QWEN_CONFIG, stem)
    else:
        write_weights(tmp_path / f"{stem}.safetensors", qwen_shards()[0])
        write_json(tmp_path / "config.json", QWEN_CONFIG)
    checkpoint = open_checkpoint(tmp_path)
    (component,) = checkpoint.components
    assert checkpoint.kind == "model"
    assert len(component.shards.headers) == (2 if sharded else 1)
    assert sum(1 for _ in component.tensors()) == sum(map(len, qwen_shards()[: 2 if sharded else 1]))


def test_single_file(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "any name.safetensors", qwen_shards()[0])
    (tmp_path / "beside.txt").touch()
    checkpoint = open_checkpoint(path)
    assert (checkpoint.kind, checkpoint.others) == ("file", {})
    assert checkpoint.components[0].class_name == "unknown"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_class_name": "A", "architectures": ["B"], "model_type": "c"}, "A"),
        ({"architectures": ["B"], "model_type": "c"}, "B"),
        ({"architectures": None, "model_type": "c"}, "c"),
        ({}, "unknown"),
    ],
    ids=str,
)
def test_class_name(tmp_path: Path, config: dict[str, object], name: str) -> None:
    assert open_checkpoint(write_model(tmp_path, config)).components[0].class_name == name


def test_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path, write_pipeline(tmp_path / "model"))
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.root == snapshot
    original = open_checkpoint(tmp_path / "model")
    assert {name: file.size for name, file in checkpoint.others.items()} == {
        name: file.size for name, file in original.others.items()
    }
    assert open_checkpoint(snapshot / "transformer").components[0].shards.headers


def test_other_copies_of_the_weights_are_left_out(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    copies = [
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.fp16.safetensors",
        "pytorch_model.bin",
        "model.pt",
    ]
    for name in [*copies, "omni_convert.json", "notes.bin", "model.txt"]:
        (model / name).touch()
    checkpoint = open_checkpoint(model)
    assert checkpoint.left_out.keys() == {*copies, "omni_convert.json"}
    assert checkpoint.others.keys() == {"notes.bin", "model.txt"}


def test_find_components(tmp_path: Path) -> None:
    model = write_pipeline(tmp_path / "model", second=True)
    assert find_components(model) == ["text_encoder", "transformer", "transformer_2"]
    assert find_components(model / "transformer") == [""]


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "absent", tmp_path / "absent", "nothing")
    refused(tmp_path, tmp_path, "no weights", "model.safetensors")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.ckpt"])
def test_pickle_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused(tmp_path, tmp_path / name, "pickle", "safetensors", "save_pretrained")
    refused(tmp_path / name, tmp_path / name, "pickle", "safetensors")


def test_pickle_component_of_a_pipeline_is_refused(tmp_path: Path) -> None:
    model = write_pipeline(tmp_path / "model")
    for path in (model / "transformer").glob("*.safetensors*"):
        path.unlink()
    (model / "transformer" / "diffusion_pytorch_model.bin").touch()
    refused(model, model / "transformer" / "diffusion_pytorch_model.bin", "pickle")


def test_file_linked_from_outside(tmp_path: Path) -> None:
    model = write_pipeline(tmp_path / "model")
    (tmp_path / "secret").write_text("x")
    (model / "assets" / "link").symlink_to("../../secret")
    refused(model, model / "assets" / "link", tmp_path / "secret", "outside")


def test_shard_linked_from_outside(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "diffusion_pytorch_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (model / "diffusion_pytorch_model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(model, model / "diffusion_pytorch_model.safetensors", tmp_path / "elsewhere.safetensors", "outside")


def test_only_blobs_of_the_same_cache_may_be_linked(tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path, write_model(tmp_path / "model"))
    secret = tmp_path / "models--c--d" / "blobs" / "0"
    secret.parent.mkdir(parents=True)
    secret.touch()
    (snapshot / "link").symlink_to(secret)
    refused(snapshot, snapshot / "link", secret)


def test_link_within_the_source_is_followed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "a.txt").write_text("hello")
    (model / "b.txt").symlink_to("a.txt")
    assert {name: file.size for name, file in open_checkpoint(model).others.items()} == {"a.txt": 5, "b.txt": 5}


@pytest.mark.parametrize("target", ["..", "/", "assets"])
def test_linked_folder(tmp_path: Path, target: str) -> None:
    model = write_pipeline(tmp_path / "model")
    (model / "loop").symlink_to(target, target_is_directory=True)
    refused(model, model / "loop", "link to a folder")


def test_broken_link_and_special_file(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "gone").symlink_to("nowhere")
    refused(model, model / "gone", "broken link")
    (model / "gone").unlink()
    os.mkfifo(model / "pipe")
    refused(model, model / "pipe", "special file")


def test_unfinished_output_is_no_source(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / ".omni_convert.partial").touch()
    refused(model, model, "unfinished")


def test_a_name_alone_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the Hub's model of that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OmniConvertError, match=r"gpt2: found nothing there, .* without ORGANIZATION, such as gpt2, is"):
        open_source("gpt2")
    write_model(tmp_path / "gpt2")
    assert open_source("gpt2").root == tmp_path / "gpt2"
