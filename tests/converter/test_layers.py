"""Rules for single layers, and recipes that give components methods of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hostile.small import QWEN_CONFIG, qwen_shards, read_json, write_pipeline, write_sharded

from omni_convert import UsageError, build_quant_config, convert, plan, verify
from omni_convert.cli import main
from omni_convert.converter.plan import Plan

MLP = "transformer_blocks.0.img_mlp.net"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "model", [*qwen_shards(width=32)], QWEN_CONFIG)


def decisions(planned: Plan) -> dict[str, str]:
    """Layer -> its format, or why it is kept."""
    return {
        tensor.layer: tensor.decision.format.name if tensor.decision.format else tensor.decision.reason
        for tensor in planned.tensors()
        if tensor.is_matrix
    }


def test_the_first_rule_that_matches_decides(model: Path) -> None:
    found = decisions(plan(model, "int8", layers=["img_mlp.net.2=int8", "0.img_mlp=none"], ignore=["img_mlp"]))
    assert found[f"{MLP}.2"] == found["transformer_blocks.1.img_mlp.net.2"] == "int8"
    assert found[f"{MLP}.0.proj"] == "--layer 0.img_mlp=none"
    assert found["transformer_blocks.1.img_mlp.net.0.proj"] == "--ignore img_mlp"


def test_a_rule_goes_before_what_is_kept_by_default(model: Path) -> None:
    found = decisions(plan(model, "fp8", layers=["img_mlp.net.2=fp8"]))
    assert found[f"{MLP}.2"] == "fp8"
    assert found[f"{MLP}.0.proj"].startswith("kept by default")


def test_a_rule_quantizes_no_layer_that_is_not_linear(model: Path) -> None:
    assert decisions(plan(model, "int8", layers=["img_in=int8"]))["img_in"].startswith("not a quantizable linear")


@pytest.mark.parametrize("rule", ["img_mpl=none", "img_mpl=int8"])
def test_a_rule_that_matches_nothing(model: Path, rule: str) -> None:
    with pytest.raises(UsageError, match=r"--layer img_mpl: no layer of the model matches.*img_mlp"):
        plan(model, "int8", layers=[rule])


def test_a_rule_that_splits_a_group(model: Path) -> None:
    with pytest.raises(UsageError, match=r"to_q is kept \(--layer \*.to_q=none\).*to_qkv"):
        plan(model, "int8", layers=["*.to_q=none"])
    found = decisions(plan(model, "int8", layers=["attn.to_qkv=none"]))
    assert {found[f"transformer_blocks.0.attn.to_{name}"] for name in "qkv"} == {"--layer attn.to_qkv=none"}


def test_one_method_per_transformer_is_all_that_vllm_omni_knows(model: Path) -> None:
    with pytest.raises(UsageError) as caught:
        plan(model, "int8", layers=["txt_mlp=fp8"])
    message = str(caught.value)
    assert "--layer txt_mlp=fp8: vLLM-Omni runs all layers of the model with one method, here int8" in message
    for remedy in ("--layer txt_mlp=none", "convert everything to fp8", "--target omni-convert"):
        assert remedy in message


def test_qualities_may_differ_where_methods_may_not(model: Path, tmp_path: Path) -> None:
    spec = {"method": "int8", "layers": [{"txt_mlp": {"method": "int8", "quality": "balanced"}}]}
    convert(model, tmp_path / "mixed", spec)
    fast, balanced = (
        convert(model, tmp_path / "a", "int8"),
        convert(model, tmp_path / "b", method="int8", quality="balanced"),
    )
    manifest = read_json(tmp_path / "mixed" / "omni_convert.json")
    tensors = manifest["components"][""]["tensors"]
    assert tensors["transformer_blocks.0.txt_mlp.net.2.weight"]["format"] == "int8 (balanced)"
    assert "format" not in tensors[f"{MLP}.2.weight"]
    for layer, other in (("transformer_blocks.0.txt_mlp.net.2", balanced), (f"{MLP}.2", fast)):
        assert tensors[f"{layer}.weight"]["sqnr_db"] == pytest.approx(other.sqnr_db[layer], abs=0.01)
    config = read_json(tmp_path / "mixed" / "config.json")["quantization_config"]
    assert config == read_json(tmp_path / "a" / "config.json")["quantization_config"]
    assert verify(tmp_path / "mixed", source=model).ok
    assert build_quant_config(config) is not None


def test_components_have_methods_of_their_own(tmp_path: Path) -> None:
    source = write_pipeline(tmp_path / "model")
    choices: dict[str, Any] = {"quantization": {"transformer": "int8", "text_encoder": "fp8", "vae": None}}
    choices["target"] = "omni-convert"
    by_flag = plan(source, method="int8", components=["transformer", "text_encoder=fp8"], target="omni-convert")
    for planned in (plan(source, **choices), by_flag):
        written = {part.component.name: part.quantization.to_dict()["quant_method"] for part in planned.components}
        assert written == {"transformer": "int8", "text_encoder": "fp8"}
    report = convert(source, tmp_path / "out", **choices)
    assert (report.method, report.format) == ("int8 + fp8", "int8 + fp8")
    for part, method in (("transformer", "int8"), ("text_encoder", "fp8")):
        config = read_json(tmp_path / "out" / part / "config.json")["quantization_config"]
        assert config["quant_method"] == method
    assert verify(tmp_path / "out", source=source).ok


def test_patterns_belong_to_their_component(tmp_path: Path) -> None:
    source = write_pipeline(tmp_path / "model")
    spec = {"transformer": "int8", "text_encoder": {"method": "int8", "ignored_layers": ["img_mlp"]}}
    with pytest.raises(UsageError, match=r"--ignore \(text_encoder\) img_mlp: no layer"):
        plan(source, spec, target="omni-convert")


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_recipe_from_the_command_line_is_replayed_from_the_manifest(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: int8\nignored_layers: [txt_mlp]\nlayers:\n- img_mlp.net.2: none\n")
    result = run("--recipe", recipe, "--ignore", "to_add_out", model, tmp_path / "out")
    assert result.exit_code == 0, result.output
    manifest = tmp_path / "out" / "omni_convert.json"
    assert run("--recipe", manifest, model, tmp_path / "again").exit_code == 0
    first, second = (read_json(tmp_path / name / "omni_convert.json") for name in ("out", "again"))
    assert first == second
    kept = {name for name, entry in first["components"][""]["tensors"].items() if entry["why"].startswith("--")}
    assert {name.split(".", 2)[2] for name in kept} == {
        "txt_mlp.net.0.proj.weight", "txt_mlp.net.2.weight", "img_mlp.net.2.weight", "attn.to_add_out.weight",
    }  # fmt: skip


def test_method_or_recipe(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out")
    assert result.exit_code == 2
    assert "one of --method and --recipe" in result.output
