"""``inspect``: what is in a checkpoint, by its headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile.small import random, read_json, write_json, write_model, write_pipeline, write_weights

from omni_convert import __version__
from omni_convert.converter.convert import convert
from omni_convert.converter.inspect import inspect
from omni_convert.formats.errors import OmniConvertError


def test_source_and_output_of_a_pipeline(tmp_path: Path) -> None:
    source, out = write_pipeline(tmp_path / "model"), tmp_path / "out"
    convert(source, out, method="int8", ignore=["txt_mlp"])
    before, after = inspect(source), inspect(out)
    assert (before.made_by, after.made_by) == (None, __version__)
    assert [item.name for item in after.components] == ["text_encoder", "transformer"]
    plain, quantized = before.components[1], after.components[1]
    assert (plain.method, plain.quantized_layers, plain.kept_layers) == (None, 0, 1 + 2 * 13)
    assert (quantized.method, quantized.quantized_layers, quantized.kept_layers) == ("int8", 2 * 10, 1 + 2 * 3)
    assert quantized.model_class == "QwenImageTransformer2DModel"
    assert quantized.shards == 2
    assert plain.weights == quantized.weights
    assert plain.bits_per_weight == 16
    assert quantized.bytes == read_json(out / "transformer" / "diffusion_pytorch_model.safetensors.index.json")[
        "metadata"
    ]["total_size"]  # fmt: skip
    assert quantized.bits_per_weight == 8 * quantized.bytes / quantized.weights
    assert {total.dtype: total.tensors for total in quantized.dtypes} == {"I8": 20, "F32": 20, "BF16": 7 + 26 + 2}
    assert before.components[0] == after.components[0]


def test_text_and_json(tmp_path: Path) -> None:
    summary = inspect(write_pipeline(tmp_path / "model"))
    assert json.loads(json.dumps(summary.to_dict()))["components"][1]["kept_layers"] == 27
    text = summary.to_text()
    for part in ("no omni-convert manifest", "QwenImageTransformer2DModel", "text_encoder", "BF16", "16.00"):
        assert part in text


def test_single_file(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "x.safetensors", {"a.weight": random(1000, 1500), "b": random(3)})
    (component,) = inspect(path).components
    assert (component.model_class, component.kept_layers, component.weights) == ("unknown", 1, 1_500_003)
    assert "1.5 M" in inspect(path).to_text()


def test_quantized_by_others(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {"quantization_config": {"quant_method": "gptq"}})
    (component,) = inspect(model).components
    assert (component.method, component.quantized_layers) == ("gptq", 0)


@pytest.mark.parametrize("value", [["int8"], {"quant_method": ["int8"]}, "int8"])
def test_config_of_another_kind(tmp_path: Path, value: object) -> None:
    model = write_model(tmp_path / "model", {"quantization_config": value})
    assert inspect(model).components[0].quantized_layers == 0


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(OmniConvertError, match="nothing"):
        inspect(tmp_path / "absent")
    model = write_model(tmp_path / "model")
    write_json(model / ".omni_convert.partial", {})
    with pytest.raises(OmniConvertError, match="unfinished"):
        inspect(model)
