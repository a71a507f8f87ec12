"""Several methods in one model, for an engine that can tell them apart: ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.small import QWEN_CONFIG, qwen_shards, read_folder, read_json, write_json, write_sharded

import omni_convert
from omni_convert import convert, inspect, verify

BLOCK = "transformer_blocks.0"
RULES = ["img_mlp.net.2=none", "img_mlp=fp8", "re:blocks\\.1\\.txt_mlp=mxfp8"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "model", [*qwen_shards(width=64)], QWEN_CONFIG)


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "out", "int8", layers=RULES, target="omni-convert", ignore=["img_in"])
    return tmp_path / "out"


def test_every_layer_has_the_format_that_its_rule_says(out: Path, source: Path) -> None:
    tensors = read_folder(out)
    assert {name: tensors[f"{BLOCK}.{name}.weight"].dtype for name in ("attn.to_q", "txt_mlp.net.2")} == {
        "attn.to_q": "I8", "txt_mlp.net.2": "I8",
    }  # fmt: skip
    assert tensors[f"{BLOCK}.img_mlp.net.0.proj.weight_scale"].shape == (1,)
    assert tensors["transformer_blocks.1.txt_mlp.net.2.weight_scale"].dtype == "U8"
    assert tensors[f"{BLOCK}.img_mlp.net.2.weight"].dtype == "BF16"
    config = read_json(out / "config.json")["quantization_config"]
    assert config["quant_method"] == "omni_convert"
    named = {entry["quant_method"]: sorted(entry.get("layers", ())) for entry in config["formats"]}
    assert named == {
        "int8": [],
        "fp8": [f"transformer_blocks.{block}.img_mlp.net.0.proj" for block in (0, 1)],
        "mxfp8": [f"transformer_blocks.1.txt_mlp.net.{name}" for name in ("0.proj", "2")],
    }
    assert {f"{BLOCK}.img_mlp.net.2", "img_in"} <= set(config["ignored_layers"])
    result = verify(out, source=source)
    assert [check.problems for check in result.checks if not check.ok] == []
    assert len(result.layers) == 2 * (12 - 1)


def test_what_people_see_names_all_methods(out: Path, source: Path, tmp_path: Path) -> None:
    (component,) = inspect(out).components
    assert component.method == "int8 + fp8 + mxfp8"
    report = convert(source, tmp_path / "again", "int8", layers=RULES, target="omni-convert")
    assert (report.method, report.format) == ("int8 + fp8 + mxfp8", "int8 + fp8 + mxfp8")
    tensors = read_json(out / "omni_convert.json")["components"][""]["tensors"]
    entry = tensors[f"{BLOCK}.img_mlp.net.0.proj.weight"]
    assert (entry["action"], entry["format"], entry["why"]) == ("fp8", "fp8", "--layer img_mlp=fp8")


def _rename(config: dict[str, Any]) -> None:
    config["formats"][1]["layers"][0] = f"{BLOCK}.txt_mlp.net.2"


def _forget(config: dict[str, Any]) -> None:
    config["formats"][2]["layers"].pop()


def _swap(config: dict[str, Any]) -> None:
    first, second = config["formats"][1:]
    first["layers"], second["layers"] = second["layers"], first["layers"]


@pytest.mark.parametrize("change", [_rename, _forget, _swap])
def test_a_config_that_gives_a_layer_another_format_is_found(out: Path, change: Any) -> None:
    data = read_json(out / "config.json")
    change(data["quantization_config"])
    write_json(out / "config.json", data)
    failed = {check.name: check.problems for check in verify(out).checks if not check.ok}
    assert "model config" in failed
    assert "announces" in failed["model config"][0]


def test_one_rule_for_everything_is_no_mix(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "int8", layers=["*=fp8"], target="omni-convert")
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["quant_method"] == "fp8"
    assert verify(tmp_path / "out", source=source).ok


def test_a_mixed_model_loads_and_runs(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    model = BertModel(BertConfig(**sizes, vocab_size=50)).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "bert")
    rules = ["intermediate=fp8", "layer.1.attention.output=mxfp8"]
    convert(tmp_path / "bert", tmp_path / "out", "int8", layers=rules, target="omni-convert", default_ignore=False)
    loaded = omni_convert.load(tmp_path / "out")
    layer = loaded.encoder.layer[1]
    linears = (layer.attention.self.query, layer.intermediate.dense, layer.attention.output.dense)
    assert [linear.format.name for linear in linears] == ["int8", "fp8", "mxfp8"]
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        before, after = model(tokens).last_hidden_state, loaded(tokens).last_hidden_state
    assert torch.cosine_similarity(before.float().flatten(), after.float().flatten(), dim=0) > 0.99
    assert not torch.equal(before, after)
