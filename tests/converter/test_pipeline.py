"""Components of one pipeline: which the target can load quantized, and how patterns name them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from families import FAMILIES
from hostile.small import QWEN_CONFIG, qwen_shards, random, read_json, write_json, write_pipeline, write_sharded

from omni_convert import OmniConvertError, UsageError, plan
from omni_convert.converter.plan import Plan


def kept_by(planned: Plan, reason: str) -> set[str]:
    return {
        part.component.name
        for part in planned.components
        for tensor in part.tensors()
        if tensor.decision.reason == reason
    }


def test_an_encoder_that_the_engine_builds_plain_is_refused(tmp_path: Path) -> None:
    source = write_pipeline(tmp_path / "model")
    with pytest.raises(UsageError, match=r"--component text_encoder: vLLM-Omni reads .* Qwen-Image transformer only"):
        plan(source, method="int8", components=["text_encoder"])
    assert plan(source, method="int8", components=["text_encoder"], target="omni-convert").components


def test_an_encoder_with_names_of_its_own_is_refused(tmp_path: Path) -> None:
    source = FAMILIES["FLUX.2-dev"].write(tmp_path)
    with pytest.raises(UsageError, match=r"reads the quantization config of a FLUX\.2-dev transformer only"):
        plan(source, method="int8", components=["transformer", "text_encoder"])


@pytest.mark.parametrize("components", [["text_encoder"], ["text_encoder", "transformer=fp8"]])
def test_an_encoder_that_shares_the_transformers_config_needs_its_method(tmp_path: Path, components: list[str]) -> None:
    source = FAMILIES["Z-Image"].write(tmp_path)
    layers = {f"model.layers.0.self_attn.{name}_proj.weight": random(64, 64) for name in "qkvo"}
    config = read_json(source / "text_encoder" / "config.json")
    shutil.rmtree(source / "text_encoder")
    write_sharded(source / "text_encoder", [layers], config, stem="model")
    with pytest.raises(UsageError, match="with the same method: add --component transformer"):
        plan(source, method="int8", components=components)
    assert plan(source, method="int8", components=["text_encoder", "transformer"]).warnings == ()


def test_an_encoder_without_its_config(tmp_path: Path) -> None:
    source = FAMILIES["Z-Image"].write(tmp_path)
    (source / "text_encoder" / "config.json").unlink()
    with pytest.raises(OmniConvertError, match=r"text_encoder/config\.json: is missing"):
        plan(source, method="int8")
    shutil.rmtree(source / "text_encoder")
    index = read_json(source / "model_index.json")
    write_json(source / "model_index.json", {key: value for key, value in index.items() if key != "text_encoder"})
    assert "this source has no text encoder" in plan(source, method="int8").warnings[0]


def test_a_part_of_a_fused_matrix_that_is_missing(tmp_path: Path) -> None:
    shards = [dict(shard) for shard in qwen_shards()]
    del shards[1]["transformer_blocks.1.attn.add_k_proj.weight"]
    source = write_sharded(tmp_path / "model", [*shards], QWEN_CONFIG)
    with pytest.raises(OmniConvertError, match=r"holds transformer_blocks\.1\.attn\.add_q_proj but not .*add_k_proj"):
        plan(source, method="int8")


@pytest.mark.parametrize("pattern", ["transformer_2.transformer_blocks.0.img_mlp", "transformer_2.*.0.img_mlp.net.2"])
def test_a_pattern_names_a_component_as_reports_do(tmp_path: Path, pattern: str) -> None:
    source = write_pipeline(tmp_path / "model", second=True)
    assert kept_by(plan(source, method="int8", ignore=[pattern]), f"--ignore {pattern}") == {"transformer_2"}
    with pytest.raises(UsageError, match="no layer of the model matches"):
        plan(source, method="int8", ignore=["transformer_3.transformer_blocks.0"])


@pytest.mark.parametrize(
    ("choices", "is_said"),
    [
        ({"method": "int8"}, True),
        ({"method": "int8", "fused_scale": "per-channel"}, False),  # for engines that read every scale
        ({"method": "fp8"}, False),
    ],
    ids=str,
)
def test_fused_layers_of_a_class_that_is_not_known(tmp_path: Path, choices: dict[str, str], is_said: bool) -> None:
    source = write_sharded(tmp_path / "model", [*qwen_shards(width=64)], {"_class_name": "SomeTransformer2DModel"})
    (warning,) = plan(source, **choices).warnings  # type: ignore[arg-type]
    assert ("int8 is wrong on CUDA" in warning) is is_said
