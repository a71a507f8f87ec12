"""Whole conversions through the Python API: the output's layout, bytes and values."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile.small import (
    QWEN_CONFIG,
    Stored,
    Tensor,
    qwen_shards,
    random,
    read_json,
    read_weights,
    snapshot,
    to_bits,
    to_values,
    write_json,
    write_model,
    write_pipeline,
    write_sharded,
    write_weights,
)

from omni_convert.converter.convert import Report, convert
from omni_convert.converter.output import PARTIAL_SUFFIX, OutputFile
from omni_convert.formats.errors import OmniConvertError, SourceError

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def to_int8(source: Path, out: Path, **options: Any) -> Report:
    return convert(source, out, method="int8", **options)


def dequantize(stored: dict[str, Stored], layer: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Values and scale of a layer, by the contract: ``w = weight * weight_scale``."""
    codes, scale = stored[f"{layer}.weight"], stored[f"{layer}.weight_scale"]
    assert (codes.dtype, scale.dtype) == ("I8", "F32")
    assert scale.shape == (codes.shape[0], 1)
    steps = np.frombuffer(scale.data, "<f4").reshape(scale.shape)
    return np.frombuffer(codes.data, "i1").reshape(codes.shape) * steps.astype(np.float64), steps


def check_weights(source: dict[str, Tensor], stored: dict[str, Stored]) -> int:
    """Every tensor of ``source`` is in ``stored``, unchanged or within half a step; returns how many were quantized."""
    layers = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    assert stored.keys() == source.keys() | {f"{layer}.weight_scale" for layer in layers}
    for name, tensor in source.items():
        layer = name.removesuffix(".weight")
        if layer in layers and name != layer:
            values, step = dequantize(stored, layer)
            assert np.all(np.abs(values - to_values(tensor)) <= (0.5 + 1e-4) * step)
        else:
            assert stored[name] == Stored(tensor.dtype, tensor.bits.shape, tensor.bits.tobytes())
    return len(layers)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_component_keeps_its_layout(tmp_path: Path, dtype: str) -> None:
    shards = qwen_shards(dtype)
    write_sharded(tmp_path / "model", shards, QWEN_CONFIG)
    report = to_int8(tmp_path / "model", tmp_path / "out", ignore=["img_mlp"])
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted([*(path.name for path in (tmp_path / "model").iterdir()), "omni_convert.json"])
    stored = [read_weights(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert report.layers == sum(check_weights(dict(part), found) for part, found in zip(shards, stored, strict=True))
    assert report.layers == 2 * 10
    index = read_json(tmp_path / "out" / INDEX)
    assert index["metadata"]["total_size"] == sum(len(item.data) for part in stored for item in part.values())
    assert index["weight_map"].keys() == stored[0].keys() | stored[1].keys()


def test_quantization_config_is_exactly_what_engines_accept(tmp_path: Path) -> None:
    write_sharded(tmp_path / "model", qwen_shards(), QWEN_CONFIG)
    to_int8(tmp_path / "model", tmp_path / "out", ignore=["to_qkv"])
    config = read_json(tmp_path / "out" / "config.json")
    ignored = ["img_in"]
    for block in range(2):
        parent = f"transformer_blocks.{block}"
        ignored += [f"{parent}.attn.{name}" for name in ("to_k", "to_q", "to_qkv", "to_v")] + [f"{parent}.img_mod.1"]
    assert config.pop("quantization_config") == {
        "quant_method": "int8",
        "is_checkpoint_int8_serialized": True,
        "activation_scheme": "dynamic",
        "ignored_layers": ignored,
    }
    assert config == QWEN_CONFIG


def test_output_is_read_by_safe_open(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = write_weights(tmp_path / "model.safetensors", qwen_shards("F32")[0])
    to_int8(path, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        layer = "transformer_blocks.0.attn.to_q"
        assert file.get_tensor(f"{layer}.weight").dtype == np.int8
        assert file.get_tensor(f"{layer}.weight_scale").shape == (16, 1)


@pytest.mark.parametrize("link", [False, True])
def test_pipeline_leaves_everything_else_as_it_is(tmp_path: Path, link: bool) -> None:
    source, out = write_pipeline(tmp_path / "model", second=True), tmp_path / "deep" / "out"
    before = snapshot(source)
    report = to_int8(source, out, link=link)
    assert snapshot(source) == before
    changed = {name for name, digest in before.items() if digest and snapshot(out).get(name) != digest}
    assert changed == {
        f"{name}/{file}"
        for name in ("transformer", "transformer_2")
        for file in ("config.json", INDEX, *(path.name for path in (source / name).glob("*.safetensors")))
    }
    assert snapshot(out).keys() == before.keys() | {"omni_convert.json"}
    assert report.layers == 2 * 2 * 12
    assert set(report.sqnr_db) >= {"transformer.transformer_blocks.0.attn.to_q"}
    same_inode = (source / "README.md").stat().st_ino == (out / "README.md").stat().st_ino
    assert same_inode == link


def test_component_option(tmp_path: Path) -> None:
    source, out = write_pipeline(tmp_path / "model"), tmp_path / "out"
    to_int8(source, out, components=["text_encoder"], target="omni-convert")
    assert snapshot(out / "transformer") == snapshot(source / "transformer")
    assert "quantization_config" in read_json(out / "text_encoder" / "config.json")
    wide = tmp_path / "wide"
    to_int8(source, wide, components=["transformer", "text_encoder"], target="omni-convert")
    assert snapshot(wide / "text_encoder") == snapshot(out / "text_encoder")
    assert "quantization_config" in read_json(wide / "transformer" / "config.json")


def test_transformers_model(minilm: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in minilm.rglob("*")}
    report = to_int8(minilm, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in minilm.rglob("*")} == before
    stored = read_weights(tmp_path / "out" / "model.safetensors")
    source = {
        name: Tensor(item.dtype, np.frombuffer(item.data, "<u4").reshape(item.shape))
        for name, item in read_weights(minilm / "model.safetensors").items()
        if item.dtype == "F32"
    }
    assert check_weights(source, {name: item for name, item in stored.items() if item.dtype != "I64"}) == report.layers
    assert report.layers >= 5 * 6
    assert report.mean_sqnr_db > 30
    copied = snapshot(minilm).keys() - {"config.json", "model.safetensors"}
    assert all(snapshot(tmp_path / "out")[name] == snapshot(minilm)[name] for name in copied)


def test_real_pipelines(qwen_image: Path, z_image: Path, tmp_path: Path) -> None:
    for source in (qwen_image, z_image):
        before, out = snapshot(source), tmp_path / source.name
        report = to_int8(source, out)
        assert snapshot(source) == before
        assert report.layers in (12 * 3, 7 * 4)
        for path in (source / "transformer").glob("*.safetensors"):
            tensors = {
                name: Tensor(item.dtype, np.frombuffer(item.data, "<u2").reshape(item.shape))
                for name, item in read_weights(path).items()
            }
            check_weights(tensors, read_weights(out / "transformer" / path.name))


def test_single_file(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "some model.safetensors", {"blocks.0.ff.weight": random(5, 7), "b": random(3)})
    (tmp_path / "config.json").write_text("{}")
    to_int8(path, tmp_path / "out")
    assert {item.name for item in (tmp_path / "out").iterdir()} == {path.name, "config.json", "omni_convert.json"}
    assert read_json(tmp_path / "out" / "config.json").keys() == {"quantization_config"}
    assert read_json(tmp_path / "out" / "omni_convert.json")["source"]["files"].keys() == {path.name}


def test_shapes_at_the_edges(tmp_path: Path) -> None:
    shapes = [(1, 1), (1, 64), (3, 65), (7, 1), (1, 3), (129, 63)]
    tensors = {f"blocks.{n}.ff.weight": random(*shape) for n, shape in enumerate(shapes)}
    tensors |= {"empty": random(0, 3), "odd": random(3), "scalar": random(), "zeros.weight": to_bits(np.zeros((2, 3)))}
    tensors |= {"mask": Tensor("BOOL", np.ones(5, "u1")), "ids": Tensor("I64", np.arange(3, dtype="<i8"))}
    write_model(tmp_path / "model", {}, tensors)
    to_int8(tmp_path / "model", tmp_path / "out")
    stored = read_weights(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if tensor.dtype == "BF16"}
    assert check_weights(plain, {name: stored[name] for name in stored if name not in ("mask", "ids")}) == 7
    assert stored["mask"].data == b"\1" * 5
    assert np.frombuffer(stored["zeros.weight_scale"].data, "<f4").tolist() == [1.0, 1.0]


def test_tensors_stay_aligned(tmp_path: Path) -> None:
    tensors = {f"blocks.{n}.ff.weight": random(n, 2 * n + 1) for n in (1, 3, 5)} | {"odd": random(3)}
    out = tmp_path / "out"
    to_int8(write_model(tmp_path / "model", {}, tensors), out)
    raw = (out / "diffusion_pytorch_model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    width = {"I8": 1, "BF16": 2, "F32": 4}
    for item in (value for name, value in json.loads(raw[8 : 8 + length]).items() if name != "__metadata__"):
        assert (8 + length + item["data_offsets"][0]) % width[item["dtype"]] == 0


def test_same_bytes_for_any_number_of_threads_and_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_convert.converter.convert.PIECE_BYTES", 256)  # many jobs even here
    source = write_pipeline(tmp_path / "model")
    outputs = []
    for run, threads in enumerate([1, 2, 2, 7, None]):
        to_int8(source, tmp_path / f"out{run}", threads=threads)
        outputs.append(snapshot(tmp_path / f"out{run}"))
    assert all(output == outputs[0] for output in outputs)
    monkeypatch.undo()
    to_int8(source, tmp_path / "large jobs")
    assert snapshot(tmp_path / "large jobs") == outputs[0]


def test_bytes_do_not_depend_on_where_the_source_lies(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "a" / "model")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for place in ("a", "b"):
        to_int8(tmp_path / place / "model", tmp_path / place / "out")
    assert snapshot(tmp_path / "a" / "out") == snapshot(tmp_path / "b" / "out")


def test_report(tmp_path: Path) -> None:
    source, out = write_pipeline(tmp_path / "model"), tmp_path / "out"
    report = to_int8(source, out, ignore=["txt_mlp"])
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert (report.out, report.method, report.layers, report.bytes_written) == (out, "int8", 2 * 10, size)
    assert report.bytes_before > report.bytes_after > report.bytes_before / 2
    worst = report.worst()
    assert [value for _, value in worst] == sorted(report.sqnr_db.values())[:3]
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [item["layer"] for item in data["worst_layers"]] == [name for name, _ in worst]
    assert 35 < data["mean_sqnr_db"] < 60


def test_sqnr_is_that_of_the_written_weights(tmp_path: Path) -> None:
    weight = random(33, 70, dtype="F32")
    report = to_int8(write_model(tmp_path / "model", {}, {"a.weight": weight}), tmp_path / "out")
    stored = read_weights(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    values = to_values(weight).astype(np.float64)
    noise = np.sum((dequantize(stored, "a")[0] - values) ** 2)
    assert report.sqnr_db["a"] == pytest.approx(10 * np.log10(np.sum(values**2) / noise), abs=1e-3)


def test_exact_layer_has_no_finite_sqnr(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {}, {"a.weight": to_bits(np.full((2, 3), 127.0))})
    report = to_int8(model, tmp_path / "out")
    assert report.sqnr_db == {"a": float("inf")}
    assert report.to_dict()["mean_sqnr_db"] is None


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_weight_is_named_and_nothing_is_left(
    tmp_path: Path, dtype: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni_convert.converter.convert.PIECE_BYTES", 512)  # the row is not in the first job
    values = np.ones((40, 30), np.float32)
    values[37, 11] = value
    source = write_model(tmp_path / "model", {}, {"a.weight": random(9, 9), "b.c.weight": to_bits(values, dtype)})
    before = snapshot(source)
    with pytest.raises(OmniConvertError) as caught:
        to_int8(source, tmp_path / "out", threads=2)
    for part in (source / "diffusion_pytorch_model.safetensors", "b.c.weight", "row 37", "column 11", "--ignore b.c"):
        assert str(part) in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert snapshot(source) == before
    assert to_int8(source, tmp_path / "out", ignore=["b.c"]).layers == 1


def test_source_that_becomes_shorter_during_the_run(tmp_path: Path) -> None:
    from omni_convert.converter.convert import Means, plan, run

    source = write_model(tmp_path / "model")
    planned = plan(source, method="int8")
    with (source / "diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.truncate(300)
    with pytest.raises(SourceError, match=r"has 300 bytes, expected \d+: it changed during the run"):
        run(planned, tmp_path / "out", Means(threads=2), progress=False, started=0.0)
    assert not (tmp_path / "out").exists()


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    for place in range(300):
        (source / f"{place}.txt").write_text(str(place))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        to_int8(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / "out" / "299.txt").read_text() == "299"


def test_source_file_with_the_name_of_an_unfinished_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_convert.converter.convert.PIECE_BYTES", 64)
    source = write_model(tmp_path / "model")
    (source / "data").write_bytes(b"x" * 128)
    (source / "data.partial").write_bytes(b"y")
    (source / f"data{PARTIAL_SUFFIX}").write_bytes(b"z")
    other_is_written = threading.Event()
    write = OutputFile.write

    def write_data_last(self: OutputFile, offset: int, data: bytes) -> None:
        if self.path.name == "data" and offset == 64:
            other_is_written.wait(5)
        write(self, offset, data)
        if self.path.name == "data.partial":
            other_is_written.set()

    monkeypatch.setattr(OutputFile, "write", write_data_last)
    to_int8(source, tmp_path / "out", threads=2)
    assert (tmp_path / "out" / "data").read_bytes() == b"x" * 128
    assert (tmp_path / "out" / "data.partial").read_bytes() == b"y"
    assert read_json(tmp_path / "out" / "omni_convert.json")["source"]["left_out"].keys() == {f"data{PARTIAL_SUFFIX}"}


def test_hard_links_from_the_hub_cache(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    blobs, cache = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "0a"
    cache.mkdir(parents=True)
    shutil.move(source, blobs)
    (blobs / "README.md").write_text("hello")
    for path in blobs.iterdir():
        (cache / path.name).symlink_to(f"../../blobs/{path.name}")
    to_int8(cache, tmp_path / "out", link=True)
    assert not (tmp_path / "out" / "README.md").is_symlink()
    assert (tmp_path / "out" / "README.md").samefile(blobs / "README.md")


def test_file_names_that_are_no_unicode(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    try:
        Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9.txt")).write_text("x")
    except OSError:
        pytest.skip("the file system takes only Unicode names")
    with pytest.raises(OmniConvertError, match=r"caf\\udce9\.txt'?: its name is not Unicode"):
        to_int8(source, tmp_path / "out")


def test_index_lists_what_the_source_index_forgot(tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "model", qwen_shards(), QWEN_CONFIG)
    index = read_json(source / INDEX)
    del index["weight_map"]["img_in.weight"]
    write_json(source / INDEX, index)
    to_int8(source, tmp_path / "out")
    assert "img_in.weight" in read_json(tmp_path / "out" / INDEX)["weight_map"]
