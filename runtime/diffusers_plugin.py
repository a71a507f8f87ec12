"""Teaches Diffusers to load quantized checkpoints; registers itself when ``diffusers.quantizers.auto`` is imported.

Diffusers has no registration call; other quantizers enter its two mappings in the same way.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from omni_convert.formats.config import MIXED, parse_config
from omni_convert.formats.errors import OmniConvertError
from omni_convert.runtime.component import read_tensors
from omni_convert.runtime.linear import QuantizedLinear
from omni_convert.runtime.names import register_names
from omni_convert.runtime.online import QUANTIZING
from omni_convert.runtime.operator import HELD, as_codes
from omni_convert.runtime.parallel import LOADING, Split, diffusers_splits, local_tensors, split_linears
from omni_convert.runtime.replace import check_converted, check_loaded, check_names, check_shapes, fill, replace_linears


class QuantMethod(str, Enum):
    """Diffusers reads ``quant_method.value``, so a plain string will not do. Chooses the quantizer; see ``names``."""

    OMNI_CONVERT = MIXED


class OmniConvertConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of ``config.json``, in the shape that Diffusers wants.

    Of plain weights that ``load`` quantizes, what they become, whatever the file asks for.
    """

    def __init__(self, **data: Any) -> None:
        online = QUANTIZING.get()
        data = online.config.to_dict() if online else data
        self.quantization = parse_config(data)
        self.quant_method = QuantMethod.OMNI_CONVERT
        self._data = data

    def to_dict(self) -> dict[str, Any]:
        """As it was read: engines spell names in ways that we do not."""
        return copy.deepcopy(self._data)

    def to_diff_dict(self) -> dict[str, Any]:
        """The base class calls it in ``repr`` and does not define it."""
        return self.to_dict()


class OmniConvertQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Replaces linears before the weights are streamed in, and keeps scales out of the cast to ``torch_dtype``."""

    use_keep_in_fp32_modules = True  # as for the unquantized model
    is_serializable = True
    is_trainable = True  # adapters on top: gradients flow through the activations
    is_compileable = True

    def __init__(self, quantization_config: OmniConvertConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: list[Path] = []
        self._names: set[str] = set()
        self._online = QUANTIZING.get()
        self.pre_quantized: bool = self._online is None and kwargs.get("pre_quantized", True)
        self._replaced: dict[str, str] = {}
        self._rank, self._splits = LOADING.get(), dict[str, Split]()
        self.is_serializable = self._rank is None  # a part is no model

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        check_converted(self.pre_quantized, self._online)
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise OmniConvertError(
                "device_map places layers on disk, expected CPU or GPU: Diffusers casts scales to torch_dtype when "
                "it offloads to disk. Use more memory, or pipe.enable_model_cpu_offload() after loading."
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._files, self._names = [Path(file) for file in checkpoint_files], set(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config, tensors = self.quantization_config.quantization, read_tensors(self._files)
        self._replaced = replace_linears(model, tensors, config, online=self._online)
        check_shapes(model, {name: spec.shape for name, spec in tensors.items()})
        if self._rank:
            self._splits = diffusers_splits(model, self._rank)
            split_linears(model, self._splits, self._rank)
            self.pre_quantized = True  # or Diffusers would not ask ``check_quantized_param_shape``
        return model

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Those that nothing fills, which is an error: scales are made while loading, and of a module in two places
        one name is enough. Diffusers would only warn, also of what is unexpected."""
        state = model.state_dict(keep_vars=True)
        found = {id(state[name]) for name in self._names & state.keys()}
        missing = [name for name in missing_keys if id(state[name]) not in found]
        unexpected: set[str] = set()
        if self._online:
            missing = [name for name in missing if not self._is_scale(model, name)]
        else:
            fine = model._keys_to_ignore_on_load_unexpected or ()
            unexpected = {name for name in self._names - state.keys() if not any(re.search(p, name) for p in fine)}
        check_names(type(model).__name__, missing, unexpected)
        return missing

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        check_loaded(model, self._replaced)
        self._online = None
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether the tensor is loaded by ``create_quantized_param``: all of a quantized layer are but its bias; of
        plain weights, those that are quantized; and what is split among processes."""
        layer, _, suffix = param_name.rpartition(".")
        if layer in self._splits:
            return True
        if self._online:
            return suffix == "weight" and layer in self._replaced
        module = model.get_submodule(layer)
        return isinstance(module, QuantizedLinear) and suffix in module.format.suffixes

    def check_quantized_param_shape(self, param_name: str, current_param: torch.Tensor, loaded: torch.Tensor) -> None:
        """Called where shapes differ, which only those do that a rank loads its part of."""

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # param_value has been cast to torch_dtype already; the tensor as stored is still in state_dict.
        # (Diffusers' keep_in_fp32_modules would work too, but it is the model class's own list.)
        layer, _, suffix = param_name.rpartition(".")
        module, tensors = model.get_submodule(layer), {suffix: state_dict[param_name]}
        if self._online and suffix == "weight" and layer in self._replaced:
            tensors = self._online.tensors(self._replaced[layer])
        if self._rank and layer in self._splits:
            tensors = local_tensors(getattr(module, "format", None), tensors, self._splits[layer], self._rank)
        if suffix == "bias" or not isinstance(module, QuantizedLinear):
            tensors = {suffix: tensors[suffix].to(param_value.dtype)}
        assert isinstance(module, nn.Linear)
        fill(module, {name: tensor.to(target_device) for name, tensor in tensors.items()})

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What ``save_pretrained`` writes: codes in the dtype that they have on disk."""
        config = self.quantization_config.quantization
        stored = {
            name: as_codes(tensor, config.format_on_disk(name.removesuffix(".weight")))
            for name, tensor in state_dict.items()
            if name.endswith(".weight") and tensor.dtype == HELD
        }
        return {**state_dict, **stored}, {}

    def _is_scale(self, model: nn.Module, name: str) -> bool:
        layer, _, suffix = name.rpartition(".")
        module = model.get_submodule(layer)
        return isinstance(module, QuantizedLinear) and suffix in module.format.suffixes[1:]


def announce(model: Any, config: Mapping[str, Any]) -> None:
    """Tell a model that it was quantized in memory, so that it saves ``config`` too and refuses casts."""
    model.hf_quantizer = OmniConvertQuantizer(OmniConvertConfig(**config))
    model.is_quantized, model.quantization_method = True, QuantMethod.OMNI_CONVERT
    model.register_to_config(quantization_config=model.hf_quantizer.quantization_config)


register_names(auto, OmniConvertQuantizer, OmniConvertConfig)
