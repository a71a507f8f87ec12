"""Quantizing while loading, or in memory, gives the tensors that a conversion writes, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import matrices, weights
from kinds import CHOICES
from loaded import assert_holds, layers_of, quantized_names, stored
from models import write_qwen_image, write_wan
from quantized import as_bytes
from safetensors.torch import load_file, save_file
from torch import nn

import omni_convert
from omni_convert import OmniConvertError, UsageError
from omni_convert.formats.base import Facts
from omni_convert.runtime.linear import QuantizedLinear
from omni_convert.runtime.online import quantize_weight

OPTIONS = {
    **{kind: {**choices, "target": "omni-convert"} for kind, choices in CHOICES.items()},
    "int8 for vLLM-Omni": {"method": "int8"},
    "fp8 for vLLM-Omni": {"method": "fp8"},
    "int8 balanced": {"method": "int8", "quality": "balanced"},
    "mixed": {
        "method": "int8",
        "target": "omni-convert",
        "layers": ["re:attn|attention=fp8"],
        "ignore": ["re:txt_mlp|intermediate"],
    },
}


def options(name: str, source: Path) -> dict[str, Any]:
    chosen: dict[str, Any] = dict(OPTIONS[name])
    if chosen.get("activation_scheme") == "static":
        chosen["input_scales"] = dict.fromkeys(matrices(weights(source)), 0.5)
    return chosen


def config_of(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for entry in config.get("formats", ()):  # their layers are in the order of files, or of modules
        entry.get("layers", []).sort()
    return config


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_loads_what_a_conversion_writes(
    name: str, library: str, qwen_plain: Path, bert_plain: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = qwen_plain if library == "diffusers" else bert_plain
    chosen = options(name, source)
    omni_convert.convert(source, tmp_path / "out", **chosen)
    offline = omni_convert.load(tmp_path / "out")
    online = omni_convert.load(source, **chosen)
    assert_holds(online, tmp_path / "out")
    assert layers_of(online).keys() == quantized_names(tmp_path / "out") == layers_of(offline).keys()
    for key, value in offline.state_dict().items():
        assert torch.equal(as_bytes(online.state_dict()[key]), as_bytes(value)), key
    inputs = request.getfixturevalue("qwen_inputs" if library == "diffusers" else "bert_inputs")
    with torch.inference_mode():
        assert torch.equal(online(**inputs)[0], offline(**inputs)[0])
    online.save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved") == config_of(tmp_path / "out")
    assert_holds(omni_convert.load(tmp_path / "saved"), tmp_path / "out")


@pytest.mark.parametrize("name", OPTIONS)
def test_model_in_memory(name: str, qwen_plain: Path, tmp_path: Path, qwen_inputs: dict[str, Any]) -> None:
    from diffusers import QwenImageTransformer2DModel

    chosen = options(name, qwen_plain)
    omni_convert.convert(qwen_plain, tmp_path / "out", **chosen)
    model = QwenImageTransformer2DModel.from_pretrained(qwen_plain, torch_dtype=torch.bfloat16)
    assert omni_convert.quantize_(model, **chosen) is model
    assert layers_of(model).keys() == quantized_names(tmp_path / "out")
    assert_holds(model, tmp_path / "out")
    with torch.inference_mode():
        offline = omni_convert.load(tmp_path / "out")
        assert torch.equal(model(**qwen_inputs)[0], offline(**qwen_inputs)[0])
    model.save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved") == config_of(tmp_path / "out")
    assert_holds(omni_convert.load(tmp_path / "saved"), tmp_path / "out")


@pytest.mark.parametrize("write", [write_qwen_image, write_wan])
def test_pipeline(write: Callable[[Path], Path], tmp_path: Path) -> None:
    write(tmp_path / "model")
    omni_convert.convert(tmp_path / "model", tmp_path / "out", method="int8")
    pipe = omni_convert.load(tmp_path / "model", quantization={"method": "int8"})
    assert_holds(pipe.transformer, tmp_path / "out" / "transformer")
    assert not layers_of(pipe.text_encoder)
    assert pipe.transformer.dtype == torch.bfloat16


def test_weights_that_libraries_cast(bert_plain: Path, tmp_path: Path) -> None:
    """A float32 checkpoint is quantized from float32, in whatever dtype the rest is loaded."""
    from transformers import BertModel

    source = tmp_path / "fp32"
    BertModel.from_pretrained(bert_plain, dtype=torch.float32).save_pretrained(source)
    for path in source.glob("*.safetensors"):
        tensors = {name: value + torch.randn_like(value) / 64 for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    omni_convert.convert(source, tmp_path / "out", method="int8")
    online = omni_convert.load(source, method="int8", dtype=torch.bfloat16)
    assert online.dtype == torch.bfloat16
    for name in quantized_names(tmp_path / "out"):
        for suffix in ("weight", "weight_scale"):
            assert torch.equal(online.state_dict()[f"{name}.{suffix}"], stored(tmp_path / "out")[f"{name}.{suffix}"])


@pytest.mark.parametrize("kind", [kind for kind in CHOICES if kind != "fp8 static"])
def test_rows_in_threads_are_rows_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = omni_convert.formats.make_format(**CHOICES[kind])  # type: ignore[attr-defined]
    weight = torch.randn(77, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, original = fmt.quantize(weight, Facts(amax=float(weight.abs().max()))), weight[70, 7].clone()
    monkeypatch.setattr("omni_convert.runtime.threads.SMALL", 0)
    for count in (1, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        for given in (weight, weight.t().contiguous().t()):
            found = quantize_weight(given, fmt, Facts())
            assert found.keys() == expected.keys()
            assert all(torch.equal(as_bytes(found[suffix]), as_bytes(expected[suffix])) for suffix in expected)
        weight[70, 7] = torch.nan
        with pytest.raises(OmniConvertError, match="at row 70, column 7"):
            quantize_weight(weight, fmt, Facts())
        weight[70, 7] = original


@pytest.mark.parametrize("kind", ["int8", "fp8 tensor", "fp8 block", "mxfp8"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_damaged_weight_is_named_and_nothing_replaced(kind: str, value: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    with torch.no_grad():
        model[1].weight[5, 7] = float(value)
    before = [(type(layer), layer.weight) for layer in model]
    with pytest.raises(OmniConvertError, match=r"^1: the weight holds NaN or Inf at row 5, column 7"):
        omni_convert.quantize_(model, target="omni-convert", **CHOICES[kind])
    assert [(type(layer), layer.weight) for layer in model] == before


def test_weights_that_are_not_there_are_refused() -> None:
    with pytest.raises(OmniConvertError, match="the weight of 1 is on device meta, expected it in memory"):
        omni_convert.quantize_(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64, device="meta")), "int8")


def test_only_plain_linears_are_quantized() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": Own(64, 64), "c": nn.Embedding(64, 64), "d": nn.LayerNorm(64)})
    bias = model["a"].bias
    omni_convert.quantize_(model.eval(), "int8")
    assert {name for name, part in model.items() if isinstance(part, QuantizedLinear)} == {"a"}
    assert model["a"].bias is bias
    assert not model["a"].training
    with pytest.raises(OmniConvertError, match="a is quantized already"):
        omni_convert.quantize_(model, "int8")
    with pytest.raises(OmniConvertError, match="holds no nn"):
        omni_convert.quantize_(nn.Sequential(nn.ReLU()), "int8")


def test_wrong_choices_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    for spec in ("int9", {"method": "int8", "ignored_layers": ["nothing"]}, {"method": "int8", "wrong": 1}):
        with pytest.raises(UsageError):
            omni_convert.quantize_(model, spec)
    with pytest.raises(UsageError, match="expected one of"):
        omni_convert.quantize_(model)
    assert type(model[0]) is nn.Linear


def test_quantized_checkpoint_is_not_quantized_again(qwen: Path) -> None:
    with pytest.raises(OmniConvertError, match="already quantized"):
        omni_convert.load(qwen, quantization="int8")


class Blocks(nn.Module):
    """Names as Wan's."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"ffn": nn.Linear(512, 64)}) for _ in range(count))
        self.tail = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(512, 64)])})


@pytest.mark.parametrize(("given", "first"), [(None, 5), (0, 0), (2, 2), (6, 6)])
def test_leading_blocks_stay_as_vllm_omni_leaves_them(given: int | None, first: int) -> None:
    spec: dict[str, Any] = {"method": "mxfp4_dualscale"}
    model = Blocks(8)
    omni_convert.quantize_(model, spec if given is None else spec | {"num_bf16_fallback_layers": given})
    expected = {f"blocks.{number}.ffn" for number in range(first, 8)} | {"tail.blocks.0"}
    assert layers_of(model).keys() == expected


def test_leading_blocks_of_other_methods_are_refused() -> None:
    with pytest.raises(UsageError, match="only mxfp4_dualscale"):
        omni_convert.quantize_(Blocks(1), {"method": "int8", "num_bf16_fallback_layers": 2})
    with pytest.raises(UsageError, match="num_bf16_fallback_layers is -1"):
        omni_convert.quantize_(Blocks(1), {"method": "mxfp4_dualscale", "num_bf16_fallback_layers": -1})
