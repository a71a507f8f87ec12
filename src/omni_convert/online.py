"""Online quantization: the converter decides, the runtime quantizes while it loads."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_convert.converter.checkpoint import Checkpoint, Component, open_checkpoint
from omni_convert.converter.plan import ComponentPlan, Plan, make_plan
from omni_convert.converter.recipe import DEFAULT_PART, Choices, Recipe, make_recipe
from omni_convert.formats.config import LayerRule, without_asking
from omni_convert.formats.errors import OmniConvertError, UsageError
from omni_convert.formats.header import Header, StoredTensor, TensorSpec
from omni_convert.formats.layout import Shards
from omni_convert.formats.quant_config import Spec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from typing_extensions import Unpack

    from omni_convert.runtime.online import Online
    from omni_convert.runtime.parallel import Rank

_log = logging.getLogger(__name__)

FALLBACK_BLOCKS = 5
"""Leading blocks that vLLM-Omni's online ``mxfp4_dualscale`` leaves in BF16 unless it is told otherwise."""
_FALLBACK_KEY = "num_bf16_fallback_layers"


def load_online(
    path: str | os.PathLike[str],
    quantization: Spec,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    rank: Rank | None = None,
    **choices: Unpack[Choices],
) -> Any:
    """See ``omni_convert.load``."""
    return prepare_online(path, quantization, device=device, dtype=dtype, rank=rank, **choices)()


def prepare_online(
    path: str | os.PathLike[str],
    quantization: Spec,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    rank: Rank | None = None,
    **choices: Unpack[Choices],
) -> Callable[[], Any]:
    """Plan what ``load_online`` does, from headers alone; what is returned loads the model."""
    from omni_convert.runtime.load import check_folder, load
    from omni_convert.runtime.online import stored_weights

    check_folder(Path(path))
    recipe, blocks = _recipe(quantization, choices)
    checkpoint = open_checkpoint(Path(path), recipe.components)
    plain = tuple(replace(part, config=without_asking(part.config)) for part in checkpoint.components)
    made = _plan(replace(checkpoint, components=plain), recipe, blocks)

    def load_planned() -> Any:
        parts = {}
        for part in made.components:
            files = {name: header.path for name, _, header in part.component.tensors()}
            parts[part.component.name] = _online(part, stored_weights(files))
        return load(path, device=device, dtype=dtype, online=parts, rank=rank)

    return load_planned


def quantize_(model: nn.Module, quantization: Spec, **choices: Unpack[Choices]) -> nn.Module:
    """See ``omni_convert.quantize_``."""
    from torch import nn

    from omni_convert.runtime.replace import quantize_linears
    from omni_convert.runtime.saving import guard_saving

    whole = _whole(model)
    made = _plan(_as_checkpoint(whole), *_recipe(quantization, choices))

    def weight(layer: str) -> torch.Tensor:
        linear = whole.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        return linear.weight

    online = _online(made.components[0], weight)
    guard_saving()
    quantize_linears(whole, online)
    if library := _library(whole):
        import_module(f"omni_convert.runtime.{library}_plugin").announce(whole, online.config.to_dict())
    return model


def _whole(model: Any) -> nn.Module:
    """The model in which linears are replaced: of a compiled one what was compiled, and compiles again."""
    from torch import nn

    whole = getattr(model, "_orig_mod", model)
    name = type(whole).__name__
    if not isinstance(whole, nn.Module):
        raise OmniConvertError(
            f"found a {name}, expected a model (nn.Module). Of a pipeline pass the part that is to be quantized, such "
            "as pipe.transformer, or load it with omni_convert.load(folder, quantization=...)."
        )
    if isinstance(whole, nn.Linear):
        raise OmniConvertError(
            f"found the layer itself ({name}), expected a model that holds it, for it is replaced there. Wrap it: "
            "nn.Sequential(layer)."
        )
    return whole


def _library(model: nn.Module) -> str | None:
    """Whose model it is: then it has a config, which is saved with it."""
    config = getattr(model, "config", None)
    if hasattr(config, "model_type"):
        return "transformers"
    return "diffusers" if hasattr(model, "register_to_config") else None


def _recipe(quantization: Spec, choices: Choices) -> tuple[Recipe, dict[str, int]]:
    """What is asked for, and of its parts, how many leading blocks stay unquantized."""
    by_component = isinstance(quantization, Mapping) and not {"method", "quant_method"} & quantization.keys()
    specs: dict[str, Any] = dict(quantization) if by_component else {DEFAULT_PART: quantization}  # type: ignore[arg-type]
    given = {}
    for name, spec in specs.items():
        if isinstance(spec, Mapping) and _FALLBACK_KEY in spec:
            given[name] = spec[_FALLBACK_KEY]
            specs[name] = {key: value for key, value in spec.items() if key != _FALLBACK_KEY}
    recipe = make_recipe(quantization=specs if by_component else specs[DEFAULT_PART], **choices)
    counts = {}
    for name, part in recipe.parts.items():
        count = given.get(name, given.get(DEFAULT_PART))
        if part.format.name == "mxfp4_dualscale":
            counts[name] = FALLBACK_BLOCKS if count is None else count
        elif count is not None:
            raise UsageError(f"{_FALLBACK_KEY} is {count!r}, expected no such key: only mxfp4_dualscale knows it.")
    for count in counts.values():
        if type(count) is not int or count < 0:
            raise UsageError(f"{_FALLBACK_KEY} is {count!r}, expected a number of blocks, 0 or more.")
    return recipe, counts


def _plan(checkpoint: Checkpoint, recipe: Recipe, counts: Mapping[str, int]) -> Plan:
    """``recipe``, but by part the first ``counts`` blocks stay unquantized, whatever the target keeps of them."""
    parts = dict(recipe.parts)
    for part in checkpoint.components:
        name = part.name if part.name in parts else DEFAULT_PART
        count, config = counts.get(name, 0), parts[name]
        numbers = "|".join(map(str, range(count)))
        rules = {rf"^blocks\.({numbers})\.": None, r"^blocks\.": config.format} if name in counts else {}
        found = [
            LayerRule(f"re:{pattern}", fmt)
            for pattern, fmt in rules.items()
            if any(re.match(pattern, tensor) for tensor, _, _ in part.tensors())
        ]
        ignored = [LayerRule(pattern, None) for pattern in config.ignored_layers]
        if found:
            parts[name] = replace(config, layers=(*config.layers, *ignored, *found), ignored_layers=())
    return make_plan(checkpoint, replace(recipe, parts=parts))


def _online(part: ComponentPlan, weight: Callable[[str], torch.Tensor]) -> Online:
    from omni_convert.runtime.online import LayerPlan, Online

    together: dict[str, list[str]] = defaultdict(list)
    for tensor in part.tensors():
        if tensor.amax_of:
            together[tensor.amax_of].append(tensor.layer)
    layers = {
        tensor.layer: LayerPlan(
            format=tensor.decision.format,
            amax_with=tuple(together[tensor.amax_of]) if tensor.amax_of else (),
            input_scale=tensor.input_scale,
        )
        for tensor in part.tensors()
        if tensor.decision.format
    }
    return Online(config=part.quantization, layers=layers, weight=weight)


def _as_checkpoint(model: nn.Module) -> Checkpoint:
    """What a model in memory holds, as if it lay in a folder; of its tensors those of plain linears."""
    from torch import nn

    from omni_convert.runtime.linear import QuantizedLinear
    from omni_convert.runtime.replace import refuse_module

    name = type(model).__name__
    tensors, kept = {}, defaultdict(list)
    for layer, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            raise OmniConvertError(
                f"{name}: {layer} is quantized already, expected a model of plain weights. Load the original anew."
            )
        if not isinstance(module, nn.Linear):
            continue
        if (reason := refuse_module(model, layer)) is not None:
            kept[reason].append(layer)
            continue
        if module.weight.is_meta:
            raise OmniConvertError(
                f"{name}: the weight of {layer} is on device meta, expected it in memory. Load the weights first, "
                "without offloading them."
            )
        own = module.named_parameters(recurse=False)
        tensors.update({f"{layer}.{key}": TensorSpec(*_spec(tensor)) for key, tensor in own})
    for reason, layers in kept.items():
        more = f" (like {len(layers) - 1} others)" if len(layers) > 1 else ""
        _log.warning("%s: %s%s stays unquantized: it %s", name, layers[0], more, reason)
    if not tensors:
        raise OmniConvertError(f"{name}: holds no nn.Linear, expected some to quantize.")
    shards = Shards(headers=(_header(name, tensors),), index_name=None, index_metadata={})
    component = Component(name="", folder=Path(name), config=_config(model), shards=shards)
    return Checkpoint(root=Path(name), kind="model", components=(component,), others={}, left_out={})


def _spec(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    import torch

    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    return names.get(tensor.dtype, "F64"), tuple(tensor.shape)


def _header(name: str, tensors: Mapping[str, TensorSpec]) -> Header:
    stored, end = {}, 0
    for key, spec in tensors.items():
        stored[key] = StoredTensor(spec=spec, start=end)
        end += spec.nbytes
    return Header(path=Path(name), tensors=stored, metadata={}, file_size=end, mtime_ns=0, sha256="")


def _config(model: Any) -> dict[str, Any]:
    """As its library writes it; of any other model, the name of its class."""
    library = _library(model)
    if library == "transformers":
        return {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return {**(model.config if library else {}), "_class_name": type(model).__name__}
