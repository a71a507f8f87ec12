"""What ``describe`` says of a model is what runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.runtime import cpu
from omni_convert.runtime.linear import QuantizedLinear


def test_every_layer_is_told(qwen: Path) -> None:
    model = omni_convert.load(qwen)
    found = omni_convert.describe(model)
    modules = {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    assert [layer.name for layer in found.layers] == list(modules)
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert sum(layer.stored_bytes for layer in found.layers) + found.other_bytes == total
    for layer in found.layers:
        module = modules[layer.name]
        assert (layer.format, layer.shape, layer.device) == ("int8", (module.out_features, module.in_features), "cpu")
        assert f"kernel={layer.kernel}" in repr(module)
    text = str(found)
    assert text.count("transformer_blocks.*.attn.to_q ") == 1
    assert f"{len(modules)} quantized layers" in text
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["kernel"] == found.layers[0].kernel


def test_packed_weights_count() -> None:
    if cpu.refuse_onednn((64, 64)) is not None:
        pytest.skip("no packed weights on this CPU")
    model = omni_convert.quantize_(nn.Sequential(nn.Linear(64, 64)), "int8")
    assert omni_convert.describe(model).layers[0].prepared_bytes == 0
    model(torch.ones(1, 64))
    assert omni_convert.describe(model).layers[0].prepared_bytes == 64 * 64


def test_reasons_are_told() -> None:
    model = nn.Sequential(nn.Linear(70_000, 2), nn.Linear(64, 64))
    omni_convert.quantize_(model, "int8", target="omni-convert")
    found = omni_convert.describe(model)
    assert found.layers[0].rejected.keys() >= {"onednn"}
    assert "not onednn for 1 layers: K is 70000" in str(found) or "not onednn for 2 layers" in str(found)
    fp8 = omni_convert.describe(omni_convert.quantize_(nn.Sequential(nn.Linear(64, 64)), "fp8"))
    assert "decode: weight-only" in str(fp8)


def test_other_things() -> None:
    plain = omni_convert.describe(nn.Sequential(nn.Linear(64, 64)))
    assert (plain.layers, plain.other_bytes, str(plain)) == ((), 4 * 65 * 64, "no quantized layers")
    model = omni_convert.quantize_(nn.Sequential(nn.Linear(64, 64)), "int8").to("meta")
    assert omni_convert.describe(model).layers[0].kernel is None
    with pytest.raises(OmniConvertError, match="found a dict, expected a model or a Diffusers pipeline"):
        omni_convert.describe({})
