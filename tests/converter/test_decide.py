"""What the target makes of a plan: refusals, layers kept by default, warnings, and the names of other components."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hostile.small import QWEN_CONFIG, qwen_shards, random, read_json, write_json, write_model, write_pipeline
from hostile.small import write_sharded as write_component

from omni_convert.converter.convert import convert, plan
from omni_convert.converter.plan import Plan
from omni_convert.converter.show import plan_dict
from omni_convert.converter.verify import verify
from omni_convert.formats.errors import OmniConvertError, UsageError


def quantized(planned: Plan) -> set[str]:
    return {tensor.layer for tensor in planned.tensors() if tensor.decision.format}


@pytest.fixture
def sd3(tmp_path: Path) -> Path:
    tensors = {"transformer_blocks.0.attn.to_q.weight": random(64, 64), "proj_out.weight": random(64, 64)}
    return write_model(tmp_path / "sd3", {"_class_name": "SD3Transformer2DModel"}, tensors)


@pytest.fixture
def bagel(tmp_path: Path) -> Path:
    block = "language_model.model.layers.0"
    names = [f"{block}.self_attn.{name}_proj{expert}" for name in "qkvo" for expert in ("", "_moe_gen")]
    tensors = {f"{name}.weight": random(64, 64) for name in names}
    return write_component(tmp_path / "bagel", [tensors], {"model_type": "bagel"}, stem="model")


def write_omni(folder: Path, config: dict[str, Any]) -> Path:
    tensors = {"thinker.model.layers.0.self_attn.o_proj.weight": random(64, 64)}
    return write_component(folder, [tensors], {"model_type": "qwen3_omni_moe", **config}, stem="model")


def write_z_image(folder: Path, encoder: dict[str, Any] | None) -> Path:
    block = {f"layers.0.feed_forward.w{number}.weight": random(64, 64) for number in (1, 2, 3)}
    write_component(folder / "transformer", [block], {"_class_name": "ZImageTransformer2DModel"})
    index: dict[str, Any] = {"_class_name": "ZImagePipeline", "transformer": ["diffusers", "X"]}
    if encoder is not None:
        layers = {f"model.layers.0.mlp.{name}_proj.weight": random(64, 64) for name in ("gate", "up", "down")}
        write_component(folder / "text_encoder", [{**layers, "lm_head.weight": random(64, 64)}], encoder, stem="model")
        index["text_encoder"] = ["transformers", "X"]
    write_json(folder / "model_index.json", index)
    return folder


@pytest.mark.parametrize("method", ["int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale"])
def test_class_that_the_engine_never_quantizes(sd3: Path, method: str) -> None:
    with pytest.raises(UsageError, match=r"vLLM-Omni cannot load it for SD3\.5: .* No method works there"):
        plan(sd3, method=method)


def test_refusal_names_the_target_that_works(sd3: Path) -> None:
    with pytest.raises(UsageError, match=r"To load it with omni_convert\.load instead: --target omni-convert\."):
        plan(sd3, method="int8")
    planned = plan(sd3, method="int8", target="omni-convert")
    assert quantized(planned) == {"transformer_blocks.0.attn.to_q"}
    assert planned.warnings == ()
    assert quantized(plan(sd3, method="mxfp4", target="omni-convert")) == {"transformer_blocks.0.attn.to_q"}


def test_layers_kept_by_default(tmp_path: Path) -> None:
    source = write_component(tmp_path / "qwen", qwen_shards(), QWEN_CONFIG)
    everything = quantized(plan(source, method="int8"))
    planned = plan(source, method="fp8")
    kept = {layer for layer in everything if "img_mlp" in layer}
    assert len(kept) == 4
    assert quantized(planned) == everything - kept
    assert kept <= set(planned.components[0].ignored_layers)
    reasons = {
        tensor.decision.reason for tensor in planned.tensors() if tensor.layer in kept and "bias" not in tensor.name
    }
    assert len(reasons) == 1
    assert reasons.pop().startswith("kept by default with fp8: ")
    assert quantized(plan(source, method="fp8", default_ignore=False)) == everything


def test_default_that_leaves_nothing_says_how_to_override_it(tmp_path: Path) -> None:
    tensors = {f"blocks.0.attn1.to_{name}.weight": random(64, 64) for name in "qkv"}
    source = write_model(tmp_path / "wan", {"_class_name": "WanTransformer3DModel"}, tensors)
    with pytest.raises(OmniConvertError, match="Use --no-default-ignore"):
        plan(source, method="mxfp4_dualscale")
    assert len(quantized(plan(source, method="mxfp4_dualscale", default_ignore=False))) == 3


@pytest.mark.parametrize("name", ["blocks.0.ffn.net_0.proj", "ffn.net_2", "*.attn1.to_qkv"])
def test_patterns_know_the_names_of_the_engine(tmp_path: Path, name: str) -> None:
    layers = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "ffn.net.0.proj", "ffn.net.2", "attn2.to_q"]
    tensors = {f"blocks.0.{layer}.weight": random(64, 64) for layer in layers}
    source = write_model(tmp_path / "wan", {"_class_name": "WanTransformer3DModel"}, tensors)
    planned = plan(source, method="int8", ignore=[name])
    assert len(quantized(planned)) == len(layers) - (3 if "qkv" in name else 1)
    assert any(name.removeprefix("*") in ignored for ignored in planned.components[0].ignored_layers)


def test_names_that_the_engine_would_find_in_others_are_patterns(tmp_path: Path) -> None:
    layers = ["proj_out", "x_embedder", "transformer_blocks.0.attn.to_q"]
    layers += [f"single_transformer_blocks.0.{name}" for name in ("proj_out", "proj_mlp")]
    layers += [f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    tensors = {f"{layer}.weight": random(64, 64) for layer in layers}
    source = write_model(tmp_path / "flux", {"_class_name": "FluxTransformer2DModel"}, tensors)
    (part,) = plan(source, method="fp8", granularity="channel").components
    assert set(part.ignored_layers) == {"[p]roj_out", "x_embedder", "[t]ransformer_blocks.0.attn.to_q"}
    assert set(plan(source, method="fp8").components[0].ignored_layers) == set(layers[:3])
    convert(source, tmp_path / "out", method="fp8", granularity="channel")
    assert verify(tmp_path / "out", source=source).ok


def test_experts_of_one_attention_have_one_precision(bagel: Path) -> None:
    ignored = plan(bagel, method="int8", ignore=["o_proj"]).components[0].ignored_layers
    assert "bagel.language_model.model.layers.0.self_attn.o_proj" in ignored
    with pytest.raises(UsageError, match=r"o_proj_moe_gen is kept .* but .*o_proj is not"):
        plan(bagel, method="int8", ignore=["o_proj_moe_gen"])
    with pytest.raises(UsageError, match=r"bagel\.\S*qkv_proj, which is quantized as a whole"):
        plan(bagel, method="int8", ignore=["*_proj_moe_gen"])


def test_unknown_class_is_one_warning(tmp_path: Path) -> None:
    source = write_pipeline(tmp_path / "model", second=True)
    for name in ("transformer", "transformer_2"):
        config = read_json(source / name / "config.json")
        write_json(source / name / "config.json", config | {"_class_name": "NovelTransformer"})
    planned = plan(source, method="int8")
    assert len(planned.warnings) == 1
    assert "which layers vLLM-Omni can run quantized (class: NovelTransformer)" in planned.warnings[0]
    assert plan_dict(planned, 0, 0)["warnings"] == list(planned.warnings)
    report = convert(source, tmp_path / "out", method="int8")
    assert json.loads(json.dumps(report.to_dict()))["warnings"] == list(planned.warnings)
    (caution,) = read_json(tmp_path / "out" / "omni_convert.json")["cautions"]
    assert planned.warnings[0].startswith(caution)
    assert "--" not in caution  # what to do is for whoever converts
    assert plan(source, method="int8", target="omni-convert").warnings == ()


def test_condition_is_a_warning(tmp_path: Path) -> None:
    tensors = {"model.layers.0.self_attn.o_proj.weight": random(64, 64)}
    source = write_component(tmp_path, [tensors], {"model_type": "hunyuan_image_3_moe"}, stem="model")
    assert "needs fp8" in plan(source, method="int8").warnings[0]
    assert plan(source, method="fp8").warnings == ()


def test_known_class_has_no_warning(tmp_path: Path) -> None:
    assert plan(write_pipeline(tmp_path / "model"), method="int8").warnings == ()


def test_config_without_the_part_that_takes_quantization_config(tmp_path: Path) -> None:
    for number, config in enumerate([{}, {"thinker_config": 1}, {"thinker_config": {"text_config": []}}]):
        source = write_omni(tmp_path / str(number), config)
        with pytest.raises(OmniConvertError, match=r"config\.json: has no object (thinker|text)_config"):
            plan(source, method="fp8")


def test_config_of_a_part_that_is_quantized_already(tmp_path: Path) -> None:
    text = {"quantization_config": {"quant_method": "fp8", "is_checkpoint_fp8_serialized": True}}
    source = write_omni(tmp_path, {"thinker_config": {"text_config": text}})
    with pytest.raises(OmniConvertError, match=r"already quantized \(quantization_config says 'fp8'\)"):
        plan(source, method="fp8")


def test_quantization_config_of_a_part_leaves_the_source_as_it_is(tmp_path: Path) -> None:
    config = {"thinker_config": {"text_config": {"a": 1}, "b": 2}, "c": 3}
    planned = plan(write_omni(tmp_path, config), method="fp8")
    written = json.loads(planned.components[0].config_bytes)
    assert written.pop("quantization_config")["quant_method"] == "fp8"
    assert written["thinker_config"]["text_config"].pop("quantization_config")["quant_method"] == "fp8"
    assert written == {"model_type": "qwen3_omni_moe", **config}
    assert planned.components[0].component.config == written


def test_text_encoder_that_shares_the_config_is_named_in_it(tmp_path: Path) -> None:
    planned = plan(write_z_image(tmp_path, {"num_hidden_layers": 1}), method="int8")
    (part,) = planned.components
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert set(part.ignored_layers) == {*attention, *mlp, "lm_head"}
    assert planned.warnings == ()


def test_text_encoder_that_is_quantized_too_is_not(tmp_path: Path) -> None:
    source = write_z_image(tmp_path, {"num_hidden_layers": 1})
    planned = plan(source, method="int8", components=["transformer", "text_encoder"])
    ignored = set(planned.components[0].ignored_layers)
    assert ignored == {"lm_head", *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")}


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": "2"}, {"num_hidden_layers": 10**15}])
def test_text_encoder_of_unknown_depth(tmp_path: Path, config: dict[str, Any]) -> None:
    source = write_z_image(tmp_path, config)
    with pytest.raises(OmniConvertError, match=r"text_encoder/config\.json: has no number of layers num_hidden_layers"):
        plan(source, method="int8")
    plan(source, method="int8", target="omni-convert")


@pytest.mark.parametrize("component_alone", [False, True])
def test_text_encoder_that_is_missing_is_a_warning(tmp_path: Path, component_alone: bool) -> None:
    source = write_z_image(tmp_path, None)
    planned = plan(source / "transformer" if component_alone else source, method="int8")
    assert "text encoder of Z-Image" in planned.warnings[0]
    assert planned.components[0].ignored_layers == ()


def test_linears_of_the_real_text_encoder(z_image: Path) -> None:
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    encoder = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(z_image / "text_encoder"))
    linears = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears) > 7
    (part,) = plan(z_image, method="int8").components
    assert linears <= set(part.ignored_layers)
