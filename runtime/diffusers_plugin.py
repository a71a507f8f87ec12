"""Teaches Diffusers to load quantized checkpoints; registers itself when ``diffusers.quantizers.auto`` is imported.

Diffusers has no registration call; other quantizers enter its two mappings in the same way.
"""

from __future__ import annotations

import copy
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
from omni_convert.runtime.replace import check_converted, check_loaded, replace_linears


class QuantMethod(str, Enum):
    """Diffusers reads ``quant_method.value``, so a plain string will not do. Chooses the quantizer; see ``names``."""

    OMNI_CONVERT = MIXED


class OmniConvertConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of ``config.json``, in the shape that Diffusers wants."""

    def __init__(self, **data: Any) -> None:
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
        self._replaced: list[str] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        check_converted(self.pre_quantized)
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise OmniConvertError(
                "device_map places layers on disk, expected CPU or GPU: Diffusers casts scales to torch_dtype when "
                "it offloads to disk. Use more memory, or pipe.enable_model_cpu_offload() after loading."
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._files = [Path(file) for file in checkpoint_files]
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._replaced = replace_linears(model, read_tensors(self._files), self.quantization_config.quantization)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        check_loaded(model, self._replaced)
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether the tensor is loaded by ``create_quantized_param``: scales are, codes pass through untouched."""
        layer, _, suffix = param_name.rpartition(".")
        module = model.get_submodule(layer)
        return isinstance(module, QuantizedLinear) and suffix in module.format.suffixes[1:]

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
        setattr(model.get_submodule(layer), suffix, state_dict[param_name].to(target_device))


register_names(auto, OmniConvertQuantizer, OmniConvertConfig)
