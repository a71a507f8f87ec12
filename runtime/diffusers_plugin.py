"""Teaches Diffusers to load quantized checkpoints; registers itself when ``diffusers.quantizers.auto`` is imported.

Diffusers has no registration call; other quantizers enter its two mappings in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from omni_convert.formats.config import parse_config
from omni_convert.formats.errors import OmniConvertError
from omni_convert.runtime.component import read_tensors
from omni_convert.runtime.replace import MODULES, check_converted, check_loaded, replace_linears

_log = logging.getLogger(__name__)


class QuantMethod(str, Enum):
    """Diffusers reads ``quant_method.value``, so a plain string will not do."""

    INT8 = "int8"


class OmniConvertConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of ``config.json``, in the shape that Diffusers wants."""

    def __init__(self, **data: Any) -> None:
        self.quantization = parse_config(data)
        self.quant_method = QuantMethod(self.quantization.format.name)

    def to_dict(self) -> dict[str, Any]:
        return self.quantization.to_dict()

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
        return suffix != "weight" and suffix in self.quantization_config.quantization.format.suffixes and (
            isinstance(model.get_submodule(layer), MODULES[self.quantization_config.quantization.format.name])
        )  # fmt: skip

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


def register(library: Any) -> None:
    """Add our formats to the mappings of ``diffusers.quantizers.auto``, except those another package has taken."""
    for method in QuantMethod:
        taken = library.AUTO_QUANTIZER_MAPPING.get(method.value, OmniConvertQuantizer)
        if taken is not OmniConvertQuantizer:
            _log.warning("quant_method %r of Diffusers stays with %s, which registered it first", method.value, taken)
            continue
        library.AUTO_QUANTIZER_MAPPING[method.value] = OmniConvertQuantizer
        library.AUTO_QUANTIZATION_CONFIG_MAPPING[method.value] = OmniConvertConfig


register(auto)
