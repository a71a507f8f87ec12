"""What a loaded model must hold of its checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import as_bytes
from safetensors.torch import load_file
from torch import nn

import omni_convert
from omni_convert import OmniConvertError
from omni_convert.formats import FORMATS
from omni_convert.formats.base import Format
from omni_convert.runtime.linear import QuantizedLinear

LAYERS = {"qwen": "transformer_blocks.0.attn.to_q", "bert": "encoder.layer.0.output.dense"}
"""A quantized layer of each of the models in ``runtime/conftest.py``."""
SCALES = {"weight_scale_inv", *(suffix for fmt in FORMATS.values() for suffix in fmt.suffixes[1:])}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def quantized_names(folder: Path) -> set[str]:
    parts = (name.rpartition(".") for name in stored(folder))
    return {layer for layer, _, suffix in parts if suffix in SCALES}


def assert_holds(model: nn.Module, folder: Path, prefix: str = "") -> None:
    """Codes and scales are those on disk, to the bit and in dtype; every quantized layer is a quantized module."""
    layers = quantized_names(folder)
    for name, value in stored(folder).items():
        layer, _, suffix = name.rpartition(".")
        if layer in layers and layer.startswith(prefix):
            module = model.get_submodule(layer.removeprefix(prefix))
            assert isinstance(module, QuantizedLinear)
            assert (module.weight.dtype, module.weight.requires_grad) == (torch.int8, False)
            if suffix == "bias":
                assert torch.equal(module.bias, value.to(module.bias.dtype)), name
                continue
            found = module.tensors()[suffix]
            assert found.dtype == value.dtype, name
            assert torch.equal(as_bytes(found), as_bytes(value)), name


def layers_of(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def dequantized(model: Any) -> Any:
    """A copy whose quantized layers are plain ones with the same weights."""
    model = copy.deepcopy(model)
    for name, layer in layers_of(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=model.dtype)
        weight = {"weight": layer.format.dequantize(layer.tensors())}
        plain.load_state_dict(weight | ({} if layer.bias is None else {"bias": layer.bias}))
        model.set_submodule(name, plain)
    return model


def assert_saves_same(model: Any, source: Path, target: Path, **options: Any) -> None:
    """``save_pretrained`` writes every tensor of ``source``, with its bytes and dtype, and the same config entry."""
    model.save_pretrained(target, **options)
    before, after = stored(source), stored(target)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (after[name].dtype, after[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(as_bytes(after[name]), as_bytes(value)), name
    configs = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (source, target)]
    assert configs[0] == configs[1]


def expected_output(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """Of a layer whose activations are not quantized."""
    weight = layer.format.dequantize(layer.tensors()).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))


def assert_layers_run(model: nn.Module, formats: set[Format]) -> None:
    """Each gives what its dequantized weight does; ``formats``: all that occur."""
    layers = layers_of(model)
    assert {layer.format for layer in layers.values()} == formats
    for name, layer in layers.items():
        x = torch.randn(3, layer.in_features).bfloat16()
        found, expected = layer(x), expected_output(layer, x)
        if layer.format.name == "int8":
            assert (found - expected).norm() / expected.norm() < 0.02, name
        else:
            assert torch.equal(found, expected), name


@torch.inference_mode()
def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The first output."""
    output: torch.Tensor = model(**inputs)[0]
    return output


def loaders(name: str) -> list[Callable[[Path], Any]]:
    """Ours, and the ``from_pretrained`` of the library of a model in ``LAYERS``."""
    from diffusers import QwenImageTransformer2DModel
    from transformers import BertModel

    return [omni_convert.load, (QwenImageTransformer2DModel if name == "qwen" else BertModel).from_pretrained]


def refused(name: str, folder: Path, message: str) -> None:
    """By all ``loaders``."""
    for load in loaders(name):
        with pytest.raises(OmniConvertError, match=message):
            load(folder)
