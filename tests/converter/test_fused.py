"""Layers that an engine fuses: one scale where it reads only one, quantized or kept together, wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile.small import QWEN_CONFIG, Tensor, qwen_shards, random, read_json, read_weights, to_values, write_sharded
from numpy.typing import NDArray

from omni_convert import OmniConvertError, UsageError, convert, plan, verify
from omni_convert.converter.convert import Report
from omni_convert.converter.show import plan_dict, plan_text, report_text

BLOCK = "transformer_blocks.0"
QUERIES = [f"{BLOCK}.attn.to_{name}" for name in "qkv"]
ADDED = [f"{BLOCK}.attn.add_{name}_proj" for name in "qkv"]
ALONE = f"{BLOCK}.attn.to_out.0"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two blocks; the queries, keys and values of one are in three shards, and of very different magnitude."""
    first, second = (dict(shard) for shard in qwen_shards(width=64))
    for place, layer in enumerate([*QUERIES, *ADDED]):
        values = to_values(first[f"{layer}.weight"]) * np.float32(2**place)
        first[f"{layer}.weight"] = Tensor("BF16", (values.view("<u4") >> 16).astype("<u2"))
    third = {f"{QUERIES[2]}.weight": first.pop(f"{QUERIES[2]}.weight")}
    second[f"{QUERIES[0]}.weight"] = first.pop(f"{QUERIES[0]}.weight")
    return write_sharded(tmp_path / "model", [first, second, third], QWEN_CONFIG)


def values(folder: Path) -> dict[str, NDArray[Any]]:
    """Every tensor of a folder: weights of the source as numbers, codes and scales as they are."""
    found = {name: item for path in folder.glob("*.safetensors") for name, item in read_weights(path).items()}
    dtypes = {"BF16": "<u2", "F32": "<f4", "I8": "i1", "F8_E4M3": "u1"}
    arrays = {name: np.frombuffer(item.data, dtypes[item.dtype]).reshape(item.shape) for name, item in found.items()}
    return {name: to_values(Tensor("BF16", a)) if a.dtype == np.uint16 else a for name, a in arrays.items()}


def amax(weights: Mapping[str, NDArray[Any]], layers: list[str]) -> np.float32:
    largest: np.float32 = max(np.abs(weights[f"{layer}.weight"]).max() for layer in layers)
    return largest


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("quality", ["fast", "balanced"])
def test_int8_has_one_scale_per_group(
    source: Path, tmp_path: Path, threads: int, quality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni_convert.converter.convert.PIECE_BYTES", 1024)  # many jobs even here
    convert(source, tmp_path / "out", method="int8", threads=threads, quality=quality)
    weights, found = values(source), values(tmp_path / "out")
    for group in (QUERIES, ADDED):
        scale = amax(weights, group) / np.float32(127)
        for layer in group:
            assert found[f"{layer}.weight_scale"].shape == (64, 1)
            assert np.array_equal(found[f"{layer}.weight_scale"], np.full((64, 1), scale))
            assert np.array_equal(found[f"{layer}.weight"], np.round(weights[f"{layer}.weight"] / scale).astype("i1"))
    assert len(np.unique(found[f"{ALONE}.weight_scale"])) > 32
    assert verify(tmp_path / "out", source=source).ok


def test_all_scales_for_engines_that_read_them(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "own", method="int8", fused_scale="per-channel")
    convert(source, tmp_path / "ours", method="int8", target="omni-convert")
    weights, own, ours = values(source), values(tmp_path / "own"), values(tmp_path / "ours")
    for layer in QUERIES:
        rows = np.abs(weights[f"{layer}.weight"]).max(axis=1, keepdims=True) / np.float32(127)
        assert np.array_equal(own[f"{layer}.weight_scale"], rows)
        assert np.array_equal(ours[f"{layer}.weight_scale"], rows)


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_fp8_per_weight_has_one_scale_per_group(source: Path, tmp_path: Path, scheme: str) -> None:
    weights = values(source)
    layers = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    inputs = dict.fromkeys(layers, 1.0) if scheme == "static" else None
    convert(source, tmp_path / "out", method="fp8", activation_scheme=scheme, input_scales=inputs)
    found = values(tmp_path / "out")
    for group in (QUERIES, ADDED, [ALONE]):
        for layer in group:
            assert found[f"{layer}.weight_scale"].tolist() == [amax(weights, group) / np.float32(448)]


def test_gate_and_up_in_one_tensor_have_one_scale(tmp_path: Path) -> None:
    layer = "transformer_blocks.0.ff.linear_in"
    tensors = {f"{layer}.weight": random(8, 32), "transformer_blocks.0.ff.linear_out.weight": random(32, 4)}
    model = write_sharded(tmp_path / "model", [tensors], {"_class_name": "Flux2Transformer2DModel"})
    convert(model, tmp_path / "out", method="int8")
    weights, found = values(model), values(tmp_path / "out")
    assert np.array_equal(found[f"{layer}.weight_scale"], np.full((8, 1), amax(weights, [layer]) / np.float32(127)))
    assert len(np.unique(found["transformer_blocks.0.ff.linear_out.weight_scale"])) > 16


@pytest.mark.parametrize(("rows", "is_kept"), [(32, False), (48, True), (64, False)])
def test_gate_and_up_in_one_tensor_are_cut_between_blocks(tmp_path: Path, rows: int, is_kept: bool) -> None:
    tensors = {f"{BLOCK}.ff.linear_in.weight": random(rows, 32), f"{BLOCK}.ff.linear_out.weight": random(32, 32)}
    model = write_sharded(tmp_path / "model", [tensors], {"_class_name": "Flux2Transformer2DModel"})
    planned = plan(model, method="fp8", block_size=(16, 16))
    decisions = {tensor.layer: tensor.decision for tensor in planned.tensors()}
    assert (decisions[f"{BLOCK}.ff.linear_in"].format is None) is is_kept
    assert decisions[f"{BLOCK}.ff.linear_out"].format is not None
    if is_kept:
        assert (
            decisions[f"{BLOCK}.ff.linear_in"].reason == "engines fuse or cut it, and blocks of 16 rows would not fit"
        )


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_damage_is_named_where_it_is(source: Path, tmp_path: Path, method: str) -> None:
    shard = source / "diffusion_pytorch_model-00003-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-2:] = (0x7FC0).to_bytes(2, "little")
    shard.write_bytes(data)
    with pytest.raises(OmniConvertError, match=r"attn\.to_v\.weight holds NaN or Inf at row 63, column 63") as caught:
        convert(source, tmp_path / "out", method=method)
    assert shard.name in str(caught.value)
    assert "--ignore transformer_blocks.0.attn.to_qkv" in str(caught.value)


def mean_db(report: Report, layers: list[str]) -> float:
    return float(np.mean([report.sqnr_db[layer] for layer in layers]))


def test_what_sharing_costs_is_said(source: Path, tmp_path: Path) -> None:
    shared = convert(source, tmp_path / "shared", method="int8")
    own = convert(source, tmp_path / "own", method="int8", fused_scale="per-channel")
    fused = [f"transformer_blocks.{n}.{layer.split('.', 2)[2]}" for n in (0, 1) for layer in [*QUERIES, *ADDED]]
    cost = mean_db(own, fused) - mean_db(shared, fused)
    assert cost > 5
    assert shared.shared_scale_layers == len(fused)
    assert shared.shared_scale_db == pytest.approx(cost, abs=0.3)
    assert own.shared_scale_layers == 0
    assert own.shared_scale_db is None
    assert f"cost {shared.shared_scale_db:.1f} dB on 12 fused layers (mean)" in report_text(shared)
    assert "shared scales" not in report_text(own)
    tensors = read_json(tmp_path / "shared" / "omni_convert.json")["components"][""]["tensors"]
    assert {name.removesuffix(".weight") for name, entry in tensors.items() if "shared_scale_db" in entry} == set(fused)


def test_what_sharing_will_cost_normal_weights(tmp_path: Path) -> None:
    tensors = {f"{layer}.weight": random(512, 256, seed=place) for place, layer in enumerate([*QUERIES, ALONE])}
    model = write_sharded(tmp_path / "model", [tensors], QWEN_CONFIG)
    planned = plan(model, method="int8")
    expected = plan_dict(planned, 0, 0)["shared_scales"]
    assert (expected["layers"], expected["groups"]) == (QUERIES, 1)
    cost = convert(model, tmp_path / "out", method="int8").shared_scale_db
    assert expected["expected_db"] == pytest.approx(cost, abs=0.5)
    assert f"3 layers in 1 fused groups: about {expected['expected_db']:.1f} dB less" in plan_text(planned, 0, 0)
    assert plan_dict(plan(model, method="int8", fused_scale="per-channel"), 0, 0)["shared_scales"] is None
    assert plan_dict(plan(model, method="fp8"), 0, 0)["shared_scales"] is None


def test_other_formats_have_no_such_choice(source: Path) -> None:
    with pytest.raises(UsageError, match="--fused-scale: fp8 has no such choice"):
        plan(source, method="fp8", fused_scale="shared")


def test_a_group_is_widened_when_asked(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"to_qkv.*--ignore-whole-group"):
        plan(source, method="int8", ignore=["0.attn.to_k"])
    convert(source, tmp_path / "out", method="int8", ignore=["0.attn.to_k"], ignore_whole_group=True)
    found = values(tmp_path / "out")
    assert [layer for layer in QUERIES if f"{layer}.weight_scale" in found] == []
    assert all(f"{layer}.weight_scale" in found for layer in [*ADDED, ALONE])
    ignored = read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignored_layers"]
    assert {*QUERIES, f"{BLOCK}.attn.to_qkv"} <= set(ignored)
    tensors = read_json(tmp_path / "out" / "omni_convert.json")["components"][""]["tensors"]
    assert tensors[f"{QUERIES[0]}.weight"]["why"] == f"fused with {QUERIES[1]}, which is kept"
    assert verify(tmp_path / "out", source=source).ok
