"""Puts quantized modules in the place of ``nn.Linear`` in a model that has no weights yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from omni_convert.formats.base import Format
from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.errors import OmniConvertError, printable
from omni_convert.formats.header import TensorSpec
from omni_convert.runtime.component import quantized_layers
from omni_convert.runtime.kernels import check_format, device_of
from omni_convert.runtime.linear import QuantizedLinear, take_over
from omni_convert.runtime.online import Online


def check_converted(pre_quantized: bool, online: Online | None) -> None:
    """Whether a library's ``from_pretrained`` found our config in the checkpoint, or got it from ``load``.

    Raises:
        OmniConvertError: the config was passed for plain weights.
    """
    if not pre_quantized and online is None:
        raise OmniConvertError(
            "from_pretrained was given an omni-convert quantization_config for plain weights, expected a "
            "converted checkpoint. Convert it first; its config then carries the entry and none is passed. To quantize "
            "while loading: omni_convert.load(folder, quantization=...)."
        )


def replace_linears(
    model: nn.Module,
    tensors: Mapping[str, TensorSpec],
    config: QuantizationConfig,
    modules: Mapping[str, str | None] | None = None,
    online: Online | None = None,
) -> dict[str, str]:
    """Replace the linears of ``model`` that are quantized on disk; their tensors are loaded by whoever calls.

    ``tensors``: all tensors of the checkpoint. ``modules``: checkpoint layer -> module name where they differ; None
    for a layer that this model does not have by design. ``online``: what is quantized, of plain weights. Returns the
    names of the replaced modules, and what the checkpoint calls them.

    Raises:
        OmniConvertError: the checkpoint contradicts its config (see ``quantized_layers``) or the model: a module
            that is missing, not an ``nn.Linear``, of another shape, or whose bias is missing on disk.
    """
    where = type(model).__name__
    replaced, places = {}, _places(model)
    for layer in online.layers if online else quantized_layers(tensors, config, where):
        name = layer if modules is None else modules[layer]
        if name is None:
            continue
        linear = _find_linear(model, name, layer, tensors[f"{layer}.weight"].shape)
        if linear.bias is not None and f"{layer}.bias" not in tensors:
            raise OmniConvertError(
                f"{where}: tensor {layer}.bias is not in the checkpoint, but module {name} has a bias. "
                "Convert the checkpoint again."
            )
        quantized = _like(linear, online.layers[layer].format if online else config.format_on_disk(layer))
        quantized.stored_name = layer
        quantized.await_stored()
        _put(model, places[linear], quantized)
        replaced[name] = layer
    return replaced


def quantize_linears(model: nn.Module, online: Online) -> None:
    """Replace linears of a model in memory by quantized ones, one by one; ``online``: by module names.

    Raises:
        OmniConvertError: a device without kernels, or NaN or Inf in a weight. The model is then as it was.
    """
    for layer, plan in online.layers.items():
        check_format(plan.format, device_of(online.weight(layer).device))
        online.check(layer)
    places = _places(model)
    for layer in online.layers:
        linear = model.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        quantized = _like(linear, online.layers[layer].format, device=torch.device("meta"))
        fill(quantized, online.tensors(layer))
        if linear.bias is not None:
            quantized.bias = linear.bias
        _put(model, places[linear], quantized)


def fill(module: nn.Linear, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a module its tensors, by suffix, without a copy."""
    for suffix, tensor in tensors.items():
        if suffix in ("weight", "bias"):
            trained = suffix == "bias" or not isinstance(module, QuantizedLinear)
            setattr(module, suffix, nn.Parameter(tensor, requires_grad=trained))
        else:
            setattr(module, suffix, tensor)


def _like(linear: nn.Linear, fmt: Format, device: torch.device | None = None) -> QuantizedLinear:
    quantized = QuantizedLinear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        device=device or linear.weight.device,
        dtype=linear.weight.dtype,
        fmt=fmt,
    )
    take_over(linear, quantized)
    return quantized


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every linear of ``model`` -> its names: a module may be in several places."""
    places: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            places[module].append(name)
    return places


def _put(model: nn.Module, names: Iterable[str], quantized: QuantizedLinear) -> None:
    for name in names:
        model.set_submodule(name, quantized)


def refuse_module(model: nn.Module, name: str) -> str | None:
    """Why a module cannot be replaced by a quantized one, after its name; None if it can.

    What reads ``weight`` itself would take codes for a float weight: subclasses may, and parts of PyTorch do.
    """
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, expected nn.Linear"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "is in an nn.TransformerEncoderLayer, expected elsewhere: that one reads the weight itself"
    held = {*module._parameters, *module._buffers, *module._modules}
    if held != {"weight", "bias"}:
        return f"holds {', '.join(sorted(held))}, expected weight and bias only"
    if "forward" in vars(module):
        return "has a forward of its own, as Accelerate's hooks give it, expected none: quantize before adding hooks"
    return None


def check_names(where: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """``missing``, ``unexpected``: what a library would only warn about.

    Raises:
        OmniConvertError: a tensor that the model needs is not in the checkpoint, or one that it does not know is.
    """
    for names, found, expected in (
        (sorted(missing), "is not in the checkpoint", "it there: the library would fill it with random numbers"),
        (sorted(unexpected), "is in the checkpoint", "none of that name: the model does not know it"),
    ):
        if names:
            more = f" (like {len(names) - 1} others)" if len(names) > 1 else ""
            raise OmniConvertError(
                f"{where}: tensor {printable(names[0])}{more} {found}, expected {expected}. Convert the checkpoint "
                "again, or load it with the class that its config names."
            )


def check_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """``shapes``: of the checkpoint's tensors; those that the model does not have are left to ``check_names``.

    Raises:
        OmniConvertError: one differs from the model's.
    """
    state = model.state_dict()
    for name, found in shapes.items():
        if name in state and tuple(found) != tuple(state[name].shape):
            raise OmniConvertError(
                f"{type(model).__name__}: tensor {name} has shape {tuple(found)}, expected {tuple(state[name].shape)}. "
                "The config and the weights are of different models."
            )


def check_loaded(model: nn.Module, names: Iterable[str]) -> None:
    """What the library loaded into the quantized modules is still quantized.

    Raises:
        OmniConvertError: a weight or a scale was cast, or replaced by a tied weight.
    """
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, QuantizedLinear)
        tensors = module.tensors()
        for suffix, (expected, _) in module.stored_tensors().items():
            found = tensors[suffix].dtype
            if found != expected:
                raise OmniConvertError(
                    f"{type(model).__name__}: {name}.{suffix} is {found} after loading, expected {expected}: it was "
                    "cast, or tied to an unquantized weight. Convert again and leave this layer unquantized."
                )


def _find_linear(model: nn.Module, name: str, layer: str, shape: tuple[int, ...]) -> nn.Linear:
    where = type(model).__name__
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise OmniConvertError(
            f"{where}: the checkpoint has a quantized layer {layer}, but the model has no module {name}. "
            "Load it with the class that its config names, in a version of the library that knows this model."
        ) from error
    refusal = refuse_module(model, name)
    if refusal is not None:
        raise OmniConvertError(
            f"{where}: the checkpoint has a quantized layer {layer}, but module {name} {refusal}. Convert again and "
            "leave this layer unquantized."
        )
    assert isinstance(module, nn.Linear)
    if (module.out_features, module.in_features) != shape:
        raise OmniConvertError(
            f"{where}: tensor {layer}.weight has shape {shape}, but module {name} expects "
            f"{(module.out_features, module.in_features)}. The config and the weights are of different models."
        )
    return module
