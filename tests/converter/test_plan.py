"""The plan: what happens to every tensor and why, from headers alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hostile.small import (
    QWEN_CONFIG,
    Tensor,
    entry,
    file_bytes,
    qwen_shards,
    random,
    read_json,
    write_json,
    write_model,
    write_pipeline,
    write_sharded,
    write_weights,
)

from omni_convert.converter.convert import Means, needs, plan
from omni_convert.converter.decide import natural_key
from omni_convert.converter.plan import Plan
from omni_convert.formats.errors import OmniConvertError, UsageError


def plan_int8(source: Path, ignore: Sequence[str] = (), components: Sequence[str] = ()) -> Plan:
    return plan(source, method="int8", ignore=ignore, components=components)


def kept(planned: Plan) -> dict[str, str]:
    """Why each kept tensor is kept."""
    return {tensor.name: tensor.decision.reason for tensor in planned.tensors() if not tensor.decision.format}


def quantized(planned: Plan) -> list[str]:
    return [tensor.layer for tensor in planned.tensors() if tensor.decision.format]


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "qwen", qwen_shards(), QWEN_CONFIG)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "pipeline")


@pytest.fixture
def qwen_file(tmp_path: Path) -> Path:
    """The model of ``qwen`` in one file, with its config beside it."""
    tensors = {name: tensor for shard in qwen_shards() for name, tensor in shard.items()}
    write_json(tmp_path / "single" / "config.json", QWEN_CONFIG)
    return write_weights(tmp_path / "single" / "diffusion_pytorch_model.safetensors", tensors)


def test_known_class_follows_its_table(qwen: Path) -> None:
    planned = plan_int8(qwen)
    assert len(quantized(planned)) == 2 * 12
    reasons = kept(planned)
    assert reasons["img_in.weight"] == "not a quantizable linear of Qwen-Image"
    assert "transformer_blocks.0.img_mod.1.weight" in reasons
    assert reasons["transformer_blocks.0.attn.to_q.bias"] == "not a weight"
    assert {tensor.decision.reason for tensor in planned.tensors() if tensor.decision.format} == {
        "linear of Qwen-Image"
    }
    assert planned.components[0].ignored_layers == (
        "img_in",
        "transformer_blocks.0.img_mod.1",
        "transformer_blocks.1.img_mod.1",
    )


def test_unknown_class_is_guessed_by_name_and_shape(tmp_path: Path) -> None:
    tensors = {
        "blocks.0.ff.weight": random(4, 6),
        "blocks.0.ff.bias": random(4),
        "blocks.0.norm.weight": random(4),
        "patch_embed.weight": random(4, 6),
        "blocks.0.conv.weight": random(4, 2, 3, 3),
        "proj_out.weight": random(4, 4),
        "blocks.0.wide.weight": random(4, 6, dtype="F64"),
        "blocks.0.empty.weight": random(0, 6),
        "table": random(4, 6),
    }
    planned = plan_int8(write_model(tmp_path, {"_class_name": "Novel"}, tensors))
    assert quantized(planned) == ["blocks.0.ff"]
    reasons = kept(planned)
    assert reasons["patch_embed.weight"] == "embedding role ('embed' in its name)"
    assert reasons["proj_out.weight"] == "output-head role ('proj_out' in its name)"
    assert reasons["blocks.0.conv.weight"] == "4-D, a linear weight is 2-D"
    assert reasons["blocks.0.norm.weight"] == "1-D, a linear weight is 2-D"
    assert reasons["blocks.0.wide.weight"] == "F64 is not BF16, F16 or F32"
    assert reasons["blocks.0.empty.weight"] == "the weight is empty"
    assert reasons["table"] == "not a weight"
    assert planned.components[0].architecture is None


@pytest.mark.parametrize(("name", "layers"), [("to_qkv", 2 * 3), ("add_kv_proj", 2 * 3), ("*.0.attn.to_qkv", 3)])
def test_ignore_by_the_name_of_a_fused_group(qwen: Path, name: str, layers: int) -> None:
    planned = plan_int8(qwen, [name])
    matching = [tensor for tensor, reason in kept(planned).items() if reason == f"--ignore {name}"]
    assert len(matching) == layers
    assert len(quantized(planned)) == 2 * 12 - layers
    ignored = planned.components[0].ignored_layers
    assert {tensor.removesuffix(".weight") for tensor in matching} <= set(ignored)
    assert "transformer_blocks.0.attn.add_kv_proj" in ignored or "transformer_blocks.0.attn.to_qkv" in ignored


@pytest.mark.parametrize(
    "ignore",
    [["to_q"], ["to_k"], ["add_q_proj"], ["add_k_proj", "add_v_proj"], ["re:to_[qk]$"], ["*.0.attn.to_v"]],
    ids=str,
)
def test_splitting_a_fused_group_is_refused(qwen: Path, ignore: list[str]) -> None:
    with pytest.raises(UsageError, match=r"fuse both into transformer_blocks\.\d\.attn\.(to_qkv|add_kv_proj)"):
        plan_int8(qwen, ignore)


def test_group_whose_members_are_ignored_one_by_one(qwen: Path) -> None:
    planned = plan_int8(qwen, ["re:to_q$", "to_k", "re:to_v$"])
    assert "transformer_blocks.1.attn.to_qkv" in planned.components[0].ignored_layers


def test_group_spread_over_shards(tmp_path: Path) -> None:
    names = [f"transformer_blocks.0.attn.to_{name}.weight" for name in "qkv"]
    write_sharded(tmp_path, [{name: random(4, 4)} for name in names], QWEN_CONFIG)
    assert len(quantized(plan_int8(tmp_path))) == 3
    with pytest.raises(UsageError, match="fuse both into"):
        plan_int8(tmp_path, ["to_v"])


def test_group_with_a_member_that_cannot_be_quantized(tmp_path: Path) -> None:
    tensors = {f"transformer_blocks.0.attn.to_{name}.weight": random(4, 4) for name in "qv"}
    tensors["transformer_blocks.0.attn.to_k.weight"] = random(4, 4, dtype="F64")
    write_model(tmp_path, QWEN_CONFIG, tensors)
    with pytest.raises(OmniConvertError, match="F64") as caught:
        plan_int8(tmp_path)
    assert "to_k" in str(caught.value)


def test_pattern_that_matches_nothing(qwen: Path) -> None:
    with pytest.raises(UsageError, match=r"img_mpl: no layer .*img_mlp"):
        plan_int8(qwen, ["to_qkv", "img_mpl"])


def test_nothing_left_to_quantize(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Keep less"):
        plan_int8(qwen, ["*"])
    model = write_model(tmp_path / "norms", {}, {"norm.weight": random(4)})
    with pytest.raises(OmniConvertError, match="it holds no matrices"):
        plan_int8(model)


@pytest.mark.parametrize(
    ("config", "tensors", "expected"),
    [
        (
            {"quantization_config": {"quant_method": "fp8", "is_checkpoint_fp8_serialized": True}},
            {},
            ["config.json", "'fp8'"],
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            {"b.weight_scale": random(4, dtype="F32")},
            ["b.weight_scale"],
        ),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, {}, ["'compressed-tensors'"]),
        ({}, {"b.weight": Tensor("I8", random(4, 4, dtype="F32").bits.astype("u1"))}, ["b.weight", "I8"]),
        ({}, {"b.weight": Tensor("F8_E4M3", random(4, 4).bits.astype("u1"))}, ["b.weight", "F8_E4M3"]),
        ({}, {"experts.b": Tensor("F8_E4M3", random(2, 4, 4).bits.astype("u1"))}, ["experts.b", "F8_E4M3"]),
        ({}, {"b.weight_scale": random(4, dtype="F32")}, ["b.weight_scale"]),
        ({}, {"b.qweight": random(4, 4)}, ["b.qweight"]),
        ({}, {"b.weight_scale_inv": random(4, dtype="F32")}, ["b.weight_scale_inv"]),
    ],
    ids=str,
)
def test_quantized_source_is_refused(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Tensor], expected: list[str]
) -> None:
    write_model(tmp_path, config, {"a.weight": random(4, 4), **tensors})
    with pytest.raises(OmniConvertError, match="already quantized") as caught:
        plan_int8(tmp_path)
    for part in [str(tmp_path), "expected BF16, FP16 or FP32", "original", *expected]:
        assert part in str(caught.value)


def test_sizes(qwen: Path) -> None:
    planned = plan_int8(qwen)
    width, layers, others = 16, 2 * 12, 2 * (13 * 16 + 17 + 16 * 16) + 16 * 8
    assert planned.bytes_before == 2 * (layers * width * width + others)
    assert planned.bytes_after == layers * (width * width + 4 * width) + 2 * others
    assert planned.bits_per_weight == 8 * planned.bytes_after / (layers * width * width + others)


def test_disk_and_memory_needs(tmp_path: Path) -> None:
    planned = plan_int8(write_pipeline(tmp_path / "model"))
    (memory, disk), (more_memory, less_disk) = (
        needs(planned, Means(threads=1)),
        needs(planned, Means(threads=4, link=True)),
    )
    shards = sum(shard.size for part in planned.components for shard in part.shards)
    assert (disk, less_disk) == (shards + planned.bytes_copied, shards)
    assert 0 < memory < more_memory < 100e6


def test_huge_source_is_planned_in_no_time(tmp_path: Path) -> None:
    """A file of 2 TB of holes: reading weights would take hours, holding them more memory than there is."""
    rows, columns = 65535, 2**22
    size = 2 * rows * columns
    header = {f"blocks.{n}.ff.weight": entry("BF16", [rows, columns], n * size, (n + 1) * size) for n in range(4)}
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        start = file.write(file_bytes(header))
        try:
            file.truncate(start + 4 * size)
        except OSError:
            pytest.skip("the file system holds no file of 2 TB")
    started = time.perf_counter()
    planned = plan_int8(path)
    memory, _ = needs(planned, Means(threads=2))
    assert time.perf_counter() - started < 5
    assert planned.bytes_before == 4 * size
    assert planned.bytes_after == 4 * (rows * columns + 4 * rows)
    assert memory < 200e6


def test_metadata_of_the_source_is_kept(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "x.safetensors", {"a.weight": random(4, 4)}, {"format": "pt", "note": "kept"})
    (part,) = plan_int8(path).components
    assert b'{"__metadata__":{"format":"pt","note":"kept"},' in part.shards[0].header


def test_index_of_the_output(qwen: Path) -> None:
    import json

    (part,) = plan_int8(qwen).components
    assert part.index_bytes is not None
    index = json.loads(part.index_bytes)
    assert index["metadata"] == {"total_size": plan_int8(qwen).bytes_after, "made_by": "hand"}
    assert index["weight_map"]["transformer_blocks.1.attn.to_q.weight_scale"].endswith("00002-of-00002.safetensors")


def test_config_keeps_the_keys_and_their_order(tmp_path: Path) -> None:
    import json

    config = {"z": 1e-06, "_class_name": "Novel", "a": None, "ü": [1.0, 2], "rope_theta": 1000000.0}
    model = write_model(tmp_path, config)
    (part,) = plan_int8(model).components
    written = json.loads(part.config_bytes)
    assert list(written) == [*config, "quantization_config"]
    assert {key: written[key] for key in config} == config
    assert "ü" in part.config_bytes.decode()


def test_folder_without_config_is_refused_and_its_file_is_not(tmp_path: Path) -> None:
    import json

    write_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OmniConvertError, match=r"found no config\.json"):
        plan_int8(tmp_path)
    (part,) = plan_int8(next(tmp_path.glob("*.safetensors"))).components
    assert list(json.loads(part.config_bytes)) == ["quantization_config"]


def test_pipeline_component_without_config_is_refused(pipeline: Path) -> None:
    (pipeline / "transformer" / "config.json").unlink()
    with pytest.raises(OmniConvertError, match=r"transformer: found no config\.json"):
        plan_int8(pipeline)


def test_component_that_is_listed_and_absent_is_an_incomplete_download(pipeline: Path) -> None:
    index = read_json(pipeline / "model_index.json")
    write_json(pipeline / "model_index.json", index | {"transformer_2": ["diffusers", "X"], "nothing": [None, None]})
    with pytest.raises(OmniConvertError, match="lists transformer_2"):
        plan_int8(pipeline)


def test_single_file_takes_the_config_beside_it(qwen_file: Path) -> None:
    (part,) = plan_int8(qwen_file).components
    assert part.component.class_name == "QwenImageTransformer2DModel"
    assert part.architecture == "Qwen-Image"


def test_single_file_of_any_name_is_known_by_its_tensors(qwen_file: Path) -> None:
    (part,) = plan_int8(qwen_file.rename(qwen_file.with_name("qwen.safetensors"))).components
    assert part.component.config is None
    assert part.architecture == "Qwen-Image"
    assert not {tensor.layer for tensor in part.tensors() if tensor.decision.format and "_mod" in tensor.layer}


def test_single_shard_of_several_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model-00001-of-00002.safetensors"
    write_weights(file, {"a.weight": random(4, 4)})
    with pytest.raises(OmniConvertError, match="one shard of several"):
        plan_int8(file)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"])
def test_variant_alone_is_refused(tmp_path: Path, name: str) -> None:
    write_weights(tmp_path / name, {"a.weight": random(4, 4)})
    write_json(tmp_path / "config.json", {})
    with pytest.raises(OmniConvertError, match="only a variant"):
        plan_int8(tmp_path)


def test_plan_is_made_from_the_transformers_config(tmp_path: Path) -> None:
    layer = "encoder.layer.0.intermediate.dense"
    tensors = {f"{layer}.weight": random(8, 4), "pooler.dense.weight": random(4, 4)}
    write_weights(tmp_path / "model.safetensors", tensors)
    write_json(tmp_path / "config.json", {"model_type": "bert", "architectures": ["BertModel"]})
    planned = plan_int8(tmp_path)
    assert quantized(planned) == [layer]
    assert planned.components[0].architecture == "BERT"


def test_natural_order() -> None:
    names = ["b.10.x", "b.2.x", "a", "b.2.w"]
    assert sorted(names, key=natural_key) == ["a", "b.2.w", "b.2.x", "b.10.x"]
    assert natural_key(f"a.{'9' * 5000}") > natural_key("a.10") > natural_key("a.09")
    assert natural_key("x²") == [(-1, "x²")]  # a digit, but no number


def test_source_whose_config_asks_engines_to_quantize(tmp_path: Path) -> None:
    """It is plain: the same folder without the wish gives the same output, but for a warning."""
    plain = write_model(tmp_path / "plain", {"model_type": "any"}, {"a.fc.weight": random(32, 32)})
    wish = {"quant_method": "int8", "ignored_layers": ["a"]}
    asking = write_model(
        tmp_path / "asking", {"model_type": "any", "quantization_config": wish}, {"a.fc.weight": random(32, 32)}
    )
    expected, found = (plan(source, method="fp8") for source in (plain, asking))
    assert found.components[0].config_bytes == expected.components[0].config_bytes
    assert [warning for warning in found.warnings if warning not in expected.warnings] == [
        f"{asking / 'config.json'} asks engines to quantize while they load; what it says does not count here: give "
        "--method, --ignore and the like."
    ]
