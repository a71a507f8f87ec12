"""What a loaded model must hold of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from quantized import as_bytes
from safetensors.torch import load_file
from torch import nn

from omni_convert.formats import FORMATS
from omni_convert.formats.base import Format
from omni_convert.runtime.linear import QuantizedLinear

SCALES = {"weight_scale_inv", *(suffix for fmt in FORMATS.values() for suffix in fmt.suffixes[1:])}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def quantized_names(folder: Path) -> set[str]:
    parts = (name.rpartition(".") for name in stored(folder))
    return {layer for layer, _, suffix in parts if suffix in SCALES}


def assert_holds(model: nn.Module, folder: Path, prefix: str = "") -> None:
    """Codes and scales are those on disk, to the bit and in dtype; every quantized layer is a quantized module."""
    state, layers = model.state_dict(), quantized_names(folder)
    for name, value in stored(folder).items():
        layer = name.rpartition(".")[0]
        if layer in layers and layer.startswith(prefix):
            found = state[name.removeprefix(prefix)]
            if not name.endswith(".bias"):
                assert found.dtype == value.dtype, name
            assert torch.equal(as_bytes(found), as_bytes(value.to(found.dtype))), name
            module = model.get_submodule(layer.removeprefix(prefix))
            assert isinstance(module, QuantizedLinear)
            assert not module.weight.requires_grad


def layers_of(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def expected_output(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """Of a layer whose activations are not quantized."""
    weight = layer.format.dequantize(layer.state_dict()).to(x.dtype)
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
