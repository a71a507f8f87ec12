"""Experts that stay unquantized, which in most models that have some are nearly all of the weights: never silently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hostile.small import Tensor, as_stored, random, read_folder, write_model

import omni_convert
from omni_convert.converter.show import plan_text

MERGED = {
    "gpt-oss, Qwen3-MoE": ("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 128)),
    "Llama 4": ("model.layers.0.feed_forward.experts.down_proj", (4, 64, 64)),
    "Granite MoE": ("model.layers.0.block_sparse_moe.input_linear.weight", (4, 128, 64)),
    "at the root": ("experts.down_proj", (4, 24, 30)),
    "DBRX": ("transformer.blocks.0.ffn.experts.mlp.w1", (256, 64)),
    "one by one": ("model.layers.0.mlp.experts.0.up_proj.weight", (64, 64)),
}


def write_experts(folder: Path, experts: dict[str, Tensor], width: int = 8) -> Path:
    tensors = {"model.layers.0.self_attn.o_proj.weight": random(width, width), **experts}
    return write_model(folder, {"model_type": "novel_moe"}, tensors)


@pytest.mark.parametrize("model", MERGED)
@pytest.mark.parametrize("target", ["vllm-omni", "omni-convert"])
def test_experts_are_never_kept_silently(model: str, target: str, tmp_path: Path) -> None:
    name, shape = MERGED[model]
    bias = {"model.layers.0.mlp.experts.gate_up_proj_bias": random(4, 128)}
    source = write_experts(tmp_path / "model", {name: random(*shape), **bias})
    planned = omni_convert.plan(source, method="int8", target=target)
    decision = next(tensor.decision for tensor in planned.tensors() if tensor.name == name)
    assert decision.format is None
    assert decision.reason.startswith("routed-expert role" if model == "one by one" else "experts merged into one")
    size, others = 2 * int(np.prod(shape)), 2 * (8 * 8 + 4 * 128)
    share = f"{size / (size + others):.0%} of the bytes stay BF16"
    (warning,) = [text for text in planned.warnings if "experts" in text]
    assert share in warning
    assert name.removesuffix(".weight") in warning
    assert decision.reason in warning
    text = plan_text(planned, 0, 0)
    assert name.removesuffix(".weight") in text
    assert decision.reason in text
    report = omni_convert.convert(source, tmp_path / "out", method="int8", target=target)
    assert report.warnings == planned.warnings
    assert read_folder(tmp_path / "out")[name] == as_stored(random(*shape))


def test_few_experts_and_other_tensors_of_three_dimensions_are_no_warning(tmp_path: Path) -> None:
    name, shape = MERGED["gpt-oss, Qwen3-MoE"]

    def warnings(source: Path) -> tuple[str, ...]:
        return omni_convert.plan(source, method="int8", target="omni-convert").warnings

    assert warnings(write_experts(tmp_path / "few", {name: random(*shape)}, width=1024)) == ()
    assert warnings(write_experts(tmp_path / "conv", {"encoder.conv.weight": random(64, 64, 7)})) == ()
    assert warnings(write_experts(tmp_path / "positions", {"pos_embed": random(1, 64, 64)})) == ()


def test_experts_that_the_user_keeps_are_no_warning(tmp_path: Path) -> None:
    block = "thinker.model.layers.0"
    names = ["self_attn.o_proj", *(f"mlp.experts.0.{name}_proj" for name in ("gate", "up", "down"))]
    config = {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": {}}}
    source = write_model(tmp_path, config, {f"{block}.{name}.weight": random(64, 64) for name in names})
    assert omni_convert.plan(source, method="fp8").warnings == ()
    assert omni_convert.plan(source, method="fp8", ignore=["experts"]).warnings == ()


@pytest.mark.parametrize("model", MERGED)
def test_experts_that_nobody_quantizes_can_be_ignored_too(model: str, tmp_path: Path) -> None:
    name, shape = MERGED[model]
    source = write_experts(tmp_path, {name: random(*shape)})
    layer = name.removesuffix(".weight")
    assert omni_convert.plan(source, method="int8", target="omni-convert", ignore=[layer]).warnings == ()


def test_merged_experts_that_engines_quantize_one_by_one_say_how(tmp_path: Path) -> None:
    block = "thinker.model.layers.0"
    experts = {f"{block}.mlp.experts.gate_up_proj": random(4, 128, 64)}
    tensors = {f"{block}.self_attn.o_proj.weight": random(64, 64), **experts}
    config = {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": {}}}
    planned = omni_convert.plan(write_model(tmp_path, config, tensors), method="fp8")
    (warning,) = planned.warnings
    assert "quantized only where each has its own tensors, as save_pretrained writes them" in warning
    assert f"{block}.mlp.experts.gate_up_proj" in planned.components[0].ignored_layers
